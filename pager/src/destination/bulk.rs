//! Receiving pushed pages on a `bulk` lane, straight into the alias.

use std::io::IoSliceMut;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use switchover_wire::clock::Nanos;
use switchover_wire::frame::FrameError;
use switchover_wire::frame::bulk::{BulkFrame, CHUNK_PAGES};
use switchover_wire::ring::{Ring, RingError};
use switchover_wire::types::{LaneId, PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};
use thiserror::Error;

use super::Shared;
use crate::lane::{PageLane, PagerEvent};
use crate::runs::{CHUNK_LEN, runs};
use crate::state::{Arrival, Claim, LaneTag};
use crate::stats::RateSeries;
use crate::uffd::WatchError;

/// One operation at a time: two entries are one more than needed.
const RING_ENTRIES: u32 = 2;

/// Why a bulk lane ended on the destination.
#[derive(Debug, Error)]
pub enum BulkError {
    /// Its ring or socket failed, or the source closed it before its end.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A frame that cannot be.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A page could not be mapped.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The source's count of pages is not ours.
    #[error("the source says that it sent {said} pages on this lane, but {got} arrived")]
    Count {
        /// The source's count.
        said: u64,
        /// Ours.
        got: u64,
    },
}

/// One bulk lane.
pub struct BulkReceiver {
    lane: PageLane,
    tag: LaneTag,
    shared: Arc<Shared>,
    ring: Ring,
    /// Where pages go whose claim was lost: nothing may write the alias of a page that is here.
    scratch: Box<[u8; PAGE_SIZE]>,
    received: u64,
    rate: RateSeries,
}

impl BulkReceiver {
    /// A receiver for `lane`, which claims pages as `tag`.
    ///
    /// # Errors
    /// When there is no ring for it.
    pub(super) fn new(lane: PageLane, tag: LaneTag, shared: &Arc<Shared>) -> Result<Self, BulkError> {
        Ok(Self {
            lane,
            tag,
            shared: Arc::clone(shared),
            ring: Ring::new(RING_ENTRIES)?,
            scratch: Box::new([0; PAGE_SIZE]),
            received: 0,
            rate: RateSeries::new(),
        })
    }

    /// Receives until the source says that it has pushed everything.
    ///
    /// # Errors
    /// When the lane ends before that, carries a bad frame, or a page cannot be mapped.
    pub fn run(mut self) -> Result<(), BulkError> {
        let result = self.receive();
        let shared = &self.shared;
        shared.pushed_rates.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.rate));
        result?;
        if shared.bulk_lanes_open.fetch_sub(1, Ordering::AcqRel) == 1 {
            check_nothing_forgotten(shared, self.lane.id);
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(), BulkError> {
        let mut header = [0; BulkFrame::LEN];
        loop {
            self.ring.recv_exact(self.lane.socket.as_fd(), &mut [IoSliceMut::new(&mut header)])?;
            self.lane.socket.counters().add_received(BulkFrame::LEN as u64);
            let (frame, _flags) = BulkFrame::decode(&header, self.shared.states.pages())?;
            match frame {
                BulkFrame::Packed { .. } => todo!(),
                BulkFrame::Chunk { first, data, zero } => {
                    self.take_zeros(first, zero)?;
                    self.take_data(first, data)?;
                }
                BulkFrame::Zeros { first, count } => {
                    let end = first.0 + count.0;
                    let mut at = first.0;
                    while at < end {
                        let pages = (end - at).min(CHUNK_PAGES);
                        self.take_zeros(PageIndex(at), u64::MAX >> (CHUNK_PAGES - pages))?;
                        at += pages;
                    }
                }
                BulkFrame::End { pages } if pages == self.received => return Ok(()),
                BulkFrame::End { pages } => return Err(BulkError::Count { said: pages, got: self.received }),
            }
        }
    }

    /// Receives the pages of `data`, each to its place if it is still wanted there, and maps them in runs.
    fn take_data(&mut self, first: PageIndex, data: u64) -> Result<(), BulkError> {
        if data == 0 {
            return Ok(());
        }
        let (mut won, mut wanted) = (0_u64, 0_u64);
        for bit in bits(data) {
            match self.shared.states.claim(page_at(first, bit), self.tag) {
                Claim::Won { wanted: waiting } => {
                    won |= 1 << bit;
                    wanted |= u64::from(waiting) << bit;
                }
                Claim::Lost => {}
            }
        }
        if let Err(error) = self.receive_pages(first, data, won) {
            for bit in bits(won) {
                // Whether a fault waits is of no use here: a dead lane ends the session.
                self.shared.states.release(page_at(first, bit), self.tag);
            }
            return Err(error);
        }
        let pages = u64::from(data.count_ones());
        self.received += pages;
        self.lane.socket.counters().add_received(pages * PAGE_SIZE_U64);

        let mut present = 0_u64;
        for bit in bits(won) {
            let page = page_at(first, bit);
            match self.shared.states.arrived(page, self.tag) {
                // A fault that came meanwhile asked for nothing: mapping wakes it, and nobody keeps its time.
                Arrival::Present { .. } => present |= 1 << bit,
                Arrival::Removed => self.wipe(page),
            }
        }
        for (bit, count) in runs(present) {
            self.shared.watch.map(page_at(first, bit), PageCount(u64::from(count)), true)?;
        }
        self.report_raced(first, wanted & present);
        let placed = u64::from(present.count_ones());
        let counts = &self.shared.counts;
        counts.pushed.fetch_add(placed, Ordering::Relaxed);
        counts.discarded.fetch_add(pages - u64::from(won.count_ones()), Ordering::Relaxed);
        self.rate.add(Nanos::now(), present.count_ones());
        self.shared.placed(placed);
        Ok(())
    }

    /// One vectored receive for all pages of `data`: those of `won` into the alias, the others into scratch.
    fn receive_pages(&mut self, first: PageIndex, data: u64, won: u64) -> Result<(), BulkError> {
        let mut parts = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; CHUNK_LEN];
        let mut used = 0;
        for (bit, count) in runs(data) {
            let mut at = bit;
            while at < bit + count {
                let left = bit + count - at;
                let won_run = (won >> at).trailing_ones().min(left);
                let alias = self.shared.watch.ram().alias_of(page_at(first, at)).filter(|_| won_run > 0);
                let (base, pages) = alias.map_or((self.scratch.as_mut_ptr(), 1), |base| (base, won_run));
                parts[used] = libc::iovec { iov_base: base.cast(), iov_len: pages as usize * PAGE_SIZE };
                used += 1;
                at += pages;
            }
        }
        // SAFETY: each part is either the scratch page, which this object owns and borrows mutably, or a run of pages
        // in the alias whose claim this lane has won: nobody else writes them before `arrived`, and the guest does
        // not have them mapped. The frame was checked against RAM's size, so the runs lie inside the mapping, which
        // the watch keeps alive. The call returns only when the kernel is done with all parts.
        unsafe { self.ring.recv_exact_raw(self.lane.socket.as_fd(), &mut parts[..used])? };
        Ok(())
    }

    /// Takes note of zero pages, and maps them where that costs no memory or somebody waits.
    fn take_zeros(&mut self, first: PageIndex, zero: u64) -> Result<(), BulkError> {
        let (mut won, mut wanted) = (0_u64, 0_u64);
        for bit in bits(zero) {
            if let Claim::Won { wanted: waiting } = self.shared.states.claim_zero(page_at(first, bit)) {
                won |= 1 << bit;
                wanted |= u64::from(waiting) << bit;
            }
        }
        let to_map = if self.shared.populated { won } else { wanted };
        for (bit, count) in runs(to_map) {
            self.shared.watch.map_zero(page_at(first, bit), PageCount(u64::from(count)))?;
        }
        self.report_raced(first, wanted);
        let count = u64::from(won.count_ones());
        self.shared.counts.zero.fetch_add(count, Ordering::Relaxed);
        self.shared.placed(count);
        Ok(())
    }

    /// Tells the fault thread, which keeps the books, when the faults on these pages were woken.
    fn report_raced(&self, first: PageIndex, wanted: u64) {
        if wanted != 0 {
            let now = Nanos::now();
            for bit in bits(wanted) {
                self.shared.raced_wakes.force_push((page_at(first, bit), now));
            }
        }
    }

    /// Undoes what landed in a page that the guest gave back meanwhile.
    fn wipe(&self, page: PageIndex) {
        if let Some(alias) = self.shared.watch.ram().alias_of(page) {
            // SAFETY: a whole page of the alias; this lane had claimed it, and it is not mapped for the guest.
            unsafe { alias.write_bytes(0, PAGE_SIZE) };
        }
    }
}

/// When every lane has ended, each page must be here or on its way as the answer to a request.
fn check_nothing_forgotten(shared: &Shared, lane: LaneId) {
    if shared.missing.load(Ordering::Acquire) == 0 {
        return;
    }
    let forgotten = (0..shared.states.pages().0).map(PageIndex).find(|page| shared.states.is_absent(*page));
    if let Some(page) = forgotten {
        let reason = format!("the source says that it has pushed everything, but {page} never came");
        (shared.notify)(PagerEvent::LaneFailed { lane, reason });
    }
}

fn bits(mask: u64) -> impl Iterator<Item = u32> {
    runs(mask).flat_map(|(first, count)| first..first + count)
}

fn page_at(first: PageIndex, bit: u32) -> PageIndex {
    PageIndex(first.0 + u64::from(bit))
}
