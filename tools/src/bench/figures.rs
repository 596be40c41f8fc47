//! The figures of one run, and the list of them that tables and summaries go through.
//!
//! `docs/report.md` says of each one its clock, its start, its end and what it leaves out.

use serde::{Deserialize, Serialize};
use switchover_hybrid::monitor::Choice;
use switchover_hybrid::report::{DecisionReport, LaneBytes, PrecopyReport, SideReport};
use switchover_wire::types::PAGE_SIZE_U64;

use super::guest_trace::{Progress, seconds};
use super::vmm::Account;

/// What a second of the whole migration costs beside the guest-seconds lost: the hosts' time, and the risk that a failure
/// in it bears.
const COST_OF_A_SECOND: f64 = 0.1;

/// What one run comes down to. A figure that cannot be had is absent, never 0.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Figures {
    /// From the last vCPU's exit on the source to the first one's entry on the destination; absent where the two
    /// sides read different clocks.
    pub blackout_ns: Option<u64>,
    /// How the guest fared.
    #[serde(flatten)]
    pub progress: Progress,
    /// `lost_s` and a tenth of `total_ns` in seconds. Absent where either is, and where the guest was not moved.
    pub cost_s: Option<f64>,
    /// From the migration's start on the source until it knew that the destination had everything.
    pub total_ns: Option<u64>,
    /// From the migration's start on the source until the destination was prepared.
    pub setup_ns: Option<u64>,
    /// From the commit's arrival at the destination to the last page's placement there.
    pub drain_ns: Option<u64>,
    /// Non-zero bytes placed, over `drain_ns`, in 10^9 bit/s.
    pub drain_gbit_s: Option<f64>,
    /// Rounds of pre-copy that were begun.
    pub rounds: Option<u64>,
    /// From the first round's start to the last one's end.
    pub precopy_ns: Option<u64>,
    /// Pages that the rounds sent with bytes, each as often as it was sent.
    pub precopy_pages: Option<u64>,
    /// Bytes on the wire of the rounds.
    pub precopy_bytes: Option<u64>,
    /// Bytes of the pages that were encoded, after it, in percent of those before it.
    pub encoded_percent: Option<f64>,
    /// The highest share of time for which vCPUs were kept from running, in percent.
    pub throttle_percent: Option<u64>,
    /// Pages that the handoff left to be sent.
    pub handoff_pages: Option<u64>,
    /// The blackout that the monitor expected of the handoff that it chose.
    pub predicted_blackout_ns: Option<u64>,
    /// What ended pre-copy.
    pub ended_by: Option<Choice>,
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
    /// What the VMM itself says of how long the guest stood still, where it is one that says so. Not what the guest felt.
    pub own_downtime_ns: Option<u64>,
    /// Pages that the destination asked for because a vCPU waited.
    pub page_requests: Option<u64>,
    /// CPU time of both processes, without their vCPUs' threads, from `migrate` to the completion, for each GiB of the
    /// guest's working set.
    pub cpu_s_per_gib: Option<f64>,
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
    /// Hundredths.
    Percent,
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
    figure("lost_around_s", "… within 10 s around the move", Unit::Seconds, |f| f.progress.lost_around_s),
    figure("recovered_s", "Back at 95 % of its rate after", Unit::Seconds, |f| f.progress.recovered_s),
    figure("cost_s", "Cost: lost + 0.1 × whole migration", Unit::Seconds, |f| f.cost_s),
    figure("end_rate_percent", "Guest's rate at the end, of the steady", Unit::Percent, |f| {
        f.progress.end_rate_percent
    }),
    figure("steady_visits_per_s", "Guest's steady rate before", Unit::PerSecond, |f| f.progress.steady_visits_per_s),
    figure("own_downtime_ns", "Downtime as the VMM itself reports it", Unit::Milliseconds, |f| {
        count(f.own_downtime_ns)
    }),
    figure("drain_ns", "Drain", Unit::Milliseconds, |f| count(f.drain_ns)),
    figure("drain_gbit_s", "Drain rate", Unit::GigabitsPerSecond, |f| f.drain_gbit_s),
    figure("setup_ns", "Set-up", Unit::Milliseconds, |f| count(f.setup_ns)),
    figure("total_ns", "Whole migration", Unit::Milliseconds, |f| count(f.total_ns)),
    figure("rounds", "Rounds of pre-copy", Unit::Count, |f| count(f.rounds)),
    figure("precopy_ns", "Pre-copy", Unit::Milliseconds, |f| count(f.precopy_ns)),
    figure("precopy_pages", "Pages pre-copied, repeats counted", Unit::Count, |f| count(f.precopy_pages)),
    figure("precopy_bytes", "Bytes pre-copied", Unit::Bytes, |f| count(f.precopy_bytes)),
    figure("encoded_percent", "Encoded pages, of their bytes", Unit::Percent, |f| f.encoded_percent),
    figure("throttle_percent", "vCPUs throttled, at most", Unit::Percent, |f| count(f.throttle_percent)),
    figure("handoff_pages", "Pages left at the handoff", Unit::Count, |f| count(f.handoff_pages)),
    figure("predicted_blackout_ns", "Blackout that was predicted", Unit::Milliseconds, |f| {
        count(f.predicted_blackout_ns)
    }),
    figure("faults_remote", "Faults, remote", Unit::Count, |f| count(f.faults_remote)),
    figure("faults_raced", "Faults, raced", Unit::Count, |f| count(f.faults_raced)),
    figure("faults_local", "Faults, local", Unit::Count, |f| count(f.faults_local)),
    figure("faults_joined", "Faults, joined", Unit::Count, |f| count(f.faults_joined)),
    figure("page_requests", "Pages asked for", Unit::Count, |f| count(f.page_requests)),
    figure("pages_pushed", "Pages pushed", Unit::Count, |f| count(f.pages_pushed)),
    figure("pages_requested", "Pages requested", Unit::Count, |f| count(f.pages_requested)),
    figure("pages_zero", "Pages zero", Unit::Count, |f| count(f.pages_zero)),
    figure("pages_discarded", "Pages that came twice", Unit::Count, |f| count(f.pages_discarded)),
    figure("wire_bytes", "Bytes on all lanes", Unit::Bytes, |f| count(f.wire_bytes)),
    figure("state_bytes", "vCPU and device state", Unit::Bytes, |f| count(f.state_bytes)),
    figure("cpu_s_per_gib", "CPU of both processes for a GiB", Unit::Seconds, |f| f.cpu_s_per_gib),
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
        let total_ns = span(started, source.instants.drained_ns);
        Self {
            blackout_ns: blackout(source, destination),
            cost_s: progress.lost_s.zip(total_ns).map(|(lost, total)| cost(lost, total)),
            total_ns,
            setup_ns: setup.and_then(|phase| span(Some(phase.start_ns), phase.end_ns)),
            drain_ns,
            drain_gbit_s: pages
                .zip(drain_ns)
                .and_then(|(pages, ns)| gbit_s((pages.pushed + pages.requested).checked_mul(PAGE_SIZE_U64)?, ns)),
            page_requests: faults.map(|faults| faults.remote + faults.raced),
            faults_remote: faults.map(|faults| faults.remote),
            faults_raced: faults.map(|faults| faults.raced),
            faults_local: faults.map(|faults| faults.local),
            faults_joined: faults.map(|faults| faults.joined),
            pages_zero: pages.map(|pages| pages.zero),
            pages_pushed: pages.map(|pages| pages.pushed),
            pages_requested: pages.map(|pages| pages.requested),
            pages_discarded: pages.map(|pages| pages.discarded),
            state_bytes: Some(source.state_bytes),
            cpu_destination_s: Some(destination.cpu.user + destination.cpu.system),
            ..Self::of_attempt(source, progress)
        }
    }

    /// The figures of a run from what a VMM that keeps no such reports says, and how the guest fared.
    #[must_use]
    pub fn of_account(account: &Account, progress: Progress) -> Self {
        Self {
            progress,
            own_downtime_ns: account.own_downtime_ns,
            cost_s: progress.lost_s.zip(account.total_ns).map(|(lost, total)| cost(lost, total)),
            total_ns: account.total_ns,
            setup_ns: account.setup_ns,
            drain_ns: account.drain_ns,
            drain_gbit_s: account.drain_bytes.zip(account.drain_ns).and_then(|(bytes, ns)| gbit_s(bytes, ns)),
            page_requests: account.page_requests,
            wire_bytes: account.wire_bytes,
            ..Self::default()
        }
    }

    /// The same, with the CPU time that both processes spent, without their vCPUs, on a guest of this working set.
    #[must_use]
    pub fn with_cpu(mut self, spent_ns: Option<u64>, working_set: u64) -> Self {
        let gib = count(Some(working_set)).map(|bytes| bytes / f64::from(1 << 30)).filter(|gib| *gib > 0.0);
        self.cpu_s_per_gib = spent_ns.zip(gib).map(|(ns, gib)| seconds(ns) / gib);
        self
    }

    /// The figures of a run whose guest stayed at the source: it has no blackout, no total and no cost.
    #[must_use]
    pub fn of_attempt(source: &SideReport, progress: Progress) -> Self {
        let precopy = source.precopy.as_ref();
        let sum = |of: fn(&PrecopyReport) -> u64| precopy.map(of);
        let end = precopy.and_then(deciding);
        Self {
            progress,
            rounds: sum(|precopy| precopy.rounds.len() as u64),
            precopy_ns: precopy.and_then(|precopy| span(Some(precopy.start_ns), Some(precopy.rounds.last()?.end_ns))),
            precopy_pages: sum(|precopy| precopy.rounds.iter().map(|round| round.data_pages).sum()),
            precopy_bytes: sum(|precopy| precopy.rounds.iter().map(|round| round.wire_bytes).sum()),
            encoded_percent: precopy.and_then(|precopy| {
                let (before, after) =
                    (count(Some(precopy.encodings.bytes_in))?, count(Some(precopy.encodings.bytes_out))?);
                (before > 0.0).then(|| after / before * 100.0)
            }),
            throttle_percent: sum(|precopy| u64::from(precopy.throttle_percent)),
            handoff_pages: sum(|precopy| precopy.handoff_pages),
            predicted_blackout_ns: end.and_then(predicted_blackout),
            ended_by: end.map(|decision| decision.verdict.choice),
            wire_bytes: Some(source.lanes.iter().map(LaneBytes::both_ways).sum()),
            cpu_source_s: Some(source.cpu.user + source.cpu.system),
            ..Self::default()
        }
    }
}

/// The decision that ended pre-copy.
#[must_use]
pub fn deciding(precopy: &PrecopyReport) -> Option<&DecisionReport> {
    precopy.decisions.iter().rev().find(|decision| decision.verdict.choice != Choice::AnotherRound)
}

/// The blackout that the monitor expected of the handoff that it chose.
#[must_use]
pub fn predicted_blackout(decision: &DecisionReport) -> Option<u64> {
    let prediction = &decision.verdict.prediction;
    match decision.verdict.choice {
        Choice::StopAndCopy => Some(prediction.stop_blackout_ns),
        Choice::Postcopy => Some(prediction.postcopy_blackout_ns),
        Choice::AnotherRound | Choice::GiveUp => None,
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

fn cost(lost_s: f64, total_ns: u64) -> f64 {
    lost_s + COST_OF_A_SECOND * seconds(total_ns)
}

/// A span that ends before it starts is no span.
fn span(start: Option<u64>, end: Option<u64>) -> Option<u64> {
    end?.checked_sub(start?)
}

fn gbit_s(bytes: u64, ns: u64) -> Option<f64> {
    let bits = count(Some(bytes.checked_mul(8)?))?;
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
    fn the_cost_is_what_the_guest_lost_and_a_tenth_of_the_time() {
        let (source, destination) = synthetic::sides(1);
        let progress = Progress { lost_s: Some(0.5), ..Progress::default() };
        let figures = Figures::of(&source, &destination, progress);
        let total = figures.total_ns.unwrap() as f64 / 1e9;
        assert!((figures.cost_s.unwrap() - (0.5 + 0.1 * total)).abs() < 1e-12);
        assert_eq!(Figures::of(&source, &destination, Progress::default()).cost_s, None);
        assert_eq!(Figures::of_attempt(&source, progress).cost_s, None);
    }

    #[test]
    fn pre_copys_figures_are_sums_over_its_rounds() {
        let (source, destination) = synthetic::hybrid_sides(1);
        let precopy = source.precopy.clone().unwrap();
        let figures = Figures::of(&source, &destination, Progress::default());
        assert_eq!(figures.rounds, Some(precopy.rounds.len() as u64));
        assert_eq!(figures.precopy_bytes, Some(precopy.rounds.iter().map(|round| round.wire_bytes).sum()));
        assert_eq!(figures.precopy_ns, Some(precopy.rounds.last().unwrap().end_ns - precopy.start_ns));
        assert_eq!(figures.handoff_pages, Some(precopy.handoff_pages));
        assert_eq!(figures.ended_by, Some(Choice::Postcopy));
        let (source, destination) = synthetic::sides(1);
        assert_eq!(Figures::of(&source, &destination, Progress::default()).rounds, None);
    }

    #[test]
    fn an_account_makes_the_same_figures_as_far_as_it_goes() {
        let account = Account {
            own_downtime_ns: Some(2_000_000),
            total_ns: Some(500_000_000),
            drain_ns: Some(400_000_000),
            drain_bytes: Some(250_000_000),
            ..Account::default()
        };
        let progress = Progress { lost_s: Some(0.5), ..Progress::default() };
        let figures = Figures::of_account(&account, progress);
        assert_eq!((figures.drain_gbit_s, figures.blackout_ns), (Some(5.0), None));
        assert!((figures.cost_s.unwrap() - 0.55).abs() < 1e-12);
    }

    #[test]
    fn cpu_time_is_for_a_gib_of_the_working_set() {
        let figures = Figures::default().with_cpu(Some(300_000_000), 256 << 20);
        assert!((figures.cpu_s_per_gib.unwrap() - 1.2).abs() < 1e-12);
        assert_eq!(Figures::default().with_cpu(Some(1), 0).cpu_s_per_gib, None);
        assert_eq!(Figures::default().with_cpu(None, 1 << 30).cpu_s_per_gib, None);
    }

    #[test]
    fn every_figure_is_listed_under_its_fields_name() {
        let (source, destination) = synthetic::hybrid_sides(1);
        let progress = Progress {
            steady_visits_per_s: Some(1.0),
            gap_before_ns: Some(2),
            gap_ns: Some(3),
            lost_s: Some(4.0),
            window_s: Some(5.0),
            end_rate_percent: Some(99.0),
            lost_around_s: Some(4.5),
            around_s: Some(10.0),
            recovered_s: Some(0.3),
        };
        let account = Account { own_downtime_ns: Some(1_000_000), ..Account::default() };
        let own_downtime_ns = Figures::of_account(&account, progress).own_downtime_ns;
        let figures =
            Figures { own_downtime_ns, ..Figures::of(&source, &destination, progress).with_cpu(Some(9), 1 << 28) };
        let json = serde_json::to_value(figures).unwrap();
        let fields = json.as_object().unwrap();
        for figure in FIGURES {
            assert_eq!(fields[figure.key].as_f64(), (figure.get)(&figures), "{}", figure.key);
        }
        // The windows are the frames of figures, and what ended pre-copy is a word.
        assert_eq!(fields.len(), FIGURES.len() + 3);
    }
}
