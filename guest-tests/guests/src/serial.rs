//! The UART at 0x3f8: a byte at a time, never waiting; and a waiting one for last words.

use core::fmt;
use core::hint::spin_loop;

use crate::cpu::{port_in, port_out};

const DATA: u16 = 0x3f8;
const INTERRUPTS: u16 = DATA + 1;
const FIFO: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const MODEM_CONTROL: u16 = DATA + 4;
const LINE_STATUS: u16 = DATA + 5;

/// Line status: the transmitter's FIFO is empty.
const EMPTY: u8 = 1 << 5;
/// A 16550's transmitter FIFO.
const FIFO_BYTES: u8 = 16;

/// Sets the UART up for polled output.
pub fn init() {
    const DIVISOR_ACCESS: u8 = 0x80;
    const EIGHT_BITS_NO_PARITY: u8 = 0x03;
    port_out(INTERRUPTS, 0);
    port_out(LINE_CONTROL, DIVISOR_ACCESS);
    port_out(DATA, 1);
    port_out(DATA + 1, 0);
    port_out(LINE_CONTROL, EIGHT_BITS_NO_PARITY);
    port_out(FIFO, 0x07);
    port_out(MODEM_CONTROL, 0x03);
}

/// The transmitter, asked for its state only once for every FIFO's worth of bytes: each access is an exit to the VMM.
#[derive(Default)]
pub struct Transmitter {
    room: u8,
}

/// What became of a byte.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Yes,
    /// The UART was only asked whether it has room, and has: the next call sends.
    Soon,
    /// The UART is full.
    No,
}

impl Transmitter {
    /// Does one access to the UART.
    #[inline]
    pub fn send(&mut self, byte: u8) -> Sent {
        if self.room > 0 {
            self.room -= 1;
            port_out(DATA, byte);
            Sent::Yes
        } else if port_in(LINE_STATUS) & EMPTY != 0 {
            self.room = FIFO_BYTES;
            Sent::Soon
        } else {
            Sent::No
        }
    }
}

/// Writes and waits for room, but not for ever.
pub struct Blocking;

impl fmt::Write for Blocking {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        const PATIENCE: u32 = 100_000;
        for byte in text.bytes() {
            for _ in 0..PATIENCE {
                if port_in(LINE_STATUS) & EMPTY != 0 {
                    break;
                }
                spin_loop();
            }
            port_out(DATA, byte);
        }
        Ok(())
    }
}
