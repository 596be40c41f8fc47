//! When to wait for a page without sleeping.
//!
//! Waking a thread that sleeps costs more than anything else on the way of a page: some 10 µs where its processor is busy, several
//! times that where it sleeps too. A thread that spins is there at once, but takes a processor from the guest, or from whoever
//! pushes its pages. So the fault threads spin while a vCPU waits and nobody else has use for the processors.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use switchover_wire::clock::Nanos;

/// How long a fault thread waits for an answer without sleeping, and a source's for the next request: a few round trips on a good
/// network.
const SPIN: Duration = Duration::from_micros(200);
/// The push has paused when nothing was pushed for this long: longer than a frame takes on a slow link, and than a thread that
/// yields waits for its turn.
const PAUSE_NS: u64 = 20_000_000;
/// Processors that a guest and its pager want beside those of the push and of whoever waits.
const SPARE: u64 = 2;

/// Whether a side's processors have nothing better to do.
#[derive(Debug)]
pub struct Idleness {
    processors: u64,
    /// When something was pushed last, in nanoseconds; 0 before.
    pushed: AtomicU64,
}

impl Idleness {
    /// Of this machine.
    pub fn new() -> Self {
        Self::of(thread::available_parallelism().map_or(1, |count| count.get() as u64))
    }

    const fn of(processors: u64) -> Self {
        Self { processors, pushed: AtomicU64::new(0) }
    }

    /// Something was pushed just now.
    pub fn note_push(&self, now: Nanos) {
        self.pushed.store(now.0, Ordering::Relaxed);
    }

    /// How long one of `waiters`, which may all wait at once, is to wait without sleeping beside `lanes` that may push.
    pub fn spin(&self, waiters: u64, lanes: u64, now: Nanos) -> Duration {
        let pushing = now.0.saturating_sub(self.pushed.load(Ordering::Relaxed)) < PAUSE_NS;
        // One is left for whoever is waited for.
        let wanted = if pushing { waiters + lanes + SPARE } else { waiters + 1 };
        if self.processors < wanted { Duration::ZERO } else { SPIN }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_pushes_has_the_processors_unless_there_are_more() {
        let now = Nanos(5_000_000_000);
        let spins = |processors, lanes, pushed: u64| {
            let idleness = Idleness::of(processors);
            idleness.note_push(Nanos(pushed));
            idleness.spin(1, lanes, now) > Duration::ZERO
        };
        let (long_ago, just_now) = (now.0 - PAUSE_NS, now.0 - PAUSE_NS + 1);
        assert!(!spins(1, 1, 0), "the only processor");
        assert!(spins(2, 1, 0) && spins(2, 8, long_ago));
        assert!(!spins(2, 1, just_now) && !spins(3, 1, just_now) && !spins(8, 8, just_now));
        assert!(spins(4, 1, just_now) && spins(11, 8, just_now));
    }

    #[test]
    fn waiters_leave_one_for_whom_they_wait_for() {
        let idleness = Idleness::of(4);
        let spins = |waiters| idleness.spin(waiters, 1, Nanos(1 << 40)) > Duration::ZERO;
        assert!(spins(1) && spins(3) && !spins(4) && !spins(16));
    }
}
