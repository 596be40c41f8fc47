//! The lines that vCPU 0 prints, and the buffer that they leave a byte at a time.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU8, Ordering::Relaxed};

use crate::clock::Clock;
use crate::cpu::MAX_CPUS;
use crate::meter::{BUCKETS, DETAILS, FINE_BUCKETS, METERS};
use crate::params::Params;
use crate::platform;
use crate::serial::{Sent, Transmitter};

const BUFFER: usize = 1 << 16;
/// Room that the longest lines of a period take: every number at its longest.
const LONGEST_P: usize = 128 + BUCKETS * 24;
const LONGEST_G: usize = 128 + FINE_BUCKETS * 25;
const LONGEST_V: usize = 128;
const LONGEST_B: usize = 192;

/// Bytes that wait for the UART. They lie apart because a vCPU's stack is small, and are atomic only to be that.
static BYTES: [AtomicU8; BUFFER] = [const { AtomicU8::new(0) }; BUFFER];

/// Which of them.
struct Buffer {
    read: usize,
    written: usize,
}

/// Only the guest's first vCPU has one.
pub struct Reporter {
    buffer: Buffer,
    transmitter: Transmitter,
    clock: Clock,
    vcpus: usize,
    fine: bool,
    period_ticks: u64,
    period_start: u64,
    period: u64,
    stop: u64,
    seen: [Seen; MAX_CPUS],
}

/// What was reported of a vCPU.
#[derive(Clone, Copy)]
struct Seen {
    gaps: [u64; BUCKETS],
    details: usize,
}

impl Reporter {
    /// A reporter whose first period starts at `now`.
    pub fn new(clock: Clock, params: &Params, now: u64) -> Self {
        Self {
            buffer: Buffer { read: 0, written: 0 },
            transmitter: Transmitter::default(),
            clock,
            vcpus: params.vcpus,
            fine: params.fine,
            period_ticks: clock.ticks_of_ns(params.period_ms * 1_000_000),
            period_start: now,
            period: 0,
            stop: params.stop,
            seen: [Seen { gaps: [0; BUCKETS], details: 0 }; MAX_CPUS],
        }
    }

    /// Puts a line into the buffer.
    pub fn line(&mut self, text: fmt::Arguments<'_>) {
        // A line that does not fit is cut short; those of a period are written only where there is room.
        let _ = writeln!(self.buffer, "{text}");
    }

    /// To be called after each visit with its time: ends the period if it is over, and sends a byte of what waits. Says
    /// whether there was anything to do.
    #[inline]
    pub fn after_visit(&mut self, now: u64) -> bool {
        // A difference, not a deadline: should the TSC step back, the period ends at once instead of never.
        let over = now.wrapping_sub(self.period_start) >= self.period_ticks;
        if over {
            self.end_period(now);
        }
        let waiting = !self.buffer.is_empty();
        self.step();
        over || waiting
    }

    /// Sends a byte or asks the UART for room: one access to it, or none. Says whether another call can do more now.
    #[inline]
    pub fn step(&mut self) -> bool {
        match self.buffer.first() {
            None => false,
            Some(byte) => match self.transmitter.send(byte) {
                Sent::Yes => {
                    self.buffer.read += 1;
                    true
                }
                Sent::Soon => true,
                Sent::No => false,
            },
        }
    }

    #[cold]
    fn end_period(&mut self, now: u64) {
        let fine = if self.fine { LONGEST_G } else { 0 };
        if self.buffer.room() < LONGEST_P + fine + self.vcpus * (LONGEST_V + DETAILS * LONGEST_B) {
            return;
        }
        self.write_period();
        self.period += 1;
        self.period_start = if now.wrapping_sub(self.period_start) < 2 * self.period_ticks {
            self.period_start.wrapping_add(self.period_ticks)
        } else {
            now
        };
        if self.stop > 0 && self.period == self.stop {
            // Nothing is measured any more.
            while !self.buffer.is_empty() {
                self.step();
            }
            platform::exit(platform::EXIT_DONE);
        }
    }

    fn write_period(&mut self) {
        let period = self.period;
        let mut gaps = [0_u64; BUCKETS];
        let mut visits = [0_u64; MAX_CPUS];
        let mut longest = [0_u64; MAX_CPUS];
        let mut bad = 0;
        for cpu in 0..self.vcpus {
            for ((gaps, seen), now) in gaps.iter_mut().zip(&mut self.seen[cpu].gaps).zip(METERS[cpu].gaps()) {
                let new = now - *seen;
                *gaps += new;
                visits[cpu] += new;
                *seen = now;
            }
            longest[cpu] = METERS[cpu].take_longest();
            bad += METERS[cpu].bad();
        }
        let total: u64 = visits.iter().sum();
        let worst = longest.iter().copied().max().unwrap_or(0);

        let (clock, buffer) = (self.clock, &mut self.buffer);
        // The buffer has room: that was checked.
        let _ = write!(buffer, "P {period} visits {total} maxgap_us {} bad {bad} h:", clock.us_of_ticks(worst));
        for (bucket, count) in gaps.iter().enumerate().filter(|(_, count)| **count > 0) {
            let _ = write!(buffer, " {bucket}:{count}");
        }
        let _ = writeln!(buffer);
        if self.fine {
            write_times(buffer, period, self.vcpus);
        }
        for cpu in 1..self.vcpus {
            let (visits, longest) = (visits[cpu], clock.us_of_ticks(longest[cpu]));
            let _ = writeln!(buffer, "V {period} cpu {cpu} visits {visits} maxgap_us {longest}");
        }
        for (meter, seen) in METERS.iter().zip(&mut self.seen).take(self.vcpus) {
            while let Some(found) = meter.detail(seen.details) {
                let [counter, expected] = found.counter;
                let [got, wanted] = found.value;
                let _ = writeln!(
                    buffer,
                    "B page {} counter {counter} expected {expected} word {} got {got:#x} expected {wanted:#x}",
                    found.page, found.word
                );
                seen.details += 1;
            }
        }
    }
}

/// The times of the visits since the last call, of all vCPUs.
fn write_times(buffer: &mut Buffer, period: u64, vcpus: usize) {
    let mut times = [0_u64; FINE_BUCKETS];
    for meter in METERS.iter().take(vcpus) {
        for (sum, new) in times.iter_mut().zip(meter.take_times()) {
            *sum += new;
        }
    }
    let visits: u64 = times.iter().sum();
    let _ = write!(buffer, "G {period} visits {visits} t:");
    for (bucket, count) in times.iter().enumerate().filter(|(_, count)| **count > 0) {
        let _ = write!(buffer, " {bucket}:{count}");
    }
    let _ = writeln!(buffer);
}

impl Buffer {
    fn is_empty(&self) -> bool {
        self.read == self.written
    }

    fn room(&self) -> usize {
        BUFFER - (self.written - self.read)
    }

    #[inline]
    fn first(&self) -> Option<u8> {
        (self.read != self.written).then(|| BYTES[self.read % BUFFER].load(Relaxed))
    }
}

impl Write for Buffer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.room() == 0 {
                return Err(fmt::Error);
            }
            BYTES[self.written % BUFFER].store(byte, Relaxed);
            self.written += 1;
        }
        Ok(())
    }
}
