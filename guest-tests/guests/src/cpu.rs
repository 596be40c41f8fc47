//! The CPU below Rust: the boot code, a block of memory for each CPU, ports, the TSC.

use core::arch::{asm, global_asm, x86_64::_rdtsc};
use core::cell::UnsafeCell;
use core::sync::atomic::AtomicU32;

use crate::traps;

/// As many vCPUs as a guest can use.
pub const MAX_CPUS: usize = 16;

/// Below this address, memory is mapped (identically, writable, for ring 3).
pub const MAPPED: u64 = (MAPPED_GIB as u64) << 30;
const MAPPED_GIB: usize = 16;

/// The page below 1 MiB where a CPU that is being started begins in real mode.
pub const TRAMPOLINE_PAGE: u8 = 0x08;

const BLOCK: usize = 0x10000;
const FIRST_TSS_SELECTOR: u32 = 0x40;

/// One CPU's TSS and stacks; boot.s gives the layout.
#[repr(C, align(65536))]
struct Block(UnsafeCell<[u8; BLOCK]>);

// SAFETY: Rust never looks inside; each block is used by the one CPU whose stack and TSS it is.
unsafe impl Sync for Block {}

static CPUS: [Block; MAX_CPUS] = [const { Block(UnsafeCell::new([0; BLOCK])) }; MAX_CPUS];

/// Physical address of the PVH start info, stored by the entry code.
pub static START_INFO: AtomicU32 = AtomicU32::new(0);

/// The block and TSS selector that the next CPU to start takes.
static AP_BLOCK: AtomicU32 = AtomicU32::new(0);
static AP_SELECTOR: AtomicU32 = AtomicU32::new(0);

global_asm!(
    include_str!("boot.s"),
    max_cpus = const MAX_CPUS,
    mapped_gib = const MAPPED_GIB,
    block = const BLOCK,
    trampoline = const (TRAMPOLINE_PAGE as usize) << 12,
    cpus = sym CPUS,
    start_info = sym START_INFO,
    ap_block = sym AP_BLOCK,
    ap_selector = sym AP_SELECTOR,
    ring3 = sym ring3_start,
    idt = sym traps::IDT,
    exception_report = sym traps::exception_report,
    options(att_syntax),
);

unsafe extern "Rust" {
    // SAFETY: `guest!` defines it with this signature, and it has no preconditions.
    safe fn guest_main(cpu: usize) -> !;
}

/// The first Rust code of every CPU, in ring 3 on its own stack.
extern "C" fn ring3_start(block: usize) -> ! {
    guest_main((block - CPUS.as_ptr().addr()) / BLOCK)
}

/// Prepares what the trampoline of CPU `cpu` reads. The next CPU to start is that one.
pub fn prepare_start(cpu: usize) {
    use core::sync::atomic::Ordering::SeqCst;
    let address = CPUS[cpu].0.get().addr();
    AP_BLOCK.store(low_half(address), SeqCst);
    AP_SELECTOR.store(FIRST_TSS_SELECTOR + 16 * low_half(cpu), SeqCst);
}

#[expect(clippy::cast_possible_truncation, reason = "the image lies below 4 GiB, as do CPU numbers")]
fn low_half(value: usize) -> u32 {
    value as u32
}

/// The time-stamp counter.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: reads a counter; CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// Sleeps until an interrupt. In ring 3 this raises #GP, whose handler in boot.s sleeps with interrupts on and returns
/// behind it.
#[inline]
pub fn halt() {
    // SAFETY: that handler changes no register; memory may be changed by others meanwhile, which asm! assumes.
    unsafe { asm!("hlt") }
}

/// Reads a byte from an I/O port.
#[inline]
pub fn port_in(port: u16) -> u8 {
    let value: u8;
    // SAFETY: no device of this machine writes memory on its own, so that no port access can break Rust's memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Writes 32 bits to an I/O port behind which a device may read and write memory.
#[inline]
pub fn port_out_32(port: u16, value: u32) {
    // SAFETY: the caller's memory that the device writes is behind an `UnsafeCell`; without `nomem` the compiler takes it for
    // changed, and for needed before.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) }
}

/// Writes a byte to an I/O port.
#[inline]
pub fn port_out(port: u16, value: u8) {
    // SAFETY: as for `port_in`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}
