//! The source's half: serve the destination's requests, and push everything else.
//!
//! Its threads start with the session, but touch guest memory only after [`SourcePager::start_serving`]: from then
//! on the guest is paused and its memory does not change, so that pages can be sent from where they lie.

pub mod order;
mod push;
mod queue;
mod serve;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded};
use switchover_wire::types::{LaneId, LaneRole, PAGE_SIZE, PageCount, PageIndex};
use thiserror::Error;

use self::order::Policy;
use self::push::Pusher;
use self::queue::PushQueue;
use self::serve::FaultServer;
use crate::cpu::{self, CpuMeter, CpuTime};
use crate::lane::{Notify, PageLane, PagerEvent};
use crate::pace::Pacer;
use crate::ram::Ram;
use crate::sent::{ChunkIndex, SentPages};
use crate::wait::Idleness;
use crate::zero::Survey;

/// The source's pager could not start.
#[derive(Debug, Error)]
pub enum SourcePagerError {
    /// No thread.
    #[error("cannot start a thread for the {lane}: {source}; is the number of threads limited (`ulimit -u`)?")]
    Thread {
        /// The lane it was for.
        lane: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What the threads share.
struct Shared {
    ram: Ram,
    sent: SentPages,
    queue: PushQueue,
    pacer: Pacer,
    survey: Survey,
    encoders: Mutex<Vec<(LaneId, Box<dyn ChunkEncoder>)>>,
    written: AtomicBool,
    as_they_are: OnceLock<Vec<u64>>,
    /// Set while guest memory is paused, and may be read.
    serving: AtomicBool,
    stopping: AtomicBool,
    idleness: Idleness,
    pushers: u64,
    servers: u64,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    zero: AtomicU64,
    data: AtomicU64,
    requests: AtomicU64,
}

/// How far the source has come. Pages are counted when they are handed to a lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SourceProgress {
    /// Pages sent as zero, in a bit.
    pub zero: u64,
    /// Pages sent with their bytes, pushed or requested.
    pub data: u64,
    /// Requests answered.
    pub requests: u64,
    /// Pages that nobody has sent yet.
    pub remaining: PageCount,
}

/// Turns a lane's chunks into fewer bytes. What it learned of link and pages before the handoff it may use after it.
///
/// It may send differences to what the destination has acknowledged of these very pages, for no guest can have written
/// those; never a reference to another page, which one may.
pub trait ChunkEncoder: Send {
    /// The whole frame of a chunk's `data` and `zero` pages (bit i: page `first + i`), each page read once with `read`; `None`
    /// where the chunk should go as it is. A frame that is returned is sent.
    fn encode(
        &mut self,
        first: PageIndex,
        data: u64,
        zero: u64,
        read: &mut dyn FnMut(PageIndex, &mut [u8; PAGE_SIZE]),
    ) -> Option<&[u8]>;

    /// A frame of `bytes` took `elapsed` to be handed to the socket, waiting for a rate limit included.
    fn sent(&mut self, bytes: u64, elapsed: Duration);
}

/// What the destination lacks, and how it may be sent.
#[derive(Default)]
pub struct Rest {
    /// The pages that it lacks, a bit each, in words of 64.
    pub missing: Vec<u64>,
    /// All of them were written once: there is no need to look for holes among them.
    pub written: bool,
    /// Those of them of which it may hold another version than the encoders think: they go as they are.
    pub as_they_are: Vec<u64>,
    /// Those of them of which a lane's stream still holds an older version: only that lane sends them again, so that the old
    /// version has been passed over when the new one comes.
    pub under_way: Vec<UnderWay>,
    /// The lanes' encoders. A lane without one sends pages as they are.
    pub encoders: Vec<(LaneId, Box<dyn ChunkEncoder>)>,
}

impl Rest {
    /// Everything, of which nothing was sent.
    #[must_use]
    pub fn all(pages: PageCount) -> Self {
        let word = |first: u64| match pages.0 - first {
            left @ ..64 => (1 << left) - 1,
            _ => u64::MAX,
        };
        Self { missing: (0..pages.0).step_by(64).map(word).collect(), ..Self::default() }
    }
}

/// What one bulk lane had sent before the handoff, and the destination had not acknowledged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnderWay {
    /// The lane.
    pub lane: LaneId,
    /// The pages, by chunk.
    pub chunks: Vec<(ChunkIndex, u64)>,
}

/// The running threads of a source.
pub struct SourcePager {
    shared: Arc<Shared>,
    lanes: Vec<PageLane>,
    threads: Vec<JoinHandle<()>>,
    start: Option<Sender<()>>,
    cpu: Arc<CpuMeter>,
}

impl SourcePager {
    /// Starts a thread for each lane; they wait. `max_bandwidth` bounds the pushed bytes a second of all bulk lanes
    /// together, 0 meaning no bound.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(
        ram: Ram,
        lanes: Vec<PageLane>,
        max_bandwidth: u64,
        notify: &Notify,
    ) -> Result<Self, SourcePagerError> {
        let pages = ram.pages();
        let pushers = lanes.iter().filter(|lane| lane.id.role == LaneRole::Bulk).count();
        let shared = Arc::new(Shared {
            ram,
            sent: SentPages::new(pages),
            queue: PushQueue::new(Policy::CHOSEN, pages),
            pacer: Pacer::new(max_bandwidth),
            survey: Survey::new(pages),
            encoders: Mutex::default(),
            written: AtomicBool::new(false),
            as_they_are: OnceLock::new(),
            serving: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            idleness: Idleness::new(),
            pushers: pushers as u64,
            servers: (lanes.len() - pushers) as u64,
            counts: Counts::default(),
        });
        let (start, started) = bounded::<()>(0);
        let cpu = Arc::new(CpuMeter::default());
        let mut pager = Self { shared, lanes: lanes.clone(), threads: Vec::new(), start: Some(start), cpu };
        let pushing = Arc::new(AtomicU64::new(pushers as u64));
        for lane in lanes {
            pager.spawn(lane, &started, &pushing, notify)?;
        }
        Ok(pager)
    }

    fn spawn(
        &mut self,
        lane: PageLane,
        started: &Receiver<()>,
        pushing: &Arc<AtomicU64>,
        notify: &Notify,
    ) -> Result<(), SourcePagerError> {
        let shared = Arc::clone(&self.shared);
        let (cpu, notify, pushing, started) =
            (Arc::clone(&self.cpu), Arc::clone(notify), Arc::clone(pushing), started.clone());
        let name = lane.id.to_string();
        let body = move || {
            let id = lane.id;
            let result = cpu.measure(|| match id.role {
                LaneRole::Bulk => {
                    // Made before it is needed: then the guest stands still.
                    let pusher = Pusher::new(lane, &shared).map_err(|error| error.to_string())?;
                    // The channel never carries anything: it ends when serving starts, or with the pager. Until then there is
                    // time to find out where memory is.
                    cpu::yield_to_others();
                    while started.try_recv() == Err(TryRecvError::Empty) && shared.survey.go_on(shared.ram.file()) {
                        cpu::let_others_run();
                    }
                    let _ = started.recv();
                    if !shared.serving.load(Ordering::Acquire) {
                        return Ok(());
                    }
                    pusher.run().map_err(|error| error.to_string())
                }
                _ => FaultServer::new(lane, &shared).and_then(FaultServer::run).map_err(|error| error.to_string()),
            });
            match result {
                // A pager that is being stopped has its lanes shut down under it: no failure.
                _ if shared.stopping.load(Ordering::Acquire) => {}
                Ok(()) => {
                    if id.role == LaneRole::Bulk && pushing.fetch_sub(1, Ordering::AcqRel) == 1 {
                        notify(PagerEvent::AllPushed);
                    }
                }
                Err(reason) => notify(PagerEvent::LaneFailed { lane: id, reason }),
            }
        };
        let thread = thread::Builder::new()
            .name(thread_name(&name))
            .spawn(body)
            .map_err(|source| SourcePagerError::Thread { lane: name, source })?;
        self.threads.push(thread);
        Ok(())
    }

    /// The guest is paused, and its memory will not change until this pager is stopped: serve requests, and push
    /// `first`, the most urgent first. Of the rest, no more is pushed before [`start_sweep`](Self::start_sweep).
    pub fn start_serving(&mut self, first: &[PageIndex], rest: Rest) {
        let Rest { missing, written, as_they_are, under_way, encoders } = rest;
        self.shared.written.store(written, Ordering::Release);
        self.shared.sent.leave_only(&missing);
        for UnderWay { lane, chunks } in under_way {
            let chunks = chunks.into_iter().map(|(chunk, mask)| (chunk, self.shared.sent.claim(chunk, mask)));
            self.shared.queue.keep_for(lane, chunks.collect());
        }
        *self.shared.encoders.lock().unwrap_or_else(PoisonError::into_inner) = encoders;
        // Set once: the pager of a migration hands off once.
        let _ = self.shared.as_they_are.set(as_they_are);
        self.shared.queue.put_first(first);
        self.shared.serving.store(true, Ordering::Release);
        self.start = None;
    }

    /// The bound on pushed bytes a second is this from now on; 0 means none.
    pub fn set_max_bandwidth(&self, bytes_per_second: u64) {
        self.shared.pacer.set_rate(bytes_per_second);
    }

    /// Push these before the sweep, the most urgent first.
    pub fn push_first(&self, pages: &[PageIndex]) {
        self.shared.queue.put_first(pages);
    }

    /// Push everything else too. The sweep takes both processors of a small host, so it waits for the handoff.
    pub fn start_sweep(&self) {
        self.shared.queue.open_sweep();
    }

    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> SourceProgress {
        let counts = &self.shared.counts;
        SourceProgress {
            zero: counts.zero.load(Ordering::Relaxed),
            data: counts.data.load(Ordering::Relaxed),
            requests: counts.requests.load(Ordering::Relaxed),
            remaining: self.shared.sent.remaining(),
        }
    }

    /// CPU time of the threads that have ended.
    #[must_use]
    pub fn cpu(&self) -> CpuTime {
        self.cpu.total()
    }

    /// Ends all threads and shuts the lanes down. No guest memory is read afterwards. Safe to repeat.
    pub fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.queue.stop();
        self.start = None;
        for lane in &self.lanes {
            lane.socket.shutdown();
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the source's pager panicked");
            }
        }
    }
}

impl Drop for SourcePager {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The kernel keeps 15 bytes of a thread's name: "bulk lane 0" fits.
pub(crate) fn thread_name(lane: &str) -> String {
    lane.chars().take(15).collect()
}
