//! Getting a vCPU out of the guest without a race.
//!
//! KVM looks at the `immediate_exit` byte of the vCPU's shared page when KVM_RUN begins, and at pending signals from
//! then on. Whoever wants the vCPU out sets the byte first and sends one signal after it: either KVM_RUN has not looked
//! at the byte yet and returns at once, or it runs and the signal interrupts it. Nothing has to be repeated.
//!
//! Unsafety in this file: one atomic byte inside a mapping that [`ExitByte`] owns, and a signal sent to a thread that the
//! caller knows to be alive.

use std::io;
use std::mem::offset_of;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, pthread_t, siginfo_t};
use memmap2::{MmapOptions, MmapRaw};
use switchover_wire::types::PAGE_SIZE;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

const EXIT_BYTE: usize = offset_of!(kvm_run, immediate_exit);

/// A vCPU's `immediate_exit` byte, through a mapping of its own: the vCPU's thread may be in KVM_RUN, where kvm-ioctls
/// holds the only reference to the other mapping.
#[derive(Debug)]
pub struct ExitByte {
    page: MmapRaw,
}

impl ExitByte {
    /// That of `vcpu`.
    ///
    /// # Errors
    /// When its shared page cannot be mapped.
    pub fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        let page = MmapOptions::new().len(PAGE_SIZE).map_raw(vcpu)?;
        Ok(Self { page })
    }

    /// That of no vCPU.
    #[cfg(test)]
    pub fn of_none() -> Self {
        Self { page: MmapOptions::new().len(PAGE_SIZE).map_anon().unwrap().into() }
    }

    /// Whether KVM_RUN is to return at once.
    pub fn set(&self, leave: bool) {
        self.byte().store(u8::from(leave), Ordering::SeqCst);
    }

    /// Whether KVM_RUN returns at once.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.byte().load(Ordering::SeqCst) != 0
    }

    fn byte(&self) -> &AtomicU8 {
        const { assert!(EXIT_BYTE < PAGE_SIZE) };
        // SAFETY: the byte lies inside the page that `self` keeps mapped, any address is aligned for a byte, and through
        // this mapping it is only ever used as this atomic. The kernel reads it, and does not write it.
        unsafe { AtomicU8::from_ptr(self.page.as_mut_ptr().add(EXIT_BYTE)) }
    }
}

extern "C" fn ignore(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Prepares the calling thread, a vCPU's, for [`kick`]: the signal interrupts system calls there and does nothing else.
///
/// # Errors
/// When the kernel refuses.
pub fn prepare_thread() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    // No SA_RESTART: KVM_RUN must return.
    let installed = INSTALLED.get_or_init(|| register_signal_handler(SIGRTMIN(), ignore).map_err(errno::Error::errno));
    installed.map_err(io::Error::from_raw_os_error)?;
    // Threads inherit the mask of whoever starts them.
    unblock_signal(SIGRTMIN()).map_err(|error| io::Error::other(error.to_string()))
}

/// The calling thread, for [`kick`].
#[must_use]
pub fn this_thread() -> pthread_t {
    // SAFETY: pthread_self has no preconditions.
    unsafe { libc::pthread_self() }
}

/// Interrupts `thread`.
///
/// # Safety
/// The thread has called [`prepare_thread`] and has not ended.
pub unsafe fn kick(thread: pthread_t) {
    // SAFETY: the caller promises a live thread. The only other error is a bad signal number, which SIGRTMIN is not.
    unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
}
