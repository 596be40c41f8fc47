//! How much has crossed a lane.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that this side wrote to a lane and read from it, headers included. Whoever does the transfer adds to them;
/// anybody may read them at any time.
#[derive(Debug, Default)]
pub struct LaneCounters {
    sent: AtomicU64,
    received: AtomicU64,
}

impl LaneCounters {
    /// Adds to the bytes written.
    pub fn add_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds to the bytes read.
    pub fn add_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes written so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes read so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_directions_are_counted_apart() {
        let counters = LaneCounters::default();
        counters.add_sent(3);
        counters.add_received(5);
        counters.add_sent(4);
        assert_eq!((counters.sent(), counters.received()), (7, 5));
    }
}
