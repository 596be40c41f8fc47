//! What can go wrong with a virtual machine.

use std::io;
use std::path::PathBuf;

use switchover_pager::ram::RamError;
use switchover_wire::types::PageCount;
use thiserror::Error;

use crate::arch::{BootError, CpuStateError};
use crate::run_state::Refusal;
use crate::state::StateError;

/// A virtual machine could not be built, or could not do what was asked of it.
#[derive(Debug, Error)]
pub enum VmError {
    /// `/dev/kvm` did not open.
    #[error(
        "cannot open /dev/kvm: {source}; load the kvm module, and give this user access to the device \
         (as a member of group kvm)"
    )]
    OpenKvm {
        /// The kernel's answer.
        source: io::Error,
    },
    /// KVM lacks something that cannot be done without.
    #[error("this host's KVM lacks {what}; a newer kernel is needed")]
    Lacking {
        /// The capability's name.
        what: &'static str,
    },
    /// KVM refused a call.
    #[error("cannot {attempted}: KVM says {source}")]
    Kvm {
        /// What was tried, as an infinitive.
        attempted: String,
        /// The kernel's answer.
        source: kvm_ioctls::Error,
    },
    /// The host refused a call that has nothing to do with KVM.
    #[error("cannot {attempted}: {source}")]
    Host {
        /// What was tried, as an infinitive.
        attempted: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A number of vCPUs that the host cannot give.
    #[error("cannot run {asked} vCPUs: this host's KVM allows 1 to {most}")]
    VcpuCount {
        /// What was asked for.
        asked: u8,
        /// What KVM can do.
        most: usize,
    },
    /// Not enough memory to boot anything in, or too much for the address space.
    #[error("cannot give a guest {asked}: between {least} and {most} fit the memory layout")]
    MemorySize {
        /// What was asked for.
        asked: PageCount,
        /// The least that will do.
        least: PageCount,
        /// The most that will do.
        most: PageCount,
    },
    /// A machine was to boot without being told what.
    #[error("nothing to boot: name a 64-bit ELF with a PVH note as the kernel")]
    NoKernel,
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The directory of the guest's host files could not be opened.
    #[error("cannot give the guest the files of {}: {source}; --host-files names a directory", path.display())]
    HostFiles {
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file of the serial port could not be made.
    #[error("cannot write the serial port's output to {}: {source}", path.display())]
    SerialFile {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel cannot be booted.
    #[error("cannot boot {}: {source}", path.display())]
    Boot {
        /// The kernel's file.
        path: PathBuf,
        /// Why not.
        source: BootError,
    },
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The machine may not do that now.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A saved state that cannot be read.
    #[error("cannot read the saved state: {0}")]
    State(#[from] StateError),
    /// A saved state that the host will not take, or a state that cannot be read out.
    #[error(transparent)]
    CpuState(#[from] CpuStateError),
    /// A vCPU did not come out of the guest.
    #[error("vCPU {vcpu} did not leave the guest within {waited_ms} ms; the guest runs on")]
    PauseTimeout {
        /// Which one; the first where there are several.
        vcpu: usize,
        /// How long it was waited for.
        waited_ms: u128,
    },
    /// A vCPU's thread has ended, which it does only when the machine is torn down.
    #[error("the thread of vCPU {vcpu} is gone")]
    VcpuGone {
        /// Which one.
        vcpu: usize,
    },
}

impl VmError {
    /// For `map_err` on a KVM call.
    pub(crate) fn kvm(attempted: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        let attempted = attempted.into();
        move |source| Self::Kvm { attempted, source }
    }
}
