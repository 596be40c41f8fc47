//! The legacy devices: interrupt controller, timer tick, the way out.

use core::fmt::{Arguments, Write};
use core::panic::PanicInfo;

use crate::cpu::{halt, port_out};
use crate::serial::Blocking;
use crate::traps::PIC_VECTOR;

/// Debug-exit codes.
pub const EXIT_DONE: u8 = 0;
pub const EXIT_REFUSED: u8 = 1;
pub const EXIT_EXCEPTION: u8 = 2;

/// The debug-exit port.
const EXIT_PORT: u16 = 0xf4;

const PIC1: u16 = 0x20;
const PIC2: u16 = 0xa0;
const PIT_CHANNEL_0: u16 = 0x40;
const PIT_COMMAND: u16 = 0x43;

/// The PIT's frequency.
pub const PIT_HZ: u64 = 1_193_182;
/// How often the idle guest wakes.
pub const TICK_HZ: u64 = 1000;

/// Moves the interrupt controllers' vectors out of the exceptions' way, and masks all of them: firmware may have left
/// a timer running.
pub fn quiet() {
    const INIT_WITH_ICW4: u8 = 0x11;
    const MODE_8086: u8 = 0x01;
    for (pic, vector, cascade) in [(PIC1, PIC_VECTOR, 1 << 2), (PIC2, PIC_VECTOR + 8, 2)] {
        port_out(pic, INIT_WITH_ICW4);
        port_out(pic + 1, vector);
        port_out(pic + 1, cascade);
        port_out(pic + 1, MODE_8086);
        port_out(pic + 1, 0xff);
    }
}

/// Starts the tick that ends CPU 0's [`halt`].
pub fn start_tick() {
    const CHANNEL_0_RATE_GENERATOR: u8 = 0x34;
    const ALL_BUT_THE_TIMER: u8 = 0xfe;
    let [low, high, ..] = (PIT_HZ / TICK_HZ).to_le_bytes();
    port_out(PIT_COMMAND, CHANNEL_0_RATE_GENERATOR);
    port_out(PIT_CHANNEL_0, low);
    port_out(PIT_CHANNEL_0, high);
    port_out(PIC1 + 1, ALL_BUT_THE_TIMER);
}

/// Ends the guest; sleeps for ever where there is no debug-exit port.
pub fn exit(code: u8) -> ! {
    port_out(EXIT_PORT, code);
    quiet();
    loop {
        halt();
    }
}

/// Says why, at once, and ends the guest. What is waiting in the report's buffer is lost.
pub fn fail(code: u8, reason: Arguments<'_>) -> ! {
    // The UART never refuses; and there would be nobody to tell.
    let _ = writeln!(Blocking, "{reason}");
    exit(code)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    fail(EXIT_EXCEPTION, format_args!("\nX {info}"))
}
