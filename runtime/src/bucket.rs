//! How much a vCPU may write: a token bucket. Pure; its clock is its caller's.

use std::time::Duration;

/// What a vCPU may write at once after it wrote nothing for long, as a time at its rate.
const BURST: Duration = Duration::from_millis(100);
/// The most that a vCPU is kept out for what it wrote at once. What it owes beyond that is forgiven: it shall go on, if slowly.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Bytes that may still be written; below zero where too many were.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Bucket {
    /// Bytes a second.
    rate: f64,
    left: f64,
}

impl Bucket {
    /// A full one, for so many bytes a second.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a rate, which need not be exact")]
    pub fn new(bytes_per_second: u64) -> Self {
        let rate = bytes_per_second.max(1) as f64;
        Self { rate, left: rate * BURST.as_secs_f64() }
    }

    /// Time has passed, and bytes were written in it. Answers how long to write nothing.
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    pub fn take(&mut self, passed: Duration, bytes: u64) -> Duration {
        let most = self.rate * BURST.as_secs_f64();
        let least = -self.rate * LONGEST_WAIT.as_secs_f64();
        self.left = ((self.left + self.rate * passed.as_secs_f64()).min(most) - bytes as f64).max(least);
        if self.left >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-self.left / self.rate) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn who_keeps_to_the_rate_never_waits() {
        let mut bucket = Bucket::new(10 * MIB);
        for _ in 0..1000 {
            assert_eq!(bucket.take(Duration::from_millis(10), MIB / 10), Duration::ZERO);
        }
        // A burst of a tenth of a second is free, once.
        assert_eq!(bucket.take(Duration::from_secs(5), MIB), Duration::ZERO);
        assert!(bucket.take(Duration::ZERO, MIB) >= Duration::from_millis(99));
    }

    #[test]
    fn nobody_waits_for_ever() {
        let mut bucket = Bucket::new(1);
        assert_eq!(bucket.take(Duration::ZERO, u64::MAX), LONGEST_WAIT);
        assert_eq!(bucket.take(LONGEST_WAIT, 0), Duration::ZERO);
        assert!(Bucket::new(0).take(Duration::ZERO, 1) <= LONGEST_WAIT);
    }

    proptest! {
        #[test]
        fn who_waits_as_told_keeps_to_the_rate(
            rate in MIB..100 * MIB,
            turns in prop::collection::vec((0_u64..20_000, 0_u64..500), 1..100),
        ) {
            let (mut bucket, mut time, mut bytes) = (Bucket::new(rate), Duration::ZERO, 0);
            for (micros, thousandths) in turns {
                let ran = Duration::from_micros(micros);
                let wrote = rate * thousandths / 1000;
                let wait = bucket.take(ran, wrote);
                bytes += wrote;
                time += ran + wait;
                prop_assert_eq!(bucket.take(wait, 0), Duration::ZERO);
                let most = rate as f64 * (time + BURST).as_secs_f64();
                prop_assert!((bytes as f64) <= most + rate as f64 / 1e6, "{} bytes of {}", bytes, most);
            }
        }
    }
}
