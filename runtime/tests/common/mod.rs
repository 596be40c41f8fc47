//! Tiny guests, assembled by hand: ring 0, 32-bit, paging off, as PVH starts them.

#![allow(dead_code, reason = "each test file uses some of it")]

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use switchover_runtime::config::{DirtyTracking, SerialTarget, VmConfig};
use switchover_runtime::vm::Vm;
use switchover_wire::types::PageCount;
use tempfile::NamedTempFile;

/// Where guests are linked.
pub const BASE: u32 = 0x10_0000;
/// Where guests count.
pub const COUNTER: u32 = 0x20_0000;

/// Whether this host can run guests; says so when not.
pub fn kvm(name: &str) -> bool {
    let there = kvm_ioctls::Kvm::new().is_ok();
    if !there {
        println!("SKIP {name}: /dev/kvm cannot be opened");
    }
    there
}

/// A PVH ELF with `code` at [`BASE`], started there.
pub fn elf(code: &[u8]) -> Vec<u8> {
    const CODE_AT: u64 = 0x100;
    const NOTE_AT: u64 = 64 + 2 * 56;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend(2_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for number in [u64::from(BASE), 64, 0] {
        file.extend(number.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for number in [64_u16, 56, 2, 0, 0, 0] {
        file.extend(number.to_le_bytes());
    }
    let length = u64::try_from(code.len()).unwrap();
    for (kind, offset, address, size) in [(1_u32, CODE_AT, u64::from(BASE), length), (4, NOTE_AT, 0, 20)] {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for number in [offset, address, address, size, size, 4] {
            file.extend(number.to_le_bytes());
        }
    }
    for number in [4_u32, 4, 18] {
        file.extend(number.to_le_bytes());
    }
    file.extend(b"Xen\0");
    file.extend(BASE.to_le_bytes());
    file.resize(usize::try_from(CODE_AT).unwrap(), 0);
    file.extend(code);
    file
}

/// A guest's file, configuration and serial output.
pub struct Guest {
    kernel: NamedTempFile,
    pub serial: NamedTempFile,
}

impl Guest {
    pub fn new(code: &[u8]) -> Self {
        let mut kernel = NamedTempFile::new().unwrap();
        kernel.write_all(&elf(code)).unwrap();
        Self { kernel, serial: NamedTempFile::new().unwrap() }
    }

    pub fn config(&self, vcpus: u8) -> VmConfig {
        VmConfig {
            kernel: Some(PathBuf::from(self.kernel.path())),
            append: "quick brown fox".to_owned(),
            initrd: None,
            memory: PageCount(1024),
            vcpus,
            serial: SerialTarget::File(self.serial.path().to_owned()),
            lazy_memory: false,
            host_files: None,
            dirty_tracking: DirtyTracking::Auto,
        }
    }

    pub fn boot(&self, vcpus: u8) -> Arc<Vm> {
        Vm::boot(&self.config(vcpus)).unwrap()
    }

    pub fn printed(&self) -> String {
        std::fs::read_to_string(self.serial.path()).unwrap()
    }
}

/// The 32-bit word of guest RAM at `address`.
pub fn word(vm: &Vm, address: u32) -> u32 {
    use switchover_hybrid::machine::Machine;
    let ram = vm.ram();
    let at = ram.guest_base().wrapping_add(usize::try_from(address).unwrap());
    // SAFETY: inside the RAM that `ram` keeps mapped, and aligned; the guest writes it as whole words.
    unsafe { at.cast::<u32>().read_volatile() }
}

/// Where [`SCATTERING`] writes: the upper half of the RAM of 4 MiB.
pub const SCATTERED: std::ops::Range<u64> = 512..1024;

/// Counts in pages of [`SCATTERED`], in no order.
pub const SCATTERING: &[u8] = &[
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1
    // again:
    0x69, 0xc0, 0x6d, 0x4e, 0xc6, 0x41, // imul eax, eax, 1103515245
    0x05, 0x39, 0x30, 0x00, 0x00, // add eax, 12345
    0x89, 0xc7, // mov edi, eax
    0xc1, 0xef, 0x10, // shr edi, 16
    0x81, 0xe7, 0xff, 0x01, 0x00, 0x00, // and edi, 511
    0xc1, 0xe7, 0x0c, // shl edi, 12
    0x81, 0xc7, 0x00, 0x00, 0x20, 0x00, // add edi, 0x200000
    0xff, 0x07, // inc dword [edi]
    0xeb, 0xdd, // jmp again
];

/// Where [`SWEEPING`] writes, in a RAM of 128 MiB.
pub const SWEPT: std::ops::Range<u64> = 512..32_768;

/// Counts in each page of [`SWEPT`] in turn, over and over: more pages than a dirty ring has entries.
pub const SWEEPING: &[u8] = &[
    // over:
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
    // again:
    0xff, 0x07, // inc dword [edi]
    0xe6, 0x80, // out 0x80, al: a KVM that emulates this must look at its ring now and then
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 4096
    0x81, 0xff, 0x00, 0x00, 0x00, 0x08, // cmp edi, 0x8000000
    0x72, 0xee, // jb again
    0xeb, 0xe7, // jmp over
];

/// As [`SWEEPING`], without leaving the guest for anything but the memory.
pub const SWEEPING_BLINDLY: &[u8] = &[
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
    0xff, 0x07, // inc dword [edi]
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 4096
    0x81, 0xff, 0x00, 0x00, 0x00, 0x08, // cmp edi, 0x8000000
    0x72, 0xf0, // jb inc
    0xeb, 0xe9, // jmp mov
];

/// Waits for a state that will come.
pub fn until(what: &str, mut there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain until {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Prints its command line, then ends with exit status 0x21.
pub const PRINTER: &[u8] = &[
    0x8b, 0x73, 0x18, // mov esi, [ebx + 24]   the command line's address
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xac, // lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x03, // jz +3
    0xee, // out dx, al
    0xeb, 0xf8, // jmp lodsb
    0xb0, 0x10, // mov al, 0x10
    0xe6, 0xf4, // out 0xf4, al
    0xf4, // hlt
];

/// Counts at [`COUNTER`]. The serial port loops back: each count's low byte is written and read again, and must come back.
/// An `out` or `in` that happens twice or not at all makes it another, and the guest ends with exit status 3.
pub const COUNTING: &[u8] = &[
    0x66, 0xba, 0xfc, 0x03, // mov dx, 0x3fc
    0xb0, 0x10, // mov al, 0x10
    0xee, // out dx, al
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x31, 0xc0, // xor eax, eax
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, COUNTER
    // again:
    0x40, // inc eax
    0xee, // out dx, al
    0x88, 0xc3, // mov bl, al
    0xec, // in al, dx
    0x38, 0xd8, // cmp al, bl
    0x75, 0x04, // jne wrong
    0x89, 0x07, // mov [edi], eax
    0xeb, 0xf3, // jmp again
    // wrong:
    0xb0, 0x01, // mov al, 1
    0xe6, 0xf4, // out 0xf4, al
    0xf4, // hlt
];

/// Where the second vCPU of [`starting_another`] counts.
pub const SECOND_COUNTER: u32 = 0x9000;

/// Starts a second vCPU, which counts at [`SECOND_COUNTER`] in real mode, and goes on as [`COUNTING`].
pub fn starting_another() -> Vec<u8> {
    const SECOND: &[u8] = &[
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x66, 0xff, 0x06, 0x00, 0x90, // inc dword [0x9000]
        0xeb, 0xf9, // jmp inc
    ];
    let mut code = vec![0xbf, 0x00, 0x80, 0x00, 0x00]; // mov edi, 0x8000
    for byte in SECOND {
        code.extend([0xb0, *byte, 0xaa]); // mov al, byte; stosb
    }
    // The local APIC on; INIT to the other; SIPI to 0x8000.
    let spurious = 0xfee0_00f0_u32.to_le_bytes();
    let icr_high = 0xfee0_0310_u32.to_le_bytes();
    let icr_low = 0xfee0_0300_u32.to_le_bytes();
    for (register, value) in [(spurious, 0x1ff), (icr_high, 0x0100_0000_u32), (icr_low, 0x4500), (icr_low, 0x4608)] {
        code.extend([0xc7, 0x05]); // mov dword [register], value
        code.extend(register);
        code.extend(value.to_le_bytes());
    }
    code.extend(COUNTING);
    code
}
