//! What the guest itself tells of a run: how fast it went, how long it stood still, and whether its memory is whole.

use serde::{Deserialize, Serialize};
use switchover_hybrid::report::Side;
use switchover_wire::clock::Nanos;

use super::guest_lines::{Line, Period, Ready};
use super::serial_log::TimedLine;

/// Two lines that a guest printed without fault tell that it lives; one may still have come out of a buffer.
const LINES_TO_BE_ALIVE: usize = 2;
/// Enough of a guest's complaints to know what is wrong.
const MOST_COMPLAINTS: usize = 8;
/// How long after the drain a guest's progress still counts towards what the move cost: long enough for its caches and
/// the hypervisor's page tables to be warm again, short enough that noise does not drown the figure.
pub const SETTLE_NS: u64 = 1_000_000_000;

/// How long after it a guest is watched for what it lost around the move: half of ten seconds, whose other half, before
/// it, is the steady rate itself.
pub const AROUND_NS: u64 = 5_000_000_000;

/// A guest that does this much of its steady rate again has recovered; the rest is noise.
const RECOVERED: f64 = 0.9;
/// A guest that does this much of its steady rate is back at it.
const BACK: f64 = 0.95;
/// Over how long its rate is looked at for that.
const RATE_NS: u64 = 500_000_000;

/// One period as the guest reported it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GuestPeriod {
    /// Counted by the guest from 0.
    pub number: u64,
    /// When its line was complete, on the bench's `CLOCK_MONOTONIC`: a little after the period's end.
    pub read_ns: u64,
    /// The side that printed the line's end.
    pub side: Side,
    /// Visits of all vCPUs.
    pub visits: u64,
    /// The longest gap between two visits of one vCPU that ended in this period, in microseconds of the guest's clock.
    pub max_gap_us: u64,
    /// Corrupt visits since the guest's start.
    pub bad: u64,
    /// Visits of each vCPU, in order.
    pub vcpu_visits: Vec<u64>,
    /// How many visits took how long by themselves, in eight buckets an octave of TSC ticks; empty where the guest does not
    /// tell. See `guest-tests/guests`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub times: Vec<(u16, u64)>,
}

/// All that a guest said in one run.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct GuestTrace {
    /// Bytes that it visits.
    pub working_set: u64,
    /// Its TSC's frequency as it knows it.
    pub tsc_khz: u64,
    /// vCPUs that work.
    pub vcpus: u64,
    /// When it was ready, on the bench's `CLOCK_MONOTONIC`; absent where it never said so.
    pub ready_ns: Option<u64>,
    /// Its periods, in the order in which they were printed.
    pub periods: Vec<GuestPeriod>,
    /// Lines that no healthy guest prints: corruption, death, and lines that are damaged.
    pub complaints: Vec<String>,
    /// How many such lines there were.
    pub complaint_count: u64,
}

/// When the bench did what, on its own `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Marks {
    /// The warm-up began: the guest had said that it was ready.
    pub warm_up_ns: u64,
    /// Just before `migrate` was sent.
    pub migrate_ns: u64,
    /// Just before the handoff was asked for. Where nobody asks for it: when the last vCPU left the guest on the source, as
    /// the source tells; `completed_ns` where it never did.
    pub handoff_ns: u64,
    /// Both sides had been seen as `completed`, or the source as `failed` or `cancelled` where the guest stayed there; they
    /// are asked every few milliseconds.
    pub completed_ns: u64,
}

/// How a guest fared around the move.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Visits a second before the move: those of the periods in the second half of the warm-up.
    pub steady_visits_per_s: Option<f64>,
    /// The longest gap that the guest saw in those periods.
    pub gap_before_ns: Option<u64>,
    /// The longest gap that the guest saw from `migrate` to the second line after the drain.
    pub gap_ns: Option<u64>,
    /// Seconds of work that the guest did not do because of the move.
    pub lost_s: Option<f64>,
    /// The stretch of time over which `lost_s` was summed.
    pub window_s: Option<f64>,
    /// The guest's rate in the last half second of that stretch, in percent of the steady one.
    pub end_rate_percent: Option<f64>,
    /// The same as `lost_s`, over a stretch that does not depend on how the guest fared: to the first line read
    /// [`AROUND_NS`] after the completion.
    #[serde(default)]
    pub lost_around_s: Option<f64>,
    /// That stretch; shorter where the run ended before.
    #[serde(default)]
    pub around_s: Option<f64>,
    /// From the handoff to the start of the first half second in which the guest did 95 % of its steady rate; absent where
    /// there was none.
    #[serde(default)]
    pub recovered_s: Option<f64>,
}

impl GuestTrace {
    /// What `lines` say.
    #[must_use]
    pub fn read(lines: &[TimedLine]) -> Self {
        let mut trace = Self::default();
        for line in lines {
            match Line::parse(&line.bytes) {
                Line::Ready(ready) => trace.ready(ready, line.at),
                Line::Period(period) => trace.period(&period, line),
                Line::Vcpu(vcpu) => match trace.periods.last_mut() {
                    Some(period) if period.number == vcpu.number && vcpu.cpu == period.vcpu_visits.len() as u64 => {
                        // What the others did is not the first vCPU's.
                        let first = period.vcpu_visits.first_mut();
                        if let Some(first) = first {
                            *first = first.saturating_sub(vcpu.visits);
                        }
                        period.vcpu_visits.push(vcpu.visits);
                        period.max_gap_us = period.max_gap_us.max(vcpu.max_gap_us);
                    }
                    _ => trace.complain(format!("vCPU {} reported out of turn", vcpu.cpu)),
                },
                Line::Times(times) => match trace.periods.last_mut() {
                    Some(period) if period.number == times.number && period.times.is_empty() => {
                        period.times = times.buckets;
                    }
                    _ => trace.complain(format!("the times of period {} came out of turn", times.number)),
                },
                Line::Corrupt(text) | Line::Died(text) => trace.complain(text),
                Line::Garbled(text) => trace.complain(format!("damaged line: {text}")),
                Line::Other => {}
            }
        }
        trace
    }

    /// Why this run's guest is not proven whole; empty where it is.
    ///
    /// It is whole when it said no corrupt visit in any period, every period is there once and in order, it went on
    /// reporting where it `is` after the bench's instant `from_ns` (and only there), and each of its vCPUs went on
    /// visiting.
    #[must_use]
    pub fn doubts(&self, is: Side, from_ns: u64) -> Vec<String> {
        let mut doubts = Vec::new();
        if self.ready_ns.is_none() {
            doubts.push("the guest never said that it was ready".to_owned());
        }
        if self.complaint_count > 0 {
            let some = self.complaints.join("; ");
            doubts.push(format!("the guest printed {} lines of trouble: {some}", self.complaint_count));
        }
        if let Some(period) = self.periods.iter().find(|period| period.bad > 0) {
            let most = self.periods.iter().map(|period| period.bad).max().unwrap_or(0);
            doubts.push(format!("corrupt visits: {most}, first in period {}", period.number));
        }
        let expected = 0..;
        if let Some((expected, period)) =
            expected.zip(&self.periods).find(|(expected, period)| *expected != period.number)
        {
            doubts.push(format!("period {expected} is missing or out of order: period {} came", period.number));
        }
        let name = match is {
            Side::Source => "source",
            Side::Destination => "destination",
        };
        let there: Vec<_> =
            self.periods.iter().filter(|period| period.side == is && period.read_ns > from_ns).collect();
        if there.len() < LINES_TO_BE_ALIVE {
            doubts.push(format!("the guest reported {} periods at the {name}: it stands still", there.len()));
        }
        if is == Side::Source && self.periods.iter().any(|period| period.side == Side::Destination) {
            doubts.push("the guest was not moved, and ran at the destination".to_owned());
        }
        // The first line's period began at the source, and the last one's further vCPUs may not have been read.
        let whole = there.get(1..).unwrap_or_default();
        for cpu in 0..usize::try_from(self.vcpus).unwrap_or(usize::MAX) {
            let visits = |period: &&&GuestPeriod| period.vcpu_visits.get(cpu).copied().unwrap_or(0) > 0;
            if !whole.is_empty() && !whole.iter().any(|period| visits(&period)) {
                doubts.push(format!("vCPU {cpu} does not visit at the {name}"));
                break;
            }
        }
        doubts
    }

    /// How the guest fared around the move that `marks` describes.
    ///
    /// `lost_s` is taken between two lines: the last one read before `migrate`, and the first one read
    /// [`SETTLE_NS`] or more after the completion (the run's last where there is none, or where the guest has not
    /// recovered its rate by then). It is the host's time
    /// between the two, less the time that the visits in between would have taken at the steady rate. Nothing is
    /// clamped: a guest that ran faster than before gains. A guest clock that stops during the blackout hides nothing, as the time is
    /// the host's.
    #[must_use]
    pub fn progress(&self, marks: &Marks) -> Progress {
        let steady_from = marks.warm_up_ns.midpoint(marks.migrate_ns);
        let steady = self.between(steady_from, marks.migrate_ns);
        let steady_visits_per_s = rate(steady);
        let (open, close) = match (steady.last(), self.settled_by(marks.completed_ns, steady_visits_per_s)) {
            (Some(open), Some(close)) if close.read_ns > open.read_ns => (open, close),
            _ => return Progress::default(),
        };
        let lost = |end: &GuestPeriod| {
            let window = self.between(open.read_ns, end.read_ns);
            let window_s = seconds(end.read_ns.saturating_sub(open.read_ns));
            (window_s, steady_visits_per_s.map(|rate| window_s - visits(window) / rate))
        };
        let (window_s, lost_s) = lost(close);
        let watched = marks.completed_ns.saturating_add(AROUND_NS);
        let (around_s, lost_around_s) = lost(self.first_from(watched).unwrap_or(close));
        Progress {
            steady_visits_per_s,
            gap_before_ns: longest_gap(steady),
            gap_ns: longest_gap(self.around(marks)),
            lost_s,
            window_s: Some(window_s),
            lost_around_s,
            around_s: Some(around_s),
            recovered_s: steady_visits_per_s.and_then(|steady| self.recovered(marks.handoff_ns, steady)),
            end_rate_percent: self
                .rate_before(close.read_ns)
                .zip(steady_visits_per_s)
                .map(|(end, rate)| end / rate * 100.0),
        }
    }

    /// The periods in which the guest can have felt the move: from the first line read after `migrate` to the second
    /// one read after the completion. The second, because a line is read after its period's end: what happened just
    /// before the first line may belong to the period after it.
    fn around(&self, marks: &Marks) -> &[GuestPeriod] {
        let from = self.periods.partition_point(|period| period.read_ns <= marks.migrate_ns);
        let to = self.periods.partition_point(|period| period.read_ns <= marks.completed_ns) + 2;
        self.periods.get(from..to.min(self.periods.len())).unwrap_or_default()
    }

    /// The line by which the guest counts as settled.
    fn settled_by(&self, completed_ns: u64, steady: Option<f64>) -> Option<&GuestPeriod> {
        let settled = completed_ns.saturating_add(SETTLE_NS);
        let line = self.periods.iter().find(|period| period.read_ns >= settled);
        let recovered = |line: &&GuestPeriod| match (self.rate_before(line.read_ns), steady) {
            (Some(rate), Some(steady)) => rate >= steady * RECOVERED,
            // Nothing to tell by.
            _ => true,
        };
        line.filter(recovered).or(self.periods.last())
    }

    /// The first line read at `from_ns` or later; the run's last where there is none.
    fn first_from(&self, from_ns: u64) -> Option<&GuestPeriod> {
        self.periods.iter().find(|period| period.read_ns >= from_ns).or(self.periods.last())
    }

    /// Seconds from `handoff_ns` to the first line behind which the guest did [`BACK`] of its steady rate for [`RATE_NS`]: to
    /// the first line read that much later, so that single periods, which are noisy, do not decide.
    fn recovered(&self, handoff_ns: u64, steady: f64) -> Option<f64> {
        let from = self.periods.partition_point(|period| period.read_ns < handoff_ns);
        let after = self.periods.get(from..)?;
        let back = |(index, start): &(usize, &GuestPeriod)| {
            let until = start.read_ns.saturating_add(RATE_NS);
            let window = after.iter().skip(*index).position(|period| period.read_ns >= until);
            let window = window.and_then(|length| after.get(*index..=*index + length));
            window.and_then(rate).is_some_and(|rate| rate >= steady * BACK)
        };
        let (_, start) = after.iter().enumerate().find(back)?;
        Some(seconds(start.read_ns - handoff_ns))
    }

    /// Visits a second over the last [`RATE_NS`] before `end_ns`.
    fn rate_before(&self, end_ns: u64) -> Option<f64> {
        rate(self.between(end_ns.saturating_sub(RATE_NS), end_ns))
    }

    /// The periods whose lines were read within the two instants, both included.
    fn between(&self, from_ns: u64, to_ns: u64) -> &[GuestPeriod] {
        let from = self.periods.partition_point(|period| period.read_ns < from_ns);
        let to = self.periods.partition_point(|period| period.read_ns <= to_ns);
        self.periods.get(from..to).unwrap_or_default()
    }

    fn ready(&mut self, ready: Ready, at: Nanos) {
        if self.ready_ns.is_some() {
            self.complain("the guest said twice that it was ready: it started again".to_owned());
        }
        self.ready_ns = Some(at.0);
        (self.working_set, self.tsc_khz, self.vcpus) = (ready.working_set, ready.tsc_khz, ready.vcpus);
    }

    fn period(&mut self, period: &Period, line: &TimedLine) {
        self.periods.push(GuestPeriod {
            number: period.number,
            read_ns: line.at.0,
            side: line.side,
            visits: period.visits,
            max_gap_us: period.max_gap_us,
            bad: period.bad,
            vcpu_visits: vec![period.visits],
            times: Vec::new(),
        });
    }

    fn complain(&mut self, what: String) {
        self.complaint_count += 1;
        if self.complaints.len() < MOST_COMPLAINTS {
            self.complaints.push(what);
        }
    }
}

/// Nanoseconds as seconds.
#[expect(clippy::cast_precision_loss, reason = "spans of a run stay far below 2^52 ns, which are 52 days")]
#[must_use]
pub fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// Visits a second from the first line's reading to the last one's.
fn rate(periods: &[GuestPeriod]) -> Option<f64> {
    let (first, last) = (periods.first()?, periods.last()?);
    let visits = visits(periods);
    let time = seconds(last.read_ns.checked_sub(first.read_ns)?);
    (time > 0.0 && visits > 0.0).then(|| visits / time)
}

/// Visits from the first line to the last one.
#[expect(clippy::cast_precision_loss, reason = "a count of visits stays far below 2^52")]
fn visits(periods: &[GuestPeriod]) -> f64 {
    periods.iter().skip(1).map(|period| period.visits).sum::<u64>() as f64
}

fn longest_gap(periods: &[GuestPeriod]) -> Option<u64> {
    periods.iter().map(|period| period.max_gap_us.saturating_mul(1_000)).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn line(at_ms: u64, side: Side, text: &str) -> TimedLine {
        TimedLine { at: Nanos(at_ms * MS), side, bytes: text.as_bytes().to_vec() }
    }

    /// A guest with a period of 100 ms and 1000 visits in each, that moves at 1.0 s and stands still for `lost` ms of
    /// the period in which it does. Its line of that period comes late by as much when its clock `stops` meanwhile.
    fn moved(vcpus: u64, lost: u64, stops: bool) -> Vec<TimedLine> {
        let mut lines = vec![line(0, Side::Source, &format!("R ready ws 4096 tsc_khz 1000000 vcpus {vcpus}"))];
        for number in 0..40 {
            let side = if number < 10 { Side::Source } else { Side::Destination };
            let late = if stops && number >= 10 { lost } else { 0 };
            let visits = if number == 10 && !stops { 1000 - 10 * lost } else { 1000 };
            let gap = if number == 10 && !stops { lost * 1000 } else { 50 };
            let at = (number + 1) * 100 + late;
            lines.push(line(at, side, &format!("P {number} visits {visits} maxgap_us {gap} bad 0 h: 9:{visits}")));
            for cpu in 1..vcpus {
                lines.push(line(at, side, &format!("V {number} cpu {cpu} visits 400 maxgap_us 7")));
            }
        }
        lines
    }

    const MARKS: Marks = Marks { warm_up_ns: 0, migrate_ns: 950 * MS, handoff_ns: 1000 * MS, completed_ns: 1200 * MS };

    #[test]
    fn a_whole_guest_raises_no_doubts() {
        assert_eq!(GuestTrace::read(&moved(1, 30, false)).doubts(Side::Destination, 0), [""; 0]);
        let two = GuestTrace::read(&moved(2, 30, false));
        assert_eq!(two.doubts(Side::Destination, 0), [""; 0]);
        assert_eq!(two.periods[0].vcpu_visits, [600, 400]);
    }

    #[test]
    fn lost_progress_is_what_the_guest_did_not_do() {
        let progress = GuestTrace::read(&moved(1, 30, false)).progress(&MARKS);
        assert!((progress.lost_s.unwrap() - 0.030).abs() < 1e-9, "{progress:?}");
        assert!((progress.steady_visits_per_s.unwrap() - 10_000.0).abs() < 1e-6);
        assert_eq!(progress.gap_ns, Some(30 * MS));
        assert_eq!(progress.gap_before_ns, Some(50_000));
        // From the line at 0.9 s to that at 2.2 s.
        assert!((progress.window_s.unwrap() - 1.3).abs() < 1e-9);
    }

    #[test]
    fn a_brownout_before_the_handoff_counts_from_migrate_on() {
        // Moved at 1.5 s, slowed to a half from 1.0 s on.
        let mut lines = moved(1, 0, false);
        for line in &mut lines[11..16] {
            let text = String::from_utf8(line.bytes.clone()).unwrap().replace("1000", "500");
            (line.bytes, line.side) = (text.into_bytes(), Side::Source);
        }
        let marks = Marks { handoff_ns: 1500 * MS, completed_ns: 1600 * MS, ..MARKS };
        let progress = GuestTrace::read(&lines).progress(&marks);
        assert!((progress.lost_s.unwrap() - 0.25).abs() < 1e-9, "{progress:?}");
        assert!((progress.end_rate_percent.unwrap() - 100.0).abs() < 1e-6);
    }

    #[test]
    fn a_guest_that_has_not_recovered_is_watched_to_the_end() {
        let mut lines = moved(1, 0, false);
        for line in &mut lines[11..31] {
            line.bytes = String::from_utf8(line.bytes.clone()).unwrap().replace("1000", "500").into_bytes();
        }
        let progress = GuestTrace::read(&lines).progress(&MARKS);
        // From the line at 0.9 s to the last one, at 4.0 s; half of 20 periods of 0.1 s.
        assert!((progress.window_s.unwrap() - 3.1).abs() < 1e-9, "{progress:?}");
        assert!((progress.lost_s.unwrap() - 1.0).abs() < 1e-9, "{progress:?}");
    }

    #[test]
    fn a_guest_is_back_when_it_does_its_rate_for_half_a_second() {
        // Moved at 1.0 s. Nine tenths of its rate from then to 2.0 s, but for one good period.
        let mut lines = moved(1, 0, false);
        for line in lines[11..21].iter_mut().enumerate().filter(|(index, _)| *index != 4).map(|(_, line)| line) {
            line.bytes = String::from_utf8(line.bytes.clone()).unwrap().replace("1000", "900").into_bytes();
        }
        let progress = GuestTrace::read(&lines).progress(&MARKS);
        // Of the half second from 1.8 s on two periods are slow, which makes 96 %; of that from 1.7 s on, three.
        assert!((progress.recovered_s.unwrap() - 0.8).abs() < 1e-9, "{progress:?}");
        let never = GuestTrace::read(&lines[..23]).progress(&MARKS);
        assert_eq!(never.recovered_s, None, "half a second at the full rate was not seen");
    }

    #[test]
    fn what_is_lost_around_the_move_is_watched_for_as_long_however_the_guest_fares() {
        let mut lines = moved(1, 30, false);
        // Slow again from 3.0 s on: too late for `lost_s`.
        for line in &mut lines[31..41] {
            line.bytes = String::from_utf8(line.bytes.clone()).unwrap().replace("1000", "900").into_bytes();
        }
        let progress = GuestTrace::read(&lines).progress(&MARKS);
        assert!((progress.lost_s.unwrap() - 0.030).abs() < 1e-9, "{progress:?}");
        // The run ends at 4.0 s, before 5 s are over.
        assert!((progress.around_s.unwrap() - 3.1).abs() < 1e-9, "{progress:?}");
        assert!((progress.lost_around_s.unwrap() - 0.130).abs() < 1e-9, "{progress:?}");
    }

    #[test]
    fn a_guest_that_stays_must_go_on_there_and_nowhere_else() {
        let mut lines = moved(1, 30, false);
        let ran_twice = GuestTrace::read(&lines).doubts(Side::Source, 500 * MS);
        assert!(ran_twice.iter().any(|doubt| doubt.contains("ran at the destination")), "{ran_twice:?}");
        for line in &mut lines {
            line.side = Side::Source;
        }
        let trace = GuestTrace::read(&lines);
        assert_eq!(trace.doubts(Side::Source, 3500 * MS), [""; 0]);
        let late = trace.doubts(Side::Source, 3950 * MS);
        assert!(late.iter().any(|doubt| doubt.contains("1 periods at the source: it stands still")), "{late:?}");
    }

    #[test]
    fn a_guest_clock_that_stops_hides_no_loss() {
        let progress = GuestTrace::read(&moved(1, 30, true)).progress(&MARKS);
        assert!((progress.lost_s.unwrap() - 0.030).abs() < 1e-9, "{progress:?}");
    }

    #[test]
    fn times_of_visits_belong_to_the_period_before_them() {
        let mut lines = moved(1, 30, false);
        lines.insert(2, line(100, Side::Source, "G 0 visits 1000 t: 72:999 90:1"));
        let trace = GuestTrace::read(&lines);
        assert_eq!(trace.periods[0].times, [(72, 999), (90, 1)]);
        assert_eq!(trace.doubts(Side::Destination, 0), [""; 0]);
        lines.swap(2, 3);
        let doubts = GuestTrace::read(&lines).doubts(Side::Destination, 0);
        assert!(doubts.iter().any(|doubt| doubt.contains("times of period 0 came out of turn")), "{doubts:?}");
    }

    #[test]
    fn a_gap_before_the_move_is_not_the_moves() {
        let mut lines = moved(1, 30, false);
        lines[3].bytes = b"P 2 visits 1000 maxgap_us 90000 bad 0 h: 9:1000".to_vec();
        let progress = GuestTrace::read(&lines).progress(&MARKS);
        assert_eq!(progress.gap_ns, Some(30 * MS));
    }

    #[test]
    fn a_run_without_periods_has_no_figures() {
        assert_eq!(GuestTrace::read(&[]).progress(&MARKS), Progress::default());
        assert!(!GuestTrace::read(&[]).doubts(Side::Destination, 0).is_empty());
    }

    fn doubted(change: impl FnOnce(&mut Vec<TimedLine>), about: &str) {
        let mut lines = moved(2, 30, false);
        change(&mut lines);
        let doubts = GuestTrace::read(&lines).doubts(Side::Destination, 0);
        assert!(doubts.iter().any(|doubt| doubt.contains(about)), "{doubts:?} say nothing of {about}");
    }

    #[test]
    fn each_kind_of_trouble_is_doubted() {
        doubted(|lines| lines[1].bytes = b"P 0 visits 1 maxgap_us 1 bad 1 h: 1:1".to_vec(), "corrupt visits: 1");
        doubted(|lines| lines.push(line(9000, Side::Destination, "B page 1 counter 2 expected 3")), "B page 1");
        doubted(|lines| lines.push(line(9000, Side::Destination, "X exception 14")), "X exception");
        doubted(|lines| lines.push(line(9000, Side::Destination, "P 41 vis")), "damaged line");
        doubted(|lines| drop(lines.drain(41..43)), "period 20 is missing");
        doubted(|lines| lines.push(lines[1].clone()), "out of order");
        doubted(|lines| lines.truncate(22), "stands still");
        doubted(|lines| drop(lines.remove(0)), "never said");
        doubted(|lines| lines.push(lines[0].clone()), "started again");
        doubted(
            |lines| {
                for line in lines.iter_mut().filter(|line| line.side == Side::Destination) {
                    let text = String::from_utf8(line.bytes.clone()).unwrap();
                    line.bytes = text.replace("visits 400", "visits 0").into_bytes();
                }
            },
            "vCPU 1 does not visit",
        );
    }
}
