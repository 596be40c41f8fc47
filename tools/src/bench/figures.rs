//! The figures of one run, and the list of them that tables and summaries go through.
//!
//! `docs/report.md` says of each one its clock, its start, its end and what it leaves out.

use serde::{Deserialize, Serialize};
use switchover_hybrid::report::{LaneBytes, SideReport};
use switchover_wire::types::PAGE_SIZE_U64;

use super::guest_trace::{Progress, seconds};

/// What one run comes down to. A figure that cannot be had is absent, never 0.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Figures {
    /// From the last vCPU's exit on the source to the first one's entry on the destination; absent where the two
    /// sides read different clocks.
    pub blackout_ns: Option<u64>,
    /// How the guest fared.
    #[serde(flatten)]
    pub progress: Progress,
    /// From the migration's start on the source until it knew that the destination had everything.
    pub total_ns: Option<u64>,
    /// From the migration's start on the source until the destination was prepared.
    pub setup_ns: Option<u64>,
    /// From the commit's arrival at the destination to the last page's placement there.
    pub drain_ns: Option<u64>,
    /// Non-zero bytes placed, over `drain_ns`, in 10^9 bit/s.
    pub drain_gbit_s: Option<f64>,
    /// Faults whose page was asked for and came as the answer.
    pub faults_remote: Option<u64>,
    /// Faults whose page was asked for and whose pushed copy won.
    pub faults_raced: Option<u64>,
    /// Faults whose page was at the destination already.
    pub faults_local: Option<u64>,
    /// Faults on a page that another fault had asked for already.
    pub faults_joined: Option<u64>,
    /// Zero pages.
    pub pages_zero: Option<u64>,
    /// Pages that came on a bulk lane.
    pub pages_pushed: Option<u64>,
    /// Pages that came on a fault lane.
    pub pages_requested: Option<u64>,
    /// Pages that came twice.
    pub pages_discarded: Option<u64>,
    /// Bytes of all lanes, both ways.
    pub wire_bytes: Option<u64>,
    /// Bytes of vCPU and device state.
    pub state_bytes: Option<u64>,
    /// CPU time of the source's migration threads, user and system.
    pub cpu_source_s: Option<f64>,
    /// CPU time of the destination's migration threads, user and system.
    pub cpu_destination_s: Option<f64>,
}

/// How a figure is to be shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Nanoseconds, shown as milliseconds.
    Milliseconds,
    /// Seconds.
    Seconds,
    /// 10^9 bit/s.
    GigabitsPerSecond,
    /// Visits a second.
    PerSecond,
    /// Bytes, shown in binary multiples.
    Bytes,
    /// A plain count.
    Count,
}

/// One figure: its name in `report.json`, its name for people, and where it stands in [`Figures`].
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    /// The field of [`Figures`].
    pub key: &'static str,
    /// For people.
    pub label: &'static str,
    /// How it is shown.
    pub unit: Unit,
    /// Takes it out of a run's figures, in the unit of its field.
    pub get: fn(&Figures) -> Option<f64>,
}

/// Every figure, in the order in which it is shown.
pub const FIGURES: &[Figure] = &[
    figure("blackout_ns", "Blackout, between the hosts' clocks", Unit::Milliseconds, |f| count(f.blackout_ns)),
    figure("gap_ns", "Longest gap that the guest saw", Unit::Milliseconds, |f| count(f.progress.gap_ns)),
    figure("gap_before_ns", "… and before the move", Unit::Milliseconds, |f| count(f.progress.gap_before_ns)),
    figure("lost_s", "Guest progress lost", Unit::Seconds, |f| f.progress.lost_s),
    figure("steady_visits_per_s", "Guest's steady rate before", Unit::PerSecond, |f| f.progress.steady_visits_per_s),
    figure("drain_ns", "Drain", Unit::Milliseconds, |f| count(f.drain_ns)),
    figure("drain_gbit_s", "Drain rate", Unit::GigabitsPerSecond, |f| f.drain_gbit_s),
    figure("setup_ns", "Set-up", Unit::Milliseconds, |f| count(f.setup_ns)),
    figure("total_ns", "Whole migration", Unit::Milliseconds, |f| count(f.total_ns)),
    figure("faults_remote", "Faults, remote", Unit::Count, |f| count(f.faults_remote)),
    figure("faults_raced", "Faults, raced", Unit::Count, |f| count(f.faults_raced)),
    figure("faults_local", "Faults, local", Unit::Count, |f| count(f.faults_local)),
    figure("faults_joined", "Faults, joined", Unit::Count, |f| count(f.faults_joined)),
    figure("pages_pushed", "Pages pushed", Unit::Count, |f| count(f.pages_pushed)),
    figure("pages_requested", "Pages requested", Unit::Count, |f| count(f.pages_requested)),
    figure("pages_zero", "Pages zero", Unit::Count, |f| count(f.pages_zero)),
    figure("pages_discarded", "Pages that came twice", Unit::Count, |f| count(f.pages_discarded)),
    figure("wire_bytes", "Bytes on all lanes", Unit::Bytes, |f| count(f.wire_bytes)),
    figure("state_bytes", "vCPU and device state", Unit::Bytes, |f| count(f.state_bytes)),
    figure("cpu_source_s", "CPU, source's migration threads", Unit::Seconds, |f| f.cpu_source_s),
    figure("cpu_destination_s", "CPU, destination's migration threads", Unit::Seconds, |f| f.cpu_destination_s),
];

impl Figures {
    /// The figures of a run from what both sides reported and how the guest fared.
    #[must_use]
    pub fn of(source: &SideReport, destination: &SideReport, progress: Progress) -> Self {
        let pages = destination.pages;
        let faults = destination.faults.as_ref();
        let drain_ns = span(destination.instants.commit_ns, destination.instants.last_page_ns);
        let started = source.phases.first().map(|phase| phase.start_ns);
        let setup = source.phases.iter().find(|phase| phase.name == "setup");
        Self {
            blackout_ns: blackout(source, destination),
            progress,
            total_ns: span(started, source.instants.drained_ns),
            setup_ns: setup.and_then(|phase| span(Some(phase.start_ns), phase.end_ns)),
            drain_ns,
            drain_gbit_s: pages.zip(drain_ns).and_then(|(pages, ns)| gbit_s(pages.pushed + pages.requested, ns)),
            faults_remote: faults.map(|faults| faults.remote),
            faults_raced: faults.map(|faults| faults.raced),
            faults_local: faults.map(|faults| faults.local),
            faults_joined: faults.map(|faults| faults.joined),
            pages_zero: pages.map(|pages| pages.zero),
            pages_pushed: pages.map(|pages| pages.pushed),
            pages_requested: pages.map(|pages| pages.requested),
            pages_discarded: pages.map(|pages| pages.discarded),
            wire_bytes: Some(source.lanes.iter().map(LaneBytes::both_ways).sum()),
            state_bytes: Some(source.state_bytes),
            cpu_source_s: Some(source.cpu.user + source.cpu.system),
            cpu_destination_s: Some(destination.cpu.user + destination.cpu.system),
        }
    }
}

/// Bytes of a lane in both directions.
trait BothWays {
    fn both_ways(&self) -> u64;
}

impl BothWays for LaneBytes {
    fn both_ways(&self) -> u64 {
        self.sent.saturating_add(self.received)
    }
}

const fn figure(key: &'static str, label: &'static str, unit: Unit, get: fn(&Figures) -> Option<f64>) -> Figure {
    Figure { key, label, unit, get }
}

/// The stretch in which no vCPU ran, where both sides read one clock.
fn blackout(source: &SideReport, destination: &SideReport) -> Option<u64> {
    if !source.clock.same_host(&destination.clock) {
        return None;
    }
    span(source.instants.last_exit_ns, destination.instants.first_entry_ns)
}

/// A span that ends before it starts is no span.
fn span(start: Option<u64>, end: Option<u64>) -> Option<u64> {
    end?.checked_sub(start?)
}

fn gbit_s(pages: u64, ns: u64) -> Option<f64> {
    let bits = count(Some(pages.checked_mul(PAGE_SIZE_U64)?.checked_mul(8)?))?;
    // Bits in a nanosecond are gigabits in a second.
    (ns > 0).then(|| bits / (seconds(ns) * 1e9))
}

#[expect(clippy::cast_precision_loss, reason = "shown to four digits; exact below 2^52")]
fn count(value: Option<u64>) -> Option<f64> {
    value.map(|value| value as f64)
}

#[cfg(test)]
mod tests {
    use super::super::synthetic;
    use super::*;

    #[test]
    fn figures_are_taken_between_the_right_instants() {
        let (source, destination) = synthetic::sides(1);
        let figures = Figures::of(&source, &destination, Progress::default());
        let (s, d) = (source.instants, destination.instants);
        assert_eq!(figures.blackout_ns, Some(d.first_entry_ns.unwrap() - s.last_exit_ns.unwrap()));
        assert_eq!(figures.drain_ns, Some(d.last_page_ns.unwrap() - d.commit_ns.unwrap()));
        assert_eq!(figures.total_ns, Some(s.drained_ns.unwrap() - source.phases[0].start_ns));
        let pages = destination.pages.unwrap();
        let bits = (pages.pushed + pages.requested) as f64 * 4096.0 * 8.0;
        assert!((figures.drain_gbit_s.unwrap() - bits / figures.drain_ns.unwrap() as f64).abs() < 1e-9);
    }

    #[test]
    fn two_hosts_clocks_are_never_subtracted() {
        let (source, mut destination) = synthetic::sides(1);
        destination.clock.boot_id = "another".to_owned();
        assert_eq!(Figures::of(&source, &destination, Progress::default()).blackout_ns, None);
    }

    #[test]
    fn a_span_that_runs_backwards_is_none() {
        let (source, mut destination) = synthetic::sides(1);
        destination.instants.first_entry_ns = Some(1);
        assert_eq!(Figures::of(&source, &destination, Progress::default()).blackout_ns, None);
    }

    #[test]
    fn every_figure_is_listed_under_its_fields_name() {
        let (source, destination) = synthetic::sides(1);
        let progress = Progress {
            steady_visits_per_s: Some(1.0),
            gap_before_ns: Some(2),
            gap_ns: Some(3),
            lost_s: Some(4.0),
            window_s: Some(5.0),
        };
        let figures = Figures::of(&source, &destination, progress);
        let json = serde_json::to_value(figures).unwrap();
        let fields = json.as_object().unwrap();
        for figure in FIGURES {
            assert_eq!(fields[figure.key].as_f64(), (figure.get)(&figures), "{}", figure.key);
        }
        // The window is the frame of a figure, not a figure.
        assert_eq!(fields.len(), FIGURES.len() + 1);
    }
}
