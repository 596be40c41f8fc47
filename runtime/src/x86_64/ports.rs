//! The I/O ports that leave the kernel.

use crate::devices::debug_exit::{DEBUG_EXIT_PORT, KEYBOARD_COMMAND_PORT, debug_exit, keyboard_command};
use crate::devices::host_files::{HOST_FILES_PORT, HostFiles};
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
    /// The host files, where the guest may have any.
    pub host_files: Option<HostFiles>,
}

impl Ports {
    /// The guest writes. A string instruction comes as all its bytes at once. A device that keeps the vCPU waiting lets it go when it
    /// is `leaving` the guest.
    pub fn write(&self, port: u16, data: &[u8], leaving: &dyn Fn() -> bool) -> Option<ExitReason> {
        match port {
            SERIAL_PORT..=SERIAL_LAST => {
                data.iter().for_each(|byte| self.serial.write(offset(port), *byte));
                None
            }
            HOST_FILES_PORT => {
                if let Some(files) = &self.host_files {
                    files.write(data, leaving);
                }
                None
            }
            DEBUG_EXIT_PORT => Some(self.debug_exit(data)),
            KEYBOARD_COMMAND_PORT => keyboard_command(data),
            _ => None,
        }
    }

    fn debug_exit(&self, data: &[u8]) -> ExitReason {
        let reason = debug_exit(data);
        if let (Some(files), ExitReason::Guest(status)) = (&self.host_files, &reason) {
            files.log().note(format_args!("EXIT {}", status >> 1));
        }
        reason
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
