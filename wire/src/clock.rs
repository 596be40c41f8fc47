//! The one clock that every figure is taken from.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An instant of this host's `CLOCK_MONOTONIC`, or a span between two, in nanoseconds.
///
/// Instants of two processes compare only where both run under the same boot of the same kernel:
/// [`HostClock::same_host`] tells.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Nanos(pub u64);

impl Nanos {
    /// The instant now.
    #[must_use]
    pub fn now() -> Self {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid timespec to write to; CLOCK_MONOTONIC exists on every Linux, so the call
        // cannot fail, and were it to fail `time` would still be initialised.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
        Self(seconds * 1_000_000_000 + nanos)
    }

    /// The span from `start` to this instant; 0 where `start` is later.
    #[must_use]
    pub const fn since(self, start: Self) -> u64 {
        self.0.saturating_sub(start.0)
    }
}

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ns", self.0)
    }
}

/// Which host's monotonic clock a side reads, so that nobody subtracts instants of two different clocks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostClock {
    /// The kernel's boot id (`/proc/sys/kernel/random/boot_id`), or empty where it cannot be read.
    pub boot_id: String,
}

impl HostClock {
    /// This host's.
    #[must_use]
    pub fn here() -> Self {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { boot_id: boot_id.trim().to_owned() }
    }

    /// Whether instants read against the two clocks may be subtracted.
    #[must_use]
    pub fn same_host(&self, other: &Self) -> bool {
        !self.boot_id.is_empty() && self == other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_go_back() {
        let earlier = Nanos::now();
        assert!(Nanos::now() >= earlier);
        assert_eq!(earlier.since(Nanos(u64::MAX)), 0);
    }

    #[test]
    fn an_unknown_host_is_never_the_same() {
        let unknown = HostClock { boot_id: String::new() };
        assert!(!unknown.same_host(&unknown.clone()));
        assert!(HostClock::here().same_host(&HostClock::here()));
    }
}
