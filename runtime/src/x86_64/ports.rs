//! The I/O ports that leave the kernel.

use crate::devices::debug_exit::{DEBUG_EXIT_PORT, KEYBOARD_COMMAND_PORT, debug_exit, keyboard_command};
use crate::devices::serial::{SERIAL_PORT, SerialPort};
use crate::run_state::ExitReason;

const SERIAL_LAST: u16 = SERIAL_PORT + 7;
/// What a port reads where there is no device: a floating bus.
const NOTHING_THERE: u8 = 0xff;
/// The keyboard controller's status: ready for a command, nothing to read.
const KEYBOARD_READY: u8 = 0;

/// The devices behind ports. PICs, PIT and the speaker are in the kernel and never get here.
pub struct Ports {
    /// The serial port.
    pub serial: SerialPort,
}

impl Ports {
    /// The guest writes. A string instruction comes as all its bytes at once.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        match port {
            SERIAL_PORT..=SERIAL_LAST => {
                data.iter().for_each(|byte| self.serial.write(offset(port), *byte));
                None
            }
            DEBUG_EXIT_PORT => Some(debug_exit(data)),
            KEYBOARD_COMMAND_PORT => keyboard_command(data),
            _ => None,
        }
    }

    /// The guest reads.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL_PORT..=SERIAL_LAST => data.iter_mut().for_each(|byte| *byte = self.serial.read(offset(port))),
            KEYBOARD_COMMAND_PORT => data.fill(KEYBOARD_READY),
            _ => data.fill(NOTHING_THERE),
        }
    }
}

fn offset(port: u16) -> u8 {
    u8::try_from(port - SERIAL_PORT).unwrap_or(u8::MAX)
}
