//! The KVM calls on dirty pages that kvm-ioctls lacks.
//!
//! Unsafety in this file: ioctls whose arguments are structures of the layout that the kernel's header gives them, with
//! addresses of live memory in them.

use std::ffi::c_void;

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use super::span::SlotPart;

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// Clears the chosen pages' bits in the log of `slot`, and has the next write to each of them noted again.
///
/// # Errors
/// When KVM refuses: no log is kept for the slot, or the range is none of its.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, part: &SlotPart) -> Result<(), errno::Error> {
    let pages = u32::try_from(part.pages).map_err(|_| errno::Error::new(libc::EINVAL))?;
    debug_assert!(part.words.len() as u64 * 64 >= part.pages);
    let range = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: part.first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: part.words.as_ptr().cast_mut().cast::<c_void>(),
        },
    };
    // SAFETY: the kernel reads a bit for each of `num_pages` pages, in whole words, from the address, where as many words
    // live until after the call; it writes nothing to this process.
    if unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &range) } == 0 { Ok(()) } else { Err(errno::Error::last()) }
}

/// Protects the pages of all harvested entries of a VM's dirty rings again, and gives the entries back to KVM. Answers how many.
///
/// # Errors
/// When the VM has no rings; EINTR when a signal came, some entries being reset by then.
pub fn reset_dirty_rings(vm: &VmFd) -> Result<u64, errno::Error> {
    // SAFETY: the call takes no argument, and touches no memory of this process but the rings, which are atomics to it.
    let count = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    u64::try_from(count).map_err(|_| errno::Error::last())
}
