//! Pre-copy from its first round to the monitor's last word.
//!
//! A thread of its own begins each round with what the machine has noted, looks every few milliseconds at how it goes, and
//! asks the monitor. What the monitor decides goes to the session as an event; the session may also end the rounds itself.

mod probe;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use switchover_pager::source::Rest;
use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::dirty::{DirtyLog, DirtyLogError};
use switchover_precopy::heat::Heat;
use switchover_precopy::pack::Compression;
use switchover_precopy::rounds::{DifferenceMeter, Rounds, SentSoFar};
use switchover_precopy::throttle::AutoConverge;
use switchover_wire::clock::Nanos;
use switchover_wire::types::{PAGE_SIZE_U64, PageCount, PageIndex};

use self::probe::Probe;
use crate::machine::Machine;
use crate::monitor::costs::differences_pay;
use crate::monitor::{Choice, Monitor, Sample, Verdict};
use crate::report::{DecisionReport, EncodingCounts, PrecopyReport, RoundReport};
use crate::session::source::Ending;
use crate::settings::{Settings, Throttling, Tunables};

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

/// How long the lanes are measured before their rate is believed.
const MEASURE_FOR: Duration = Duration::from_millis(20);
/// What of a round is measured at its end, where it was shorter than that.
const LEAST_MEASURED: Duration = Duration::from_millis(1);
/// Data pages of a round from which on it is measured by itself. Of fewer, what was found is what it takes to begin.
const LEAST_PAGES: u64 = 256;
/// The weight of a new measurement of the rate against all before it.
const NEW_RATE_WEIGHT: f64 = 0.4;

/// How long a round takes at least: of a few pages under way, round would follow upon empty round until they are acknowledged.
const LEAST_ROUND: Duration = Duration::from_millis(2);

/// Pausing, saving and loading a machine of one vCPU: the blackout of an undisturbed handoff over loopback, where the link costs
/// next to nothing, is 0.8 to 1.5 ms on the development hosts.
const HANDOFF_BASE: Duration = Duration::from_micros(1300);

/// How long the last frames may take to be acknowledged before the handoff goes on without: the guest writes meanwhile.
const SETTLE_PATIENCE: Duration = Duration::from_millis(50);

/// Samples kept for the report: 20 minutes of looks 10 ms apart. Of longer migrations, the first ones.
const SAMPLES_KEPT: usize = 120_000;

/// The hottest pages that are pushed before the sweep: 1 GiB.
const HOTTEST: usize = 1 << 18;

/// What the session and the rounds' thread share.
pub struct Precopy {
    rounds: Rounds,
    log: Arc<dyn DirtyLog>,
    tunables: Mutex<Tunables>,
    /// The machine keeps its book: until then nothing is known of any page.
    noting: AtomicBool,
    /// The session ends the rounds: the thread says nothing more.
    ended: AtomicBool,
    heat: Mutex<Heat>,
    /// What the destination lacked at the handoff.
    missing: Mutex<Option<PageBitmap>>,
    book: Mutex<Book>,
    round_trip: Duration,
}

/// What the report and the progress are made from.
#[derive(Clone, Debug, Default)]
struct Book {
    report: PrecopyReport,
    latest: Option<(Sample, Verdict)>,
    throttle_percent: u8,
    dirty_pages_per_second: u64,
}

/// How the rounds ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RoundsEnd {
    /// No lane sends any more, and the handoff is due.
    SwitchOver(Ending),
    /// They do not converge.
    GaveUp(String),
    /// The machine cannot tell what is written.
    Failed(String),
    /// The session has ended them.
    Ended,
}

/// What a watcher sees.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct PrecopyProgress {
    /// Bytes of pages that are to be sent.
    pub remaining: u64,
    /// Everything that was sent.
    pub sent: SentSoFar,
    /// Rounds begun.
    pub rounds: u32,
    /// Pages newly written a second.
    pub dirty_pages_per_second: u64,
    /// The blackout of a handoff now.
    pub expected_downtime_ns: Option<u64>,
    /// Share of time for which vCPUs are kept from running.
    pub throttle_percent: u8,
}

impl Precopy {
    /// Rounds that have not begun, over lanes with this round-trip time.
    pub fn new(rounds: Rounds, machine: &dyn Machine, tunables: Tunables, round_trip: Duration) -> Self {
        let pages = machine.ram().pages();
        Self {
            rounds,
            log: machine.dirty_log(),
            tunables: Mutex::new(tunables),
            noting: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            heat: Mutex::new(Heat::new(pages)),
            missing: Mutex::new(None),
            book: Mutex::default(),
            round_trip,
        }
    }

    /// Has the machine keep its book of written pages.
    ///
    /// # Errors
    /// When it cannot.
    pub fn start_noting(&self) -> Result<(), DirtyLogError> {
        self.log.start()?;
        self.noting.store(true, Ordering::Release);
        Ok(())
    }

    /// Ends that, if it was begun.
    pub fn stop_noting(&self) {
        if self.noting.swap(false, Ordering::AcqRel) {
            self.log.stop();
        }
    }

    /// Changes what may change. Taken up at the next look.
    pub fn set_tunables(&self, tunables: Tunables) {
        *self.tunables.lock().unwrap_or_else(PoisonError::into_inner) = tunables;
    }

    /// Ends the rounds for the session. Returns at once; see [`wait_ended`](Self::wait_ended).
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.rounds.halt();
    }

    /// Ends everything. Whatever the lanes were blocked in must have been shut down.
    pub fn stop(&self) {
        self.end();
        self.rounds.stop();
    }

    /// Waits until no lane sends any more, but not past `deadline`; says whether that is so.
    pub fn wait_ended(&self, deadline: Instant) -> bool {
        self.rounds.wait_halted(deadline)
    }

    /// The rounds have ended: lets the streams run dry before the guest is paused, unless that takes too long. What is under
    /// way in the blackout competes with it for processors and the link, and would have to come again.
    pub fn settle(&self) {
        if !self.rounds.wait_taken(Instant::now() + SETTLE_PATIENCE) {
            tracing::debug!("the handoff begins while frames of pre-copy are under way");
        }
    }

    /// How far it has come.
    pub fn progress(&self) -> PrecopyProgress {
        let book = self.book();
        let (remaining, expected_downtime_ns) = book.latest.as_ref().map_or((0, None), |(sample, verdict)| {
            let pages = sample.left_pages + sample.dirty_pages + sample.unacknowledged_pages;
            (PageCount(pages).bytes(), Some(verdict.prediction.stop_blackout_ns))
        });
        PrecopyProgress {
            remaining,
            sent: self.rounds.sent(),
            rounds: book.report.rounds.last().map_or(0, |round| round.round),
            dirty_pages_per_second: book.dirty_pages_per_second,
            expected_downtime_ns,
            throttle_percent: book.throttle_percent,
        }
    }

    /// What it did.
    pub fn report(&self) -> PrecopyReport {
        let mut report = self.book().report.clone();
        report.encodings = self.encodings();
        if report.rounds.iter().any(|round| round.dirtied.is_some()) {
            let missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
            report.missing =
                missing.as_ref().map(|missing| BASE64.encode(switchover_wire::bitmap::encode(missing.words())));
        }
        report
    }

    /// How pages were encoded, by the lanes whose rounds have ended.
    pub fn encodings(&self) -> EncodingCounts {
        let counts = self.rounds.pack_counts();
        EncodingCounts {
            raw: counts.raw,
            lz4: counts.lz4,
            zstd: counts.zstd,
            delta: counts.delta,
            delta_bytes: counts.delta_bytes,
            delta_misses: counts.delta_misses,
            delta_overflows: counts.delta_overflows,
            same: counts.same,
            bytes_in: counts.bytes_in,
            bytes_out: counts.bytes_out,
        }
    }

    /// CPU time of the lanes' threads that have ended.
    pub fn cpu(&self) -> switchover_pager::cpu::CpuTime {
        self.rounds.cpu()
    }

    /// With the guest paused and the rounds ended: what the destination lacks, and how it may be sent.
    ///
    /// # Errors
    /// When the machine cannot tell.
    pub fn missing(&self, pages: PageCount) -> Result<Rest, DirtyLogError> {
        if !self.noting.load(Ordering::Acquire) {
            // The controller was faster than the first round.
            return Ok(Rest::all(pages));
        }
        if self.rounds.is_broken() {
            return Err(DirtyLogError::new("go on with the rounds' lanes", "one of them has failed"));
        }
        let mut missing = PageBitmap::new(pages);
        self.log.peek(&mut missing)?;
        // After the book was read: what was armed before a lane had taken it is left.
        missing.unite(&self.rounds.left());
        let under_way = self.rounds.under_way();
        missing.unite(&under_way);
        self.book().report.handoff_pages = missing.count().0;
        let rest = Rest {
            missing: missing.words().to_vec(),
            // The first round sent all of memory: what is missing after it was written since.
            written: self.rounds.first_is_over(),
            // Of a page that is under way, or was packed and then not sent, nobody knows which version the destination holds.
            as_they_are: under_way.words().to_vec(),
            under_way: self.rounds.in_streams(),
            encoders: self.rounds.take_encoders(),
        };
        *self.missing.lock().unwrap_or_else(PoisonError::into_inner) = Some(missing);
        Ok(rest)
    }

    /// The hottest of the pages that the destination lacked at the handoff, the hottest first.
    pub fn hottest(&self) -> Vec<PageIndex> {
        let missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        let heat = self.heat.lock().unwrap_or_else(PoisonError::into_inner);
        missing.as_ref().map(|missing| heat.hottest(missing, HOTTEST)).unwrap_or_default()
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

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

/// The lanes' rate, measured while they are busy.
#[derive(Debug)]
struct Meter {
    /// Until when the lanes' time has been counted.
    since: Nanos,
    /// Time that counts, since the last measurement.
    busy_ns: u64,
    /// Bytes that the destination had taken at the last measurement.
    taken: u64,
    rate: f64,
    /// Nothing was measured of this round yet. Rounds may differ in what bounds them, link or processor, as their encodings do:
    /// what one measures counts nothing in the next.
    fresh: bool,
    /// The rate was taken from less time than it should be, and is taken again at the next look.
    preliminary: bool,
    /// Bytes and data pages handed to the lanes at the last measurement.
    sent: (u64, u64),
    /// Bytes of a data page over the last stretches; 0 before anything was measured.
    page_bytes: f64,
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

impl Meter {
    fn new(now: Nanos) -> Self {
        let (taken, sent) = (0, (0, 0));
        Self { since: now, busy_ns: 0, taken, rate: 0.0, fresh: true, preliminary: false, sent, page_bytes: 0.0 }
    }

    fn begin(&mut self, now: Nanos, sent: &SentSoFar) {
        (self.since, self.busy_ns, self.taken, self.fresh) = (now, 0, sent.taken_bytes, true);
        self.sent = (sent.wire_bytes, sent.data_pages);
    }

    /// Within a round, or at its end: the time since the last call was spent sending. Of a round that was too short to be
    /// acknowledged, what was sent counts. `round` is what had been sent when it began.
    fn measure(&mut self, now: Nanos, so_far: &SentSoFar, round: &SentSoFar, over: bool) {
        let taken = so_far.taken_bytes;
        let (sent, pages) = (so_far.wire_bytes - round.wire_bytes, so_far.data_pages - round.data_pages);
        if self.fresh && self.rate > 0.0 && pages < LEAST_PAGES {
            return;
        }
        self.busy_ns += now.since(self.since);
        self.since = now;
        let bytes = if over && self.fresh { sent } else { taken.saturating_sub(self.taken) };
        let due = self.busy_ns >= nanos(MEASURE_FOR) || (self.fresh && over && self.busy_ns >= nanos(LEAST_MEASURED));
        // Spans are milliseconds to seconds, and bytes below 2^52.
        let rate = bytes as f64 * 1e9 / self.busy_ns.max(1) as f64;
        if !due {
            // Better than nothing, until there is a measurement.
            if (self.rate == 0.0 || self.preliminary) && bytes > 0 {
                (self.rate, self.preliminary) = (rate, true);
            }
            return;
        }
        (self.busy_ns, self.taken, self.preliminary) = (0, taken, false);
        self.rate = if self.fresh { rate } else { self.rate + NEW_RATE_WEIGHT * (rate - self.rate) };
        let (bytes, data_pages) = (so_far.wire_bytes - self.sent.0, so_far.data_pages - self.sent.1);
        self.sent = (so_far.wire_bytes, so_far.data_pages);
        // Frames of zero pages are a few bytes long, and not counted apart. Of a few pages nothing can be told.
        if data_pages >= LEAST_PAGES {
            let page = bytes as f64 / data_pages as f64;
            let old = if self.fresh || self.page_bytes == 0.0 { page } else { self.page_bytes };
            self.page_bytes = old + NEW_RATE_WEIGHT * (page - old);
        }
        self.fresh = false;
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is positive and below 2^63")]
    fn bytes_per_second(&self) -> u64 {
        self.rate as u64
    }
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

fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
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
