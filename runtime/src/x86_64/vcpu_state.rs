//! What a guest can see of one vCPU, read out and put in.

use kvm_bindings::{
    Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use super::clock::TscAdvance;
use super::cpuid;
use super::ioctls;
use super::msrs::{self, IA32_TSC, IA32_TSC_DEADLINE};

/// A vCPU's state could not be read or set.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("vCPU {vcpu}: cannot {what}")]
pub struct CpuStateError {
    /// Which.
    pub vcpu: usize,
    /// What was tried, and KVM's answer.
    pub what: String,
}

/// What a guest can see of one vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedVcpu {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Bytes,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    events: kvm_vcpu_events,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    tsc_offset: Option<u64>,
}

/// What saving and loading need to know and does not change: prepared when the machine is built.
#[derive(Clone, Debug)]
pub struct VcpuPlan {
    /// The CPUID table that the vCPU has.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The MSRs to carry.
    pub msrs: Vec<u32>,
    /// Bytes of extended state.
    pub xsave_size: usize,
    /// Whether KVM tells the TSC's offset.
    pub has_tsc_offset: bool,
    /// The guest TSC's frequency.
    pub tsc_khz: u32,
}

/// Bytes of a vCPU's extended state on this host.
#[must_use]
pub fn xsave_size(vm: &VmFd) -> usize {
    // 0 where KVM has only the fixed form.
    usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(size_of::<kvm_xsave>())
}

/// Reads a vCPU that is out of the guest and has completed its I/O.
///
/// # Errors
/// When KVM does not give a part of it.
pub fn save(fd: &VcpuFd, plan: &VcpuPlan) -> Result<SavedVcpu, String> {
    Ok(SavedVcpu {
        // First: reading it makes KVM take in a pending INIT or SIPI, which changes the registers.
        mp_state: fd.get_mp_state().map_err(failed("read the MP state"))?,
        regs: fd.get_regs().map_err(failed("read the registers"))?,
        sregs: fd.get_sregs().map_err(failed("read the system registers"))?,
        xsave: read_xsave(fd, plan.xsave_size)?,
        xcrs: fd.get_xcrs().map_err(failed("read the XCRs"))?,
        debugregs: fd.get_debug_regs().map_err(failed("read the debug registers"))?,
        events: fd.get_vcpu_events().map_err(failed("read the pending events"))?,
        lapic: fd.get_lapic().map_err(failed("read the local APIC"))?,
        msrs: msrs::read(fd, &plan.msrs)?,
        tsc_offset: plan
            .has_tsc_offset
            .then(|| ioctls::tsc_offset(fd).map_err(failed("read the TSC offset")))
            .transpose()?,
        cpuid: plan.cpuid.clone(),
    })
}

/// Makes a vCPU that never ran what was saved. The order is that of what depends on what.
///
/// # Errors
/// When KVM refuses a part of it. The vCPU is of no use then.
pub fn load(fd: &VcpuFd, saved: &SavedVcpu, plan: &VcpuPlan, advance: TscAdvance) -> Result<(), String> {
    // CPUID decides which registers, bits and MSRs exist. Setting it is slow, and mostly it is there already.
    if saved.cpuid != plan.cpuid {
        fd.set_cpuid2(&cpuid::to_kvm(&saved.cpuid)?).map_err(failed("set the CPUID"))?;
    }
    // The APIC base among the system registers decides which local APIC there is to set.
    fd.set_sregs(&saved.sregs).map_err(failed("set the system registers"))?;
    // XCR0 decides which parts of the extended state are taken.
    fd.set_xcrs(&saved.xcrs).map_err(failed("set the XCRs"))?;
    write_xsave(fd, &saved.xsave, plan.xsave_size)?;
    fd.set_regs(&saved.regs).map_err(failed("set the registers"))?;
    // The timer's mode must be known before its deadline is written.
    fd.set_lapic(&saved.lapic).map_err(failed("set the local APIC"))?;
    write_msrs(fd, saved, plan, advance)?;
    // After the system registers, which carry a part of the pending interrupts too and would overrule these.
    fd.set_vcpu_events(&saved.events).map_err(failed("set the pending events"))?;
    fd.set_debug_regs(&saved.debugregs).map_err(failed("set the debug registers"))?;
    // Last: from here on the vCPU is as if it had been running, or halted, all along.
    fd.set_mp_state(saved.mp_state).map_err(failed("set the MP state"))
}

fn write_msrs(fd: &VcpuFd, saved: &SavedVcpu, plan: &VcpuPlan, advance: TscAdvance) -> Result<(), String> {
    let by_offset = saved.tsc_offset.and_then(|offset| advance.offset(offset));
    let offset_taken = match by_offset {
        Some(offset) => ioctls::set_tsc_offset(fd, offset).is_ok(),
        None => false,
    };
    let mut values: Vec<(u32, u64)> = saved.msrs.clone();
    values.retain(|(index, _)| !(offset_taken && *index == IA32_TSC));
    for (index, value) in &mut values {
        if *index == IA32_TSC {
            *value = advance.tsc(*value, plan.tsc_khz);
        }
    }
    // The TSC before all that is counted in it, the deadline after all that decides what it means.
    values.sort_by_key(|(index, _)| match *index {
        IA32_TSC => 0,
        IA32_TSC_DEADLINE => 2,
        _ => 1,
    });
    msrs::write(fd, &values)
}

fn read_xsave(fd: &VcpuFd, size: usize) -> Result<Bytes, String> {
    let extra = (size - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    let mut xsave = Xsave::new(extra).map_err(|error| format!("make room for the extended state: {error:?}"))?;
    // SAFETY: the structure has room for as many bytes as KVM said that it writes, and this process never turns on
    // dynamic state features, which could make that more.
    unsafe { fd.get_xsave2(&mut xsave) }.map_err(failed("read the extended state"))?;
    let words = xsave.as_fam_struct_ref().xsave.region.iter().chain(xsave.as_slice());
    Ok(Bytes(words.flat_map(|word| word.to_le_bytes()).collect()))
}

fn write_xsave(fd: &VcpuFd, saved: &Bytes, size: usize) -> Result<(), String> {
    let expected = size.next_multiple_of(size_of::<u32>());
    if saved.0.len() != expected {
        let have = saved.0.len();
        return Err(format!("set the extended state: {have} bytes were saved, this host's KVM keeps {expected}"));
    }
    let extra = (expected - size_of::<kvm_xsave>()) / size_of::<u32>();
    let mut xsave = Xsave::new(extra).map_err(|error| format!("make room for the extended state: {error:?}"))?;
    let words: Vec<u32> =
        saved.0.chunks_exact(4).map(|word| word.iter().rev().fold(0, |n, b| n << 8 | u32::from(*b))).collect();
    let fixed = size_of::<kvm_xsave>() / size_of::<u32>();
    let (fixed, rest) = words.split_at_checked(fixed).unwrap_or((&words, &[]));
    // SAFETY: only the fixed part is written; the length that the structure keeps of its rest is left alone.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region.copy_from_slice(fixed);
    xsave.as_mut_slice().copy_from_slice(rest);
    // SAFETY: the structure has as many bytes as KVM said that it reads.
    unsafe { fd.set_xsave2(&xsave) }.map_err(failed("set the extended state"))
}

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> String {
    move |error| format!("{what}: {error}")
}

/// Bytes that are written as bytes, not as a list of numbers.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Bytes(Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Whole;
        impl Visitor<'_> for Whole {
            type Value = Bytes;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
                if bytes.len().is_multiple_of(4) {
                    Ok(Bytes(bytes.to_vec()))
                } else {
                    Err(E::custom("not a number of words"))
                }
            }
        }
        deserializer.deserialize_bytes(Whole).map_err(D::Error::custom)
    }
}
