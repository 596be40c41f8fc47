//! How a guest ends itself: QEMU's `isa-debug-exit` port, and the reset line of the 8042 keyboard controller.

use crate::run_state::ExitReason;

/// The debug-exit port, where QEMU's test guests look for it.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// Command port of the keyboard controller.
pub const KEYBOARD_COMMAND_PORT: u16 = 0x64;
/// Its command that pulses the CPU's reset line.
const RESET_COMMAND: u8 = 0xfe;

/// What a write to the debug-exit port means: the number shifted left by one, with the lowest bit set, is the exit status,
/// so that no guest can feign success. Numbers are little-endian and of 1, 2 or 4 bytes.
#[must_use]
pub fn debug_exit(data: &[u8]) -> ExitReason {
    let value = data.iter().take(4).rev().fold(0_u32, |value, byte| value << 8 | u32::from(*byte));
    ExitReason::Guest(((value << 1) | 1).cast_signed())
}

/// What a write to the keyboard controller's command port means.
#[must_use]
pub fn keyboard_command(data: &[u8]) -> Option<ExitReason> {
    data.contains(&RESET_COMMAND).then_some(ExitReason::Shutdown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_status_is_always_odd() {
        assert_eq!(debug_exit(&[0]), ExitReason::Guest(1));
        assert_eq!(debug_exit(&[0x10]), ExitReason::Guest(0x21));
        assert_eq!(debug_exit(&[0x34, 0x12, 0, 0]), ExitReason::Guest(0x2469));
    }

    #[test]
    fn only_the_reset_command_resets() {
        assert_eq!(keyboard_command(&[0xfe]), Some(ExitReason::Shutdown));
        assert_eq!(keyboard_command(&[0xad]), None);
    }
}
