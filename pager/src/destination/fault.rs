//! The fault path: from a vCPU that needs a page to the page under it.
//!
//! One thread, one io_uring. It polls the userfaultfd, asks for absent pages in small requests, receives the
//! answers, puts the pages into the alias, maps them and wakes the vCPU. Nothing here allocates once it runs, and no lock is
//! held across a system call.
//!
//! There are as many of these as shards of memory, each for the faults on its own pages.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use switchover_wire::clock::Nanos;
use switchover_wire::frame::fault::FaultRequest;
use switchover_wire::ring::{EventRing, RingError};
use switchover_wire::tls::TlsError;
use switchover_wire::tls::record::{MAX_PLAINTEXT, Sealed};
use switchover_wire::types::{PageCount, PageIndex};
use thiserror::Error;

use super::Shared;
use super::replies::{Replies, Reply, ReplyError, Wanted};
use super::shard::Shard;
use crate::cpu;
use crate::lane::{PageLane, PagerEvent};
use crate::state::{Arrival, Claim, FaultVerdict, LaneTag};
use crate::stats::{FaultStats, FaultTimes};
use crate::trace::{Answer, TracedFault};
use crate::uffd::{FaultBuffer, WatchError};

/// Operations under way: two polls, one receive, one send; rounded up.
const RING_ENTRIES: u32 = 8;
/// Faults under way for which there is room without allocating: vCPUs, and the kernel's 64 asynchronous fault
/// workers for each of a few of them.
const ROOM: usize = 1024;

const FAULTS_READY: u64 = 1;
const REPLIES: u64 = 2;
const REQUESTS_SENT: u64 = 3;
const WOKEN: u64 = 4;

/// Why faults can no longer be served at all.
#[derive(Debug, Error)]
pub enum FaultError {
    /// No ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The ring failed.
    #[error("the fault thread's io_uring failed: {0}")]
    Io(#[from] io::Error),
    /// Userfaultfd failed.
    #[error(transparent)]
    Watch(#[from] WatchError),
}

/// Why the fault lane can no longer be used. Pages that are here are still served.
#[derive(Debug, Error)]
enum LaneError {
    #[error(transparent)]
    Reply(#[from] ReplyError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the source answered for {got} (tag {got_tag}) where the answer for {wanted} (tag {tag}) was due")]
    OutOfOrder { got: PageIndex, got_tag: u32, wanted: PageIndex, tag: u32 },
    #[error("the source answered for {0}, which nobody asked for")]
    Unasked(PageIndex),
    #[error("the source closed the fault lane")]
    Closed,
    #[error("cannot {attempted}: {source}")]
    Socket { attempted: &'static str, source: io::Error },
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
struct Asked {
    page: PageIndex,
    tag: u32,
    taken: Nanos,
    submitted: Nanos,
}

/// A fault whose pushed copy won the race, until the bulk lane's report of its wake-up is found.
#[derive(Clone, Copy, Debug)]
struct Raced {
    page: PageIndex,
    taken: Nanos,
}

/// The fault thread.
pub struct FaultService {
    // The ring comes first: it waits for what is under way before the buffers behind it go.
    ring: EventRing,
    replies: Replies,
    outgoing: Vec<u8>,
    /// On a TLS lane, what goes out of it.
    sealed: Sealed,
    lane: PageLane,
    /// The claims of whatever fault lane there is: one ends before the next begins.
    tag: LaneTag,
    shared: Arc<Shared>,
    /// Whose faults these are.
    shard: Arc<Shard>,
    woken_poll: OwnedFd,
    fault_buffer: FaultBuffer,
    fault_pages: Vec<PageIndex>,
    /// Requests in the order in which they were made, which is the order of the answers.
    asked: VecDeque<Asked>,
    /// How many of `asked`, from the back, have no submission time yet.
    unsubmitted: usize,
    raced: Vec<Raced>,
    wakes: Vec<(PageIndex, Nanos)>,
    requests: Vec<u8>,
    /// The kernel may still read `outgoing`.
    sending: bool,
    /// The kernel may still write into `replies`.
    awaiting: bool,
    next_tag: u32,
    /// Where not, requests wait for the next lane.
    lane_open: bool,
}

impl FaultService {
    /// The service for the pages of `shard`, asking over `lane`, claiming them as `tag`.
    ///
    /// # Errors
    /// When there is no ring for it.
    pub(super) fn new(
        lane: PageLane,
        tag: LaneTag,
        shared: &Arc<Shared>,
        shard: &Arc<Shard>,
    ) -> Result<Self, FaultError> {
        shard.seat.sit();
        Ok(Self {
            ring: EventRing::new(RING_ENTRIES)?,
            replies: Replies::new(lane.checksums),
            sealed: Sealed::with_room_for(ROOM * FaultRequest::LEN),
            outgoing: Vec::with_capacity(ROOM * FaultRequest::LEN),
            lane,
            tag,
            shared: Arc::clone(shared),
            shard: Arc::clone(shard),
            woken_poll: shard.woken_fd()?,
            fault_buffer: FaultBuffer::default(),
            fault_pages: Vec::with_capacity(ROOM),
            asked: VecDeque::with_capacity(ROOM),
            unsubmitted: 0,
            raced: Vec::with_capacity(ROOM),
            wakes: Vec::with_capacity(ROOM),
            requests: Vec::with_capacity(ROOM * FaultRequest::LEN),
            sending: false,
            awaiting: false,
            next_tag: 0,
            lane_open: true,
        })
    }

    /// Serves until the pager is stopped.
    ///
    /// # Errors
    /// When faults can no longer be served at all. A lane that fails is only reported; another may come in its place.
    pub fn run(mut self) -> Result<(), FaultError> {
        cpu::be_prompt();
        self.ring.poll_multishot(self.shared.watch.fd(self.shard.index), FAULTS_READY)?;
        self.ring.poll_multishot(self.woken_poll.as_fd(), WOKEN)?;
        self.begin_lane()?;
        while !self.shared.stopping.load(Ordering::Acquire) {
            self.wait()?;
            while let Some(completion) = self.ring.next() {
                match (completion.token, completion.result) {
                    (FAULTS_READY, Ok(_)) => self.take_faults()?,
                    (FAULTS_READY, Err(error)) => return Err(error.into()),
                    (WOKEN, _) => {
                        self.shard.heard();
                        self.adopt_orphans()?;
                    }
                    (REPLIES, result) => self.replies_came(result)?,
                    (_, result) => {
                        if let Err(error) = self.requests_sent(result) {
                            self.lane_failed(&error);
                        }
                    }
                }
            }
            self.take_up_lane()?;
            self.send_requests()?;
        }
        Ok(())
    }

    /// Waits until something has happened: without sleeping while a vCPU waits for an answer and processors are to be had.
    fn wait(&mut self) -> Result<(), FaultError> {
        if self.lane_open && !self.asked.is_empty() {
            let lanes = self.shared.bulk_lanes_open.load(Ordering::Relaxed);
            let spin = self.shared.idleness.spin(self.shared.shards.len() as u64, lanes, Nanos::now());
            if !spin.is_zero() && self.ring.submit_and_spin(spin)? {
                return Ok(());
            }
        }
        Ok(self.ring.submit_and_wait(1, None)?)
    }

    /// Goes over to the lane that was opened in place of a lost one, as soon as the kernel has let go of everything of the old
    /// one. What was asked for over that is asked for again.
    fn take_up_lane(&mut self) -> Result<(), FaultError> {
        if self.lane_open || self.sending || self.awaiting {
            return Ok(());
        }
        let Some(lane) = self.shard.seat.take() else { return Ok(()) };
        self.lane = lane;
        self.lane_open = true;
        self.requests.clear();
        for asked in std::mem::take(&mut self.asked) {
            if self.shared.states.is_requested(asked.page) {
                self.requests.extend_from_slice(&FaultRequest { page: asked.page, tag: asked.tag }.encode());
                self.asked.push_back(asked);
            } else {
                // A bulk lane has brought it, or is about to.
                self.lost_race(asked);
            }
        }
        self.unsubmitted = self.asked.len();
        self.begin_lane()
    }

    /// The answers of the lane that there is now come next.
    fn begin_lane(&mut self) -> Result<(), FaultError> {
        match self.replies.begin(&self.lane.socket, self.lane.checksums) {
            Ok(()) => self.receive(),
            Err(error) => {
                self.lane_failed(&error.into());
                Ok(())
            }
        }
    }

    /// Asks for the pages whose lanes do not bring them after all.
    fn adopt_orphans(&mut self) -> Result<(), FaultError> {
        while let Some(page) = self.shard.next_orphan() {
            self.serve(page, Nanos::now())?;
        }
        Ok(())
    }

    /// Takes the waiting faults and does for each what its page's state says.
    fn take_faults(&mut self) -> Result<(), FaultError> {
        let mut pages = std::mem::take(&mut self.fault_pages);
        pages.clear();
        self.shared.watch.take_faults(self.shard.index, &mut self.fault_buffer, &mut pages)?;
        let taken = Nanos::now();
        for page in &pages {
            self.serve(*page, taken)?;
        }
        self.fault_pages = pages;
        Ok(())
    }

    fn serve(&mut self, page: PageIndex, taken: Nanos) -> Result<(), FaultError> {
        match self.shared.states.fault(page) {
            FaultVerdict::Ask => {
                let tag = self.next_tag;
                self.next_tag = self.next_tag.wrapping_add(1);
                self.requests.extend_from_slice(&FaultRequest { page, tag }.encode());
                self.asked.push_back(Asked { page, tag, taken, submitted: taken });
                self.unsubmitted += 1;
                self.shared.counts.requests.fetch_add(1, Ordering::Relaxed);
            }
            FaultVerdict::AlreadyAsked => self.with_stats(|stats| stats.joined += 1),
            FaultVerdict::Landing => self.with_stats(|stats| stats.local += 1),
            FaultVerdict::Map => {
                self.shared.watch.map(page, PageCount(1), true)?;
                self.served_here(page, taken);
            }
            FaultVerdict::MapZero => {
                self.shared.watch.map_zero(page, PageCount(1))?;
                self.served_here(page, taken);
            }
        }
        Ok(())
    }

    fn served_here(&self, page: PageIndex, taken: Nanos) {
        let woken = Nanos::now();
        self.with_stats(|stats| stats.record_local(taken, woken));
        self.shared.trace.note(TracedFault { page, taken, woken: Some(woken), answer: Answer::Local });
    }

    /// Hands the gathered requests to the socket, unless the last ones are still under way: then these follow.
    fn send_requests(&mut self) -> Result<(), FaultError> {
        if self.requests.is_empty() || self.sending || !self.lane_open {
            return Ok(());
        }
        std::mem::swap(&mut self.requests, &mut self.outgoing);
        self.requests.clear();
        let now = Nanos::now();
        let submitted = self.asked.len() - self.unsubmitted;
        for asked in self.asked.iter_mut().skip(submitted) {
            asked.submitted = now;
        }
        self.unsubmitted = 0;
        if let Err(error) = self.seal_requests() {
            self.lane_failed(&error);
            return Ok(());
        }
        self.sending = true;
        let outgoing = self.on_the_wire();
        // SAFETY: neither `outgoing` nor `sealed` is touched again before this operation's completion clears `sending`, and both
        // are dropped after the ring, which waits for what is under way.
        unsafe { self.ring.send(self.lane.socket.as_fd(), outgoing.as_ptr(), outgoing.len(), REQUESTS_SENT)? };
        self.ring.submit()?;
        Ok(())
    }

    fn seal_requests(&mut self) -> Result<(), LaneError> {
        let Some(tls) = self.lane.socket.tls() else { return Ok(()) };
        self.sealed.make_room_for(self.outgoing.len());
        let mut sealer = tls.sealer();
        for piece in self.outgoing.chunks(MAX_PLAINTEXT) {
            sealer.seal(&mut self.sealed, piece.len(), |room| room.copy_from_slice(piece))?;
        }
        Ok(())
    }

    /// The requests as they go to the socket.
    fn on_the_wire(&self) -> &[u8] {
        if self.lane.socket.tls().is_some() { self.sealed.bytes() } else { &self.outgoing }
    }

    fn requests_sent(&mut self, result: io::Result<u32>) -> Result<(), LaneError> {
        self.sending = false;
        let sent = moved("send page requests", result)?;
        if sent < self.on_the_wire().len() {
            return Err(LaneError::Closed);
        }
        self.lane.socket.counters().add_sent(self.outgoing.len() as u64);
        Ok(())
    }

    fn receive(&mut self) -> Result<(), FaultError> {
        let socket = self.lane.socket.as_fd();
        let (room, wanted) = self.replies.room();
        let (start, length) = (room.as_mut_ptr(), room.len());
        // SAFETY (of both): `replies` is not touched again before this operation's completion clears `awaiting`, and it is
        // dropped after the ring, which waits for what is under way.
        match wanted {
            // SAFETY: as just said.
            Wanted::Any => unsafe { self.ring.recv_some(socket, start, length, REPLIES)? },
            // SAFETY: as just said.
            Wanted::Rest(_) => unsafe { self.ring.recv(socket, start, length, REPLIES)? },
        }
        self.awaiting = true;
        Ok(())
    }

    /// Something of the answers is here: those that are whole are carried out, and more is received. A failure of the lane is
    /// reported once, and faults on pages that are here go on being served.
    fn replies_came(&mut self, result: io::Result<u32>) -> Result<(), FaultError> {
        self.awaiting = false;
        match moved("receive an answer", result) {
            Ok(count) => {
                self.lane.socket.counters().add_received(count as u64);
                self.replies.came(count);
            }
            Err(error) => {
                self.lane_failed(&error);
                return Ok(());
            }
        }
        loop {
            match self.next_reply() {
                Ok(Some((asked, reply))) => self.answered(asked, reply)?,
                Ok(None) => return self.receive(),
                Err(error) => {
                    self.lane_failed(&error);
                    return Ok(());
                }
            }
        }
    }

    /// The next answer that is whole, and what it answers.
    fn next_reply(&mut self) -> Result<Option<(Asked, Reply)>, LaneError> {
        let Some(reply) = self.replies.next(self.shared.states.pages())? else { return Ok(None) };
        let (page, tag) = (reply.header.page, reply.header.tag);
        // What is not answered is asked again on the next lane.
        let asked = *self.asked.front().ok_or(LaneError::Unasked(page))?;
        if (page, tag) != (asked.page, asked.tag) {
            let (got, got_tag, wanted, tag) = (page, tag, asked.page, asked.tag);
            return Err(LaneError::OutOfOrder { got, got_tag, wanted, tag });
        }
        self.asked.pop_front();
        self.unsubmitted = self.unsubmitted.min(self.asked.len());
        Ok(Some((asked, reply)))
    }

    fn lane_failed(&mut self, error: &LaneError) {
        if self.lane_open && !self.shared.stopping.load(Ordering::Acquire) {
            (self.shared.notify)(PagerEvent::LaneFailed { lane: self.lane.id, reason: error.to_string() });
        }
        self.lane_open = false;
        self.shard.seat.leave();
    }

    fn answered(&mut self, asked: Asked, reply: Reply) -> Result<(), FaultError> {
        let arrived = Nanos::now();
        match self.replies.page(reply) {
            None => self.place_zero(asked, arrived),
            Some(_) if self.shared.states.claim(asked.page, self.tag) == Claim::Lost => {
                self.shared.counts.discarded.fetch_add(1, Ordering::Relaxed);
                self.lost_race(asked);
                Ok(())
            }
            Some(bytes) => {
                self.shared.fill(asked.page, bytes);
                self.shared.digest(asked.page);
                self.place(asked, arrived)
            }
        }
    }

    /// The page is in the alias: map it and wake the vCPU.
    fn place(&mut self, asked: Asked, arrived: Nanos) -> Result<(), FaultError> {
        if self.shared.states.arrived(asked.page, self.tag) == Arrival::Removed {
            return self.place_removed(asked.page);
        }
        self.shared.watch.map(asked.page, PageCount(1), false)?;
        let placed = Nanos::now();
        self.shared.watch.wake(asked.page)?;
        let woken = Nanos::now();
        self.shared.counts.requested.fetch_add(1, Ordering::Relaxed);
        self.shared.placed(1);
        let Asked { taken, submitted, .. } = asked;
        self.count_remote(asked.page, FaultTimes { taken, submitted, arrived, placed, woken });
        Ok(())
    }

    fn place_zero(&mut self, asked: Asked, arrived: Nanos) -> Result<(), FaultError> {
        if self.shared.claim_zero(asked.page, self.tag) == Claim::Lost {
            self.lost_race(asked);
            return Ok(());
        }
        self.shared.watch.map_zero(asked.page, PageCount(1))?;
        let placed = Nanos::now();
        self.shared.counts.zero.fetch_add(1, Ordering::Relaxed);
        self.shared.placed(1);
        let Asked { taken, submitted, .. } = asked;
        // Mapping a zero page wakes by itself; its wake-up is not a step of its own.
        self.count_remote(asked.page, FaultTimes { taken, submitted, arrived, placed, woken: placed });
        Ok(())
    }

    /// The guest gave the page back while its old bytes were on the way: it reads as zero.
    fn place_removed(&mut self, page: PageIndex) -> Result<(), FaultError> {
        self.shared.wipe(page);
        self.shared.watch.map_zero(page, PageCount(1))?;
        Ok(())
    }

    /// The pushed copy came first. Its bulk lane says when it woke the fault: before now, or in a moment.
    fn lost_race(&mut self, asked: Asked) {
        self.raced.push(Raced { page: asked.page, taken: asked.taken });
        self.match_raced();
    }

    fn match_raced(&mut self) {
        while let Some(wake) = self.shard.next_raced() {
            self.wakes.push(wake);
        }
        let mut index = 0;
        while index < self.raced.len() {
            let raced = self.raced[index];
            match self.wakes.iter().position(|(page, _)| *page == raced.page) {
                Some(found) => {
                    let (_, woken) = self.wakes.swap_remove(found);
                    self.raced.swap_remove(index);
                    self.count_raced(raced, Some(woken));
                }
                None => index += 1,
            }
        }
    }

    fn count_remote(&self, page: PageIndex, times: FaultTimes) {
        self.with_stats(|stats| stats.record_remote(times));
        let FaultTimes { taken, woken, .. } = times;
        self.shared.trace.note(TracedFault { page, taken, woken: Some(woken), answer: Answer::Remote });
    }

    fn count_raced(&self, Raced { page, taken }: Raced, woken: Option<Nanos>) {
        self.with_stats(|stats| stats.record_raced(taken, woken));
        self.shared.trace.note(TracedFault { page, taken, woken, answer: Answer::Raced });
    }

    fn with_stats(&self, record: impl FnOnce(&mut FaultStats)) {
        record(&mut self.shard.stats());
    }
}

impl Drop for FaultService {
    /// Closes the books: an answer that is still under way when memory is complete has lost its race.
    fn drop(&mut self) {
        let pending = std::mem::take(&mut self.asked).into_iter();
        for Asked { page, taken, .. } in pending.filter(|asked| self.shared.states.is_resident(asked.page)) {
            self.raced.push(Raced { page, taken });
        }
        self.match_raced();
        for raced in std::mem::take(&mut self.raced) {
            self.count_raced(raced, None);
        }
    }
}

/// How many bytes a transfer moved, one at least, or why it did not.
fn moved(attempted: &'static str, result: io::Result<u32>) -> Result<usize, LaneError> {
    match result {
        Ok(0) => Err(LaneError::Closed),
        Ok(count) => Ok(count as usize),
        Err(source) => Err(LaneError::Socket { attempted, source }),
    }
}
