//! The CPUID table that the guest sees: what KVM supports on this host, with each vCPU's own number and the machine's
//! topology put in.
//!
//! Leaf numbers and fields: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use switchover_wire::description::CpuidLeaf;

use crate::error::VmError;

const HYPERVISOR_BIT: u32 = 1 << 31;
const HYPERTHREADING_BIT: u32 = 1 << 28;

/// What KVM supports here.
///
/// # Errors
/// When KVM does not say.
pub fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, VmError> {
    let table =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(VmError::kvm("ask for the CPUID it supports"))?;
    Ok(table.as_slice().to_vec())
}

/// The table of vCPU `vcpu` among `vcpus`, as so many cores in one package.
#[must_use]
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], vcpu: u8, vcpus: u8) -> Vec<kvm_cpuid_entry2> {
    let mut table = supported.to_vec();
    // KVM fills these fields from whichever host CPU it was asked on: left alone, they would differ from run to run.
    for entry in &mut table {
        match (entry.function, entry.index) {
            (0x1, _) => {
                entry.ebx = entry.ebx & 0x0000_ffff | u32::from(vcpus) << 16 | u32::from(vcpu) << 24;
                entry.ecx |= HYPERVISOR_BIT;
                entry.edx = if vcpus > 1 { entry.edx | HYPERTHREADING_BIT } else { entry.edx & !HYPERTHREADING_BIT };
            }
            // One thread a core.
            (0xb | 0x1f, 0) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, 0x100, u32::from(vcpu)),
            // So many cores.
            (0xb | 0x1f, 1) => {
                let bits = u8::BITS - vcpus.saturating_sub(1).leading_zeros();
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (bits, u32::from(vcpus), 0x201, u32::from(vcpu));
            }
            (0xb | 0x1f, index) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, index, u32::from(vcpu)),
            (0x8000_0008, _) => entry.ecx = entry.ecx & !0xffff | u32::from(vcpus.saturating_sub(1)),
            (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (u32::from(vcpu), u32::from(vcpu), 0),
            _ => {}
        }
    }
    table
}

/// The table in KVM's form.
///
/// # Errors
/// When it has more entries than KVM takes.
pub fn to_kvm(table: &[kvm_cpuid_entry2]) -> Result<CpuId, String> {
    CpuId::from_entries(table).map_err(|error| format!("a CPUID table of {} entries: {error:?}", table.len()))
}

/// Which registers of which leaves say what code may execute or how state is laid out. The rest (cache sizes, topology,
/// names) may differ between hosts: the guest keeps what it was told when it started.
const FEATURES: &[(u32, u32, [u32; 4])] = &[
    // The vendor.
    (0x0, 0, [0, !0, !0, !0]),
    (0x1, 0, [0, 0, !0, !0]),
    (0x7, 0, [0, !0, !0, !0]),
    (0x7, 1, [!0; 4]),
    (0x7, 2, [!0; 4]),
    (0xd, 1, [!0, 0, !0, !0]),
    // KVM's own.
    (0x4000_0001, 0, [!0, 0, 0, !0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0007, 0, [0, 0, 0, !0]),
    // Address sizes and features.
    (0x8000_0008, 0, [!0, !0, 0, 0]),
    (0x8000_000a, 0, [0, 0, 0, !0]),
    (0x8000_0021, 0, [!0, 0, 0, 0]),
];

/// The feature leaves of a table, for the handshake. A leaf that is not there is one of zeros to the guest.
#[must_use]
pub fn features(table: &[kvm_cpuid_entry2]) -> Vec<CpuidLeaf> {
    FEATURES
        .iter()
        .filter_map(|&(function, index, [eax, ebx, ecx, edx])| {
            let entry = find(table, function, index)?;
            let registers = [entry.eax & eax, entry.ebx & ebx, entry.ecx & ecx, entry.edx & edx];
            Some(CpuidLeaf { function, index, registers })
        })
        .collect()
}

/// The extended states that a guest with this table may turn on.
#[must_use]
pub fn xcr0(table: &[kvm_cpuid_entry2]) -> u64 {
    find(table, 0xd, 0).map_or(0, |entry| u64::from(entry.edx) << 32 | u64::from(entry.eax))
}

fn find(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    table.iter().find(|entry| (entry.function, entry.index) == (function, index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: !0, ebx: !0, ecx: !0, edx: !0, ..Default::default() }
    }

    #[test]
    fn every_vcpu_has_its_own_number() {
        let supported = [entry(1, 0), entry(0xb, 0), entry(0xb, 1), entry(0x8000_001e, 0)];
        for vcpu in 0..3 {
            let table = for_vcpu(&supported, vcpu, 3);
            assert_eq!(find(&table, 1, 0).unwrap().ebx >> 24, u32::from(vcpu));
            assert_eq!(find(&table, 0xb, 0).unwrap().edx, u32::from(vcpu));
            let cores = find(&table, 0xb, 1).unwrap();
            assert_eq!((cores.eax, cores.ebx), (2, 3));
        }
        assert_eq!(features(&for_vcpu(&supported, 0, 3)), features(&for_vcpu(&supported, 2, 3)));
    }
}
