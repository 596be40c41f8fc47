//! What a vCPU counts and another one reads, such that nothing is lost between two readings.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU64, AtomicUsize};

use crate::cpu::MAX_CPUS;
use crate::pages::Corruption;

/// Corrupt visits of a vCPU that are described.
pub const DETAILS: usize = 4;
/// log2 of a gap in ticks.
pub const BUCKETS: usize = 64;
/// How many parts of equal width each of them is cut into for the times of visits, and how many there are of those.
const PARTS_LOG2: u32 = 3;
pub const FINE_BUCKETS: usize = BUCKETS << PARTS_LOG2;

/// One vCPU's counts. It alone writes them, except that the reader takes the longest gap away and notes what it told. All but
/// the longest only grow: whatever a reading misses is in the next.
#[repr(C, align(128))]
pub struct Meter {
    gaps: [AtomicU64; BUCKETS],
    /// Times of visits, and how many of them were reported; counted only where they are asked for.
    times: [AtomicU64; FINE_BUCKETS],
    told: [AtomicU64; FINE_BUCKETS],
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
            times: [const { AtomicU64::new(0) }; FINE_BUCKETS],
            told: [const { AtomicU64::new(0) }; FINE_BUCKETS],
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

    /// Counts a visit that took so many ticks by itself.
    #[inline]
    pub fn visit_took(&self, ticks: u64) {
        let bucket = &self.times[fine_bucket(ticks)];
        bucket.store(bucket.load(Relaxed) + 1, Relaxed);
    }

    /// The visits' times counted since the last call, by bucket.
    pub fn take_times(&self) -> impl Iterator<Item = u64> {
        self.times.iter().zip(&self.told).map(|(count, told)| {
            let count = count.load(Relaxed);
            count - told.swap(count, Relaxed)
        })
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

/// Bucket 8·o + s holds from 2^o·(1 + s/8) ticks on, to below 2^o·(1 + (s + 1)/8); 0 ticks count as 1.
#[inline]
fn fine_bucket(ticks: u64) -> usize {
    let ticks = ticks.max(1);
    let octave = ticks.ilog2();
    let part = match octave.checked_sub(PARTS_LOG2) {
        Some(shift) => ticks >> shift,
        None => ticks << (PARTS_LOG2 - octave),
    };
    ((octave as usize) << PARTS_LOG2) + (part & ((1 << PARTS_LOG2) - 1)) as usize
}
