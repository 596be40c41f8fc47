//! Receiving pushed pages on a `bulk` lane, straight into the alias.

use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use switchover_wire::checksum::Checksum;
use switchover_wire::clock::Nanos;
use switchover_wire::encoding::{Encoding, EncodingError, Page, PageDecoder, Payload};
use switchover_wire::frame::FrameError;
use switchover_wire::frame::bulk::{BulkFrame, CHUNK_PAGES, Taken};
use switchover_wire::ring::{RingError, Stream};
use switchover_wire::types::{LaneId, PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};
use thiserror::Error;

use super::Shared;
use super::handoff::Phase;
use crate::cpu;
use crate::lane::{PageLane, PagerEvent};
use crate::runs::{CHUNK_LEN, bits, runs};
use crate::state::{Arrival, Claim, LaneTag};
use crate::stats::RateSeries;
use crate::uffd::WatchError;

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
    /// A page of an earlier frame is still landing elsewhere.
    #[error("the source sends a second version of {0} while the first is under way")]
    TwoVersions(PageIndex),
    /// A page that cannot be decoded.
    #[error(transparent)]
    Encoding(#[from] EncodingError),
    /// A difference whose other version never came.
    #[error("the source sends {0} as a difference to a version that never came")]
    DifferenceToNothing(PageIndex),
    /// A difference after the link was lost: what is here of the page may be torn.
    #[error("the source sends {0} as a difference, but the link was lost since and what is here of it may be torn")]
    LateDifference(PageIndex),
    /// A reference to another page after the handoff: the guest may have written that.
    #[error("the source sends {0} as a reference to another page after the handoff")]
    LateReference(PageIndex),
    /// The end of a lane that has the handoff before it.
    #[error("the source ends the lane before the handoff")]
    EarlyEnd,
    /// The pager ends.
    #[error("the lane was stopped")]
    Stopped,
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
    stream: Stream,
    /// Where pages go whose claim was lost: nothing may write the alias of a page that is here. Room for all of a frame, each
    /// of whose pages has a place of its own, since the checksum is of all of them.
    scratch: Box<[u8]>,
    /// What the header of the frame that is being taken says of its payload, and the frame's name; `None` where nobody asks.
    announced: Option<(Checksum, &'static str)>,
    /// Data pages since the handoff.
    received: u64,
    /// Frames since the lane began.
    frames: u64,
    rate: RateSeries,
    /// What packed chunks need, made when the first comes.
    unpacker: Option<Box<Unpacker>>,
}

#[derive(Default)]
struct Unpacker {
    decoder: PageDecoder,
    payload: Vec<u8>,
}

/// The pages of one frame that a lane may write, a bit each.
struct Claimed {
    won: u64,
    /// Those of which a version was here.
    resident: u64,
    /// The frame came before the handoff.
    counts: bool,
}

impl BulkReceiver {
    /// A receiver for `lane`, which claims pages as `tag`.
    ///
    /// # Errors
    /// When there is no ring for it.
    pub(super) fn new(lane: PageLane, tag: LaneTag, shared: &Arc<Shared>) -> Result<Self, BulkError> {
        let stream = Stream::new(Arc::clone(&lane.socket))?;
        Ok(Self {
            lane,
            tag,
            shared: Arc::clone(shared),
            stream,
            scratch: vec![0; CHUNK_LEN * PAGE_SIZE].into_boxed_slice(),
            announced: None,
            received: 0,
            frames: 0,
            rate: RateSeries::new(),
            unpacker: None,
        })
    }

    /// Receives until the source says that it has pushed everything.
    ///
    /// # Errors
    /// When the lane ends before that, carries a bad frame, or a page cannot be mapped.
    pub fn run(mut self) -> Result<(), BulkError> {
        cpu::yield_to_others();
        let result = self.receive();
        let shared = &self.shared;
        // Links may be lost and joined for ever, most of which bring nothing.
        if !self.rate.is_empty() {
            shared.pushed_rates.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.rate));
        }
        result?;
        if shared.bulk_lanes_open.fetch_sub(1, Ordering::AcqRel) == 1 {
            check_nothing_forgotten(shared, self.lane.id);
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(), BulkError> {
        let mut header = [0; BulkFrame::LEN];
        loop {
            self.stream.recv_exact(&mut [IoSliceMut::new(&mut header)])?;
            self.lane.socket.counters().add_received(BulkFrame::LEN as u64);
            let (frame, flags, checksum) = BulkFrame::decode(&header, self.shared.states.pages())?;
            self.announced = self.lane.checksums.then_some((checksum, frame.name()));
            if !flags.precopy {
                // It may have overtaken the handoff's own message, which comes on another lane.
                let stage = self.shared.handoff.wait_until(|stage| stage.phase == Phase::Postcopy);
                if stage.stopping {
                    return Err(BulkError::Stopped);
                }
            }
            if !flags.precopy {
                self.shared.idleness.note_push(Nanos::now());
            }
            match frame {
                BulkFrame::Chunk { first, data, zero } if flags.precopy => {
                    self.take_version(first, data, zero, None)?;
                }
                BulkFrame::Packed { first, data, zero, payload } if flags.precopy => {
                    self.take_version(first, data, zero, Some(payload))?;
                }
                BulkFrame::Check => {}
                BulkFrame::Chunk { first, data, zero } => {
                    self.take_zeros(first, zero)?;
                    self.take_data(first, data, None)?;
                }
                BulkFrame::Packed { first, data, zero, payload } => {
                    self.take_zeros(first, zero)?;
                    self.take_data(first, data, Some((zero, payload)))?;
                }
                BulkFrame::Zeros { first, count } => {
                    let end = first.0 + count.0;
                    let mut at = first.0;
                    while at < end {
                        // Up to the next multiple of a chunk's pages, as everything here goes by chunks.
                        let pages = (end - at).min(CHUNK_PAGES - at % CHUNK_PAGES);
                        let mask = u64::MAX >> (CHUNK_PAGES - pages);
                        if flags.precopy {
                            self.take_version(PageIndex(at), 0, mask, None)?;
                        } else {
                            self.take_zeros(PageIndex(at), mask)?;
                        }
                        at += pages;
                    }
                }
                BulkFrame::End { .. } if flags.precopy => return Err(BulkError::EarlyEnd),
                BulkFrame::End { pages } if pages == self.received => return Ok(()),
                BulkFrame::End { pages } => return Err(BulkError::Count { said: pages, got: self.received }),
            }
            cpu::let_others_run();
            self.frames += 1;
            if flags.acknowledge {
                let taken = Taken { frames: self.frames }.encode();
                self.stream.send_all(&[IoSlice::new(&taken)])?;
                self.lane.socket.counters().add_sent(taken.len() as u64);
            }
        }
    }

    /// Receives versions of pages that later ones may replace: straight into the alias, or through the decoder where they
    /// are packed. After the handoff, into scratch: they count for nothing then.
    fn take_version(&mut self, first: PageIndex, data: u64, zero: u64, payload: Option<u32>) -> Result<(), BulkError> {
        let Claimed { won, resident, counts } = self.claim_version(first, data | zero)?;
        bits(data & won).for_each(|bit| self.shared.stains.add(page_at(first, bit)));
        let received = match payload {
            None if data == 0 => Ok(()),
            None => self.receive_pages(first, data, data & won),
            Some(payload) => self.receive_packed(first, data, zero, won & data, resident, payload as usize, true),
        };
        if received.is_ok() {
            // Where nothing has landed, memory is zero already, or not even there.
            for page in bits(zero & won).map(|bit| page_at(first, bit)).filter(|page| self.shared.stains.has(*page)) {
                self.shared.wipe(page);
            }
            let bytes = payload.map_or(u64::from(data.count_ones()) * PAGE_SIZE_U64, u64::from);
            self.lane.socket.counters().add_received(bytes);
        }
        let stage = self.shared.handoff.stage();
        let still_counts = received.is_ok() && stage.phase == Phase::Precopy;
        for bit in bits(won) {
            let page = page_at(first, bit);
            if !still_counts {
                if self.shared.states.release(page, self.tag) {
                    self.shared.shard_of(page).ask_anew(page);
                }
            } else {
                self.shared.states.version_arrived(page, self.tag, zero >> bit & 1 == 1);
                self.shared.ahead.note(page, stage.round);
            }
        }
        if still_counts {
            self.shared.missing.fetch_sub(u64::from(won.count_ones()), Ordering::AcqRel);
            let totals = &self.shared.counts;
            totals.precopied.fetch_add(u64::from((won & data).count_ones()), Ordering::Relaxed);
            totals.precopied_zero.fetch_add(u64::from((won & zero).count_ones()), Ordering::Relaxed);
        } else if !counts {
            self.shared.counts.discarded.fetch_add(u64::from(data.count_ones()), Ordering::Relaxed);
        }
        drop(stage);
        received
    }

    /// Claims the pages of a version, unless the handoff has come before it.
    fn claim_version(&self, first: PageIndex, pages: u64) -> Result<Claimed, BulkError> {
        let stage = self.shared.handoff.stage();
        if stage.phase == Phase::Postcopy {
            return Ok(Claimed { won: 0, resident: 0, counts: false });
        }
        let (mut won, mut resident) = (0_u64, 0_u64);
        for bit in bits(pages) {
            let page = page_at(first, bit);
            match self.shared.states.reclaim(page, self.tag) {
                Some(here) => {
                    won |= 1 << bit;
                    resident |= u64::from(here) << bit;
                }
                None => {
                    for bit in bits(won) {
                        self.shared.states.release(page_at(first, bit), self.tag);
                    }
                    self.shared.missing.fetch_add(u64::from(resident.count_ones()), Ordering::AcqRel);
                    return Err(BulkError::TwoVersions(page));
                }
            }
        }
        // With the stage still held: the handoff counts what is missing.
        self.shared.missing.fetch_add(u64::from(resident.count_ones()), Ordering::AcqRel);
        Ok(Claimed { won, resident, counts: true })
    }

    /// Receives a packed chunk and decodes its pages, each into its place; or only receives it, where the pages are not `won`.
    #[expect(clippy::too_many_arguments, reason = "a frame's fields, and what its pages' states say")]
    fn receive_packed(
        &mut self,
        first: PageIndex,
        data: u64,
        zero: u64,
        won: u64,
        resident: u64,
        length: usize,
        precopy: bool,
    ) -> Result<(), BulkError> {
        let Unpacker { decoder, payload } = self.unpacker.get_or_insert_with(Box::default).as_mut();
        payload.resize(length, 0);
        self.stream.recv_exact(&mut [IoSliceMut::new(payload)])?;
        if let Some((announced, frame)) = self.announced {
            announced.check(frame, [&payload[..]])?;
        }
        let (ram, states) = (self.shared.watch.ram(), &self.shared.states);
        let parsed = Payload::parse(first, data, zero, payload, states.pages())?;
        for (entry, bit) in parsed.entries().zip(bits(data)).filter(|(_, bit)| won >> bit & 1 == 1) {
            if entry.encoding() == Encoding::Delta && resident >> bit & 1 == 0 {
                return Err(BulkError::DifferenceToNothing(entry.page()));
            }
            if entry.encoding() == Encoding::Delta && self.shared.rejoined.load(Ordering::Acquire) {
                return Err(BulkError::LateDifference(entry.page()));
            }
            if entry.encoding() == Encoding::Same && !precopy {
                return Err(BulkError::LateReference(entry.page()));
            }
            let Some(alias) = ram.alias_of(entry.page()) else { continue };
            // SAFETY: a whole page of the alias, which the watch keeps mapped. This lane has claimed it, so nobody else
            // writes it before `arrived` or `release`; nobody reads it through Rust but for `copy_page`, which is only called
            // for pages that are resident, as claimed ones are not; and no guest runs on it before the handoff, or has it
            // mapped after.
            let page = unsafe { &mut *alias.cast::<Page>() };
            let mut held = |other, bytes: &mut Page| states.is_resident(other) && ram.copy_page(other, bytes);
            decoder.decode(&entry, page, &mut held)?;
        }
        Ok(())
    }

    /// Receives the pages of `data`, each to its place if it is still wanted there, and maps them in runs. `packed`: the frame's
    /// zero mask and the length of its payload.
    fn take_data(&mut self, first: PageIndex, data: u64, packed: Option<(u64, u32)>) -> Result<(), BulkError> {
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
        let received = match packed {
            None => self.receive_pages(first, data, won),
            // A page that is claimed after the handoff holds what came of it before, and nobody has seen it.
            Some((zero, payload)) => self.receive_packed(first, data, zero, won, u64::MAX, payload as usize, false),
        };
        if let Err(error) = received {
            for bit in bits(won) {
                let page = page_at(first, bit);
                self.shared.stains.add(page);
                if self.shared.states.release(page, self.tag) {
                    self.shared.shard_of(page).ask_anew(page);
                }
            }
            return Err(error);
        }
        let pages = u64::from(data.count_ones());
        self.received += pages;
        let bytes = packed.map_or(pages * PAGE_SIZE_U64, |(_, payload)| u64::from(payload));
        self.lane.socket.counters().add_received(bytes);

        let mut present = 0_u64;
        for bit in bits(won) {
            let page = page_at(first, bit);
            self.shared.digest(page);
            match self.shared.states.arrived(page, self.tag) {
                // A fault that came meanwhile asked for nothing: mapping wakes it, and nobody keeps its time.
                Arrival::Present { .. } => present |= 1 << bit,
                Arrival::Removed => self.shared.wipe(page),
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

    /// One vectored receive for all pages of `data`: those of `won` into the alias, the others into scratch. They are as they
    /// were sent when it returns without an error.
    fn receive_pages(&mut self, first: PageIndex, data: u64, won: u64) -> Result<(), BulkError> {
        let mut parts = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; CHUNK_LEN];
        let mut used = 0;
        let mut scratch = self.scratch.chunks_exact_mut(PAGE_SIZE);
        for (bit, count) in runs(data) {
            let mut at = bit;
            while at < bit + count {
                let left = bit + count - at;
                let won_run = (won >> at).trailing_ones().min(left);
                let alias = self.shared.watch.ram().alias_of(page_at(first, at)).filter(|_| won_run > 0);
                let lost = || scratch.next().map(|page| (page.as_mut_ptr(), 1));
                // There is a page of scratch for each of a frame's.
                let Some((base, pages)) = alias.map(|base| (base, won_run)).or_else(lost) else { break };
                parts[used] = libc::iovec { iov_base: base.cast(), iov_len: pages as usize * PAGE_SIZE };
                used += 1;
                at += pages;
            }
        }
        // Receiving consumes the parts.
        let landed = parts;
        // SAFETY: each part is either a page of scratch, which this object owns and borrows mutably, or a run of pages
        // in the alias whose claim this lane has won: nobody else writes them before `arrived`, and the guest does
        // not have them mapped. The frame was checked against RAM's size, so the runs lie inside the mapping, which
        // the watch keeps alive. The call returns only when the kernel is done with all parts.
        unsafe { self.stream.recv_exact_raw(&mut parts[..used])? };
        if let Some((announced, frame)) = self.announced {
            // While the frame is still in the cache, and before anybody else may see any of it.
            announced.check(
                frame,
                landed[..used].iter().map(|part| {
                    // SAFETY: as above, and the kernel is done with them: nobody writes these pages while they are borrowed.
                    unsafe { std::slice::from_raw_parts(part.iov_base.cast::<u8>().cast_const(), part.iov_len) }
                }),
            )?;
        }
        Ok(())
    }

    /// Takes note of zero pages, and maps those that somebody waits for.
    fn take_zeros(&mut self, first: PageIndex, zero: u64) -> Result<(), BulkError> {
        let (mut won, mut wanted) = (0_u64, 0_u64);
        for bit in bits(zero) {
            if let Claim::Won { wanted: waiting } = self.shared.claim_zero(page_at(first, bit), self.tag) {
                won |= 1 << bit;
                wanted |= u64::from(waiting) << bit;
            }
        }
        // Nobody waits for the others: the mapper maps them when there is nothing better to do.
        if self.shared.populated && won != wanted {
            self.shared.unmapped_zeros.push(first, won & !wanted);
        }
        for (bit, count) in runs(wanted) {
            self.shared.watch.map_zero(page_at(first, bit), PageCount(u64::from(count)))?;
        }
        self.report_raced(first, wanted);
        let count = u64::from(won.count_ones());
        self.shared.counts.zero.fetch_add(count, Ordering::Relaxed);
        self.shared.placed(count);
        Ok(())
    }

    /// Tells the fault threads, which keep the books, when the faults on these pages were woken.
    fn report_raced(&self, first: PageIndex, wanted: u64) {
        if wanted != 0 {
            let now = Nanos::now();
            for bit in bits(wanted) {
                let page = page_at(first, bit);
                self.shared.shard_of(page).report_raced(page, now);
            }
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

fn page_at(first: PageIndex, bit: u32) -> PageIndex {
    PageIndex(first.0 + u64::from(bit))
}
