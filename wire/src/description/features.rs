//! The CPUID registers whose bits are features, and the names of the bits that people know.
//!
//! Names are those of Linux's `/proc/cpuinfo`; positions are from Intel's SDM (volume 2, CPUID), AMD's APM (volume 3,
//! appendix E) and, for KVM's own leaf, the kernel's `Documentation/virt/kvm/x86/cpuid.rst`.

/// One register of one leaf, each bit of which is a feature that a guest may use.
pub(super) struct FeatureRegister {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry.
    pub index: u32,
    /// Which of EAX, EBX, ECX, EDX.
    pub register: usize,
    /// Bits that say what the guest has switched on, not what the CPU can do.
    pub dynamic: u32,
    /// Bits with a well-known name.
    pub names: &'static [(u32, &'static str)],
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

impl FeatureRegister {
    pub(super) fn register_name(&self) -> &'static str {
        ["EAX", "EBX", "ECX", "EDX"][self.register]
    }

    pub(super) fn bit_name(&self, bit: u32) -> Option<&'static str> {
        self.names.iter().find(|(known, _)| *known == bit).map(|(_, name)| *name)
    }
}

const fn register(
    function: u32,
    index: u32,
    register: usize,
    dynamic: u32,
    names: &'static [(u32, &'static str)],
) -> FeatureRegister {
    FeatureRegister { function, index, register, dynamic, names }
}

/// CR4.OSXSAVE and CR4.PKE, reflected by the CPU.
const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;

#[rustfmt::skip]
pub(super) const FEATURE_REGISTERS: &[FeatureRegister] = &[
    register(1, 0, ECX, OSXSAVE, &[
        (0, "sse3"), (1, "pclmulqdq"), (3, "monitor"), (9, "ssse3"), (12, "fma"), (13, "cx16"), (17, "pcid"),
        (19, "sse4_1"), (20, "sse4_2"), (21, "x2apic"), (22, "movbe"), (23, "popcnt"), (24, "tsc_deadline_timer"),
        (25, "aes"), (26, "xsave"), (28, "avx"), (29, "f16c"), (30, "rdrand"), (31, "hypervisor"),
    ]),
    register(1, 0, EDX, 0, &[
        (0, "fpu"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (8, "cx8"), (9, "apic"), (11, "sep"),
        (12, "mtrr"), (13, "pge"), (15, "cmov"), (16, "pat"), (19, "clflush"), (23, "mmx"), (24, "fxsr"), (25, "sse"),
        (26, "sse2"), (28, "ht"),
    ]),
    register(7, 0, EBX, 0, &[
        (0, "fsgsbase"), (1, "tsc_adjust"), (3, "bmi1"), (5, "avx2"), (7, "smep"), (8, "bmi2"), (9, "erms"),
        (10, "invpcid"), (11, "rtm"), (14, "mpx"), (16, "avx512f"), (17, "avx512dq"), (18, "rdseed"), (19, "adx"),
        (20, "smap"), (21, "avx512ifma"), (23, "clflushopt"), (24, "clwb"), (28, "avx512cd"), (29, "sha_ni"),
        (30, "avx512bw"), (31, "avx512vl"),
    ]),
    register(7, 0, ECX, OSPKE, &[
        (1, "avx512vbmi"), (2, "umip"), (3, "pku"), (5, "waitpkg"), (6, "avx512_vbmi2"), (7, "user_shstk"),
        (8, "gfni"), (9, "vaes"), (10, "vpclmulqdq"), (11, "avx512_vnni"), (12, "avx512_bitalg"),
        (14, "avx512_vpopcntdq"), (16, "la57"), (22, "rdpid"), (27, "movdiri"), (28, "movdir64b"),
    ]),
    register(7, 0, EDX, 0, &[
        (4, "fsrm"), (8, "avx512_vp2intersect"), (10, "md_clear"), (14, "serialize"), (16, "tsxldtrk"), (20, "ibt"),
        (22, "amx_bf16"), (23, "avx512_fp16"), (24, "amx_tile"), (25, "amx_int8"), (26, "spec_ctrl"),
        (27, "stibp"), (28, "flush_l1d"), (29, "arch_capabilities"), (31, "ssbd"),
    ]),
    register(7, 1, EAX, 0, &[
        (4, "avx_vnni"), (5, "avx512_bf16"), (7, "cmpccxadd"), (10, "fzrm"), (11, "fsrs"), (12, "fsrc"),
        (21, "amx_fp16"), (23, "avx_ifma"), (26, "lam"),
    ]),
    register(0xD, 1, EAX, 0, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")]),
    register(0x4000_0001, 0, EAX, 0, &[
        (0, "kvm_clocksource"), (3, "kvm_clocksource2"), (4, "kvm_async_pf"), (5, "kvm_steal_time"),
        (6, "kvm_pv_eoi"), (7, "kvm_pv_unhalt"), (9, "kvm_pv_tlb_flush"), (10, "kvm_async_pf_vmexit"),
        (11, "kvm_pv_send_ipi"), (12, "kvm_poll_control"), (13, "kvm_pv_sched_yield"), (14, "kvm_async_pf_int"),
    ]),
    register(0x8000_0001, 0, ECX, 0, &[
        (0, "lahf_lm"), (2, "svm"), (4, "cr8_legacy"), (5, "abm"), (6, "sse4a"), (7, "misalignsse"),
        (8, "3dnowprefetch"), (9, "osvw"), (11, "xop"), (16, "fma4"), (21, "tbm"), (22, "topoext"),
        (23, "perfctr_core"), (29, "mwaitx"),
    ]),
    register(0x8000_0001, 0, EDX, 0, &[
        (11, "syscall"), (20, "nx"), (22, "mmxext"), (25, "fxsr_opt"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm"),
        (30, "3dnowext"), (31, "3dnow"),
    ]),
    register(0x8000_0008, 0, EBX, 0, &[
        (0, "clzero"), (1, "irperf"), (2, "xsaveerptr"), (4, "rdpru"), (9, "wbnoinvd"), (12, "ibpb"), (14, "ibrs"),
        (15, "stibp"), (24, "amd_ssbd"), (25, "virt_ssbd"),
    ]),
];

/// The extended states, by their XCR0 bit (SDM volume 1, 13.1).
pub(super) const XCR0_NAMES: &[(u32, &str)] = &[
    (0, "x87"),
    (1, "SSE"),
    (2, "AVX"),
    (3, "MPX bounds registers"),
    (4, "MPX bounds configuration"),
    (5, "AVX-512 opmask"),
    (6, "AVX-512 upper halves"),
    (7, "AVX-512 upper registers"),
    (9, "PKRU"),
    (17, "AMX tile configuration"),
    (18, "AMX tile data"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_register_and_no_bit_is_listed_twice() {
        for (at, one) in FEATURE_REGISTERS.iter().enumerate() {
            let place = (one.function, one.index, one.register);
            assert!(
                FEATURE_REGISTERS[at + 1..].iter().all(|other| (other.function, other.index, other.register) != place)
            );
            assert!(one.names.windows(2).all(|pair| pair[0].0 < pair[1].0), "{place:x?}");
            assert!(one.names.iter().all(|(bit, _)| *bit < 32 && one.dynamic & (1 << bit) == 0), "{place:x?}");
        }
    }
}
