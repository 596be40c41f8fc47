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
//! There may be several fault lanes. Each has a fault thread, a userfaultfd and a share of the pages of its own then: a *shard*.
//! The states of pages are one map for all.
//!
//! Before the handoff the bulk lanes bring pre-copy's versions of pages, and `mapper.rs` maps what stays cold. What the
//! handoff changes is in `handoff.rs`.

mod bulk;
mod fault;
mod handoff;
mod mapper;
mod replies;
mod seat;
mod shard;
mod stains;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use switchover_wire::clock::Nanos;
use switchover_wire::types::{LaneRole, PAGE_SIZE, PageIndex, SessionId};
use thiserror::Error;

use self::bulk::{BulkError, BulkReceiver};
use self::fault::FaultService;
use self::handoff::Handoff;
use self::mapper::{MappedAhead, UnmappedZeros};
use self::shard::Shard;
use self::stains::Stains;
use crate::cpu::{self, CpuMeter, CpuTime};
use crate::digest::MemoryDigest;
use crate::lane::{FAULT_LANES_LIMIT, Notify, PageLane, PagerEvent};
use crate::ram::{Ram, RamError};
use crate::source::thread_name;
use crate::state::{Arrival, Claim, LaneTag, PageStates};
use crate::stats::{FaultStats, RateSeries, WaitCounts};
use crate::trace::{FaultTrace, TracedFault};
use crate::uffd::{Watch, WatchError};
use crate::wait::Idleness;

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
    /// No fault lane, or too many.
    #[error("{lanes} fault lanes were opened; faults are served over 1 to {FAULT_LANES_LIMIT}")]
    FaultLanes {
        /// How many there are.
        lanes: usize,
    },
    /// Another number of fault lanes than memory is divided for.
    #[error("{lanes} fault lanes were opened in place of {shards} that were lost; it must be as many")]
    OtherFaultLanes {
        /// How many there are.
        lanes: usize,
        /// How many there were.
        shards: usize,
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
    unmapped_zeros: UnmappedZeros,
    stains: Stains,
    /// As many as the watch has.
    shards: Box<[Arc<Shard>]>,
    /// Of what the guest is given, where that is to be compared with what it left.
    digest: Option<MemoryDigest>,
    /// The link was lost once: pages may have landed in part.
    rejoined: AtomicBool,
    /// Whether RAM's pages are allocated: then a zero page can be mapped like any other.
    populated: bool,
    missing: AtomicU64,
    last_placed: AtomicU64,
    stopping: AtomicBool,
    counts: Counts,
    trace: FaultTrace,
    pushed_rates: Mutex<Vec<RateSeries>>,
    bulk_lanes_open: AtomicU64,
    idleness: Idleness,
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
            let claim = self.states.claim_zero(page);
            if let (Some(digest), Claim::Won { .. }) = (&self.digest, claim) {
                digest.add_zero(page);
            }
            return claim;
        }
        if self.states.claim(page, lane) == Claim::Lost {
            return Claim::Lost;
        }
        self.wipe(page);
        self.digest(page);
        match self.states.arrived(page, lane) {
            Arrival::Present { wanted } => Claim::Won { wanted },
            Arrival::Removed => Claim::Lost,
        }
    }

    /// Digests a page as it lies in the alias: the caller has claimed it, and will say that it has arrived; or nobody runs yet.
    fn digest(&self, page: PageIndex) {
        let Some(digest) = &self.digest else { return };
        let mut bytes = [0; PAGE_SIZE];
        if self.watch.ram().copy_page(page, &mut bytes) {
            digest.add(page, &bytes);
        }
    }

    /// Puts the bytes of a page that the caller has claimed into the alias.
    fn fill(&self, page: PageIndex, bytes: &[u8; PAGE_SIZE]) {
        if let Some(alias) = self.watch.ram().alias_of(page) {
            // SAFETY: as in `wipe`; the bytes are no part of the alias, which no reference of Rust's lies in.
            unsafe { alias.copy_from_nonoverlapping(bytes.as_ptr(), PAGE_SIZE) };
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

    /// Who serves the faults on `page`.
    fn shard_of(&self, page: PageIndex) -> &Shard {
        &self.shards[self.watch.shard_of(page)]
    }
}

/// What a lane's thread does.
enum Service {
    Bulk(Box<BulkReceiver>),
    Fault(Box<FaultService>, Arc<Shard>),
}

impl Service {
    fn shard(&self) -> Option<Arc<Shard>> {
        match self {
            Self::Bulk(_) => None,
            Self::Fault(_, shard) => Some(Arc::clone(shard)),
        }
    }
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
    /// The fault threads, which do not.
    threads: Vec<JoinHandle<()>>,
    mapper: Option<JoinHandle<()>>,
    cpu: Arc<CpuMeter>,
}

impl DestinationPager {
    /// Reserves `ram` (unless `lazy`), registers it, divided among as many shards as there are fault lanes, and serves its faults
    /// from now on. All of RAM counts as absent: nothing may have been loaded into it. Until [`hand_over`](Self::hand_over) the lanes bring versions of pages that later
    /// ones may replace, and nobody may run on this memory.
    ///
    /// # Errors
    /// When memory is short, userfaultfd refuses, or the lanes are not a few fault lanes and a few bulk lanes.
    pub fn start(ram: Ram, lanes: Vec<PageLane>, lazy: bool, notify: &Notify) -> Result<Self, DestinationPagerError> {
        Self::begin(ram, lanes, lazy, None, notify)
    }

    /// [`start`](Self::start), and digest all that the guest is given, for this session: [`digest`](Self::digest).
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_digesting(
        ram: Ram,
        lanes: Vec<PageLane>,
        lazy: bool,
        session: SessionId,
        notify: &Notify,
    ) -> Result<Self, DestinationPagerError> {
        let digest = MemoryDigest::new(session, ram.pages());
        Self::begin(ram, lanes, lazy, Some(digest), notify)
    }

    fn begin(
        ram: Ram,
        lanes: Vec<PageLane>,
        lazy: bool,
        digest: Option<MemoryDigest>,
        notify: &Notify,
    ) -> Result<Self, DestinationPagerError> {
        let shards = check_lanes(&lanes)?;
        if !lazy {
            reserve(&ram)?;
        }
        let pages = ram.pages();
        let shared = Arc::new(Shared {
            shards: (0..usize::from(shards)).map(|index| Shard::new(index).map(Arc::new)).collect::<Result<_, _>>()?,
            watch: Watch::register_sharded(ram, shards)?,
            states: PageStates::new(pages),
            handoff: Handoff::default(),
            ahead: MappedAhead::new(pages),
            unmapped_zeros: UnmappedZeros::default(),
            stains: Stains::new(pages),
            digest,
            rejoined: AtomicBool::new(false),
            populated: !lazy,
            missing: AtomicU64::new(pages.0),
            last_placed: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            counts: Counts::default(),
            trace: FaultTrace::default(),
            pushed_rates: Mutex::new(Vec::new()),
            bulk_lanes_open: AtomicU64::new(0),
            idleness: Idleness::new(),
            notify: Arc::clone(notify),
        });
        let cpu = Arc::new(CpuMeter::default());
        let mut pager =
            Self { shared, lanes: Vec::new(), bulk_threads: Vec::new(), threads: Vec::new(), mapper: None, cpu };
        if let Err(error) = pager.spawn_all(lanes) {
            pager.abandon();
            return Err(error);
        }
        Ok(pager)
    }

    fn spawn_all(&mut self, lanes: Vec<PageLane>) -> Result<(), DestinationPagerError> {
        let (fault, bulk) = by_role(lanes);
        let shards = self.shared.shards.iter().map(Arc::clone).collect::<Vec<_>>();
        for ((lane, tag), shard) in fault.into_iter().zip(tags(0)).zip(shards) {
            self.lanes.push(lane.clone());
            let service = FaultService::new(lane.clone(), tag, &self.shared, &shard);
            let service = service.map_err(|error| no_service(&lane, error.to_string()))?;
            let thread = self.spawn(&lane, Service::Fault(Box::new(service), shard))?;
            self.threads.push(thread);
        }
        self.spawn_bulk(bulk)?;
        self.spawn_mapper()
    }

    fn spawn_bulk(&mut self, lanes: Vec<PageLane>) -> Result<(), DestinationPagerError> {
        self.shared.bulk_lanes_open.store(lanes.len() as u64, Ordering::Release);
        // The fault threads keep their tags, whichever lanes they have.
        for (lane, tag) in lanes.into_iter().zip(tags(self.shared.shards.len())) {
            self.lanes.push(lane.clone());
            let service = BulkReceiver::new(lane.clone(), tag, &self.shared);
            let service = service.map_err(|error| no_service(&lane, error.to_string()))?;
            let thread = self.spawn(&lane, Service::Bulk(Box::new(service)))?;
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
        let deadline = Instant::now() + seat::PATIENCE;
        self.shared.shards.iter().for_each(|shard| shard.seat.wait_left(deadline));
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
    /// When the lanes are not as many fault lanes as before and a few bulk lanes, or a thread cannot be started. It is detached
    /// then.
    pub fn attach(&mut self, lanes: Vec<PageLane>) -> Result<(), DestinationPagerError> {
        self.detach();
        let (lanes_of_faults, shards) = (usize::from(check_lanes(&lanes)?), self.shared.shards.len());
        if lanes_of_faults != shards {
            return Err(DestinationPagerError::OtherFaultLanes { lanes: lanes_of_faults, shards });
        }
        let (fault, bulk) = by_role(lanes);
        if let Err(error) = self.spawn_bulk(bulk) {
            self.detach();
            return Err(error);
        }
        self.lanes.extend(fault.iter().cloned());
        for (lane, shard) in fault.into_iter().zip(&self.shared.shards) {
            shard.seat.offer(lane);
            shard.wake();
        }
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
        self.mapper = Some(thread);
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

    /// The digests of the memory that the guest was given, once all of it is here; where they were asked for.
    #[must_use]
    pub fn digest(&self) -> Option<&MemoryDigest> {
        let complete = self.shared.missing.load(Ordering::Acquire) == 0 && self.shared.handoff.is_over();
        self.shared.digest.as_ref().filter(|_| complete)
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

    /// The service was made already and not on its thread, so that what is started can also serve.
    fn spawn(&self, lane: &PageLane, service: Service) -> Result<JoinHandle<()>, DestinationPagerError> {
        let (shared, cpu, id) = (Arc::clone(&self.shared), Arc::clone(&self.cpu), lane.id);
        let name = id.to_string();
        let body = move || {
            let shard = service.shard();
            let failed = cpu.measure(|| match service {
                Service::Bulk(receiver) => receiver.run().err().map(|error| match error {
                    // What is here cannot be mapped, and who waits for it is not woken: no other lane helps.
                    BulkError::Watch(error) => PagerEvent::Broken { reason: error.to_string() },
                    error => PagerEvent::LaneFailed { lane: id, reason: error.to_string() },
                }),
                // A fault thread ends only when faults can no longer be served at all.
                Service::Fault(service, _) => {
                    service.run().err().map(|error| PagerEvent::Broken { reason: error.to_string() })
                }
            });
            if let Some(event) = failed.filter(|_| !shared.stopping.load(Ordering::Acquire)) {
                (shared.notify)(event);
            }
            if let Some(shard) = shard {
                shard.seat.leave();
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
        let mut all = FaultStats::new();
        self.shared.shards.iter().for_each(|shard| all.add(&shard.stats()));
        all
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
        let mut all = WaitCounts::default();
        self.shared.shards.iter().for_each(|shard| all.add(&shard.stats().waits));
        all
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
        // First: a thread that gets a processor last must not keep the kernel's lock from whoever waits for it.
        self.end_mapper();
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
        self.end_mapper();
        self.shared.shards.iter().for_each(|shard| shard.wake());
        self.end_bulk_lanes();
        join(self.threads.drain(..));
    }

    fn end_mapper(&mut self) {
        self.shared.handoff.end_mapping();
        self.shared.unmapped_zeros.stop();
        join(self.mapper.take());
    }

    /// Shuts all lanes down, and waits for the threads of the bulk lanes.
    fn end_bulk_lanes(&mut self) {
        for lane in &self.lanes {
            lane.socket.shutdown();
        }
        join(self.bulk_threads.drain(..));
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

/// Takes all of RAM's memory now. On a thread of its own, which can be told to leave processors to whoever wants them: guests run
/// on this host, and nobody waits for this one yet.
fn reserve(ram: &Ram) -> Result<(), DestinationPagerError> {
    let work = || {
        cpu::yield_to_others();
        ram.populate()?;
        ram.touch();
        Ok(())
    };
    let (name, lane) = ("reserve memory".to_owned(), "reservation of memory".to_owned());
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(name).spawn_scoped(scope, work);
        let thread = thread.map_err(|source| DestinationPagerError::Thread { lane, source })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn join(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a thread of the destination's pager panicked");
        }
    }
}

/// How many fault lanes there are: a few, and not more lanes in all than can be named.
fn check_lanes(lanes: &[PageLane]) -> Result<u8, DestinationPagerError> {
    let fault_lanes = lanes.iter().filter(|lane| lane.id.role == LaneRole::Fault).count();
    if lanes.len() > usize::from(LaneTag::LIMIT) {
        return Err(DestinationPagerError::TooManyLanes { lanes: lanes.len() });
    }
    u8::try_from(fault_lanes)
        .ok()
        .filter(|lanes| (1..=FAULT_LANES_LIMIT).contains(lanes))
        .ok_or(DestinationPagerError::FaultLanes { lanes: fault_lanes })
}

/// The fault lanes in the order of their numbers, and the others.
fn by_role(lanes: Vec<PageLane>) -> (Vec<PageLane>, Vec<PageLane>) {
    let (mut fault, bulk): (Vec<_>, Vec<_>) = lanes.into_iter().partition(|lane| lane.id.role == LaneRole::Fault);
    fault.sort_by_key(|lane| lane.id.index);
    (fault, bulk)
}

/// The tags from number `first` on.
fn tags(first: usize) -> impl Iterator<Item = LaneTag> {
    (0..LaneTag::LIMIT).skip(first).map_while(LaneTag::new)
}

fn no_service(lane: &PageLane, reason: String) -> DestinationPagerError {
    DestinationPagerError::Service { lane: lane.id.to_string(), reason }
}
