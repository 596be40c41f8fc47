//! Holding the pushed bytes of all bulk lanes together under a set rate.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use switchover_wire::clock::Nanos;

/// What may be sent at once after a pause: 10 ms worth, so that the rate holds over any stretch that matters, but
/// never less than a frame.
const BURST_MS: i128 = 10;
const BURST_FLOOR: i128 = 512 * 1024;

/// A token bucket that several lanes draw from.
#[derive(Debug)]
pub struct Pacer {
    bytes_per_second: AtomicU64,
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// May be negative: what a lane has taken ahead and must wait for.
    tokens: i128,
    filled_at: Nanos,
}

impl Pacer {
    /// A bucket of `bytes_per_second`; 0 means no limit.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second: AtomicU64::new(bytes_per_second),
            bucket: Mutex::new(Bucket { tokens: 0, filled_at: Nanos::now() }),
        }
    }

    /// The rate is this from now on.
    pub fn set_rate(&self, bytes_per_second: u64) {
        self.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Takes `bytes` and says how long to wait before sending them.
    #[must_use]
    pub fn take(&self, bytes: u64, now: Nanos) -> Duration {
        let rate = self.bytes_per_second.load(Ordering::Relaxed);
        if rate == 0 {
            return Duration::ZERO;
        }
        let rate = i128::from(rate);
        let burst = (rate * BURST_MS / 1000).max(BURST_FLOOR);
        let mut bucket = self.bucket.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let earned = i128::from(now.since(bucket.filled_at)) * rate / 1_000_000_000;
        if earned > 0 {
            bucket.tokens = (bucket.tokens + earned).min(burst);
            bucket.filled_at = now;
        }
        bucket.tokens -= i128::from(bytes);
        if bucket.tokens >= 0 {
            Duration::ZERO
        } else {
            Duration::from_nanos(u64::try_from(-bucket.tokens * 1_000_000_000 / rate).unwrap_or(u64::MAX))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_a_second() {
        let pacer = Pacer::new(100_000_000);
        let (mut clock, mut sent) = (Nanos::now(), 0);
        let start = clock;
        while clock.since(start) < 1_000_000_000 {
            clock.0 += u64::try_from(pacer.take(256 * 1024, clock).as_nanos()).unwrap();
            sent += 256 * 1024;
        }
        assert!((98_000_000..102_000_000).contains(&sent), "{sent} bytes in a second");
    }

    #[test]
    fn no_limit_never_waits() {
        assert_eq!(Pacer::new(0).take(u64::MAX, Nanos::now()), Duration::ZERO);
    }

    #[test]
    fn a_long_pause_earns_no_more_than_a_burst() {
        let pacer = Pacer::new(100_000_000);
        let later = Nanos(Nanos::now().0 + 60_000_000_000);
        assert_eq!(pacer.take(1_000_000, later), Duration::ZERO);
        assert!(pacer.take(1_000_000, later) > Duration::from_millis(9));
    }
}
