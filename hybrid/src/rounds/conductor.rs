//! The thread that conducts the rounds: begins each with what the machine has noted, looks every few milliseconds at how it goes,
//! and asks the monitor.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::dirty::DirtyLogError;
use switchover_precopy::pack::Compression;
use switchover_precopy::rounds::{DifferenceMeter, SentSoFar};
use switchover_precopy::throttle::AutoConverge;
use switchover_wire::clock::Nanos;
use switchover_wire::types::{PAGE_SIZE_U64, PageCount};

use super::meter::Meter;
use super::probe::Probe;
use super::{Precopy, RoundsEnd, nanos};
use crate::machine::Machine;
use crate::monitor::costs::differences_pay;
use crate::monitor::{Choice, Monitor, Sample, Verdict};
use crate::report::{DecisionReport, RoundReport};
use crate::session::source::Ending;
use crate::settings::{Settings, Throttling};

/// How often a round is looked at. A look walks three bitmaps: on a large machine it is taken less often, so that it costs no
/// more than this share of a processor.
const LOOK_EVERY: Duration = Duration::from_millis(10);
const LOOK_SHARE: u32 = 20;

/// When the first round is looked at first; then again whenever it is twice as old, until looks are as far apart as they should
/// be. Which guests are better handed off at once is seen by then.
const FIRST_LOOK: Duration = Duration::from_micros(2500);

/// Written pages of which a look measures the difference to the version that was sent, on average: some 2 µs each.
const DIFFERENCES: u64 = 64;

/// Data pages that the lanes send before it shows whether they keep what they send: by then they know their link.
const UNDECIDED: u64 = 1024;

/// How long a round takes at least: of a few pages under way, round would follow upon empty round until they are acknowledged.
const LEAST_ROUND: Duration = Duration::from_millis(2);

/// Pausing, saving and loading a machine of one vCPU: the blackout of an undisturbed handoff over loopback, where the link costs
/// next to nothing, is 0.8 to 1.5 ms on the development hosts.
const HANDOFF_BASE: Duration = Duration::from_micros(1300);

/// Samples kept for the report: 20 minutes of looks 10 ms apart. Of longer migrations, the first ones.
const SAMPLES_KEPT: usize = 120_000;

/// What one thread does from the first round to the last. `begun` is told of each round.
pub struct Conductor<'a> {
    precopy: &'a Precopy,
    machine: &'a dyn Machine,
    settings: &'a Settings,
    monitor: Monitor,
    throttle: Option<AutoConverge>,
    pages: PageCount,
    start: Nanos,
    meter: Meter,
    look_every: Duration,
    probe: Option<Probe>,
    differences: DifferenceMeter,
    /// Bound on the lanes' bytes a second; 0 where there is none.
    limit: u64,
}

/// A round under way.
struct Round {
    number: u32,
    /// What no lane had taken of it at the last look.
    left: PageBitmap,
    began: Nanos,
    pages: PageBitmap,
    count: u64,
    sent_before: SentSoFar,
}

impl<'a> Conductor<'a> {
    /// The conductor of `precopy`.
    pub fn new(precopy: &'a Precopy, machine: &'a dyn Machine, settings: &'a Settings) -> Self {
        let now = Nanos::now();
        precopy.book().report.start_ns = now.0;
        let throttle = match settings.throttling {
            Throttling::AutoConverge { initial, increment, most } => Some(AutoConverge::new(initial, increment, most)),
            Throttling::Off | Throttling::DirtyLimit { .. } => None,
        };
        Self {
            precopy,
            machine,
            settings,
            monitor: Monitor::new(settings.limits),
            throttle,
            pages: machine.ram().pages(),
            start: now,
            meter: Meter::new(now),
            look_every: LOOK_EVERY,
            probe: None,
            differences: DifferenceMeter::default(),
            limit: settings.bandwidth.precopy,
        }
    }

    /// Rounds until the monitor or the session ends them.
    pub fn conduct(mut self, begun: impl FnMut(u32)) -> RoundsEnd {
        let end = self.rounds(begun);
        if self.precopy.ended.load(Ordering::Acquire) {
            return RoundsEnd::Ended;
        }
        end.unwrap_or_else(|error| RoundsEnd::Failed(error.to_string()))
    }

    fn rounds(&mut self, mut begun: impl FnMut(u32)) -> Result<RoundsEnd, DirtyLogError> {
        if let Throttling::DirtyLimit { bytes_per_second } = self.settings.throttling
            && let Err(error) = self.machine.limit_dirty_rate(Some(bytes_per_second))
        {
            return Ok(RoundsEnd::GaveUp(error.to_string()));
        }
        let mut noted = PageBitmap::new(self.pages);
        self.precopy.log.peek(&mut noted)?;
        self.probe = Some(Probe::arm(&self.precopy.rounds, &noted)?);
        loop {
            let mut round = self.begin(noted);
            begun(round.number);
            if let Some(probe) = self.probe.as_mut().filter(|_| round.number == 1) {
                probe.find_zeros(&self.machine.ram());
            }
            let (verdict, now_noted) = self.watch(&mut round)?;
            if self.precopy.ended.load(Ordering::Acquire) {
                return Ok(RoundsEnd::Ended);
            }
            self.close(&round, &now_noted);
            match verdict.choice {
                Choice::AnotherRound => {}
                Choice::StopAndCopy => return Ok(self.switch_over(Ending::StopAndCopy)),
                Choice::Postcopy => return Ok(self.switch_over(Ending::Postcopy)),
                Choice::GiveUp => return Ok(RoundsEnd::GaveUp(verdict.reason)),
            }
            noted = now_noted;
        }
    }

    fn begin(&mut self, pages: PageBitmap) -> Round {
        let (began, count) = (Nanos::now(), pages.count().0);
        let sent_before = self.precopy.rounds.sent();
        let number = self.precopy.rounds.begin(&pages);
        self.meter.begin(began, &sent_before);
        let mut book = self.precopy.book();
        let report =
            RoundReport { round: number, start_ns: began.0, end_ns: began.0, pages: count, ..RoundReport::default() };
        book.report.rounds.push(report);
        Round { number, left: pages.clone(), began, pages, count, sent_before }
    }

    /// Looks at the round until it is over, or the monitor wants none of its rest. Returns the last verdict, and what is noted.
    fn watch(&mut self, round: &mut Round) -> Result<(Verdict, PageBitmap), DirtyLogError> {
        loop {
            let over = self.precopy.rounds.wait(self.until_next_look(round));
            let sent = self.precopy.rounds.sent();
            self.meter.measure(Nanos::now(), &sent, &round.sent_before, over);
            if over && Nanos::now().since(round.began) < nanos(LEAST_ROUND) {
                std::thread::sleep(LEAST_ROUND);
            }
            self.take_up_tunables();
            let looked = Instant::now();
            let (sample, noted) = self.look(round, over)?;
            self.look_every = LOOK_EVERY.max(looked.elapsed() * LOOK_SHARE);
            let mut verdict = self.monitor.observe(&sample);
            if verdict.choice == Choice::Postcopy && self.may_differ(&sample) {
                verdict.choice = Choice::AnotherRound;
                verdict.reason = format!(
                    "the versions of {} pages are kept, and what differences to them would save is not known yet; else: {}",
                    self.precopy.rounds.kept_pages(),
                    verdict.reason
                );
            }
            let ended = self.precopy.ended.load(Ordering::Acquire);
            self.note(round, sample, &verdict, !ended && (over || verdict.choice != Choice::AnotherRound));
            if over || ended || verdict.choice != Choice::AnotherRound {
                return Ok((verdict, noted));
            }
        }
    }

    fn until_next_look(&self, round: &Round) -> Duration {
        let age = Duration::from_nanos(Nanos::now().since(round.began));
        // A look that costs so much that it is not taken every few milliseconds is not taken early either.
        if round.number > 1 || self.look_every > LOOK_EVERY {
            self.look_every
        } else {
            age.clamp(FIRST_LOOK, LOOK_EVERY)
        }
    }

    /// Whether the second round is still to show what differences save: the link is slow enough for them to pay, and versions
    /// are kept of most of what was sent, or it is too early to tell, so that whatever is sent again may be far smaller than it
    /// was.
    fn may_differ(&self, sample: &Sample) -> bool {
        let packing = &self.settings.packing;
        let keeps = packing.compression == Compression::Adaptive && packing.delta_cache_bytes > 0;
        let sent = self.precopy.rounds.sent().data_pages;
        sample.at_ns < nanos(self.settings.limits.time_budget)
            && keeps
            && differences_pay(sample.bytes_per_second, sample.limit_bytes_per_second, sample.within_host)
            && is_untried(sample, sent, self.precopy.rounds.kept_pages())
    }

    fn take_up_tunables(&mut self) {
        let tunables = *self.precopy.tunables.lock().unwrap_or_else(PoisonError::into_inner);
        self.monitor.set_limits(tunables.limits);
        self.limit = tunables.bandwidth.precopy;
        self.precopy.rounds.set_rate(self.limit);
    }

    fn look(&mut self, round: &mut Round, over: bool) -> Result<(Sample, PageBitmap), DirtyLogError> {
        let rounds = &self.precopy.rounds;
        let left = rounds.left();
        let under_way = rounds.under_way();
        let mut noted = PageBitmap::new(self.pages);
        self.precopy.log.peek(&mut noted)?;
        let now = Nanos::now();
        let sent = rounds.sent();
        rounds.set_measured(self.meter.bytes_per_second());
        let count = |set: &PageBitmap| set.count().0;
        let noted_count = count(&noted);
        // What the lanes took since the last look.
        let mut fresh = std::mem::replace(&mut round.left, left);
        let left = &round.left;
        fresh.subtract(left);
        let seen = self.probe.as_ref().filter(|_| round.number == 1).map(|probe| probe.look(left, &noted, now));
        let seen = seen.unwrap_or_default();
        let differences =
            rounds.bytes_of_differences(&again(&noted, left, round.number), DIFFERENCES, &mut self.differences);
        let sample = Sample {
            at_ns: now.since(self.start),
            round: round.number,
            round_ns: now.since(round.began),
            round_over: over,
            round_pages: round.count,
            left_pages: count(left),
            unacknowledged_pages: count(&under_way).saturating_sub(under_way.intersect_count(&noted).0),
            dirty_pages: noted_count.saturating_sub(left.intersect_count(&noted).0),
            rewritten_pages: if over { round.pages.intersect_count(&noted).0 } else { 0 },
            bytes_per_second: self.meter.bytes_per_second(),
            fresh_pages: count(&fresh),
            fresh_dirty_pages: fresh.intersect_count(&noted).0,
            bytes_per_page: bytes_per_page(&sent, &round.sent_before),
            bytes_per_data_page: self.meter.page_bytes,
            bytes_per_difference: differences.unwrap_or(0.0),
            probe_pages: seen.pages,
            probe_dirty_pages: seen.dirty,
            probe_zero_pages: seen.zero,
            probe_ns: seen.ns,
            limit_bytes_per_second: self.limit,
            within_host: rounds.is_within_host(),
            handoff_ns: nanos(HANDOFF_BASE + self.precopy.round_trip * 5 / 2),
        };
        Ok((sample, noted))
    }

    fn note(&self, round: &Round, sample: Sample, verdict: &Verdict, decided: bool) {
        let mut book = self.precopy.book();
        if sample.round_ns > 0 {
            book.dirty_pages_per_second = per_second(sample.dirty_pages, sample.round_ns);
        }
        if book.report.samples.len() < SAMPLES_KEPT {
            book.report.samples.push(sample);
        }
        book.latest = Some((sample, verdict.clone()));
        if decided {
            book.report.decisions.push(DecisionReport {
                at_ns: self.start.0 + sample.at_ns,
                round: round.number,
                verdict: verdict.clone(),
                actual_round_pages: None,
                actual_round_ns: None,
                actual_blackout_ns: None,
            });
        }
    }

    /// The books of a round that is over, or was left.
    fn close(&mut self, round: &Round, noted: &PageBitmap) {
        let now = Nanos::now();
        let sent = self.precopy.rounds.sent();
        self.precopy.heat.lock().unwrap_or_else(PoisonError::into_inner).note_round(noted);
        let before = &round.sent_before;
        let mut book = self.precopy.book();
        if let Some(report) = book.report.rounds.last_mut() {
            report.end_ns = now.0;
            report.data_pages = sent.data_pages - before.data_pages;
            report.zero_pages = sent.zero_pages - before.zero_pages;
            report.deferred_pages = sent.deferred_pages - before.deferred_pages;
            report.wire_bytes = sent.wire_bytes - before.wire_bytes;
            report.dirtied_pages = noted.count().0;
            if self.settings.record_bitmaps {
                report.dirtied = Some(BASE64.encode(switchover_wire::bitmap::encode(noted.words())));
            }
        }
        // What the decision before this round expected of it.
        let expected = book.report.decisions.iter_mut().rev().find(|decision| decision.round + 1 == round.number);
        if let Some(decision) = expected.filter(|decision| decision.verdict.choice == Choice::AnotherRound) {
            decision.actual_round_pages = Some(round.count);
            decision.actual_round_ns = Some(now.since(round.began));
        }
        drop(book);
        self.slow_down(sent.data_pages - before.data_pages, noted.count().0);
    }

    /// Throttles the vCPUs where the rounds do not shrink.
    fn slow_down(&mut self, sent: u64, dirtied: u64) {
        let Some(throttle) = &mut self.throttle else { return };
        let percent = throttle.after_round(PageCount(sent), PageCount(dirtied));
        let mut book = self.precopy.book();
        if percent != book.throttle_percent {
            book.throttle_percent = percent;
            book.report.throttle_percent = book.report.throttle_percent.max(percent);
            drop(book);
            self.machine.throttle(percent);
        }
    }

    fn switch_over(&self, ending: Ending) -> RoundsEnd {
        self.precopy.rounds.halt();
        // For as long as a frame takes. A lane that is stuck fails in the end, or the session shuts it down.
        while !self.precopy.rounds.wait_halted(Instant::now() + Duration::from_secs(1)) {
            if self.precopy.ended.load(Ordering::Acquire) {
                return RoundsEnd::Ended;
            }
        }
        self.precopy.settle();
        RoundsEnd::SwitchOver(ending)
    }
}

/// Whether nothing has shown yet what differences save. A measured sample of them shows it when the first round is over, and
/// the second round by itself in two looks.
fn is_untried(sample: &Sample, sent: u64, kept: u64) -> bool {
    match sample.round {
        1 if sample.round_over && sample.bytes_per_difference > 0.0 => false,
        1 => sent < UNDECIDED || kept > sent / 2,
        2 => sample.round_ns < 2 * nanos(LOOK_EVERY) && !sample.round_over && kept > sent / 2,
        _ => false,
    }
}

/// The pages that were sent before and are to be sent again: in the first round none of those left.
fn again(noted: &PageBitmap, left: &PageBitmap, round: u32) -> PageBitmap {
    let mut again = noted.clone();
    if round == 1 {
        again.subtract(left);
    } else {
        again.unite(left);
    }
    again
}

fn bytes_per_page(sent: &SentSoFar, before: &SentSoFar) -> f64 {
    let pages = (sent.data_pages + sent.zero_pages) - (before.data_pages + before.zero_pages);
    if pages == 0 {
        return PAGE_SIZE_U64 as f64;
    }
    (sent.wire_bytes - before.wire_bytes) as f64 / pages as f64
}

fn per_second(count: u64, span_ns: u64) -> u64 {
    u64::try_from(u128::from(count) * 1_000_000_000 / u128::from(span_ns.max(1))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use switchover_wire::types::PageIndex;

    use super::*;

    #[test]
    fn differences_are_waited_for_until_they_have_shown_what_they_save() {
        let of = |round, round_over, round_ns| Sample { round, round_over, round_ns, ..Sample::default() };
        let early = of(1, false, 2_500_000);
        assert!(is_untried(&early, UNDECIDED - 1, 0), "too early to tell");
        assert!(!is_untried(&early, UNDECIDED, UNDECIDED / 2), "half of them are not kept");
        assert!(is_untried(&early, UNDECIDED, UNDECIDED / 2 + 1));
        let over = of(1, true, 1_000_000_000);
        assert!(is_untried(&over, 9000, 9000));
        assert!(!is_untried(&Sample { bytes_per_difference: 300.0, ..over }, 9000, 9000), "it was measured");
        assert!(is_untried(&of(2, false, nanos(LOOK_EVERY)), 9000, 9000));
        assert!(!is_untried(&of(2, false, 2 * nanos(LOOK_EVERY)), 9000, 9000));
        assert!(!is_untried(&of(3, false, 1), 9000, 9000));
    }

    #[test]
    fn what_is_sent_again_is_not_what_was_never_sent() {
        let set = |pages: &[u64]| {
            let mut set = PageBitmap::new(PageCount(64));
            pages.iter().for_each(|page| assert!(set.insert(PageIndex(*page))));
            set
        };
        let (noted, left) = (set(&[1, 2, 3]), set(&[3, 4]));
        assert_eq!(again(&noted, &left, 1).words(), set(&[1, 2]).words());
        assert_eq!(again(&noted, &left, 2).words(), set(&[1, 2, 3, 4]).words());
    }
}
