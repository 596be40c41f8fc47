//! The KVM calls that kvm-ioctls lacks: the attributes of a vCPU.
//!
//! Unsafety in this file: three ioctls, whose argument is a structure of the layout that the kernel's header gives it, with
//! the address of a live `u64` in it.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

/// Whether this host's KVM tells and sets what is added to the host's TSC to give the guest's.
#[must_use]
pub fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    // SAFETY: the call only looks at which attribute is meant.
    unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attribute(0)) == 0 }
}

/// What is added to the host's TSC to give the guest's.
///
/// # Errors
/// When KVM does not tell.
pub fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, errno::Error> {
    let mut offset: u64 = 0;
    // SAFETY: the attribute is a u64 (Documentation/virt/kvm/devices/vcpu.rst), and the address is that of `offset`, which
    // lives until after the call.
    answer(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute(&raw mut offset as u64)) })?;
    Ok(offset)
}

/// Sets what [`tsc_offset`] gives.
///
/// # Errors
/// When KVM refuses.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), errno::Error> {
    // SAFETY: as above; the kernel only reads it.
    answer(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute(&raw const offset as u64)) })
}

fn answer(result: i32) -> Result<(), errno::Error> {
    if result == 0 { Ok(()) } else { Err(errno::Error::last()) }
}

fn attribute(address: u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: u64::from(KVM_VCPU_TSC_OFFSET), addr: address }
}
