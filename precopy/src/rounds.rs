//! Rounds: sending what the guest writes while it goes on writing.
//!
//! One thread for each bulk lane, and one that reads what the destination says it has taken.
//!
//! ```text
//!   begin(noted) ──▶ work list ──span──▶ lane thread: rearm, find zeros, pack or not, send ──▶ bulk lane
//!                                            │ under way                                         │
//!                                            ▼                                                   │
//!                       books: one bit a page, a queue a lane ◀── taken ── receipts thread ◀─────┘
//! ```
//!
//! # What it promises
//! - *No page is under way in two versions.* A page whose last frame was not acknowledged is passed over, and stays noted
//!   in the machine's book of written pages, so that a later round takes it.
//! - *Nothing is forgotten.* At any moment, what the destination lacks or has in an old version is what the machine has
//!   noted, what no lane has taken yet, and what is under way.
//! - *A slow lane stops nobody.* A round is over when its work is given out; the next begins without waiting for frames.

mod books;
mod differences;
mod lane;
pub mod probe;
mod receipts;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use switchover_pager::cpu::{CpuMeter, CpuTime};
use switchover_pager::lane::{Notify, PageLane, PagerEvent};
use switchover_pager::pace::Pacer;
use switchover_pager::ram::Ram;
use switchover_pager::source::{ChunkEncoder, UnderWay};
use switchover_wire::types::{LaneId, PageCount, PageIndex};
use thiserror::Error;

use self::books::Books;
pub use self::differences::DifferenceMeter;
use self::lane::LaneSender;
use self::receipts::Receipts;
use crate::bitmap::{AtomicPageBitmap, PageBitmap};
use crate::dirty::{DirtyLog, DirtyLogError};
use crate::pack::{LastRound, PackCounts, PackSettings, Packer, SentVersions};

/// How many chunks of 64 pages a lane takes at a time: 4 MiB. Each span costs one rearming, which at 1024 pages costs a quarter of
/// what it costs at 64, and little more than at 16384 (`benches/dirty_tracking`). What a lane holds when the handoff comes has to be sent again.
const SPAN_CHUNKS: usize = 16;

/// Rounds could not be started.
#[derive(Debug, Error)]
pub enum RoundsError {
    /// No thread.
    #[error("cannot start a thread for pre-copy: {0}; is the number of threads limited (`ulimit -u`)?")]
    Thread(#[source] io::Error),
    /// No eventfd.
    #[error("cannot create an eventfd: {0}")]
    EventFd(#[source] io::Error),
}

/// How rounds are sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RoundsSettings {
    /// Encodings.
    pub packing: PackSettings,
    /// Bound on the bytes a second of all lanes together; 0 means none.
    pub bytes_per_second: u64,
}

/// What the threads share.
struct Shared {
    ram: Ram,
    log: Arc<dyn DirtyLog>,
    /// The round's pages that no lane has taken.
    work: AtomicPageBitmap,
    /// The next chunk of it that a lane looks at.
    cursor: AtomicUsize,
    books: Books,
    versions: Arc<SentVersions>,
    packing: PackSettings,
    within_host: bool,
    pacer: Pacer,
    /// Bytes a second as measured lately; 0 before that.
    bytes_per_second: AtomicU64,
    gate: Mutex<Gate>,
    changed: Condvar,
    halted: AtomicBool,
    /// A lane has failed: its stream may end within a frame.
    broken: AtomicBool,
    totals: Totals,
    /// Those of the lanes that have ended.
    packers: Mutex<Vec<(LaneId, Packer)>>,
}

/// What threads wait for.
#[derive(Clone, Copy, Debug, Default)]
struct Gate {
    /// The round that was begun last.
    round: u32,
    /// The last round whose work is given out.
    over: u32,
    /// No lane sends any more, or will.
    halted: bool,
    /// Lanes whose threads have not ended.
    sending: usize,
}

#[derive(Debug, Default)]
struct Totals {
    data: AtomicU64,
    zero: AtomicU64,
    deferred: AtomicU64,
    wire: AtomicU64,
    /// Of the packers that were given away.
    packs: Mutex<PackCounts>,
}

/// What was sent so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SentSoFar {
    /// Pages sent with their bytes.
    pub data_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Pages passed over because an earlier version was under way.
    pub deferred_pages: u64,
    /// Bytes handed to the lanes.
    pub wire_bytes: u64,
    /// Bytes of frames that the destination has taken.
    pub taken_bytes: u64,
}

/// The running rounds of a source.
pub struct Rounds {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    receipts: Mutex<Receipts>,
    cpu: Arc<CpuMeter>,
}

impl Rounds {
    /// Starts the threads; they wait for the first round. `log` has been started. Failures of lanes go to `notify`.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(
        ram: &Ram,
        log: Arc<dyn DirtyLog>,
        lanes: &[PageLane],
        settings: RoundsSettings,
        notify: &Notify,
    ) -> Result<Self, RoundsError> {
        let pages = ram.pages();
        let packing = settings.packing.for_ram(pages);
        let versions = SentVersions::new(packing);
        let shared = Arc::new(Shared {
            ram: ram.clone(),
            log,
            work: AtomicPageBitmap::new(pages),
            cursor: AtomicUsize::new(usize::MAX / 2),
            books: Books::new(pages, lanes, Arc::clone(&versions)),
            versions,
            packing,
            within_host: lanes.iter().all(|lane| lane.socket.is_within_host()),
            pacer: Pacer::new(settings.bytes_per_second),
            bytes_per_second: AtomicU64::new(0),
            gate: Mutex::new(Gate { sending: lanes.len(), ..Gate::default() }),
            changed: Condvar::new(),
            halted: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            totals: Totals::default(),
            packers: Mutex::default(),
        });
        let cpu = Arc::new(CpuMeter::default());
        let receipts = Receipts::start(&shared, lanes, &cpu, notify)?;
        let rounds = Self { shared, threads: Mutex::default(), receipts: Mutex::new(receipts), cpu };
        for (index, lane) in lanes.iter().enumerate() {
            if let Err(error) = rounds.spawn(index, lane.clone(), notify) {
                rounds.shared.leave(lanes.len() - index);
                return Err(error);
            }
        }
        Ok(rounds)
    }

    fn spawn(&self, index: usize, lane: PageLane, notify: &Notify) -> Result<(), RoundsError> {
        let (shared, cpu, notify) = (Arc::clone(&self.shared), Arc::clone(&self.cpu), Arc::clone(notify));
        let body = move || {
            let id = lane.id;
            let result = cpu.measure(|| LaneSender::new(index, lane, &shared).and_then(LaneSender::run));
            let halted = shared.halted.load(Ordering::Acquire);
            if result.is_err() {
                shared.broken.store(true, Ordering::Release);
            }
            shared.leave(1);
            if let Err(error) = result
                && !halted
            {
                notify(PagerEvent::LaneFailed { lane: id, reason: error.to_string() });
            }
        };
        let thread =
            thread::Builder::new().name(format!("precopy {index}")).spawn(body).map_err(RoundsError::Thread)?;
        self.threads().push(thread);
        Ok(())
    }

    /// Arms `sample` of the first round's pages `noted`, before any lane takes one, so that it shows how soon they are written
    /// again. After the first round has begun it does nothing: a page that a lane has read must not be armed by another.
    ///
    /// What was armed here and not written is no longer noted, and the destination lacks it all the same: it is
    /// [`left`](Self::left) until a lane takes it.
    ///
    /// # Errors
    /// When the machine cannot rearm pages.
    pub fn probe(&self, noted: &PageBitmap, sample: &PageBitmap) -> Result<(), DirtyLogError> {
        let gate = self.shared.gate();
        if gate.round > 0 {
            return Ok(());
        }
        // Before the machine forgets a page it is left.
        self.shared.work.unite(noted);
        let mut armed = sample.clone();
        armed.intersect(noted);
        // With the gate held, so that no round can begin meanwhile.
        let armed = self.shared.log.rearm(PageIndex(0), armed.words());
        drop(gate);
        armed
    }

    /// Begins the next round, whose pages are `noted`; returns its number, counted from 1. The round before must be over.
    pub fn begin(&self, noted: &PageBitmap) -> u32 {
        let shared = &self.shared;
        shared.work.unite(noted);
        let mut gate = shared.gate();
        shared.cursor.store(0, Ordering::Release);
        gate.round += 1;
        shared.changed.notify_all();
        gate.round
    }

    /// Waits until the round is over, but no longer than `span`; says whether it is. A halt ends the wait.
    #[must_use]
    pub fn wait(&self, span: Duration) -> bool {
        let unfinished = |gate: &mut Gate| gate.over < gate.round && !gate.halted;
        let waited = self.shared.changed.wait_timeout_while(self.shared.gate(), span, unfinished);
        let gate = waited.unwrap_or_else(PoisonError::into_inner).0;
        gate.over >= gate.round
    }

    /// No more frames: each lane ends with the one that it is sending. Returns at once.
    pub fn halt(&self) {
        self.shared.halted.store(true, Ordering::Release);
        self.shared.gate().halted = true;
        self.shared.changed.notify_all();
    }

    /// Waits until no lane sends any more, but not past `deadline`; says whether that is so.
    #[must_use]
    pub fn wait_halted(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.shared.changed.wait_timeout_while(self.shared.gate(), left, |gate| gate.sending > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0.sending == 0
    }

    /// Waits until the destination has acknowledged all that the lanes have sent, but not past `deadline`; says whether that is
    /// so. After a halt.
    #[must_use]
    pub fn wait_taken(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let unfinished = |_: &mut Gate| !self.shared.books.all_taken();
        let waited = self.shared.changed.wait_timeout_while(self.shared.gate(), left, unfinished);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Pages of which the version that was sent is kept, so that a difference to it could be sent.
    #[must_use]
    pub fn kept_pages(&self) -> u64 {
        self.shared.versions.kept_pages()
    }

    /// Wire bytes that a page of `among` would take if it were sent now, as a difference where its version is kept, on average of
    /// about `most` of them. `None` where none of those is kept.
    #[must_use]
    pub fn bytes_of_differences(&self, among: &PageBitmap, most: u64, meter: &mut DifferenceMeter) -> Option<f64> {
        if self.kept_pages() == 0 {
            return None;
        }
        meter.bytes_per_page(&self.shared.ram, &self.shared.versions, among, most)
    }

    /// Whether nothing but this host is between the two ends: each lane is a Unix socket, or goes over loopback.
    #[must_use]
    pub fn is_within_host(&self) -> bool {
        self.shared.within_host
    }

    /// Whether all of the first round was given out to the lanes.
    #[must_use]
    pub fn first_is_over(&self) -> bool {
        self.shared.gate().over > 0
    }

    /// Whether a lane has failed, so that nothing can follow in its stream.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.shared.broken.load(Ordering::Acquire)
    }

    /// Ends all threads, and forgets what was kept of sent pages. A lane that is blocked in its socket ends when that is shut
    /// down. Nothing touches the machine's book afterwards. Safe to repeat.
    pub fn stop(&self) {
        self.halt();
        for thread in std::mem::take(&mut *self.threads()) {
            if thread.join().is_err() {
                tracing::error!("a thread of pre-copy panicked");
            }
        }
        self.receipts.lock().unwrap_or_else(PoisonError::into_inner).stop();
        self.shared.versions.clear();
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The round's pages that no lane has taken.
    #[must_use]
    pub fn left(&self) -> PageBitmap {
        self.shared.work.snapshot()
    }

    /// The pages that a lane has taken or sent, and the destination not acknowledged.
    #[must_use]
    pub fn under_way(&self) -> PageBitmap {
        self.shared.books.under_way()
    }

    /// What each lane has sent and the destination not acknowledged. Good for the handoff only after a halt, and only when
    /// taken after [`under_way`](Self::under_way).
    #[must_use]
    pub fn in_streams(&self) -> Vec<UnderWay> {
        self.shared.books.in_streams()
    }

    /// The bound on bytes a second is this from now on; 0 means none.
    pub fn set_rate(&self, bytes_per_second: u64) {
        self.shared.pacer.set_rate(bytes_per_second);
    }

    /// What the lanes carry a second, as measured lately: frames are kept short enough that none takes long.
    pub fn set_measured(&self, bytes_per_second: u64) {
        self.shared.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
    }

    /// What was sent so far.
    #[must_use]
    pub fn sent(&self) -> SentSoFar {
        let totals = &self.shared.totals;
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        SentSoFar {
            data_pages: read(&totals.data),
            zero_pages: read(&totals.zero),
            deferred_pages: read(&totals.deferred),
            wire_bytes: read(&totals.wire),
            taken_bytes: self.shared.books.taken_bytes(),
        }
    }

    /// How pages were encoded in the rounds, by the lanes that have ended.
    #[must_use]
    pub fn pack_counts(&self) -> PackCounts {
        let mut counts = *self.shared.totals.packs.lock().unwrap_or_else(PoisonError::into_inner);
        self.packers().iter().for_each(|(_, packer)| counts += packer.counts());
        counts
    }

    /// The ended lanes' packers, with what they have learned, for those who send the rest.
    #[must_use]
    pub fn take_encoders(&self) -> Vec<(LaneId, Box<dyn ChunkEncoder>)> {
        let counts = self.pack_counts();
        *self.shared.totals.packs.lock().unwrap_or_else(PoisonError::into_inner) = counts;
        let mut packers = std::mem::take(&mut *self.packers());
        let round = self.shared.gate().round.saturating_add(1);
        packers.drain(..).map(|(lane, packer)| (lane, Box::new(LastRound::new(packer, round)) as _)).collect()
    }

    fn packers(&self) -> MutexGuard<'_, Vec<(LaneId, Packer)>> {
        self.shared.packers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// CPU time of the threads that have ended.
    #[must_use]
    pub fn cpu(&self) -> CpuTime {
        self.cpu.total()
    }
}

impl Drop for Rounds {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `lanes` lanes send no more.
    fn leave(&self, lanes: usize) {
        let mut gate = self.gate();
        gate.sending = gate.sending.saturating_sub(lanes);
        self.changed.notify_all();
    }

    fn is_halted(&self) -> bool {
        self.halted.load(Ordering::Acquire)
    }

    /// The next chunks of the round; `None` when all are given out.
    fn next_span(&self) -> Option<std::ops::Range<usize>> {
        let chunks = usize::try_from(self.ram.pages().0.div_ceil(64)).unwrap_or(usize::MAX);
        let start = self.cursor.fetch_add(SPAN_CHUNKS, Ordering::AcqRel);
        (start < chunks).then(|| start..(start + SPAN_CHUNKS).min(chunks))
    }

    /// Waits for a round after `round`; `None` when there will be none.
    fn next_round(&self, round: u32) -> Option<u32> {
        let waited = self.changed.wait_while(self.gate(), |gate| gate.round <= round && !gate.halted);
        let gate = waited.unwrap_or_else(PoisonError::into_inner);
        (!gate.halted).then_some(gate.round)
    }

    /// All work of `round` is given out.
    fn round_over(&self, round: u32) {
        let mut gate = self.gate();
        if gate.over < round {
            gate.over = round;
            self.changed.notify_all();
        }
    }

    /// Waits for `span`; says whether a halt came first.
    fn pause(&self, span: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.gate(), span, |gate| !gate.halted);
        waited.unwrap_or_else(PoisonError::into_inner).0.halted
    }

    /// A receipt has come: after a halt somebody may wait for it.
    fn receipt_came(&self) {
        if self.is_halted() {
            drop(self.gate());
            self.changed.notify_all();
        }
    }

    fn pages(&self) -> PageCount {
        self.ram.pages()
    }
}
