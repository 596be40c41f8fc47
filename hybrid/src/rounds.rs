//! Pre-copy from its first round to the monitor's last word.
//!
//! A thread of its own begins each round with what the machine has noted, looks every few milliseconds at how it goes, and
//! asks the monitor. What the monitor decides goes to the session as an event; the session may also end the rounds itself.

mod conductor;
mod meter;
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
use switchover_precopy::rounds::{Rounds, SentSoFar};
use switchover_wire::types::{PageCount, PageIndex};

pub use self::conductor::Conductor;
use crate::machine::Machine;
use crate::monitor::{Sample, Verdict};
use crate::report::{EncodingCounts, PrecopyReport};
use crate::session::source::Ending;
use crate::settings::Tunables;

/// How long the last frames may take to be acknowledged before the handoff goes on without: the guest writes meanwhile.
const SETTLE_PATIENCE: Duration = Duration::from_millis(50);

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

fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}
