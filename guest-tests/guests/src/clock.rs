//! The TSC's frequency, and times in it.

use crate::cpu::{port_in, port_out, tsc};
use crate::platform::PIT_HZ;

/// Converts between the TSC and time.
#[derive(Clone, Copy)]
pub struct Clock {
    khz: u64,
}

const PIT_CHANNEL_2: u16 = 0x42;
const PIT_COMMAND: u16 = 0x43;
/// Bit 0 lets channel 2 count, bit 1 would let it sound, bit 5 shows its output.
const SPEAKER: u16 = 0x61;
const OUTPUT: u8 = 1 << 5;

/// How long the PIT counts, and how often at most.
const MEASURED_MS: u64 = 20;
const TRIES: usize = 25;
/// The frequency is known well enough when its bounds are this part of it apart.
const PRECISION: u64 = 5000;
/// Ticks after which a PIT that does not answer is given up: beyond a second on any CPU.
const PATIENCE: u64 = 10_000_000_000;

impl Clock {
    /// A clock of a known frequency in kHz, not 0.
    pub fn new(khz: u64) -> Self {
        Self { khz }
    }

    /// Measures it against the PIT; `None` where there is none. Takes 20 ms or, on a busy host, half a second.
    pub fn measure() -> Option<Self> {
        let (mut least, mut most) = (0, u64::MAX);
        for _ in 0..TRIES {
            let (low, high) = pit_interval()?;
            // Each try gives sure bounds, however long it was interrupted: together they can only come closer.
            (least, most) = (least.max(low), most.min(high));
            if most.saturating_sub(least) <= most / PRECISION {
                break;
            }
        }
        Some(Self { khz: least.midpoint(most) / MEASURED_MS })
    }

    /// In kHz.
    pub fn khz(self) -> u64 {
        self.khz
    }

    /// Ticks in so many ns (at most an hour).
    pub fn ticks_of_ns(self, ns: u64) -> u64 {
        ns / 1_000_000 * self.khz + ns % 1_000_000 * self.khz / 1_000_000
    }

    /// Whole microseconds in so many ticks, rounded up.
    pub fn us_of_ticks(self, ticks: u64) -> u64 {
        (ticks / self.khz).saturating_mul(1000).saturating_add((ticks % self.khz * 1000).div_ceil(self.khz))
    }
}

/// Lower and upper bound of the TSC's ticks in [`MEASURED_MS`] of the PIT.
fn pit_interval() -> Option<(u64, u64)> {
    const CHANNEL_2_COUNT_DOWN: u8 = 0xb0;
    let [low, high, ..] = (PIT_HZ * MEASURED_MS / 1000).to_le_bytes();
    port_out(SPEAKER, port_in(SPEAKER) & !0x03 | 0x01);
    port_out(PIT_COMMAND, CHANNEL_2_COUNT_DOWN);
    port_out(PIT_CHANNEL_2, low);
    // The count starts at some time within the second write,
    let before_start = tsc();
    port_out(PIT_CHANNEL_2, high);
    let after_start = tsc();
    let mut not_over = after_start;
    loop {
        let asked = tsc();
        // and is over at some time after the last look that did not show it, and before the end of the one that does.
        if port_in(SPEAKER) & OUTPUT != 0 {
            return Some((not_over - after_start, tsc() - before_start));
        }
        if asked - after_start > PATIENCE {
            return None;
        }
        not_over = asked;
    }
}
