//! Holding the pushed bytes of all bulk lanes together under a set rate, which may change while they push.
//!
//! A token bucket, told as two counts of bytes: *taken*, all that lanes ever asked for, and *allowed*, all that the rate
//! ever let through. A lane that takes bytes gets a ticket with the count that it took up to; its turn has come when
//! as much is allowed. So turns come in the order in which they were asked for, none is lost when a lane wakes late, and
//! a change of the rate holds at once for those who wait already.
//!
//! ```text
//!   bytes ──────────────┬─────────────┬─────────────────▶
//!               allowed ▲             ▲ taken
//!      turn has come    │  waiting    │  next ticket      (allowed ≤ taken + BURST's worth)
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use switchover_wire::clock::Nanos;
use switchover_wire::frame::bulk::CHUNK_PAGES;
use switchover_wire::types::PAGE_SIZE_U64;

const SECOND_NS: i128 = 1_000_000_000;

/// What may be sent at once after a pause is what the rate lets through in this time: one percent of a second. Lanes that
/// wake late, by less than that, still reach the rate; and with frames of [`Pacer::frame_pages`], no second carries more
/// than 101.5 percent of it.
const BURST_NS: i128 = SECOND_NS / 100;

/// A frame is at most a second's worth divided by this.
const FRAMES_A_SECOND: u64 = 200;

/// The longest that anybody waits before asking again: a rate that was raised meanwhile holds by then.
const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// A token bucket that several lanes draw from.
#[derive(Debug)]
pub struct Pacer {
    /// Bytes a second, 0 meaning no limit. Changes only under the lock, and is read without it.
    rate: AtomicU64,
    bucket: Mutex<Bucket>,
}

/// Counts of bytes, in billionths, so that a nanosecond of any rate is a whole number.
#[derive(Debug)]
struct Bucket {
    taken: i128,
    allowed: i128,
    /// When `allowed` was counted last.
    at: Nanos,
}

/// A place in the order of all bytes: what was taken with it may be sent when its turn has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticket {
    /// `None` where there was no limit when it was taken.
    taken: Option<i128>,
}

impl Pacer {
    /// A bucket of `bytes_per_second`; 0 means no limit.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        let bucket = Bucket { taken: 0, allowed: 0, at: Nanos::now() };
        Self { rate: AtomicU64::new(bytes_per_second), bucket: Mutex::new(bucket) }
    }

    /// The rate, in bytes a second; 0 means no limit.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate.load(Ordering::Relaxed)
    }

    /// Changes the rate, for those who wait too; 0 means no limit.
    pub fn set_rate(&self, bytes_per_second: u64) {
        self.set_rate_at(bytes_per_second, Nanos::now());
    }

    fn set_rate_at(&self, bytes_per_second: u64, now: Nanos) {
        let mut bucket = self.bucket();
        let old = self.rate();
        bucket.fill(old, now);
        if old == 0 {
            // Nobody counted what went out so far: nothing is saved up, and nobody waits.
            bucket.allowed = bucket.taken;
        }
        self.rate.store(bytes_per_second, Ordering::Relaxed);
    }

    /// The most pages that a frame should have. With larger ones a second may carry the rate and one frame more.
    #[must_use]
    pub fn frame_pages(&self) -> u32 {
        let most = match self.rate() {
            0 => CHUNK_PAGES,
            rate => (rate / FRAMES_A_SECOND / PAGE_SIZE_U64).clamp(1, CHUNK_PAGES),
        };
        u32::try_from(most).unwrap_or(u32::MAX)
    }

    /// Takes the next `bytes`, to be sent when their turn comes.
    #[must_use]
    pub fn take(&self, bytes: u64, now: Nanos) -> Ticket {
        if self.rate() == 0 {
            return Ticket { taken: None };
        }
        let mut bucket = self.bucket();
        // First what nobody asked for is lost, then more is asked for.
        bucket.fill(self.rate(), now);
        bucket.taken += i128::from(bytes) * SECOND_NS;
        Ticket { taken: Some(bucket.taken) }
    }

    /// How long to wait before the turn of `ticket` may have come; zero when it has. Whoever waited asks again: the rate
    /// may have changed. Never more than 50 ms, so that nobody sleeps through a change.
    #[must_use]
    pub fn wait(&self, ticket: Ticket, now: Nanos) -> Duration {
        let (Some(taken), 1..) = (ticket.taken, self.rate()) else { return Duration::ZERO };
        let mut bucket = self.bucket();
        // The limit may have gone just now, and whoever took it away left no rate to divide by.
        let rate = self.rate();
        bucket.fill(rate, now);
        match taken - bucket.allowed {
            missing @ 1.. if rate > 0 => {
                let ns = (missing - 1) / i128::from(rate) + 1;
                u64::try_from(ns).map_or(LONGEST_WAIT, Duration::from_nanos).min(LONGEST_WAIT)
            }
            _ => Duration::ZERO,
        }
    }

    /// Takes the next `bytes` and waits for their turn with `pause`, which waits for a span, or says that it was told to
    /// stop. Says whether it was; nothing may be sent then.
    #[must_use]
    pub fn stopped_before(&self, bytes: u64, mut pause: impl FnMut(Duration) -> bool) -> bool {
        if self.rate() == 0 {
            return false;
        }
        let mut now = Nanos::now();
        let ticket = self.take(bytes, now);
        loop {
            match self.wait(ticket, now) {
                Duration::ZERO => return false,
                span if pause(span) => return true,
                _ => now = Nanos::now(),
            }
        }
    }

    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bucket {
    /// Counts what the rate let through until now.
    fn fill(&mut self, rate: u64, now: Nanos) {
        let span = now.since(self.at);
        if span > 0 {
            self.allowed = self.allowed.saturating_add(i128::from(span).saturating_mul(i128::from(rate)));
            self.at = now;
        }
        // Nothing is saved up but a burst; what was saved up at a higher rate is more than one at a lower.
        self.allowed = self.allowed.min(self.taken + i128::from(rate) * BURST_NS);
    }
}

#[cfg(test)]
mod tests;
