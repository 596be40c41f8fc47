//! A machine's architecture-dependent whole: what is set up before the first vCPU runs, and what a saved state holds.

use std::sync::{Arc, Mutex};

use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use switchover_wire::clock::HostClock;
use switchover_wire::description::MachineDescription;
use switchover_wire::types::{PAGE_SIZE_U64, PageIndex};

use super::boot::{self, BootError};
use super::chipset;
use super::clock::SavedClock;
use super::saved::{self, Parts, SavedMachine};
use super::vcpu_state::{self, CpuStateError, VcpuPlan};
use super::{cpuid, ioctls, msrs, ports::Ports, start, walk};
use crate::devices::host_files;
use crate::error::VmError;
use crate::lock;
use crate::memory::GuestMemory;
use crate::state::{STATE_VERSION, StateError};

/// The devices whose state travels.
const DEVICES: [&str; 6] = ["serial", "pic", "ioapic", "pit", "lapic", "clock"];
/// What cannot be done without.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)"),
    (Cap::Pit2, "an in-kernel timer (KVM_CAP_PIT2)"),
    (Cap::ExtCpuid, "a settable CPUID (KVM_CAP_EXT_CPUID)"),
    (Cap::ImmediateExit, "a way out of the guest without a race (KVM_CAP_IMMEDIATE_EXIT)"),
    (Cap::AdjustClock, "a settable clock (KVM_CAP_ADJUST_CLOCK)"),
    (Cap::UserMemory, "memory slots (KVM_CAP_USER_MEMORY)"),
];

/// Prepared when the machine is built, so that saving and loading need not ask for any of it.
pub struct Platform {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    plans: Vec<VcpuPlan>,
    host: HostClock,
    description: MachineDescription,
}

impl Platform {
    /// Gives a new VM its memory, its chipset and its vCPUs.
    ///
    /// # Errors
    /// When KVM lacks something or refuses.
    pub fn build(
        kvm: &Kvm,
        vm: Arc<VmFd>,
        memory: GuestMemory,
        vcpus: u8,
        has_host_files: bool,
    ) -> Result<(Self, Vec<VcpuFd>), VmError> {
        if let Some((_, what)) = NEEDED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
            return Err(VmError::Lacking { what });
        }
        memory.register(&vm)?;
        chipset::create(&vm)?;
        let supported = cpuid::supported(kvm)?;
        let xsave_size = vcpu_state::xsave_size(&vm);
        let (mut fds, mut plans) = (Vec::new(), Vec::new());
        for index in 0..vcpus {
            let fd = vm.create_vcpu(u64::from(index)).map_err(VmError::kvm(format!("create vCPU {index}")))?;
            let table = cpuid::for_vcpu(&supported, index, vcpus);
            let refused = |what| CpuStateError { vcpu: usize::from(index), what };
            let in_kvm = cpuid::to_kvm(&table).map_err(refused)?;
            fd.set_cpuid2(&in_kvm).map_err(VmError::kvm(format!("set the CPUID of vCPU {index}")))?;
            let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
            let has_tsc_offset = ioctls::has_tsc_offset(&fd);
            fds.push(fd);
            plans.push(VcpuPlan { cpuid: table, msrs: Vec::new(), xsave_size, has_tsc_offset, tsc_khz });
        }
        let msrs = fds.first().map(|fd| msrs::of_host(kvm, fd)).transpose()?.unwrap_or_default();
        for plan in &mut plans {
            plan.msrs.clone_from(&msrs);
        }
        let devices = DEVICES.into_iter().chain(has_host_files.then_some(host_files::NAME));
        let description = describe(&memory, &plans, msrs, devices.map(str::to_owned).collect());
        let host = HostClock::here();
        Ok((Self { vm, memory, plans, host, description }, fds))
    }

    /// Loads a kernel and puts the first vCPU at its entry point.
    ///
    /// # Errors
    /// When it cannot be booted.
    pub fn boot(&self, first: &VcpuFd, kernel: &[u8], append: &str, initrd: Option<&[u8]>) -> Result<(), BootError> {
        let entry = boot::load(&self.memory, kernel, append, initrd)?;
        start::at(first, entry).map_err(|error| BootError::Load(format!("KVM refuses the start registers: {error}")))
    }

    /// What the other side of a migration must match.
    #[must_use]
    pub fn description(&self) -> &MachineDescription {
        &self.description
    }

    /// Writes down everything but memory. All vCPUs are parked.
    ///
    /// # Errors
    /// When KVM does not give a part of it.
    pub fn save(&self, vcpus: &[&Mutex<VcpuFd>], ports: &Ports) -> Result<Vec<u8>, VmError> {
        // Before the TSCs are read: what passes between the two is then counted twice rather than lost, and is some µs.
        let tsc_khz = self.plans.first().map_or(0, |plan| plan.tsc_khz);
        let clock = SavedClock::now(&self.vm, &self.host, tsc_khz).map_err(VmError::kvm("read the clock"))?;
        let mut saved = Vec::with_capacity(vcpus.len());
        for (index, (fd, plan)) in vcpus.iter().zip(&self.plans).enumerate() {
            let vcpu = vcpu_state::save(&lock(fd), plan).map_err(|what| CpuStateError { vcpu: index, what })?;
            saved.push(vcpu);
        }
        let chipset = chipset::save(&self.vm)?;
        let unknown = |reason| StateError::Write { section: saved::HOST_FILES, reason };
        let host_files = ports.host_files.as_ref().map(|files| files.save().map_err(unknown)).transpose()?;
        Ok(SavedMachine { vcpus: saved, chipset, clock, serial: ports.serial.save(), host_files }.write()?)
    }

    /// Makes the machine what [`Self::save`] wrote down. No vCPU has ever run.
    ///
    /// All of it is read before any of it is set: damage is found while nothing has happened yet.
    ///
    /// # Errors
    /// When the bytes are not such a state, or KVM refuses it.
    pub fn load(&self, state: &[u8], vcpus: &[&Mutex<VcpuFd>], ports: &Ports) -> Result<(), VmError> {
        let parts = Parts { vcpus: self.plans.len(), host_files: ports.host_files.is_some() };
        let SavedMachine { vcpus: saved, chipset, clock, serial, host_files } = SavedMachine::read(state, parts)?;
        let unusable = |reason| StateError::Contents { section: saved::HOST_FILES, reason };
        let reopened = match (&ports.host_files, &host_files) {
            (Some(device), Some(saved)) => Some((device, device.reopen(saved).map_err(unusable)?)),
            _ => None,
        };

        // The clock first: what the TSCs are set to depends on when it was.
        let advance = clock.restore(&self.vm, &self.host).map_err(VmError::kvm("set the clock"))?;
        for (index, ((fd, saved), plan)) in vcpus.iter().zip(&saved).zip(&self.plans).enumerate() {
            vcpu_state::load(&lock(fd), saved, plan, advance).map_err(|what| CpuStateError { vcpu: index, what })?;
        }
        chipset::load(&self.vm, &chipset)?;
        ports.serial.load(&serial).map_err(|reason| StateError::Contents { section: saved::SERIAL, reason })?;
        if let Some((device, files)) = reopened {
            device.load(files);
        }
        Ok(())
    }

    /// The pages that the parked vCPUs will want first.
    #[must_use]
    pub fn first_pages(&self, vcpus: &[&Mutex<VcpuFd>]) -> Vec<PageIndex> {
        let registers: Vec<_> = vcpus
            .iter()
            .filter_map(|fd| {
                let fd = lock(fd);
                Some((fd.get_regs().ok()?, fd.get_sregs().ok()?))
            })
            .collect();
        walk::first_pages(&self.memory, registers.iter().map(|(regs, sregs)| (regs, sregs)))
    }
}

fn describe(memory: &GuestMemory, plans: &[VcpuPlan], msrs: Vec<u32>, devices: Vec<String>) -> MachineDescription {
    let table = plans.first().map_or(&[][..], |plan| &plan.cpuid);
    MachineDescription {
        architecture: std::env::consts::ARCH.to_owned(),
        page_size: u32::try_from(PAGE_SIZE_U64).unwrap_or(0),
        ram: memory.regions().to_vec(),
        vcpus: u32::try_from(plans.len()).unwrap_or(u32::MAX),
        cpuid: cpuid::features(table),
        xcr0: cpuid::xcr0(table),
        msrs,
        tsc_khz: plans.first().map_or(0, |plan| plan.tsc_khz),
        devices,
        state_version: STATE_VERSION,
    }
}
