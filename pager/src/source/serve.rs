//! Answering the destination's requests on a `fault` lane.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use switchover_wire::checksum::Checksum;
use switchover_wire::clock::Nanos;
use switchover_wire::frame::FrameError;
use switchover_wire::frame::fault::{FaultReply, FaultRequest, ReplyContent};
use switchover_wire::ring::{RingError, Stream};
use switchover_wire::types::{PAGE_SIZE, PageIndex};
use thiserror::Error;

use super::Shared;
use super::order::Fault;
use crate::cpu;
use crate::lane::PageLane;
use crate::zero::is_zero;

/// Why a fault lane ended on the source.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Its ring or socket failed, or the destination closed it.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A request that is none.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A request before the handoff, whose answer could be stale in a moment.
    #[error("the destination asked for {0} before the handoff, while the guest may still write it")]
    TooEarly(PageIndex),
}

/// One fault lane.
pub struct FaultServer {
    lane: PageLane,
    shared: Arc<Shared>,
    stream: Stream,
}

impl FaultServer {
    /// A server for `lane`.
    ///
    /// # Errors
    /// When there is no ring for it.
    pub(super) fn new(lane: PageLane, shared: &Arc<Shared>) -> Result<Self, ServeError> {
        let stream = Stream::new(Arc::clone(&lane.socket))?;
        Ok(Self { lane, shared: Arc::clone(shared), stream })
    }

    /// Serves until the lane ends, which is always an error to this function; whoever stops the pager knows better.
    ///
    /// # Errors
    /// When the lane ends, or carries something else than requests.
    pub fn run(mut self) -> Result<(), ServeError> {
        cpu::be_prompt();
        let mut request = [0; FaultRequest::LEN];
        loop {
            // Only the next request can tell that a vCPU waits: it comes soon, or not for a while.
            self.stream.spin_for(self.shared.idleness.spin(self.shared.servers, self.shared.pushers, Nanos::now()));
            self.stream.recv_exact(&mut [IoSliceMut::new(&mut request)])?;
            self.lane.socket.counters().add_received(FaultRequest::LEN as u64);
            let request = FaultRequest::decode(&request, self.shared.ram.pages())?;
            if !self.shared.serving.load(Ordering::Acquire) {
                return Err(ServeError::TooEarly(request.page));
            }
            self.answer(request)?;
            self.shared.queue.note_fault(Fault { page: request.page, lane: self.lane.id.index });
        }
    }

    /// Sends the page whether or not it was pushed already: the pushed copy may still be far back in its lane.
    fn answer(&mut self, request: FaultRequest) -> Result<(), ServeError> {
        let page = self.shared.ram.readable(request.page).ok_or(ServeError::TooEarly(request.page))?;
        // SAFETY: the page lies in a mapping that `shared.ram` keeps. The guest is paused while `serving` is set, and
        // nothing else on a source writes its memory, so the bytes do not change under the slice.
        let bytes = unsafe { std::slice::from_raw_parts(page, PAGE_SIZE) };
        let zero = is_zero(bytes);
        let content = if zero { ReplyContent::Zero } else { ReplyContent::Raw };
        let checksum = if zero || !self.lane.checksums { Checksum::NONE } else { Checksum::of([bytes]) };
        let header = FaultReply { page: request.page, tag: request.tag, content }.encode(checksum);
        let parts = [IoSlice::new(&header), IoSlice::new(bytes)];
        let parts = if zero { &parts[..1] } else { &parts[..] };
        self.shared.sent.mark(request.page);
        let sent = self.stream.send_all(parts)?;
        self.lane.socket.counters().add_sent(sent as u64);
        let counts = &self.shared.counts;
        counts.requests.fetch_add(1, Ordering::Relaxed);
        if zero { &counts.zero } else { &counts.data }.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
