//! The fault path: from a vCPU that needs a page to the page under it.
//!
//! One thread, one io_uring. It polls the userfaultfd, asks for absent pages in 16-byte requests, receives the
//! answers straight into the alias, maps them and wakes the vCPU. Nothing here allocates once it runs, and no lock is
//! held across a system call.
//!
//! There are as many of these as shards of memory, each for the faults on its own pages.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use switchover_wire::clock::Nanos;
use switchover_wire::frame::FrameError;
use switchover_wire::frame::fault::{FaultReply, FaultRequest, ReplyContent};
use switchover_wire::ring::{EventRing, RingError};
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};
use thiserror::Error;

use super::Shared;
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
const REPLY_HEADER: u64 = 2;
const REPLY_PAGE: u64 = 3;
const REQUESTS_SENT: u64 = 4;
const WOKEN: u64 = 5;

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
    Frame(#[from] FrameError),
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
    buffers: Box<Buffers>,
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
    /// The kernel may still write the header, or the page of `receiving`.
    awaiting: bool,
    next_tag: u32,
    /// The reply that is being received, and whether its page goes to the alias.
    receiving: Option<(Asked, bool)>,
    /// Where not, requests wait for the next lane.
    lane_open: bool,
}

/// What the kernel reads and writes while operations are under way.
struct Buffers {
    header: [u8; FaultReply::LEN],
    scratch: [u8; PAGE_SIZE],
    outgoing: Vec<u8>,
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
            buffers: Box::new(Buffers {
                header: [0; FaultReply::LEN],
                scratch: [0; PAGE_SIZE],
                outgoing: Vec::with_capacity(ROOM * FaultRequest::LEN),
            }),
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
            receiving: None,
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
        self.receive_header()?;
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
                    (token, result) => {
                        let outcome = match (token, result) {
                            (REPLY_HEADER, result) => self.header_came(&result),
                            (REPLY_PAGE, result) => self.page_came(&result),
                            (_, result) => self.requests_sent(&result),
                        };
                        self.settle(outcome)?;
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
        self.receive_header()
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
        std::mem::swap(&mut self.requests, &mut self.buffers.outgoing);
        self.requests.clear();
        let now = Nanos::now();
        let submitted = self.asked.len() - self.unsubmitted;
        for asked in self.asked.iter_mut().skip(submitted) {
            asked.submitted = now;
        }
        self.unsubmitted = 0;
        self.sending = true;
        let outgoing = &self.buffers.outgoing;
        // SAFETY: `outgoing` is not touched again before this operation's completion clears `sending`, and it is dropped
        // after the ring, which waits for what is under way.
        unsafe { self.ring.send(self.lane.socket.as_fd(), outgoing.as_ptr(), outgoing.len(), REQUESTS_SENT)? };
        self.ring.submit()?;
        Ok(())
    }

    fn requests_sent(&mut self, result: &io::Result<u32>) -> Result<Next, LaneError> {
        self.sending = false;
        let wanted = self.buffers.outgoing.len();
        finished("send page requests", result, wanted)?;
        self.lane.socket.counters().add_sent(wanted as u64);
        Ok(Next::Nothing)
    }

    fn receive_header(&mut self) -> Result<(), FaultError> {
        let header = &mut self.buffers.header;
        // SAFETY: `header` is not touched again before this operation completes, and is dropped after the ring.
        unsafe { self.ring.recv(self.lane.socket.as_fd(), header.as_mut_ptr(), header.len(), REPLY_HEADER)? };
        self.awaiting = true;
        Ok(())
    }

    /// The header of an answer is here: claim its page, and receive it where the claim says.
    fn header_came(&mut self, result: &io::Result<u32>) -> Result<Next, LaneError> {
        self.awaiting = false;
        finished("receive an answer", result, FaultReply::LEN)?;
        self.lane.socket.counters().add_received(FaultReply::LEN as u64);
        let reply = FaultReply::decode(&self.buffers.header, self.shared.states.pages())?;
        let asked = self.asked.pop_front().ok_or(LaneError::Unasked(reply.page))?;
        self.unsubmitted = self.unsubmitted.min(self.asked.len());
        if (reply.page, reply.tag) != (asked.page, asked.tag) {
            // Whoever waits for it waits for the next lane.
            self.asked.push_front(asked);
            let (got, got_tag, wanted, tag) = (reply.page, reply.tag, asked.page, asked.tag);
            return Err(LaneError::OutOfOrder { got, got_tag, wanted, tag });
        }
        match reply.content {
            ReplyContent::Zero => Ok(Next::Zero(asked)),
            ReplyContent::Raw => {
                let won = matches!(self.shared.states.claim(asked.page, self.tag), Claim::Won { .. });
                Ok(Next::Page(asked, won))
            }
        }
    }

    fn page_came(&mut self, result: &io::Result<u32>) -> Result<Next, LaneError> {
        self.awaiting = false;
        let received = self.receiving.take();
        if let Err(error) = finished("receive a page", result, PAGE_SIZE) {
            if let Some((asked, to_alias)) = received {
                self.give_up(asked, to_alias);
            }
            return Err(error);
        }
        self.lane.socket.counters().add_received(PAGE_SIZE_U64);
        Ok(received.map_or(Next::Nothing, |(asked, to_alias)| Next::Arrived(asked, to_alias)))
    }

    /// The lane has ended within an answer: whoever waits for its page waits for the next lane.
    fn give_up(&mut self, asked: Asked, claimed: bool) {
        if claimed {
            self.shared.stains.add(asked.page);
            self.shared.states.release(asked.page, self.tag);
            // Still waited for. Nobody else asks in between: this shard's faults are taken by this thread alone.
            self.shared.states.fault(asked.page);
        }
        self.asked.push_front(asked);
    }

    /// Carries out what the last completion calls for. A failure of the lane is reported once, and faults on pages
    /// that are here go on being served.
    fn settle(&mut self, outcome: Result<Next, LaneError>) -> Result<(), FaultError> {
        match outcome {
            Ok(Next::Nothing) => Ok(()),
            Ok(Next::Zero(asked)) => {
                self.place_zero(asked)?;
                self.receive_header()
            }
            Ok(Next::Page(asked, to_alias)) => self.receive_page(asked, to_alias),
            Ok(Next::Arrived(asked, true)) => {
                self.place(asked)?;
                self.receive_header()
            }
            Ok(Next::Arrived(asked, false)) => {
                self.shared.counts.discarded.fetch_add(1, Ordering::Relaxed);
                self.lost_race(asked);
                self.receive_header()
            }
            Err(error) => {
                if self.lane_open && !self.shared.stopping.load(Ordering::Acquire) {
                    let event = PagerEvent::LaneFailed { lane: self.lane.id, reason: error.to_string() };
                    (self.shared.notify)(event);
                }
                self.lane_open = false;
                self.shard.seat.leave();
                Ok(())
            }
        }
    }

    fn receive_page(&mut self, asked: Asked, to_alias: bool) -> Result<(), FaultError> {
        self.receiving = Some((asked, to_alias));
        let alias = self.shared.watch.ram().alias_of(asked.page).filter(|_| to_alias);
        let target = alias.unwrap_or(self.buffers.scratch.as_mut_ptr());
        // SAFETY: the target is a whole page: either scratch, which is not touched before this operation completes and
        // is dropped after the ring, or the alias of a page whose claim was just won, which nobody else writes and the
        // guest has not mapped; the watch keeps the alias mapped, and is dropped after the ring too.
        unsafe { self.ring.recv(self.lane.socket.as_fd(), target, PAGE_SIZE, REPLY_PAGE)? };
        self.awaiting = true;
        Ok(())
    }

    /// The answer has landed in the alias: map it and wake the vCPU.
    fn place(&mut self, asked: Asked) -> Result<(), FaultError> {
        let arrived = Nanos::now();
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

    fn place_zero(&mut self, asked: Asked) -> Result<(), FaultError> {
        let arrived = Nanos::now();
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
        let receiving = self.receiving.take().map(|(asked, _)| asked);
        let pending = receiving.into_iter().chain(std::mem::take(&mut self.asked));
        for Asked { page, taken, .. } in pending.filter(|asked| self.shared.states.is_resident(asked.page)) {
            self.raced.push(Raced { page, taken });
        }
        self.match_raced();
        for raced in std::mem::take(&mut self.raced) {
            self.count_raced(raced, None);
        }
    }
}

/// What a completion calls for.
#[derive(Clone, Copy, Debug)]
enum Next {
    Nothing,
    /// The page is zero.
    Zero(Asked),
    /// The page follows; into the alias if the claim was won.
    Page(Asked, bool),
    /// The page is here; in the alias if the claim was won.
    Arrived(Asked, bool),
}

/// A transfer that moved all of `wanted` bytes, or why it did not.
fn finished(attempted: &'static str, result: &io::Result<u32>, wanted: usize) -> Result<(), LaneError> {
    match result {
        Ok(moved) if *moved as usize == wanted => Ok(()),
        Ok(_) => Err(LaneError::Closed),
        Err(error) => Err(LaneError::Socket {
            attempted,
            source: error
                .raw_os_error()
                .map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error),
        }),
    }
}
