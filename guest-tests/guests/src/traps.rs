//! Interrupt descriptors, and what is said of an exception that nobody expected.

use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::platform;

/// The table; its entries are two words each. Written from ring 3: see boot.s.
pub static IDT: [AtomicU64; 512] = [const { AtomicU64::new(0) }; 512];

/// Vector of the PIT's tick (the interrupt controllers are told so in platform.rs), and of a spurious one beside it.
pub const PIC_VECTOR: u8 = 0x20;
const PIC_SPURIOUS: u8 = 0x27;
/// Vectors of the local APIC: its timer, and what it calls spurious.
pub const LAPIC_VECTOR: u8 = 0x30;
pub const LAPIC_SPURIOUS: u8 = 0xff;

/// Distance between the entries of two exceptions.
const STUB: usize = 16;
const EXCEPTIONS: u8 = 32;

unsafe extern "C" {
    safe fn exception_stubs();
    safe fn pic_tick();
    safe fn lapic_tick();
    safe fn spurious_interrupt();
}

/// Fills the table, before anything can go wrong.
pub fn init() {
    for vector in 0..EXCEPTIONS {
        set(vector, (exception_stubs as *const () as usize) + usize::from(vector) * STUB);
    }
    set(PIC_VECTOR, pic_tick as *const () as usize);
    set(PIC_SPURIOUS, spurious_interrupt as *const () as usize);
    set(LAPIC_VECTOR, lapic_tick as *const () as usize);
    set(LAPIC_SPURIOUS, spurious_interrupt as *const () as usize);
}

/// A 64-bit interrupt gate of ring 0.
fn set(vector: u8, handler: usize) {
    const CODE: u64 = 0x10;
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e00;
    let handler = handler as u64;
    let low = (handler & 0xffff) | CODE << 16 | PRESENT_INTERRUPT_GATE << 32 | (handler & 0xffff_0000) << 32;
    IDT[2 * usize::from(vector)].store(low, SeqCst);
    IDT[2 * usize::from(vector) + 1].store(handler >> 32, SeqCst);
}

/// Where boot.s continues in ring 3 after an exception: `address` is CR2.
pub extern "C" fn exception_report(vector: u64, error: u64, rip: u64, address: u64) -> ! {
    platform::fail(
        platform::EXIT_EXCEPTION,
        format_args!("\nX exception {vector} error {error:#x} rip {rip:#x} address {address:#x}"),
    )
}
