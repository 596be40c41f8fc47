//! The destination's half: guest memory that fills itself.
//!
//! ```text
//!   vCPU ──fault──▶ userfaultfd ──▶ fault thread ──request──▶ fault lane ──▶ source
//!     ▲                              │      ▲                     │
//!     └────────── CONTINUE, WAKE ────┘      └──── page ◀──────────┘
//!     └────────── CONTINUE in runs ── bulk threads ◀── bulk lanes ◀── source
//!                     both write the alias of pages that they have claimed in `PageStates`
//! ```
//!
//! Before the handoff the bulk lanes bring pre-copy's versions of pages, and `mapper.rs` maps what stays cold. What the
//! handoff changes is in `handoff.rs`.

mod bulk;
mod fault;
mod handoff;
mod mapper;
mod seat;
mod stains;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crossbeam::queue::{ArrayQueue, SegQueue};
use nix::sys::eventfd::{EfdFlags, EventFd};
use switchover_wire::clock::Nanos;
use switchover_wire::types::{LaneRole, PAGE_SIZE, PageIndex};
use thiserror::Error;

use self::bulk::{BulkError, BulkReceiver};
use self::fault::FaultService;
use self::handoff::Handoff;
use self::mapper::MappedAhead;
use self::seat::Seat;
use self::stains::Stains;
use crate::cpu::{CpuMeter, CpuTime};
use crate::lane::{Notify, PageLane, PagerEvent};
use crate::ram::{Ram, RamError};
use crate::source::thread_name;
use crate::state::{Arrival, Claim, LaneTag, PageStates};
use crate::stats::{FaultStats, RateSeries, WaitCounts};
use crate::trace::{FaultTrace, TracedFault};
use crate::uffd::{Watch, WatchError};

/// Wake-ups of raced faults that the bulk lanes report and the fault thread has not looked at yet. More than there
/// can be faults under way; what does not fit is counted without its time.
const RACED_WAKES: usize = 4096;

/// The destination's pager could not start or end.
#[derive(Debug, Error)]
pub enum DestinationPagerError {
    /// Guest RAM could not be reserved.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Userfaultfd refused.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// No thread.
    #[error("cannot start a thread for the {lane}: {source}; is the number of threads limited (`ulimit -u`)?")]
    Thread {
        /// The lane it was for.
        lane: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// What a lane needs could not be made.
    #[error("cannot serve the {lane}: {reason}")]
    Service {
        /// The lane.
        lane: String,
        /// Why.
        reason: String,
    },
    /// More lanes than a page's state can name.
    #[error("{lanes} lanes carry pages, but at most {limit} can: use fewer bulk lanes", limit = LaneTag::LIMIT)]
    TooManyLanes {
        /// How many there are.
        lanes: usize,
    },
    /// Not exactly one fault lane.
    #[error("{lanes} fault lanes were opened; this version serves faults over exactly one")]
    FaultLanes {
        /// How many there are.
        lanes: usize,
    },
    /// No eventfd.
    #[error("cannot create an eventfd: {0}")]
    EventFd(#[source] io::Error),
    /// What the source says at the handoff is not what it sent.
    #[error("the source says that {missing} pages are still to come, but {absent} are not here")]
    Forgotten {
        /// How many pages the source means to send.
        missing: u64,
        /// How many are needed.
        absent: u64,
    },
    /// The handoff was made already.
    #[error("the source told twice which pages are still to come")]
    HandedOver,
    /// The pager was asked to finish while pages are missing.
    #[error("{missing} pages are still missing: userfaultfd stays, so that nobody reads zeros in their place")]
    Incomplete {
        /// How many.
        missing: u64,
    },
}

/// What the threads share.
struct Shared {
    watch: Watch,
    states: PageStates,
    handoff: Handoff,
    ahead: MappedAhead,
    stains: Stains,
    /// Pages that a fault waits for and that nobody brings any more: the fault thread asks for them.
    orphans: SegQueue<PageIndex>,
    seat: Seat,
    /// The link was lost once: pages may have landed in part.
    rejoined: AtomicBool,
    wake_fault_thread: EventFd,
    /// Whether RAM's pages are allocated: then a zero page can be mapped like any other.
    populated: bool,
    missing: AtomicU64,
    last_placed: AtomicU64,
    stopping: AtomicBool,
    raced_wakes: ArrayQueue<(PageIndex, Nanos)>,
    counts: Counts,
    faults: Mutex<FaultStats>,
    trace: FaultTrace,
    pushed_rates: Mutex<Vec<RateSeries>>,
    bulk_lanes_open: AtomicU64,
    notify: Notify,
}

#[derive(Default)]
struct Counts {
    zero: AtomicU64,
    pushed: AtomicU64,
    requested: AtomicU64,
    discarded: AtomicU64,
    precopied: AtomicU64,
    precopied_zero: AtomicU64,
    kept: AtomicU64,
    requests: AtomicU64,
}

impl Shared {
    /// Notes that `pages` more are here and mapped.
    fn placed(&self, pages: u64) {
        if pages == 0 {
            return;
        }
        self.last_placed.fetch_max(Nanos::now().0, Ordering::AcqRel);
        if self.missing.fetch_sub(pages, Ordering::AcqRel) == pages {
            (self.notify)(PagerEvent::Complete);
        }
    }

    /// The source says that `page` is zero. What an older version has left in it is wiped out first.
    fn claim_zero(&self, page: PageIndex, lane: LaneTag) -> Claim {
        if !self.stains.has(page) {
            return self.states.claim_zero(page);
        }
        if self.states.claim(page, lane) == Claim::Lost {
            return Claim::Lost;
        }
        self.wipe(page);
        match self.states.arrived(page, lane) {
            Arrival::Present { wanted } => Claim::Won { wanted },
            Arrival::Removed => Claim::Lost,
        }
    }

    /// Undoes what has landed in a page that the caller has claimed.
    fn wipe(&self, page: PageIndex) {
        if let Some(alias) = self.watch.ram().alias_of(page) {
            // SAFETY: a whole page of the alias, which the watch keeps mapped; the caller has claimed it, and until it
            // lets go nobody else writes it and the guest has not mapped it, or does not run.
            unsafe { alias.write_bytes(0, PAGE_SIZE) };
        }
    }

    /// A fault waits for `page`, whose lane does not bring it after all.
    fn ask_anew(&self, page: PageIndex) {
        self.orphans.push(page);
        self.wake_fault_thread();
    }

    fn wake_fault_thread(&self) {
        if let Err(errno) = self.wake_fault_thread.write(1) {
            tracing::error!(%errno, "cannot wake the fault thread");
        }
    }
}

/// What a lane's thread does.
enum Service {
    Bulk(Box<BulkReceiver>),
    Fault(Box<FaultService>),
}

/// How far the destination has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DestinationProgress {
    /// Pages that are zero.
    pub zero: u64,
    /// Pages that came on a bulk lane.
    pub pushed: u64,
    /// Pages that came on the fault lane.
    pub requested: u64,
    /// Pages that came a second time.
    pub discarded: u64,
    /// Versions of pages that came before the handoff, with their bytes.
    pub precopied: u64,
    /// Those that came as zero.
    pub precopied_zero: u64,
    /// Pages that were here at the handoff, and need not come again.
    pub kept: u64,
    /// Pages asked for.
    pub requests: u64,
    /// Pages that are not here yet.
    pub missing: u64,
}

/// The running threads of a destination.
pub struct DestinationPager {
    shared: Arc<Shared>,
    lanes: Vec<PageLane>,
    /// The threads of the bulk lanes, which end with their lanes.
    bulk_threads: Vec<JoinHandle<()>>,
    /// The fault thread and the mapper, which do not.
    threads: Vec<JoinHandle<()>>,
    cpu: Arc<CpuMeter>,
}

/// The fault thread's claims; the bulk lanes' follow.
const FAULT_TAG: LaneTag = LaneTag::FIRST;

impl DestinationPager {
    /// Reserves `ram` (unless `lazy`), registers it, and serves its faults from now on. All of RAM counts as absent:
    /// nothing may have been loaded into it. Until [`hand_over`](Self::hand_over) the lanes bring versions of pages that later
    /// ones may replace, and nobody may run on this memory.
    ///
    /// # Errors
    /// When memory is short, userfaultfd refuses, or the lanes are not one fault lane and a few bulk lanes.
    pub fn start(ram: Ram, lanes: Vec<PageLane>, lazy: bool, notify: &Notify) -> Result<Self, DestinationPagerError> {
        check_lanes(&lanes)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| DestinationPagerError::EventFd(errno.into()))?;
        if !lazy {
            ram.populate()?;
            ram.touch();
        }
        let pages = ram.pages();
        let shared = Arc::new(Shared {
            watch: Watch::register(ram)?,
            states: PageStates::new(pages),
            handoff: Handoff::default(),
            ahead: MappedAhead::new(pages),
            stains: Stains::new(pages),
            orphans: SegQueue::new(),
            seat: Seat::default(),
            rejoined: AtomicBool::new(false),
            wake_fault_thread: wake,
            populated: !lazy,
            missing: AtomicU64::new(pages.0),
            last_placed: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            raced_wakes: ArrayQueue::new(RACED_WAKES),
            counts: Counts::default(),
            faults: Mutex::new(FaultStats::new()),
            trace: FaultTrace::default(),
            pushed_rates: Mutex::new(Vec::new()),
            bulk_lanes_open: AtomicU64::new(0),
            notify: Arc::clone(notify),
        });
        let cpu = Arc::new(CpuMeter::default());
        let mut pager = Self { shared, lanes: Vec::new(), bulk_threads: Vec::new(), threads: Vec::new(), cpu };
        if let Err(error) = pager.spawn_all(lanes) {
            pager.abandon();
            return Err(error);
        }
        Ok(pager)
    }

    fn spawn_all(&mut self, lanes: Vec<PageLane>) -> Result<(), DestinationPagerError> {
        let (fault, bulk): (Vec<_>, Vec<_>) = lanes.into_iter().partition(|lane| lane.id.role == LaneRole::Fault);
        for lane in fault {
            self.lanes.push(lane.clone());
            let thread = self.spawn(lane, FAULT_TAG)?;
            self.threads.push(thread);
        }
        self.spawn_bulk(bulk)?;
        self.spawn_mapper()
    }

    fn spawn_bulk(&mut self, lanes: Vec<PageLane>) -> Result<(), DestinationPagerError> {
        self.shared.bulk_lanes_open.store(lanes.len() as u64, Ordering::Release);
        for (lane, tag) in lanes.into_iter().zip((FAULT_TAG.number() + 1..).map_while(LaneTag::new)) {
            self.lanes.push(lane.clone());
            let thread = self.spawn(lane, tag)?;
            self.bulk_threads.push(thread);
        }
        Ok(())
    }

    /// The link is lost: shuts its lanes down, and takes back what they had claimed. What is here is served on; who needs more
    /// waits. Nothing of these lanes is reported after it returns. Safe to repeat.
    pub fn detach(&mut self) {
        self.shared.rejoined.store(true, Ordering::Release);
        self.end_bulk_lanes();
        self.lanes.clear();
        self.shared.seat.wait_left();
    }

    /// The pages that are not here, a bit each, in words of 64: what a source that joins again has to send. Of a detached pager,
    /// where it can only shrink.
    #[must_use]
    pub fn missing(&self) -> Vec<u64> {
        let states = &self.shared.states;
        let word = |first: u64| {
            let here = (first..states.pages().0.min(first + 64)).map(PageIndex);
            here.filter(|page| !states.is_resident(*page)).fold(0, |word, page| word | 1 << (page.0 % 64))
        };
        (0..states.pages().0).step_by(64).map(word).collect()
    }

    /// Goes on over these lanes, in place of those that were [detached](Self::detach): what is waited for is asked for anew.
    /// The source must be serving.
    ///
    /// # Errors
    /// When the lanes are not one fault lane and a few bulk lanes, or a thread cannot be started. It is detached then.
    pub fn attach(&mut self, lanes: Vec<PageLane>) -> Result<(), DestinationPagerError> {
        check_lanes(&lanes)?;
        self.detach();
        let (fault, bulk): (Vec<_>, Vec<_>) = lanes.into_iter().partition(|lane| lane.id.role == LaneRole::Fault);
        if let Err(error) = self.spawn_bulk(bulk) {
            self.detach();
            return Err(error);
        }
        self.lanes.extend(fault.iter().cloned());
        fault.into_iter().for_each(|lane| self.shared.seat.offer(lane));
        self.shared.wake_fault_thread();
        Ok(())
    }

    fn spawn_mapper(&mut self) -> Result<(), DestinationPagerError> {
        let (shared, cpu) = (Arc::clone(&self.shared), Arc::clone(&self.cpu));
        let body = move || {
            if let Err(error) = cpu.measure(|| mapper::run(&shared)) {
                // Only time is lost: who touches such a page faults.
                tracing::warn!(%error, "pages are not mapped ahead any more");
            }
        };
        let thread = thread::Builder::new()
            .name("mapper".to_owned())
            .spawn(body)
            .map_err(|source| DestinationPagerError::Thread { lane: "mapping ahead".to_owned(), source })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Round `round` of pre-copy begins, counted from 1: what has not come again for some rounds may be mapped ahead.
    pub fn begin_round(&self, round: u32) {
        self.shared.handoff.begin_round(round);
    }

    /// The handoff: `missing` (a bit a page, in words of 64) must still come, whatever has come of it before; everything
    /// else is here. Frames of pre-copy count for nothing from now on.
    ///
    /// # Errors
    /// When something that is not `missing` never came, the handoff was made before, or the kernel refuses.
    pub fn hand_over(&self, missing: &[u64]) -> Result<(), DestinationPagerError> {
        handoff::hand_over(&self.shared, missing)
    }

    /// The guest runs: map everything that is here and not mapped, before it is touched.
    pub fn map_the_rest(&self) {
        self.shared.handoff.map_the_rest();
    }

    /// Ends the watch of memory that is complete before the guest runs: it will never fault then. The pager's threads go on
    /// until [`finish`](Self::finish).
    ///
    /// # Errors
    /// When pages are missing, or the kernel refuses; faults go on being served.
    pub fn end_watch(&self) -> Result<(), DestinationPagerError> {
        let missing = self.shared.missing.load(Ordering::Acquire);
        if missing > 0 || !self.shared.handoff.is_over() {
            return Err(DestinationPagerError::Incomplete { missing });
        }
        Ok(self.shared.watch.unregister()?)
    }

    fn spawn(&self, lane: PageLane, tag: LaneTag) -> Result<JoinHandle<()>, DestinationPagerError> {
        let shared = Arc::clone(&self.shared);
        let cpu = Arc::clone(&self.cpu);
        let id = lane.id;
        let name = id.to_string();
        // Made here and not on its thread, so that what is started can also serve.
        let no_service = |reason: String| DestinationPagerError::Service { lane: id.to_string(), reason };
        let service = match id.role {
            LaneRole::Bulk => {
                let service = BulkReceiver::new(lane, tag, &shared);
                Service::Bulk(Box::new(service.map_err(|error| no_service(error.to_string()))?))
            }
            _ => {
                let service = FaultService::new(lane, tag, &shared);
                Service::Fault(Box::new(service.map_err(|error| no_service(error.to_string()))?))
            }
        };
        let body = move || {
            let failed = cpu.measure(|| match service {
                Service::Bulk(receiver) => receiver.run().err().map(|error| match error {
                    // What is here cannot be mapped, and who waits for it is not woken: no other lane helps.
                    BulkError::Watch(error) => PagerEvent::Broken { reason: error.to_string() },
                    error => PagerEvent::LaneFailed { lane: id, reason: error.to_string() },
                }),
                // The fault thread ends only when faults can no longer be served at all.
                Service::Fault(service) => {
                    service.run().err().map(|error| PagerEvent::Broken { reason: error.to_string() })
                }
            });
            if let Some(event) = failed.filter(|_| !shared.stopping.load(Ordering::Acquire)) {
                (shared.notify)(event);
            }
            if id.role == LaneRole::Fault {
                shared.seat.leave();
            }
        };
        thread::Builder::new()
            .name(thread_name(&name))
            .spawn(body)
            .map_err(|source| DestinationPagerError::Thread { lane: name, source })
    }

    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> DestinationProgress {
        let counts = &self.shared.counts;
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        DestinationProgress {
            zero: read(&counts.zero),
            pushed: read(&counts.pushed),
            requested: read(&counts.requested),
            discarded: read(&counts.discarded),
            precopied: read(&counts.precopied),
            precopied_zero: read(&counts.precopied_zero),
            kept: read(&counts.kept),
            requests: read(&counts.requests),
            missing: self.shared.missing.load(Ordering::Acquire),
        }
    }

    /// What faults cost so far.
    #[must_use]
    pub fn fault_stats(&self) -> FaultStats {
        self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps every fault from now on, up to [`MOST_TRACED`](crate::trace::MOST_TRACED).
    pub fn trace_faults(&self) {
        self.shared.trace.start();
    }

    /// The faults kept, in the order in which they were answered.
    #[must_use]
    pub fn traced_faults(&self) -> Vec<TracedFault> {
        self.shared.trace.faults()
    }

    /// How long faults whose pages were asked for took so far, in few words.
    #[must_use]
    pub fn waits(&self) -> WaitCounts {
        self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner).waits
    }

    /// Non-zero pushed pages placed over time, from `start` on. Of the lanes that have ended.
    #[must_use]
    pub fn pushed_rate(&self, start: Nanos) -> Vec<u32> {
        let rates = self.shared.pushed_rates.lock().unwrap_or_else(PoisonError::into_inner);
        RateSeries::merged(rates.iter(), start)
    }

    /// When the last page was placed.
    #[must_use]
    pub fn last_placed(&self) -> Option<Nanos> {
        match self.shared.last_placed.load(Ordering::Acquire) {
            0 => None,
            at => Some(Nanos(at)),
        }
    }

    /// CPU time of the threads that have ended.
    #[must_use]
    pub fn cpu(&self) -> CpuTime {
        self.cpu.total()
    }

    /// Ends the pager of a guest whose memory is complete: unregisters userfaultfd, then ends the threads.
    ///
    /// # Errors
    /// When pages are missing, or the kernel refuses; faults go on being served.
    pub fn finish(&mut self) -> Result<(), DestinationPagerError> {
        let missing = self.shared.missing.load(Ordering::Acquire);
        if missing > 0 {
            return Err(DestinationPagerError::Incomplete { missing });
        }
        self.shared.watch.unregister()?;
        self.end_threads();
        Ok(())
    }

    /// Ends the pager of a guest that never ran and never will. Its memory may be used for nothing afterwards.
    pub fn abandon(mut self) {
        self.end_threads();
        // Nobody runs on this memory, so nobody can be fed zeros; without this the descriptor would stay for ever.
        if let Err(error) = self.shared.watch.unregister() {
            tracing::warn!(%error, "userfaultfd stays registered");
        }
    }

    fn end_threads(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.handoff.stop();
        self.shared.wake_fault_thread();
        self.end_bulk_lanes();
        join(&mut self.threads);
    }

    /// Shuts all lanes down, and waits for the threads of the bulk lanes.
    fn end_bulk_lanes(&mut self) {
        for lane in &self.lanes {
            lane.socket.shutdown();
        }
        join(&mut self.bulk_threads);
    }
}

impl Drop for DestinationPager {
    /// A pager that is dropped before it finished leaves its threads serving and its userfaultfd open, for as long as
    /// the process lives: whoever waits for a page must not be given zeros.
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            tracing::error!("a pager was dropped while its guest's memory is incomplete; it goes on serving");
        }
    }
}

fn join(threads: &mut Vec<JoinHandle<()>>) {
    for thread in threads.drain(..) {
        if thread.join().is_err() {
            tracing::error!("a thread of the destination's pager panicked");
        }
    }
}

/// One fault lane, and not more lanes than can be named.
fn check_lanes(lanes: &[PageLane]) -> Result<(), DestinationPagerError> {
    let fault_lanes = lanes.iter().filter(|lane| lane.id.role == LaneRole::Fault).count();
    if fault_lanes != 1 {
        return Err(DestinationPagerError::FaultLanes { lanes: fault_lanes });
    }
    if lanes.len() > usize::from(LaneTag::LIMIT) {
        return Err(DestinationPagerError::TooManyLanes { lanes: lanes.len() });
    }
    Ok(())
}

/// The descriptor of an eventfd, for polling.
fn poll_fd(event: &EventFd) -> io::Result<OwnedFd> {
    event.as_fd().try_clone_to_owned()
}
