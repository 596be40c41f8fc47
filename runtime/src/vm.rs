//! The virtual machine: built, started, stopped, moved, torn down.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::Receiver;
use kvm_ioctls::{Kvm, VcpuFd};
use nix::errno::Errno;
use switchover_hybrid::machine::{Machine, MachineError, Paused};
use switchover_pager::ram::Ram;
use switchover_precopy::dirty::DirtyLog;
use switchover_wire::clock::Nanos;
use switchover_wire::description::MachineDescription;
use switchover_wire::types::PageIndex;

use crate::arch::{LEAST_MEMORY, MOST_MEMORY, Platform, Ports, ram_regions};
use crate::config::{HostFilesLog, SerialTarget, VmConfig};
use crate::control::{Control, VmEvent};
use crate::devices::host_files::HostFiles;
use crate::devices::host_files::log::Log;
use crate::devices::input::InputPump;
use crate::devices::output::Output;
use crate::devices::serial::{InputGate, SerialPort};
use crate::dirty::{Tracked, Tracking};
use crate::error::VmError;
use crate::governor::Governor;
use crate::kick::ExitByte;
use crate::lock;
use crate::memory::GuestMemory;
use crate::run_state::{ExitReason, RunFlags, RunState};
use crate::vcpu::{Shared, Vcpu, spawn};

/// How long a pause waits for the vCPUs. Out of the guest takes microseconds; handling an exit at most as long as
/// [`crate::devices::output`] waits for its reader.
const PAUSE_PATIENCE: Duration = Duration::from_secs(2);
/// How long a machine that is dropped waits for its threads. One that waits for a page that will never come is left behind,
/// with the memory that it needs.
const DROP_PATIENCE: Duration = Duration::from_secs(2);

/// A virtual machine on KVM.
///
/// It runs on threads of its own, one a vCPU, until it is dropped. All methods may be called from any thread.
pub struct Vm {
    platform: Platform,
    vcpus: Vec<Arc<Vcpu>>,
    shared: Arc<Shared>,
    dirty: Arc<dyn DirtyLog>,
    governor: Arc<Governor>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    input: Mutex<Option<InputPump>>,
}

/// Opens `/dev/kvm`: for a process that gives up the right to, before it builds its machine.
///
/// # Errors
/// When it is not there, or this user may not.
pub fn open_kvm() -> Result<Kvm, VmError> {
    Kvm::new().map_err(|error| VmError::OpenKvm { source: error.into() })
}

impl Vm {
    /// A machine with a kernel in it, paused; [`Self::cont`] starts it.
    ///
    /// # Errors
    /// When the host cannot give what the configuration asks for, or the kernel cannot be booted.
    pub fn boot(config: &VmConfig) -> Result<Arc<Self>, VmError> {
        Self::boot_on(&open_kvm()?, config)
    }

    /// The same, on a KVM that was [opened](open_kvm) before.
    ///
    /// # Errors
    /// As for [`boot`](Self::boot).
    pub fn boot_on(kvm: &Kvm, config: &VmConfig) -> Result<Arc<Self>, VmError> {
        let path = config.kernel.as_deref().ok_or(VmError::NoKernel)?;
        let kernel = read(path)?;
        let initrd = config.initrd.as_deref().map(read).transpose()?;
        let vm = Self::build(kvm, config, RunFlags::booting(), Ram::new(config.memory)?)?;
        if let Some(first) = vm.vcpus.first() {
            vm.platform
                .boot(&lock(&first.fd), &kernel, &config.append, initrd.as_deref())
                .map_err(|source| VmError::Boot { path: path.to_owned(), source })?;
        }
        Ok(vm)
    }

    /// A machine that waits for a migration to bring its memory and state. Its memory is taken from the host now, unless the
    /// configuration says otherwise. Nothing of it touches that memory before it runs.
    ///
    /// # Errors
    /// When the host cannot give what the configuration asks for.
    pub fn incoming(config: &VmConfig) -> Result<Arc<Self>, VmError> {
        Self::incoming_on(&open_kvm()?, config)
    }

    /// The same, on a KVM that was [opened](open_kvm) before.
    ///
    /// # Errors
    /// As for [`incoming`](Self::incoming).
    pub fn incoming_on(kvm: &Kvm, config: &VmConfig) -> Result<Arc<Self>, VmError> {
        let ram = Ram::new(config.memory)?;
        if !config.lazy_memory {
            ram.populate()?;
        }
        Self::build(kvm, config, RunFlags::incoming(), ram)
    }

    /// The state that a controller sees.
    #[must_use]
    pub fn run_state(&self) -> RunState {
        self.shared.control.run_state()
    }

    /// Pauses the guest on behalf of its user. Returns at once: a vCPU that waits for a page comes out when it is here.
    ///
    /// # Errors
    /// During a handoff, and before the guest has arrived.
    pub fn stop(&self) -> Result<(), VmError> {
        Ok(self.shared.control.change(RunFlags::stop)?)
    }

    /// Starts the guest, or lets it go on.
    ///
    /// # Errors
    /// Without the right to run, during a handoff, and after its end.
    pub fn cont(&self) -> Result<(), VmError> {
        self.shared.control.change(RunFlags::cont)?;
        self.shared.ports.serial.open_input();
        Ok(())
    }

    /// Ends the machine on behalf of its user.
    pub fn quit(&self) {
        self.shared.control.change(|flags| flags.end(ExitReason::Quit));
    }

    /// Ends the machine because it has no future: its incoming migration failed, say.
    pub fn fail(&self, reason: String) {
        self.shared.control.change(|flags| flags.end(ExitReason::Failed(reason)));
    }

    /// Blocks until the machine is over. What the guest had written to its serial port has been written through by then.
    pub fn wait_exit(&self) -> ExitReason {
        self.shared.control.wait_exit()
    }

    /// The events from now on. Each call makes a new subscription.
    pub fn events(&self) -> Receiver<VmEvent> {
        self.shared.control.subscribe()
    }

    /// Guest memory as this machine's devices use it: what is written through it is noted in the dirty log.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.shared.memory
    }

    /// The files that its guest has open, where it may have any.
    #[must_use]
    pub fn host_files(&self) -> Option<&HostFiles> {
        self.shared.ports.host_files.as_ref()
    }

    /// Whether written pages are found by a ring for each vCPU, rather than a bit for each page.
    #[must_use]
    pub fn keeps_rings(&self) -> bool {
        self.shared.ring.is_some()
    }

    /// How many bytes a second each vCPU newly writes, over the last tenth of a second or since the call before. `None` where
    /// that is not known: without dirty rings, or before the dirty log was started.
    #[must_use]
    pub fn dirty_rates(&self) -> Option<Vec<u64>> {
        self.shared.ring.as_ref().filter(|ring| ring.has_started()).map(|ring| ring.rates())
    }

    /// How often each vCPU was taken out of the guest for a while, by [`Machine::throttle`] or [`Machine::limit_dirty_rate`].
    #[must_use]
    pub fn holds(&self) -> Vec<u64> {
        self.shared.control.holds()
    }

    /// Whether the guest was saved and stands still since.
    #[must_use]
    pub fn is_saved(&self) -> bool {
        self.shared.control.change(|flags| flags.is_saved())
    }

    /// Why the guest was stopped for good, if it was. The machine may still answer its controller.
    #[must_use]
    pub fn status_reason(&self) -> Option<String> {
        self.shared.control.reason()
    }

    fn build(kvm: &Kvm, config: &VmConfig, flags: RunFlags, ram: Ram) -> Result<Arc<Self>, VmError> {
        let most = kvm.get_max_vcpus();
        if config.vcpus == 0 || usize::from(config.vcpus) > most {
            return Err(VmError::VcpuCount { asked: config.vcpus, most });
        }
        let regions = ram_regions(config.memory).ok_or(VmError::MemorySize {
            asked: config.memory,
            least: LEAST_MEMORY,
            most: MOST_MEMORY,
        })?;
        let memory = GuestMemory::new(ram, regions)?;
        let fd = Arc::new(kvm.create_vm().map_err(VmError::kvm("create a VM"))?);
        let tracking = Tracking::set_up(config.dirty_tracking, kvm, &fd, &memory)?;
        let (platform, fds) =
            Platform::build(kvm, Arc::clone(&fd), memory.clone(), config.vcpus, config.host_files.is_some())?;
        let Tracked { log: dirty, ring } = tracking.begin(&fd, &memory, &fds)?;

        let output = match &config.serial {
            SerialTarget::Stdio => Output::stdout()?,
            SerialTarget::File(path) => Output::file(path)?,
            SerialTarget::Null => Output::null(),
        };
        let host = |attempted: &str| {
            let attempted = attempted.to_owned();
            move |source| VmError::Host { attempted, source }
        };
        let input = Arc::new(InputGate::new().map_err(host("make an eventfd"))?);
        let host_files = config.host_files.as_ref().map(|files| {
            let log = match &files.log {
                HostFilesLog::Off => Log::default(),
                HostFilesLog::Lines => Log::new(Output::stdout()?, None),
                HostFilesLog::Named(name) => Log::new(Output::stdout()?, Some(name.clone())),
            };
            HostFiles::new(memory.clone(), &files.directory, log)
        });
        let ports = Ports { serial: SerialPort::new(fd, output, input), host_files: host_files.transpose()? };

        let mut vcpus = Vec::new();
        for (index, fd) in fds.into_iter().enumerate() {
            let exit_byte = Arc::new(ExitByte::of(&fd).map_err(host(&format!("map the shared page of vCPU {index}")))?);
            vcpus.push(Arc::new(Vcpu { index, fd: Mutex::new(fd), exit_byte }));
        }
        let control = Control::new(flags, vcpus.iter().map(|vcpu| Arc::clone(&vcpu.exit_byte)).collect());
        let shared = Arc::new(Shared { control, ports, memory, ring });
        let governor = Governor::new(Arc::clone(&shared));
        let vm = Arc::new(Self {
            platform,
            vcpus,
            shared,
            dirty,
            governor,
            threads: Mutex::default(),
            input: Mutex::default(),
        });
        for vcpu in &vm.vcpus {
            let thread = spawn(Arc::clone(vcpu), Arc::clone(&vm.shared))
                .map_err(host(&format!("start the thread of vCPU {}", vcpu.index)))?;
            lock(&vm.threads).push(thread);
        }
        if config.serial == SerialTarget::Stdio {
            // Started now, with the gate closed: starting a thread would cost the blackout more than opening a gate.
            *lock(&vm.input) = InputPump::start(Arc::clone(&vm.shared)).map_err(host("read standard input"))?;
        }
        Ok(vm)
    }

    fn fds(&self) -> Vec<&Mutex<VcpuFd>> {
        self.vcpus.iter().map(|vcpu| &vcpu.fd).collect()
    }
}

impl Machine for Vm {
    fn describe(&self) -> MachineDescription {
        self.platform.description().clone()
    }

    fn ram(&self) -> Ram {
        self.shared.memory.ram().clone()
    }

    fn dirty_log(&self) -> Arc<dyn DirtyLog> {
        Arc::clone(&self.dirty)
    }

    fn throttle(&self, percent: u8) {
        if let Err(error) = self.governor.throttle(percent) {
            tracing::warn!(%error, "the guest cannot be slowed down: no thread could be started for it");
        }
    }

    fn limit_dirty_rate(&self, bytes_per_second: Option<u64>) -> Result<(), MachineError> {
        const ATTEMPTED: &str = "limit what each vCPU writes";
        let failed = |why: &str| Err(MachineError::new(ATTEMPTED, why));
        match (bytes_per_second, &self.shared.ring) {
            (Some(_), None) => {
                failed("this machine cannot tell its vCPUs' writes apart; run it with --dirty-tracking ring")
            }
            (Some(_), Some(ring)) if !ring.has_started() => failed("its dirty log has not been started"),
            _ => self.governor.limit(bytes_per_second).map_err(|error| MachineError::new(ATTEMPTED, error)),
        }
    }

    fn pause(&self) -> Result<Paused, MachineError> {
        let paused =
            self.shared.control.pause(PAUSE_PATIENCE).map_err(|error| MachineError::new("pause the guest", error))?;
        self.governor.let_go();
        Ok(paused)
    }

    fn resume(&self) -> Result<(), MachineError> {
        // Whatever it was paused for: a guest that wished to be saved, and goes on here, was not.
        if let Some(files) = self.host_files() {
            files.refuse_to_save(Errno::EIO);
        }
        self.shared.control.resume().map_err(|error| MachineError::new("resume the guest", error))?;
        self.shared.ports.serial.open_input();
        Ok(())
    }

    fn keep_paused(&self) {
        self.shared.control.change(RunFlags::keep_saved);
    }

    fn surrender_right_to_run(&self) {
        self.shared.control.change(RunFlags::surrender);
        self.governor.let_go();
    }

    fn take_right_to_run(&self) {
        if !self.shared.control.change(RunFlags::take) {
            tracing::error!("the right to run was given to a machine without a state, and not taken");
        }
    }

    fn take_back_right_to_run(&self) {
        if !self.shared.control.change(RunFlags::take_back) {
            tracing::error!("the right to run was given back to a machine that never surrendered it, and not taken");
        }
    }

    fn first_pages(&self) -> Vec<PageIndex> {
        match self.shared.control.change(|flags| flags.check_saving()) {
            Ok(()) => self.platform.first_pages(&self.fds()),
            Err(_) => Vec::new(),
        }
    }

    fn save_state(&self) -> Result<Vec<u8>, MachineError> {
        let failed = |error: VmError| MachineError::new("save the guest's state", error);
        self.shared.control.change(|flags| flags.check_saving()).map_err(|error| failed(error.into()))?;
        self.platform.save(&self.fds(), &self.shared.ports).map_err(failed)
    }

    fn load_state(&self, state: &[u8]) -> Result<(), MachineError> {
        let failed = |error: VmError| MachineError::new("load the guest's state", error);
        self.shared.control.change(|flags| flags.check_loading()).map_err(|error| failed(error.into()))?;
        self.platform.load(state, &self.fds(), &self.shared.ports).map_err(failed)?;
        self.shared.control.change(RunFlags::loaded);
        Ok(())
    }

    fn first_entry(&self) -> Option<Nanos> {
        self.shared.control.first_entry()
    }

    fn stop_for_good(&self, reason: &str) {
        tracing::error!(reason, "the guest is stopped for good");
        self.shared.control.change(|flags| flags.break_down(reason));
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        drop(lock(&self.input).take());
        self.governor.end();
        let all_gone = self.shared.control.tear_down(DROP_PATIENCE);
        if !all_gone {
            tracing::error!(
                "a vCPU waits for a page that does not come: its thread and the guest's memory are left behind"
            );
            return;
        }
        for thread in lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, VmError> {
    fs::read(path).map_err(|source| VmError::ReadFile { path: path.to_owned(), source })
}
