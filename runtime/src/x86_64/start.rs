//! The registers of a vCPU that a PVH kernel is started on: 32-bit protected mode, flat segments, paging and interrupts
//! off (Xen's `docs/misc/pvh.pandoc`).

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::layout::START_INFO;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
/// The bit of EFLAGS that is always set.
const FLAGS: u64 = 2;
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TASK: u8 = 0xb;
/// A task-state segment without I/O bitmap.
const TASK_LIMIT: u32 = 0x67;

/// Puts `vcpu` at a kernel's entry point.
///
/// # Errors
/// When KVM refuses.
pub fn at(vcpu: &VcpuFd, entry: u32) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    protected_mode(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: u64::from(entry), rbx: START_INFO, rflags: FLAGS, ..Default::default() })
}

fn protected_mode(sregs: &mut kvm_sregs) {
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(0x8, TYPE_CODE);
    let data = flat(0x10, TYPE_DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: TASK_LIMIT, selector: 0x18, type_: TYPE_TASK, present: 1, ..Default::default() };
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
}
