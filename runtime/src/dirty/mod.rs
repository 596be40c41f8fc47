//! Which pages were written: by the guest, by KVM for it, and by this process.
//!
//! KVM tells of the guest's writes and its own; what this process writes through [`GuestMemory`]
//! is in the [`book`] that hangs on the mapping. A page is noted when either says so.
//!
//! ```text
//!   guest, KVM ─┬▶ bitmap of each slot ([`log`]) ───────────┐
//!               └▶ ring of each vCPU ([`ring`]) ──▶ ┐       ├──▶ peek
//!   devices ──────────────────────────────────────▶ book ───┘
//! ```
//!
//! A machine has the one or the other from its beginning ([`Tracking`]).

use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use switchover_precopy::dirty::DirtyLog;

use crate::config::DirtyTracking;
use crate::error::VmError;
use crate::memory::GuestMemory;
use log::BitmapLog;
use ring::{RingBytes, RingLog};

pub mod book;
mod ioctls;
pub mod log;
pub mod ring;
pub(crate) mod span;
mod vcpu_ring;

/// How KVM was told to keep a machine's log, before the vCPUs exist.
pub enum Tracking {
    /// In bitmaps.
    Log(BitmapLog),
    /// In rings.
    Ring(RingBytes),
}

impl Tracking {
    /// Sets a new VM up for what its configuration asks for.
    ///
    /// # Errors
    /// When KVM has it not.
    pub fn set_up(wanted: DirtyTracking, kvm: &Kvm, vm: &Arc<VmFd>, memory: &GuestMemory) -> Result<Self, VmError> {
        const NO_LOG: VmError = VmError::Lacking {
            what: "a dirty log that is cleared by a call of its own (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)",
        };
        const NO_RING: VmError =
            VmError::Lacking { what: "dirty rings that tell everything (KVM_CAP_DIRTY_LOG_RING_ACQ_REL)" };
        let log = || BitmapLog::new(kvm, Arc::clone(vm), memory.clone()).map(Self::Log);
        let ring = || Ok::<_, VmError>(RingBytes::give(kvm, vm)?.map(Self::Ring));
        match wanted {
            DirtyTracking::Log => log().ok_or(NO_LOG),
            DirtyTracking::Ring => ring()?.ok_or(NO_RING),
            DirtyTracking::Auto => match log() {
                Some(log) => Ok(log),
                None => ring()?.ok_or(NO_LOG),
            },
        }
    }

    /// The log, now that the vCPUs exist.
    ///
    /// # Errors
    /// When the host gives no memory for it.
    pub fn begin(self, vm: &Arc<VmFd>, memory: &GuestMemory, vcpus: &[VcpuFd]) -> Result<Tracked, VmError> {
        Ok(match self {
            Self::Log(log) => Tracked { log: Arc::new(log), ring: None },
            Self::Ring(bytes) => {
                let ring = Arc::new(RingLog::new(Arc::clone(vm), memory.clone(), bytes, vcpus)?);
                Tracked { log: Arc::clone(&ring) as Arc<dyn DirtyLog>, ring: Some(ring) }
            }
        })
    }
}

/// A machine's log.
pub struct Tracked {
    /// As migrations see it.
    pub log: Arc<dyn DirtyLog>,
    /// The same once more, where it is kept in rings.
    pub ring: Option<Arc<RingLog>>,
}
