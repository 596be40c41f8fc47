//! Latencies over all runs: histograms merged, never averaged, and percentiles with the count behind them.

use hdrhistogram::Histogram;
use switchover_hybrid::report::{FaultReport, HistogramError};

pub use crate::floor::Percentiles;

/// One of the parts into which a fault's latency is split.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Its field in [`FaultReport`], and part of its files' names.
    pub key: &'static str,
    /// For people.
    pub label: &'static str,
    encoded: fn(&FaultReport) -> &switchover_hybrid::report::EncodedHistogram,
}

/// Every part, in the order in which it is shown.
pub const PARTS: &[Part] = &[
    Part { key: "total", label: "remote and raced, whole", encoded: |f| &f.total },
    Part { key: "queue", label: "queue: taken → request submitted", encoded: |f| &f.queue },
    Part { key: "wire", label: "wire: → page arrived", encoded: |f| &f.wire },
    Part { key: "place", label: "place: → page mapped", encoded: |f| &f.place },
    Part { key: "wake", label: "wake: → vCPU woken", encoded: |f| &f.wake },
    Part { key: "local_total", label: "local, whole", encoded: |f| &f.local_total },
];

impl Part {
    /// The histogram of this part in one run.
    ///
    /// # Errors
    /// When the report holds something that is no histogram.
    pub fn histogram(&self, faults: &FaultReport) -> Result<Histogram<u64>, HistogramError> {
        (self.encoded)(faults).decode()
    }
}

/// The sum of all runs' histograms of one part.
#[must_use]
pub fn merge(runs: &[Histogram<u64>]) -> Option<Histogram<u64>> {
    let mut runs = runs.iter();
    let mut sum = runs.next()?.clone();
    sum.auto(true);
    for run in runs {
        // With auto-resizing on, what does not fit makes room for itself.
        sum.add(run).ok()?;
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(values: &[u64]) -> Histogram<u64> {
        let mut histogram = Histogram::new(3).unwrap();
        for value in values {
            histogram.record(*value).unwrap();
        }
        histogram
    }

    #[test]
    fn a_merged_percentile_is_not_the_mean_of_percentiles() {
        let quick = histogram(&[10; 99]);
        let slow = histogram(&[1000]);
        let merged = merge(&[quick, slow]).unwrap();
        let percentiles = Percentiles::of(&merged);
        assert_eq!((percentiles.count, percentiles.p50_ns, percentiles.p90_ns), (100, 10, 10));
        assert_eq!((percentiles.p99_ns, percentiles.p99_9_ns, percentiles.max_ns), (10, 1000, 1000));
    }

    #[test]
    fn histograms_of_different_ranges_merge() {
        let mut narrow = Histogram::<u64>::new_with_bounds(1, 1000, 3).unwrap();
        narrow.record(500).unwrap();
        let merged = merge(&[narrow, histogram(&[5_000_000_000])]).unwrap();
        assert_eq!(merged.len(), 2);
        assert!(merge(&[]).is_none());
    }
}
