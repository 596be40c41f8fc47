//! From runs to a mode's summary.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use switchover_hybrid::report::HistogramError;

use super::bandwidth::Bandwidth;
use super::felt;
use super::figures::FIGURES;
use super::latency::{PARTS, Percentiles, merge};
use super::modes::Family;
use super::schema::{ModeReport, RunReport, Spread};
use super::statistics::{median, median_interval};

/// A mode's runs and what they say together, with the merged histograms that plots and files are made from.
#[derive(Clone, Debug)]
pub struct Aggregate {
    /// What goes into the report.
    pub report: ModeReport,
    /// Fault latencies by part, all runs together, in nanoseconds.
    pub merged: BTreeMap<&'static str, Histogram<u64>>,
    /// Fault latencies by part, run by run, with the run's number.
    pub by_run: BTreeMap<&'static str, Vec<(u32, Histogram<u64>)>>,
}

impl Aggregate {
    /// Of `runs`, which one mode of one VMM made.
    ///
    /// # Errors
    /// When a side reported a histogram that is none.
    pub fn of(mode: &str, vmm: &str, runs: Vec<RunReport>) -> Result<Self, HistogramError> {
        let mut summary = BTreeMap::new();
        // What a guest felt that was not moved says nothing of a move; where none was, it is all there is.
        let moved = runs.iter().any(|run| run.marks.is_some() && run.not_converged.is_none());
        let counted = |run: &&RunReport| !moved || run.not_converged.is_none();
        for figure in FIGURES {
            let values: Vec<f64> = runs.iter().filter(counted).filter_map(|run| (figure.get)(&run.figures)).collect();
            if let Some(spread) = Spread::of(values) {
                summary.insert(figure.key.to_owned(), spread);
            }
        }
        let mut merged = BTreeMap::new();
        let mut by_run = BTreeMap::new();
        for part in PARTS {
            let mut found = Vec::new();
            for run in &runs {
                if let Some(faults) = run.destination.as_ref().and_then(|side| side.faults.as_ref()) {
                    found.push((run.run, part.histogram(faults)?));
                }
            }
            let histograms: Vec<_> = found.iter().map(|(_, histogram)| histogram.clone()).collect();
            if let Some(sum) = merge(&histograms) {
                merged.insert(part.key, sum);
            }
            by_run.insert(part.key, found);
        }
        let mut latency: BTreeMap<_, _> =
            merged.iter().map(|(key, sum)| ((*key).to_owned(), Percentiles::of(sum))).collect();
        latency.extend(felt::merged(&runs).map(|visits| (felt::KEY.to_owned(), visits)));
        let verified = !runs.is_empty() && runs.iter().all(|run| run.verified);
        let report = ModeReport {
            mode: mode.to_owned(),
            family: None,
            vmm: vmm.to_owned(),
            guest: String::new(),
            bandwidth_bit_s: None,
            verified,
            summary,
            latency,
            runs,
        };
        Ok(Self { report, merged, by_run })
    }

    /// The same, of this guest over a link of this bandwidth.
    #[must_use]
    pub fn in_cell(mut self, guest: String, bandwidth: Bandwidth) -> Self {
        self.report.guest = guest;
        self.report.bandwidth_bit_s = bandwidth.bits_per_second();
        self
    }

    /// The same, of a mode of this family.
    #[must_use]
    pub fn of_family(mut self, family: Family) -> Self {
        self.report.family = Some(family);
        self
    }

    /// The run to show in plots: the one whose blackout is the median (the shorter of two middle ones), or else the
    /// first that has reports of both sides, or of the source alone. Of a VMM that reports nothing, the one with the median
    /// of what the guest saw.
    #[must_use]
    pub fn typical_run(&self) -> Option<&RunReport> {
        let complete = || self.report.runs.iter().filter(|run| run.source.is_some() && run.destination.is_some());
        let mut by_blackout: Vec<&RunReport> = complete().filter(|run| run.figures.blackout_ns.is_some()).collect();
        by_blackout.sort_by_key(|run| run.figures.blackout_ns);
        by_blackout
            .get(by_blackout.len().saturating_sub(1) / 2)
            .copied()
            .or_else(|| complete().next())
            .or_else(|| self.report.runs.iter().find(|run| run.source.is_some()))
            .or_else(|| self.report.run_with_median_gap())
    }
}

impl Spread {
    /// Of `values`; `None` where there are none.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.retain(|value| value.is_finite());
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let interval = median_interval(&values);
        let runs = u32::try_from(values.len()).unwrap_or(u32::MAX);
        Some(Self {
            median: median(values)?,
            min,
            max,
            runs,
            ci_low: interval.map(|interval| interval.low),
            ci_high: interval.map(|interval| interval.high),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::synthetic;
    use super::*;

    #[test]
    fn a_median_of_even_and_odd_counts() {
        let spread = Spread::of(vec![5.0, 1.0, 3.0]).unwrap();
        assert_eq!((spread.median, spread.min, spread.max, spread.runs), (3.0, 1.0, 5.0, 3));
        assert_eq!((spread.ci_low, spread.ci_high), (Some(1.0), Some(5.0)));
        assert_eq!(Spread::of(vec![4.0, 1.0, 3.0, 2.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of(vec![4.0]).unwrap().ci_low, None);
        assert_eq!(Spread::of(vec![]), None);
    }

    #[test]
    fn percentiles_come_from_the_histograms_of_all_runs() {
        let aggregate = Aggregate::of("postcopy", "switchover", synthetic::runs(3)).unwrap();
        let remote: u64 = aggregate.report.runs.iter().map(|run| run.figures.faults_remote.unwrap()).sum();
        let raced: u64 = aggregate.report.runs.iter().map(|run| run.figures.faults_raced.unwrap()).sum();
        assert_eq!(aggregate.report.latency["total"].count, remote + raced);
        assert_eq!(aggregate.report.latency["queue"].count, remote);
        assert_eq!(aggregate.report.summary["blackout_ns"].runs, 3);
    }

    #[test]
    fn the_typical_run_has_the_median_blackout() {
        let aggregate = Aggregate::of("postcopy", "switchover", synthetic::runs(3)).unwrap();
        let median = aggregate.report.summary["blackout_ns"].median;
        let typical = aggregate.typical_run().unwrap();
        assert_eq!(typical.figures.blackout_ns.map(|ns| ns as f64), Some(median));
    }

    #[test]
    fn one_doubtful_run_or_none_at_all_is_not_verified() {
        let mut runs = synthetic::runs(2);
        assert!(Aggregate::of("postcopy", "switchover", runs.clone()).unwrap().report.verified);
        runs[1].verified = false;
        assert!(!Aggregate::of("postcopy", "switchover", runs).unwrap().report.verified);
        assert!(!Aggregate::of("postcopy", "switchover", vec![]).unwrap().report.verified);
    }

    #[test]
    fn a_run_that_did_not_converge_counts_only_among_its_like() {
        let mut runs = synthetic::runs(2);
        let stayed = synthetic::stayed_runs(1).remove(0);
        runs.push(stayed.clone());
        let report = Aggregate::of("precopy", "switchover", runs).unwrap().report;
        assert_eq!((report.summary["lost_s"].runs, report.not_converged(), report.verified), (2, 1, true));
        let report = Aggregate::of("precopy", "switchover", vec![stayed]).unwrap().report;
        assert_eq!(report.summary["lost_s"].runs, 1);
        assert!(!report.summary.contains_key("cost_s") && !report.summary.contains_key("total_ns"));
    }

    #[test]
    fn a_run_that_failed_has_no_part_in_the_figures() {
        let mut runs = synthetic::runs(2);
        runs.push(RunReport { run: 3, doubts: vec!["it failed".to_owned()], ..RunReport::default() });
        let aggregate = Aggregate::of("postcopy", "switchover", runs).unwrap();
        assert_eq!(aggregate.report.summary["blackout_ns"].runs, 2);
        assert!(!aggregate.report.verified);
    }
}
