//! Tiny guests, assembled by hand: ring 0, 32-bit, paging off, as PVH starts them.

#![allow(dead_code, reason = "each test file uses some of it")]

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use switchover_runtime::config::{SerialTarget, VmConfig};
use switchover_runtime::vm::Vm;
use switchover_wire::types::PageCount;
use tempfile::NamedTempFile;

/// Where guests are linked.
pub const BASE: u32 = 0x10_0000;
/// Where guests count; the second vCPU in the next word.
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
    // SAFETY: inside the RAM of 4 MiB that `ram` keeps mapped, and aligned; the guest writes it as whole words.
    unsafe { at.cast::<u32>().read_volatile() }
}

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

/// Counts at [`COUNTER`], and each time writes the count's low byte to the serial port's scratch register, reads it back,
/// and ends with exit status 3 where it is another.
pub const COUNTING: &[u8] = &[
    0x31, 0xc0, // xor eax, eax
    0x66, 0xba, 0xff, 0x03, // mov dx, 0x3ff
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
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
