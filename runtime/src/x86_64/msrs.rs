//! The model-specific registers that a saved state carries.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::error::VmError;

/// The time-stamp counter.
pub const IA32_TSC: u32 = 0x10;
/// When the local APIC's timer fires, in guest TSC.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// The registers that KVM lists and that `vcpu` really has, sorted. `vcpu` must not have run yet.
///
/// KVM lists what it could have; what the vCPU's CPUID lacks cannot be read, and a few can be read but not written back.
///
/// # Errors
/// When KVM does not list any.
pub fn of_host(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, VmError> {
    let list = kvm.get_msr_index_list().map_err(VmError::kvm("ask for the MSRs that it keeps"))?;
    let mut indices: Vec<u32> = list.as_slice().iter().copied().filter(|index| can_be_carried(vcpu, *index)).collect();
    indices.sort_unstable();
    indices.dedup();
    Ok(indices)
}

fn can_be_carried(vcpu: &VcpuFd, index: u32) -> bool {
    match read(vcpu, &[index]) {
        // Writing the TSC back would set it back.
        Ok(_) if index == IA32_TSC => true,
        Ok(values) => write(vcpu, &values).is_ok(),
        Err(_) => false,
    }
}

/// The registers' values, in the order asked for.
///
/// # Errors
/// When one cannot be read; it is named.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, String> {
    let entries: Vec<_> = indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    let mut msrs = to_kvm(&entries)?;
    let count = vcpu.get_msrs(&mut msrs).map_err(|error| format!("read the MSRs: {error}"))?;
    match indices.get(count) {
        Some(refused) => Err(format!("read MSR {refused:#x}: KVM refuses it")),
        None => Ok(msrs.as_slice().iter().map(|entry| (entry.index, entry.data)).collect()),
    }
}

/// Sets registers, in this order.
///
/// # Errors
/// When one is refused; it is named with its value. Those before it are set.
pub fn write(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), String> {
    let entries: Vec<_> =
        values.iter().map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() }).collect();
    let count = vcpu.set_msrs(&to_kvm(&entries)?).map_err(|error| format!("set the MSRs: {error}"))?;
    match values.get(count) {
        Some((index, value)) => Err(format!("set MSR {index:#x} to {value:#x}: KVM refuses it")),
        None => Ok(()),
    }
}

fn to_kvm(entries: &[kvm_msr_entry]) -> Result<Msrs, String> {
    Msrs::from_entries(entries).map_err(|error| format!("handle {} MSRs at once: {error:?}", entries.len()))
}
