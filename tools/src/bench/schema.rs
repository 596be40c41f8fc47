//! `report.json`: what a bench run found, in full.
//!
//! Fields are only ever added under one schema name; a change of meaning makes a new one. Nanoseconds end in `_ns`,
//! seconds in `_s`; instants are of a `CLOCK_MONOTONIC` (the bench's in `marks` and `guest`, each side's own in `source`
//! and `destination`: see their `clock`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use switchover_hybrid::report::SideReport;

use super::bandwidth::Bandwidth;
use super::comparison::Comparison;
use super::felt::Felt;
use super::figures::Figures;
use super::guest_trace::{GuestTrace, Marks};
use super::host_info::HostInfo;
use super::latency::Percentiles;
use super::matrix::Matrix;
use super::modes::Family;
use crate::floor::FloorReport;

/// What [`ModeReport::vmm`] says of this program's own machines.
pub const OURS: &str = "switchover";

/// The name of this format and its version.
pub const SCHEMA: &str = "switchover.report/v1";

/// The whole file.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// When the bench began, in UTC: `2026-11-20T19:45:00Z`.
    pub created: String,
    /// The version of switchover that wrote it.
    pub switchover: String,
    /// Every run's guest memory was verified, and there was at least one run.
    pub verified: bool,
    /// The machine and its kernel.
    pub host: HostInfo,
    /// What was asked for.
    pub settings: Settings,
    /// What this machine can do at best, measured just before the runs.
    pub floor: Option<FloorReport>,
    /// One entry a mode, guest and bandwidth.
    pub modes: Vec<ModeReport>,
    /// The modes side by side, where there are several.
    #[serde(default)]
    pub matrix: Option<Matrix>,
    /// This VMM beside a peer, where one was measured.
    #[serde(default)]
    pub comparison: Option<Comparison>,
    /// The user ended it before every run had been made: what is here was.
    #[serde(default)]
    pub interrupted: bool,
}

/// What was asked for.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// The built-in guest's name, or the ELF file's; several with commas between.
    pub guest: String,
    /// The guest's command line.
    pub append: String,
    /// Bytes of guest RAM.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// `tcp`, `unix` or `veth`.
    pub link: String,
    /// Runs of each mode.
    pub runs: u32,
    /// Time between the guest's lines, in milliseconds.
    pub period_ms: u64,
    /// Seconds from the guest's readiness to `migrate`.
    pub warmup_s: f64,
    /// Seconds from the completion to the end.
    pub after_s: f64,
    /// Seconds after which a pre-copy was cancelled; absent where it was not.
    #[serde(default)]
    pub patience_s: Option<f64>,
    /// Seconds for which the pusher was held back after the handoff; absent where it was not.
    #[serde(default)]
    pub hold_push_s: Option<f64>,
    /// Migration parameters that were set on both sides besides.
    #[serde(default)]
    pub parameters: Map<String, Value>,
    /// Whether this VMM's machines were confined to their system calls: `on`, `log` or `off`. Empty where there was no filter yet.
    #[serde(default)]
    pub seccomp: String,
    /// What the order of the runs followed from.
    #[serde(default)]
    pub seed: u32,
    /// The VMM that was measured beside this one.
    #[serde(default)]
    pub peer: Option<PeerInfo>,
}

/// A VMM that was measured beside this one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerInfo {
    /// What its modes' `vmm` says.
    pub name: String,
    /// For people: `QEMU`.
    pub title: String,
    /// Its version, in its own words.
    pub version: String,
    /// Its program.
    pub program: String,
}

/// All runs of one mode.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ModeReport {
    /// `precopy`, `postcopy` or `hybrid`, or what a peer calls it.
    pub mode: String,
    /// Whether the guest may be handed over before all of its memory is.
    #[serde(default)]
    pub family: Option<Family>,
    /// Whose virtual machine: `switchover`, or a peer's name.
    pub vmm: String,
    /// The guest; see [`Settings::guest`].
    #[serde(default)]
    pub guest: String,
    /// What the link could carry, in bit/s; absent where nothing bounded it.
    #[serde(default)]
    pub bandwidth_bit_s: Option<u64>,
    /// Every run was verified, and there was at least one.
    pub verified: bool,
    /// Each figure over the runs that moved the guest (over all where none did), by its name in `runs[].figures`. A figure
    /// that none of them has is left out.
    pub summary: BTreeMap<String, Spread>,
    /// Fault latencies over all runs together, by part: `total`, `queue`, `wire`, `place`, `wake`, `local_total`; and
    /// `guest_visit`, the guest's visits from the handoff on, where it reports how long they took.
    pub latency: BTreeMap<String, Percentiles>,
    /// The runs one by one.
    pub runs: Vec<RunReport>,
}

/// A figure over several runs.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Spread {
    /// The middle one, or the mean of the two middle ones.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// Runs that have the figure.
    pub runs: u32,
    /// The lower end of the median's confidence interval of 95 %, by the percentile bootstrap; absent where one run has the
    /// figure.
    #[serde(default)]
    pub ci_low: Option<f64>,
    /// Its upper end.
    #[serde(default)]
    pub ci_high: Option<f64>,
}

/// One run.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct RunReport {
    /// Counted from 1.
    pub run: u32,
    /// Nothing speaks against the guest's memory being whole.
    pub verified: bool,
    /// What does.
    pub doubts: Vec<String>,
    /// Why the guest was not moved, where pre-copy did not converge: a result, not a failure. It goes on at the source.
    #[serde(default)]
    pub not_converged: Option<String>,
    /// What it comes down to.
    pub figures: Figures,
    /// When the bench did what.
    pub marks: Option<Marks>,
    /// How long the guest's visits took from the handoff on, where it reports that.
    #[serde(default)]
    pub felt: Option<Felt>,
    /// What the guest said.
    pub guest: Option<GuestTrace>,
    /// What the source reported.
    pub source: Option<SideReport>,
    /// What the destination reported.
    pub destination: Option<SideReport>,
}

impl ModeReport {
    /// Whether this program's own machines were moved.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.vmm == OURS
    }

    /// The mode's name, behind the VMM's where that is not this program's.
    #[must_use]
    pub fn name(&self) -> String {
        if self.is_ours() { self.mode.clone() } else { format!("{} {}", self.vmm, self.mode) }
    }

    /// Runs that were carried out to an end, be it that the guest stayed where it was.
    pub fn carried_out(&self) -> impl Iterator<Item = &RunReport> {
        self.runs.iter().filter(|run| run.marks.is_some())
    }

    /// Of the runs that moved the guest, the one whose guest saw the median gap (the shorter of two middle ones).
    #[must_use]
    pub fn run_with_median_gap(&self) -> Option<&RunReport> {
        let moved = self.carried_out().filter(|run| run.not_converged.is_none());
        let mut runs: Vec<_> = moved.filter(|run| run.figures.progress.gap_ns.is_some()).collect();
        runs.sort_by_key(|run| run.figures.progress.gap_ns);
        runs.get(runs.len().saturating_sub(1) / 2).copied()
    }

    /// How many runs did not converge.
    #[must_use]
    pub fn not_converged(&self) -> usize {
        self.runs.iter().filter(|run| run.not_converged.is_some()).count()
    }

    /// The guest and the bandwidth, and what to call them in a file's name: `hotset-1G`.
    #[must_use]
    pub fn cell_name(&self) -> String {
        let guest = self.guest.rsplit('/').next().unwrap_or_default();
        format!("{guest}-{}", Bandwidth::from(self.bandwidth_bit_s))
    }
}

#[cfg(test)]
mod tests {
    use super::super::aggregate::Aggregate;
    use super::super::synthetic;
    use super::*;

    #[test]
    fn a_report_reads_back_as_it_was_written() {
        let mode = Aggregate::of("postcopy", "switchover", synthetic::runs(2)).unwrap().report;
        let report = synthetic::report(vec![mode]);
        let json = serde_json::to_string_pretty(&report).unwrap();
        // Not assert_eq: it would print megabytes.
        assert!(serde_json::from_str::<Report>(&json).unwrap() == report);
    }

    #[test]
    fn the_names_that_readers_rely_on_are_there() {
        let mode = Aggregate::of("postcopy", "switchover", synthetic::runs(2)).unwrap().report;
        let json = serde_json::to_value(synthetic::report(vec![mode])).unwrap();
        assert_eq!(json["schema"], "switchover.report/v1");
        assert_eq!(json["verified"], true);
        for pointer in [
            "/host/kernel",
            "/settings/memory",
            "/floor/guest_fault/spinning/p99_ns",
            "/floor/sums/0/p50_ns",
            "/modes/0/summary/blackout_ns/median",
            "/modes/0/summary/gap_ns/max",
            "/modes/0/summary/lost_s/min",
            "/modes/0/latency/total/p99_9_ns",
            "/modes/0/latency/wire/count",
            "/modes/0/runs/1/figures/blackout_ns",
            "/modes/0/runs/1/guest/periods/3/visits",
            "/modes/0/runs/1/source/instants/last_exit_ns",
            "/modes/0/runs/1/destination/faults/total",
            "/modes/0/runs/1/marks/handoff_ns",
        ] {
            let found = json.pointer(pointer);
            assert!(found.is_some_and(|value| !value.is_null()), "{pointer}");
        }
    }
}
