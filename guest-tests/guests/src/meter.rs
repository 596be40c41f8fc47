//! What a vCPU counts and another one reads, such that nothing is lost between two readings.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU64, AtomicUsize};

use crate::cpu::MAX_CPUS;
use crate::pages::Corruption;

/// Corrupt visits of a vCPU that are described.
pub const DETAILS: usize = 4;
/// log2 of a gap in ticks.
pub const BUCKETS: usize = 64;

/// One vCPU's counts. It alone writes them, except that the reader takes the longest gap away. All but that one
/// only grow: whatever a reading misses is in the next.
#[repr(C, align(128))]
pub struct Meter {
    gaps: [AtomicU64; BUCKETS],
    longest: AtomicU64,
    bad: AtomicU64,
    described: AtomicUsize,
    details: [[AtomicU64; 6]; DETAILS],
}

/// Every vCPU's.
pub static METERS: [Meter; MAX_CPUS] = [const { Meter::new() }; MAX_CPUS];

impl Meter {
    const fn new() -> Self {
        Self {
            gaps: [const { AtomicU64::new(0) }; BUCKETS],
            longest: AtomicU64::new(0),
            bad: AtomicU64::new(0),
            described: AtomicUsize::new(0),
            details: [const { [const { AtomicU64::new(0) }; 6] }; DETAILS],
        }
    }

    /// Counts a visit that ended so many ticks after the one before.
    #[inline]
    pub fn visit(&self, gap: u64) {
        let bucket = &self.gaps[(gap | 1).ilog2() as usize];
        bucket.store(bucket.load(Relaxed) + 1, Relaxed);
        if gap > self.longest.load(Relaxed) {
            // Not a plain store: the reader may have taken the old one just now.
            self.longest.fetch_max(gap, AcqRel);
        }
    }

    /// Counts a corrupt visit, and remembers the first few.
    #[cold]
    pub fn corrupt(&self, found: &Corruption) {
        self.bad.store(self.bad.load(Relaxed) + 1, Relaxed);
        let n = self.described.load(Relaxed);
        if let Some(detail) = self.details.get(n) {
            let [counter, expected] = found.counter;
            let [got, wanted] = found.value;
            for (to, value) in detail.iter().zip([found.page, counter, expected, found.word, got, wanted]) {
                to.store(value, Relaxed);
            }
            self.described.store(n + 1, Release);
        }
    }

    /// The gaps counted so far, by bucket.
    pub fn gaps(&self) -> impl Iterator<Item = u64> {
        self.gaps.iter().map(|count| count.load(Relaxed))
    }

    /// Takes away the longest gap since the last call.
    pub fn take_longest(&self) -> u64 {
        self.longest.swap(0, AcqRel)
    }

    /// Corrupt visits so far.
    pub fn bad(&self) -> u64 {
        self.bad.load(Relaxed)
    }

    /// Description number `n`, once it is there.
    pub fn detail(&self, n: usize) -> Option<Corruption> {
        if n >= self.described.load(Acquire) {
            return None;
        }
        let [page, counter, expected, word, got, wanted] = self.details[n].each_ref().map(|value| value.load(Relaxed));
        Some(Corruption { page, counter: [counter, expected], word, value: [got, wanted] })
    }
}
