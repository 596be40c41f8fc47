//! A vCPU's thread.
//!
//! It is parked, or it holds its file descriptor's lock and goes round KVM_RUN. It leaves the guest only on KVM_RUN
//! answering EINTR with the exit byte set. By then KVM has completed whatever instruction the exit before left half
//! done (the value of an `in`, the rest of a string instruction), because it does that before it looks at the byte:
//! saved registers never point at an instruction that has had half of its effect.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};
use switchover_pager::cpu;
use switchover_wire::clock::Nanos;

use crate::arch::Ports;
use crate::control::Control;
use crate::dirty::ring::RingLog;
use crate::kick::{ExitByte, prepare_thread};
use crate::lock;
use crate::memory::GuestMemory;
use crate::run_state::ExitReason;

/// What MMIO reads where there is neither RAM nor a device: a floating bus.
const NOTHING_THERE: u8 = 0xff;

/// A vCPU. Its thread holds the lock while it is not parked.
#[derive(Debug)]
pub struct Vcpu {
    /// Counted from 0.
    pub index: usize,
    /// KVM's file descriptor.
    pub fd: Mutex<VcpuFd>,
    /// Gets the thread out of KVM_RUN.
    pub exit_byte: Arc<ExitByte>,
}

/// What all vCPU threads of a machine use.
pub struct Shared {
    /// Who runs.
    pub control: Control,
    /// The devices behind I/O ports.
    pub ports: Ports,
    /// Keeps guest RAM mapped for as long as a thread can touch it.
    pub memory: GuestMemory,
    /// What the vCPUs write, where that is kept in rings.
    pub ring: Option<Arc<RingLog>>,
}

/// What became of an exit.
enum Outcome {
    GoOn,
    /// The machine is over.
    End(ExitReason),
    /// The guest cannot go on.
    Broken(String),
}

/// Starts the thread of `vcpu`, parked.
///
/// # Errors
/// When the host gives no thread.
pub fn spawn(vcpu: Arc<Vcpu>, shared: Arc<Shared>) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(format!("vcpu{}", vcpu.index)).spawn(move || {
        match prepare_thread() {
            Ok(()) => live(&vcpu, &shared),
            Err(error) => shared.control.change(|flags| {
                flags.break_down(&format!("cannot prepare the thread of vCPU {} for signals: {error}", vcpu.index));
            }),
        }
        // Drop what the thread holds before it says that it is gone: whoever waits for that may count descriptors.
        let index = vcpu.index;
        drop(vcpu);
        shared.control.gone(index);
    })
}

fn live(vcpu: &Vcpu, shared: &Shared) {
    // What moves bytes beside it must not keep a guest waiting.
    cpu::be_prompt();
    warm_up(vcpu);
    let mut last_exit = None;
    while shared.control.park(vcpu.index, last_exit) {
        if let Some(files) = &shared.ports.host_files {
            files.hold(&|| vcpu.exit_byte.is_set());
        }
        let mut fd = lock(&vcpu.fd);
        shared.control.entering();
        last_exit = Some(run(vcpu, &mut fd, shared));
    }
}

/// Goes into KVM_RUN and comes straight out, without entering the guest: what KVM makes when a machine first runs, a thread of
/// its own among others, it makes now. It would take 0.6 ms of the blackout.
fn warm_up(vcpu: &Vcpu) {
    let mut fd = lock(&vcpu.fd);
    // Parking clears it before the guest is entered.
    vcpu.exit_byte.set(true);
    if let Ok(exit) = fd.run() {
        tracing::warn!(vcpu = vcpu.index, ?exit, "KVM did not heed that a vCPU was to leave at once");
    }
}

/// Runs the guest until asked out. Answers when it left the guest.
fn run(vcpu: &Vcpu, fd: &mut VcpuFd, shared: &Shared) -> Nanos {
    loop {
        let outcome = match fd.run() {
            Ok(exit) => handle(exit, vcpu, shared),
            // EAGAIN: a vCPU that waited for another to start it has been started.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                let left = Nanos::now();
                if vcpu.exit_byte.is_set() {
                    return left;
                }
                Outcome::GoOn
            }
            Err(error) => {
                let left = Nanos::now();
                if vcpu.exit_byte.is_set() {
                    // Already on the way out; whatever is wrong will show again when it runs on.
                    return left;
                }
                Outcome::Broken(format!("KVM cannot run it: {error}"))
            }
        };
        match outcome {
            Outcome::GoOn => {}
            // Both ask this vCPU out as well: its next KVM_RUN completes the instruction and returns.
            Outcome::End(reason) => shared.control.change(|flags| flags.end(reason)),
            Outcome::Broken(what) => {
                let reason = format!("vCPU {} {what}{}", vcpu.index, whereabouts(fd));
                tracing::error!("{reason}");
                shared.control.change(|flags| flags.break_down(&reason));
            }
        }
    }
}

fn handle(exit: VcpuExit<'_>, vcpu: &Vcpu, shared: &Shared) -> Outcome {
    match exit {
        VcpuExit::IoOut(port, data) => match shared.ports.write(port, data, &|| vcpu.exit_byte.is_set()) {
            None => Outcome::GoOn,
            Some(reason) => Outcome::End(reason),
        },
        VcpuExit::IoIn(port, data) => {
            shared.ports.read(port, data);
            Outcome::GoOn
        }
        VcpuExit::MmioRead(_, data) => {
            data.fill(NOTHING_THERE);
            Outcome::GoOn
        }
        VcpuExit::MmioWrite(..) | VcpuExit::IrqWindowOpen | VcpuExit::Intr | VcpuExit::IoapicEoi(_) => Outcome::GoOn,
        // A triple fault is how a guest without firmware resets.
        VcpuExit::Shutdown | VcpuExit::SystemEvent(..) => Outcome::End(ExitReason::Shutdown),
        VcpuExit::FailEntry(reason, cpu) => {
            Outcome::Broken(format!("could not enter the guest on host CPU {cpu} (hardware reason {reason:#x})"))
        }
        VcpuExit::InternalError => Outcome::Broken("hit an internal error of KVM".to_owned()),
        VcpuExit::MemoryFault { gpa, size, .. } => {
            Outcome::Broken(format!("has no memory behind {size} bytes at {gpa:#x}"))
        }
        VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
            match shared.ring.as_ref().map(|ring| ring.make_room(vcpu.index)) {
                Some(Err(error)) => Outcome::Broken(format!("cannot go on with its dirty ring full: {error}")),
                Some(Ok(())) | None => Outcome::GoOn,
            }
        }
        exit => Outcome::Broken(format!("left the guest for a reason unheard of: {exit:?}")),
    }
}

/// Where a vCPU that cannot go on stands, and why, as far as KVM can tell.
fn whereabouts(fd: &mut VcpuFd) -> String {
    let at = fd.get_regs().map(|regs| format!(", at RIP {:#x}", regs.rip)).unwrap_or_default();
    let run = fd.get_kvm_run();
    if run.exit_reason != kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
        return at;
    }
    // SAFETY: the exit reason says that this is the union's valid member, and all its bits are valid numbers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let what = match internal.suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => " (an instruction that KVM cannot emulate)".to_owned(),
        other => format!(" (suberror {other})"),
    };
    format!("{at}{what}; `dmesg` on the host may say more")
}
