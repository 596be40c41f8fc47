//! What the guest itself felt of single visits around the move, where it reports their times (`gaps=fine`).
//!
//! A pager's figures leave out how long a fault took to reach it and the vCPU to go on afterwards. The guest leaves out nothing:
//! with the pusher held back (`--hold-push`) and a guest that visits each page once, each of its visits is one remote fault,
//! and comparable to F.

use serde::{Deserialize, Serialize};
use switchover_wire::clock::Nanos;

use super::format::{ns_as, number};
use super::guest_trace::{GuestPeriod, GuestTrace, Marks};
use super::latency::Percentiles;
use super::schema::{ModeReport, Report, RunReport};

/// What the visits' times are called among a mode's latencies.
pub const KEY: &str = "guest_visit";

/// Left out after a handoff whose pusher is held: there the guest touches its code and its table for the first time, so that
/// one visit waits for two pages.
const FIRST_TOUCHES_NS: u64 = 200_000_000;

/// Buckets of the times in an octave; `guest-tests/guests` says what they hold.
const PARTS: u16 = 8;

/// How long visits took, of one run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Felt {
    /// The stretch in which the visits counted were made, on the bench's `CLOCK_MONOTONIC`.
    pub from_ns: u64,
    /// Its end.
    pub to_ns: u64,
    /// The pusher was held back all that time.
    pub held: bool,
    /// Times of visits by the guest's TSC, with a resolution of an eighth of an octave.
    pub latency: Percentiles,
}

impl Felt {
    /// Of the visits from the handoff to the drain, or to the pusher's release where it was held back. `None` where the
    /// guest did not report their times.
    #[must_use]
    pub fn of(trace: &GuestTrace, marks: &Marks, released: Option<Nanos>) -> Option<Self> {
        let (from_ns, to_ns) = match released {
            Some(released) => (marks.handoff_ns.saturating_add(FIRST_TOUCHES_NS), released.0),
            None => (marks.handoff_ns, marks.completed_ns),
        };
        let mut felt = Self { from_ns, to_ns, held: released.is_some(), latency: Percentiles::default() };
        felt.latency = percentiles(felt.spans(trace))?;
        Some(felt)
    }

    /// The visits' times in `trace`.
    fn spans(self, trace: &GuestTrace) -> Vec<Span> {
        let periods = if self.held { self.within(&trace.periods) } else { self.around(&trace.periods) };
        let times = periods.iter().flat_map(|period| &period.times);
        times.filter_map(|(bucket, count)| Span::of(*bucket, *count, trace.tsc_khz)).collect()
    }

    /// The periods that lie within the stretch.
    fn within(self, periods: &[GuestPeriod]) -> &[GuestPeriod] {
        // The first line read in it ends a period that began before it.
        let from = periods.partition_point(|period| period.read_ns < self.from_ns) + 1;
        let to = periods.partition_point(|period| period.read_ns <= self.to_ns);
        periods.get(from..to).unwrap_or_default()
    }

    /// The periods that have a part in the stretch: a drain may be over within one.
    fn around(self, periods: &[GuestPeriod]) -> &[GuestPeriod] {
        let from = periods.partition_point(|period| period.read_ns <= self.from_ns);
        let to = periods.partition_point(|period| period.read_ns <= self.to_ns) + 1;
        periods.get(from..to.min(periods.len())).unwrap_or_default()
    }
}

/// The same over all runs together.
#[must_use]
pub fn merged(runs: &[RunReport]) -> Option<Percentiles> {
    let told = runs.iter().filter_map(|run| Some(run.felt?.spans(run.guest.as_ref()?)));
    percentiles(told.flatten().collect())
}

/// `report`'s remote faults as the guests felt them, against the floor: a line a mode. Nothing where the pusher was not held
/// back, as most visits are no remote faults then.
#[must_use]
pub fn against_floor(report: &Report) -> Vec<String> {
    if report.settings.hold_push_s.is_none() {
        return Vec::new();
    }
    report.modes.iter().filter_map(|mode| line(mode, report)).collect()
}

fn line(mode: &ModeReport, report: &Report) -> Option<String> {
    let felt = mode.latency.get(KEY)?;
    let micros = |ns| number(ns_as(ns, 1e3));
    let mut line = format!(
        "{} {}: guest-seen remote fault {} µs at p50, {} at p99 ({} visits)",
        mode.vmm,
        mode.mode,
        micros(felt.p50_ns),
        micros(felt.p99_ns),
        felt.count
    );
    let floor = report.floor.as_ref()?;
    for sum in floor.sums.iter().filter(|sum| sum.link == report.settings.link && sum.p50_ns > 0) {
        let ratio = number(ns_as(felt.p50_ns, 1.0) / ns_as(sum.p50_ns, 1.0));
        line += &format!("\n  = {ratio} × F {} ({} µs) at p50", sum.way, micros(sum.p50_ns));
    }
    Some(line)
}

/// Visits whose times lie between two spans of nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Span {
    low: f64,
    high: f64,
    count: u64,
}

impl Span {
    fn of(bucket: u16, count: u64, tsc_khz: u64) -> Option<Self> {
        if tsc_khz == 0 || count == 0 {
            return None;
        }
        let octave = 2_f64.powi(i32::from(bucket / PARTS));
        let at = |part: u16| octave * (1.0 + f64::from(part) / f64::from(PARTS)) * 1e6 / ns_as(tsc_khz, 1.0);
        let part = bucket % PARTS;
        Some(Self { low: at(part), high: at(part + 1), count })
    }
}

/// The times' percentiles, as if those of a bucket were spread evenly over it.
fn percentiles(mut spans: Vec<Span>) -> Option<Percentiles> {
    spans.sort_by(|a, b| a.low.total_cmp(&b.low));
    let count = spans.iter().try_fold(0_u64, |sum, span| sum.checked_add(span.count)).filter(|count| *count > 0)?;
    let at = |thousandths: u64| {
        let mut rank = (u128::from(count) * u128::from(thousandths)).div_ceil(1000).max(1);
        for span in &spans {
            let here = u128::from(span.count);
            if rank <= here {
                let place = (ns_as(u64::try_from(rank).unwrap_or(u64::MAX), 1.0) - 0.5) / ns_as(span.count, 1.0);
                return rounded(span.low + (span.high - span.low) * place);
            }
            rank -= here;
        }
        0
    };
    Some(Percentiles {
        count,
        p50_ns: at(500),
        p90_ns: at(900),
        p99_ns: at(990),
        p99_9_ns: at(999),
        max_ns: spans.last().map_or(0, |span| rounded(span.high)),
    })
}

/// A span to the nanosecond.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "times are positive, and the cast saturates"
)]
fn rounded(ns: f64) -> u64 {
    ns.round() as u64
}

#[cfg(test)]
mod tests {
    use switchover_hybrid::report::Side;

    use super::super::aggregate::Aggregate;
    use super::super::synthetic;
    use super::*;

    const MS: u64 = 1_000_000;
    const MARKS: Marks = Marks { warm_up_ns: 0, migrate_ns: 900 * MS, handoff_ns: 1000 * MS, completed_ns: 1450 * MS };

    /// 30 periods of 100 ms at 1 GHz, the times of each in a bucket of its own.
    fn trace() -> GuestTrace {
        let period = |number: u64| GuestPeriod {
            number,
            read_ns: (number + 1) * 100 * MS,
            side: Side::Destination,
            visits: 10,
            max_gap_us: 1,
            bad: 0,
            vcpu_visits: vec![10],
            times: vec![(u16::try_from(number).unwrap() * 8, 10)],
        };
        GuestTrace { tsc_khz: 1_000_000, periods: (0..30).map(period).collect(), ..GuestTrace::default() }
    }

    #[test]
    fn a_held_pushers_stretch_holds_only_whole_periods_behind_the_first_touches() {
        let felt = Felt::of(&trace(), &MARKS, Some(Nanos(2000 * MS))).unwrap();
        // From 1.2 s: the line at 1.3 s ends the first whole period, number 12; the one at 2.0 s the last, number 19.
        assert_eq!((felt.held, felt.latency.count), (true, 80));
        assert_eq!(felt.latency.max_ns, (1 << 19) * 9 / 8);
        assert!(felt.latency.p50_ns >= 1 << 15 && felt.latency.p50_ns < 1 << 16, "{felt:?}");
    }

    #[test]
    fn a_drains_stretch_holds_every_period_that_has_a_part_in_it() {
        let felt = Felt::of(&trace(), &MARKS, None).unwrap();
        // The lines at 1.1 to 1.5 s.
        assert_eq!((felt.held, felt.latency.count), (false, 50));
    }

    #[test]
    fn a_guest_that_tells_no_times_felt_nothing_that_is_known() {
        let mut silent = trace();
        silent.periods.iter_mut().for_each(|period| period.times.clear());
        assert_eq!(Felt::of(&silent, &MARKS, None), None);
        assert_eq!(Felt::of(&GuestTrace { tsc_khz: 0, ..trace() }, &MARKS, None), None);
    }

    #[test]
    fn times_of_a_bucket_are_spread_over_it() {
        // 2^16 to 9/8 of that, in ticks of half a nanosecond.
        let spans = vec![Span::of(128, 100, 2_000_000).unwrap()];
        let found = percentiles(spans).unwrap();
        // 32,768 ns and 4,096 more; the 50th lies 49.5 hundredths in, the 99th 98.5.
        assert_eq!((found.p50_ns, found.p99_ns), (34_796, 36_803));
        assert_eq!(found.max_ns, 36_864);
    }

    #[test]
    fn the_ratio_is_told_where_the_pusher_was_held() {
        let mut runs = synthetic::runs(2);
        for run in &mut runs {
            run.guest = Some(trace());
            run.felt = Felt::of(&trace(), &MARKS, Some(Nanos(2000 * MS)));
        }
        let mode = Aggregate::of("postcopy", "switchover", runs).unwrap().report;
        assert_eq!(mode.latency[KEY].count, 160);
        let mut report = synthetic::report(vec![mode]);
        assert!(against_floor(&report).is_empty());
        report.settings.hold_push_s = Some(1.0);
        let [line] = &against_floor(&report)[..] else { panic!("one mode, one line") };
        assert!(line.contains("160 visits") && line.contains("× F spinning (44.0 µs)"), "{line}");
        assert!(line.lines().all(|line| line.chars().count() <= 100), "{line}");
    }
}
