//! What the destination's pager counts and times, cheaply enough to leave on.

use hdrhistogram::Histogram;
use switchover_wire::clock::Nanos;

/// Two significant digits more than anyone reads, at 190 KiB a histogram.
const SIGNIFICANT_DIGITS: u8 = 3;
/// One minute: whatever takes longer is as bad.
const HIGHEST_NS: u64 = 60_000_000_000;

/// Each slice of a [`RateSeries`]: fine enough to show the drain, coarse enough to plot.
pub const SLICE_NS: u64 = 2_000_000;
/// Slices kept: the first four minutes of a drain. What comes later is added to the last.
const SLICES: usize = 120_000;

/// Buckets of [`WaitCounts`].
pub const WAIT_BUCKETS: usize = 24;

/// A histogram of nanoseconds.
pub type Latencies = Histogram<u64>;

fn latencies() -> Latencies {
    #[expect(clippy::expect_used, reason = "the bounds are constants that the crate accepts: 1 < 60e9, 3 digits")]
    Histogram::new_with_bounds(1, HIGHEST_NS, SIGNIFICANT_DIGITS).expect("constant bounds are valid")
}

/// The instants of one remote fault.
#[derive(Clone, Copy, Debug)]
pub struct FaultTimes {
    /// The fault was taken from the userfaultfd.
    pub taken: Nanos,
    /// Its request was about to be handed to the socket.
    pub submitted: Nanos,
    /// The last byte of its page was here.
    pub arrived: Nanos,
    /// The page was mapped.
    pub placed: Nanos,
    /// The wake-up call had returned.
    pub woken: Nanos,
}

/// Remote and raced faults by how long they took, in few words: for those who look often, and must not keep faults waiting for a
/// copy of whole histograms.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WaitCounts {
    /// Faults that were timed, from taken to woken.
    pub faults: u64,
    /// The sum of their times in nanoseconds.
    pub total_ns: u64,
    /// Bucket N has those of 2^N up to 2^(N+1) µs; the first has shorter ones too, the last longer ones.
    pub buckets: [u64; WAIT_BUCKETS],
}

impl WaitCounts {
    /// Counts a fault that took `ns`.
    pub fn record(&mut self, ns: u64) {
        let bucket = (ns / 1_000).checked_ilog2().unwrap_or(0) as usize;
        self.buckets[bucket.min(WAIT_BUCKETS - 1)] += 1;
        self.faults += 1;
        self.total_ns = self.total_ns.saturating_add(ns);
    }

    /// Counts those of `other` too.
    pub fn add(&mut self, other: &Self) {
        self.faults += other.faults;
        self.total_ns = self.total_ns.saturating_add(other.total_ns);
        self.buckets.iter_mut().zip(other.buckets).for_each(|(bucket, more)| *bucket += more);
    }

    /// The mean time of a fault in nanoseconds; `None` where there was none.
    #[must_use]
    pub const fn mean_ns(&self) -> Option<u64> {
        self.total_ns.checked_div(self.faults)
    }
}

/// What faults cost.
#[derive(Clone, Debug)]
pub struct FaultStats {
    /// Pages asked for that came as the answer.
    pub remote: u64,
    /// Pages asked for whose pushed copy won.
    pub raced: u64,
    /// Faults on pages that were here or landing already.
    pub local: u64,
    /// Faults on pages that another fault had asked for already.
    pub joined: u64,
    /// Remote and raced: taken to woken.
    pub total: Latencies,
    /// Remote: taken to submitted.
    pub queue: Latencies,
    /// Remote: submitted to arrived.
    pub wire: Latencies,
    /// Remote: arrived to placed.
    pub place: Latencies,
    /// Remote: placed to woken.
    pub wake: Latencies,
    /// Local: taken to woken. Faults on landing pages, which the lane wakes, are counted but not timed.
    pub local_total: Latencies,
    /// Remote and raced faults over time.
    pub rate: RateSeries,
    /// Remote and raced, as `total` has them.
    pub waits: WaitCounts,
}

impl FaultStats {
    /// Nothing counted; time slices start now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            remote: 0,
            raced: 0,
            local: 0,
            joined: 0,
            total: latencies(),
            queue: latencies(),
            wire: latencies(),
            place: latencies(),
            wake: latencies(),
            local_total: latencies(),
            rate: RateSeries::new(),
            waits: WaitCounts::default(),
        }
    }

    /// Counts a fault whose page came as the answer.
    pub fn record_remote(&mut self, times: FaultTimes) {
        self.remote += 1;
        self.rate.add(times.taken, 1);
        self.count_wait(times.woken.since(times.taken));
        self.queue.saturating_record(times.submitted.since(times.taken).max(1));
        self.wire.saturating_record(times.arrived.since(times.submitted).max(1));
        self.place.saturating_record(times.placed.since(times.arrived).max(1));
        self.wake.saturating_record(times.woken.since(times.placed).max(1));
    }

    /// Counts a fault whose pushed copy came first, and when that woke it, where that is known.
    pub fn record_raced(&mut self, taken: Nanos, woken: Option<Nanos>) {
        self.raced += 1;
        self.rate.add(taken, 1);
        if let Some(woken) = woken {
            self.count_wait(woken.since(taken));
        }
    }

    /// Counts what another shard's faults cost too.
    pub fn add(&mut self, other: &Self) {
        self.remote += other.remote;
        self.raced += other.raced;
        self.local += other.local;
        self.joined += other.joined;
        let histograms = [
            (&mut self.total, &other.total),
            (&mut self.queue, &other.queue),
            (&mut self.wire, &other.wire),
            (&mut self.place, &other.place),
            (&mut self.wake, &other.wake),
            (&mut self.local_total, &other.local_total),
        ];
        // All have the same bounds: none has a value that another could not take.
        histograms.into_iter().for_each(|(all, more)| *all += more);
        self.rate.add_all(&other.rate);
        self.waits.add(&other.waits);
    }

    fn count_wait(&mut self, ns: u64) {
        self.total.saturating_record(ns.max(1));
        self.waits.record(ns);
    }

    /// Counts a fault on a page that was here.
    pub fn record_local(&mut self, taken: Nanos, woken: Nanos) {
        self.local += 1;
        self.local_total.saturating_record(woken.since(taken).max(1));
    }
}

impl Default for FaultStats {
    fn default() -> Self {
        Self::new()
    }
}

/// Counts per slice of time.
#[derive(Clone, Debug)]
pub struct RateSeries {
    /// The first slice's start: the first thing counted.
    pub start: Option<Nanos>,
    /// Counts, slice after slice.
    pub counts: Vec<u32>,
}

impl RateSeries {
    /// Empty, with room for the usual drain so that counting does not allocate.
    #[must_use]
    pub fn new() -> Self {
        Self { start: None, counts: Vec::with_capacity(4096) }
    }

    /// Nothing was counted.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.start.is_none()
    }

    /// Counts `count` at `at`.
    pub fn add(&mut self, at: Nanos, count: u32) {
        let start = *self.start.get_or_insert(at);
        let slice = usize::try_from(at.since(start) / SLICE_NS).unwrap_or(usize::MAX).min(SLICES - 1);
        if self.counts.len() <= slice {
            self.counts.resize(slice + 1, 0);
        }
        self.counts[slice] = self.counts[slice].saturating_add(count);
    }

    /// Adds the counts of another series, whichever began first.
    pub fn add_all(&mut self, other: &Self) {
        if let Some(start) = self.start.into_iter().chain(other.start).min() {
            *self = Self { start: Some(start), counts: Self::merged([&*self, other].into_iter(), start) };
        }
    }

    /// Adds the counts of several series over one common start.
    #[must_use]
    pub fn merged<'a>(all: impl Iterator<Item = &'a Self> + Clone, start: Nanos) -> Vec<u32> {
        let mut merged = Self { start: Some(start), counts: Vec::new() };
        for series in all {
            let Some(own_start) = series.start else { continue };
            for (slice, count) in series.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
                merged.add(Nanos(own_start.0 + slice as u64 * SLICE_NS), *count);
            }
        }
        merged.counts
    }
}

impl Default for RateSeries {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_fault_is_split_without_remainder() {
        let mut stats = FaultStats::new();
        let at = |us: u64| Nanos(1_000_000 + us * 1000);
        stats.record_remote(FaultTimes {
            taken: at(0),
            submitted: at(2),
            arrived: at(52),
            placed: at(53),
            woken: at(54),
        });
        let parts = stats.queue.max() + stats.wire.max() + stats.place.max() + stats.wake.max();
        assert_eq!((stats.remote, stats.total.len()), (1, 1));
        assert!(parts.abs_diff(stats.total.max()) < 100, "{parts} against {}", stats.total.max());
    }

    #[test]
    fn waits_fall_into_buckets_of_powers_of_two_microseconds() {
        let mut stats = FaultStats::new();
        let times = [0, 999, 1_999, 2_000, 3_999, 4_000, 1_023_999, 1_024_000, 8_388_608_000, u64::MAX / 4];
        for ns in times {
            stats.record_raced(Nanos(0), Some(Nanos(ns)));
        }
        stats.record_raced(Nanos(0), None);
        let filled: Vec<_> = stats.waits.buckets.iter().enumerate().filter(|(_, count)| **count > 0).collect();
        assert_eq!(filled, [(0, &3), (1, &2), (2, &1), (9, &1), (10, &1), (23, &2)]);
        assert_eq!((stats.waits.faults, stats.total.len()), (10, 10));
        assert_eq!(stats.waits.mean_ns(), Some(times.iter().sum::<u64>() / 10));
        assert_eq!(WaitCounts::default().mean_ns(), None);
    }

    #[test]
    fn two_shards_cost_what_both_cost() {
        let (mut one, mut two, mut both) = (FaultStats::new(), FaultStats::new(), FaultStats::new());
        let at = |us: u64| Nanos(100_000_000 + us * 1000);
        let times = |us: u64| FaultTimes {
            taken: at(us),
            submitted: at(us + 1),
            arrived: at(us + 30),
            placed: at(us + 32),
            woken: at(us + 35),
        };
        // The second shard's first fault comes before the first's.
        let record = |stats: &mut FaultStats, us: u64| {
            stats.record_remote(times(us));
            stats.record_raced(at(us), Some(at(us + 50)));
            stats.record_local(at(us), at(us + 3));
            stats.joined += us;
        };
        // The second shard's first fault comes before the first's.
        record(&mut one, 9_000);
        [1_000, 20_000].into_iter().for_each(|us| record(&mut two, us));
        [9_000, 1_000, 20_000].into_iter().for_each(|us| record(&mut both, us));
        one.add(&two);
        assert_eq!((one.remote, one.raced, one.local, one.joined), (3, 3, 3, 30_000));
        assert_eq!((&one.total, &one.queue, &one.wire), (&both.total, &both.queue, &both.wire));
        assert_eq!((&one.place, &one.wake, &one.local_total), (&both.place, &both.wake, &both.local_total));
        assert_eq!(one.waits, both.waits);
        assert_eq!(one.rate.start, Some(at(1_000)));
        assert_eq!(one.rate.counts, [2, 0, 0, 0, 2, 0, 0, 0, 0, 2]);
        let mut none = FaultStats::new();
        none.add(&FaultStats::new());
        assert!(none.rate.is_empty() && none.rate.counts.is_empty());
    }

    #[test]
    fn series_of_several_lanes_add_up() {
        let (mut one, mut two) = (RateSeries::new(), RateSeries::new());
        one.add(Nanos(10_000_000), 3);
        two.add(Nanos(10_000_000 + 2 * SLICE_NS), 4);
        one.add(Nanos(10_000_000 + 2 * SLICE_NS), 1);
        assert_eq!(RateSeries::merged([&one, &two].into_iter(), Nanos(10_000_000)), vec![3, 0, 5]);
    }

    #[test]
    fn a_time_far_off_does_not_allocate_without_bound() {
        let mut series = RateSeries::new();
        series.add(Nanos(0), 1);
        series.add(Nanos(u64::MAX), 1);
        assert_eq!(series.counts.len(), SLICES);
    }
}
