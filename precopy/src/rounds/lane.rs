//! One bulk lane's sender.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use switchover_pager::cpu;
use switchover_pager::lane::PageLane;
use switchover_pager::runs::{CHUNK_LEN, bits, lowest};
use switchover_pager::sent::ChunkIndex;
use switchover_pager::zero::Holes;
use switchover_wire::checksum::Checksum;
use switchover_wire::frame::bulk::{BulkFrame, CHUNK_PAGES, FrameFlags};
use switchover_wire::ring::{RingError, Stream};
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};
use thiserror::Error;

use super::books::Frame;
use super::{SPAN_CHUNKS, Shared};
use crate::dirty::DirtyLogError;
use crate::live;
use crate::pack::Packer;

/// Bytes after which the destination is asked for a receipt, besides at the end of each span. Each receipt costs both sides a
/// system call and a wake-up.
const RECEIPT_EVERY: u64 = 512 * 1024;

/// A frame is cut so that the link needs no longer than this for it: a handoff waits for the frame under way.
const FRAME_TIME: Duration = Duration::from_millis(2);
/// But into no smaller pieces than this many pages.
const LEAST_PAGES: u32 = 4;

/// Why a lane ended early.
#[derive(Debug, Error)]
pub enum LaneError {
    /// Its ring or socket failed.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The machine cannot tell what is written.
    #[error(transparent)]
    DirtyLog(#[from] DirtyLogError),
}

/// One bulk lane's sender.
pub struct LaneSender {
    index: usize,
    lane: PageLane,
    shared: Arc<Shared>,
    stream: Stream,
    packer: Packer,
    round: u32,
    /// Bytes since the last frame that asked for a receipt.
    unreceipted: u64,
    /// A frame's pages as they are sent; nothing where the lane carries no checksums.
    copy: Box<[u8]>,
}

impl LaneSender {
    /// The sender of lane number `index`.
    ///
    /// # Errors
    /// When there is no ring for it.
    pub(super) fn new(index: usize, lane: PageLane, shared: &Arc<Shared>) -> Result<Self, LaneError> {
        let packer = Packer::new(shared.packing, Arc::clone(&shared.versions));
        let stream = Stream::new(Arc::clone(&lane.socket))?;
        let copied = if lane.checksums { CHUNK_LEN * PAGE_SIZE } else { 0 };
        let copy = vec![0; copied].into_boxed_slice();
        Ok(Self { index, lane, shared: Arc::clone(shared), stream, packer, round: 0, unreceipted: 0, copy })
    }

    /// Sends round after round until a halt.
    ///
    /// # Errors
    /// When the lane fails, or the machine cannot rearm pages.
    pub fn run(mut self) -> Result<(), LaneError> {
        cpu::yield_to_others();
        let result = self.send_rounds();
        let mut packers = self.shared.packers.lock().unwrap_or_else(PoisonError::into_inner);
        packers.push((self.lane.id, self.packer));
        result
    }

    fn send_rounds(&mut self) -> Result<(), LaneError> {
        let shared = Arc::clone(&self.shared);
        let mut holes = Holes::new(shared.ram.file(), shared.pages());
        while let Some(round) = shared.next_round(self.round) {
            self.round = round;
            while let Some(span) = shared.next_span() {
                self.send_span(span, &mut holes)?;
                if shared.is_halted() {
                    return self.ask_for_receipt();
                }
            }
            shared.round_over(round);
        }
        self.ask_for_receipt()
    }

    /// Asks what the destination has taken, where frames were sent since it was asked last.
    fn ask_for_receipt(&mut self) -> Result<(), LaneError> {
        if std::mem::take(&mut self.unreceipted) == 0 {
            return Ok(());
        }
        let header = BulkFrame::Check.encode(FrameFlags { precopy: true, acknowledge: true }, Checksum::NONE);
        let bytes = header.len() as u64;
        let frame = Frame { chunk: ChunkIndex(0), data: 0, zero: 0, chunks: 1, bytes, pinned: Vec::new() };
        self.shared.books.send(self.index, frame);
        live::send_bytes(&mut self.stream, &header)?;
        self.sent(bytes);
        Ok(())
    }

    /// Takes what there is to send of a span, rearms it, and sends it.
    fn send_span(&mut self, span: Range<usize>, holes: &mut Holes<'_>) -> Result<(), LaneError> {
        let shared = Arc::clone(&self.shared);
        let mut taken = [0; SPAN_CHUNKS];
        let mut passed_over = 0;
        for (index, taken) in span.clone().zip(&mut taken) {
            let wanted = shared.work.take(index);
            if wanted != 0 {
                *taken = shared.books.take(ChunkIndex(index as u64), wanted);
                passed_over += u64::from((wanted & !*taken).count_ones());
            }
        }
        shared.totals.deferred.fetch_add(passed_over, Ordering::Relaxed);
        let Some(last) = taken.iter().rposition(|mask| *mask != 0) else { return Ok(()) };
        // Before anything of it is read: a write from now on is noted.
        shared.log.rearm(ChunkIndex(span.start as u64).first(), &taken[..=last])?;
        // A hole that was written since it was asked for must not pass for one.
        holes.forget_holes();
        if let Some(untouched) = untouched(&shared, &span, &taken, holes) {
            return self.send_untouched(ChunkIndex(span.start as u64), untouched);
        }
        for (offset, (index, mask)) in span.zip(taken).enumerate().filter(|(_, (_, mask))| *mask != 0) {
            self.send_chunk(ChunkIndex(index as u64), mask, offset == last, holes)?;
            if shared.is_halted() {
                // The rest counts as under way, and so is sent after the handoff.
                return Ok(());
            }
        }
        Ok(())
    }

    /// A whole span that the guest has never touched.
    fn send_untouched(&mut self, chunk: ChunkIndex, count: PageCount) -> Result<(), LaneError> {
        let flags = FrameFlags { precopy: true, acknowledge: true };
        let header = BulkFrame::Zeros { first: chunk.first(), count }.encode(flags, Checksum::NONE);
        let chunks = count.0.div_ceil(CHUNK_PAGES);
        let frame = Frame { chunk, data: 0, zero: u64::MAX, chunks, bytes: header.len() as u64, pinned: Vec::new() };
        self.shared.books.send(self.index, frame);
        self.shared.totals.zero.fetch_add(count.0, Ordering::Relaxed);
        for index in chunk.0..chunk.0 + chunks {
            self.packer.sent_as_is(ChunkIndex(index).first(), 0, u64::MAX);
        }
        live::send_bytes(&mut self.stream, &header)?;
        self.sent(header.len() as u64);
        Ok(())
    }

    /// Sends the pages of `mask`, in as many frames as their length calls for.
    fn send_chunk(&mut self, chunk: ChunkIndex, mask: u64, last: bool, holes: &mut Holes<'_>) -> Result<(), LaneError> {
        let mut zero = 0;
        for bit in bits(mask) {
            let page = PageIndex(chunk.first().0 + u64::from(bit));
            if holes.run_from(page).0 > 0 || live::is_zero(&self.shared.ram, page) {
                zero |= 1 << bit;
            }
        }
        let mut data = mask & !zero;
        let at_once = self.pages_at_once();
        loop {
            let part = lowest(data, at_once);
            data &= !part;
            if !self.send_frame(chunk, part, zero, last && data == 0)? || data == 0 {
                return Ok(());
            }
            zero = 0;
        }
    }

    /// Sends one frame; `false` when a halt came first.
    fn send_frame(&mut self, chunk: ChunkIndex, data: u64, zero: u64, last: bool) -> Result<bool, LaneError> {
        let shared = Arc::clone(&self.shared);
        let raw_bytes = BulkFrame::LEN as u64 + u64::from(data.count_ones()) * PAGE_SIZE_U64;
        let acknowledge = last || self.unreceipted + raw_bytes >= RECEIPT_EVERY;
        let flags = FrameFlags { precopy: true, acknowledge };
        let frame = |bytes, pinned| Frame { chunk, data, zero, chunks: 1, bytes, pinned };
        let ram = &shared.ram;
        let packed = if data != 0 && self.packer.wants(self.round) {
            let mut read = |page, bytes: &mut _| {
                ram.copy_page(page, bytes);
            };
            self.packer.pack(chunk.first(), data, zero, flags.bits(), &mut read)
        } else {
            None
        };
        // From here on it is the link's time, a rate limit's included, and no longer the packer's.
        let began = Instant::now();
        let bytes = if let Some(packed) = packed {
            let bytes = packed.bytes.len() as u64;
            if !pace(&shared, bytes) {
                return Ok(false);
            }
            shared.books.send(self.index, frame(bytes, packed.pinned.to_vec()));
            live::send_bytes(&mut self.stream, packed.bytes)?;
            bytes
        } else {
            if !pace(&shared, raw_bytes) {
                return Ok(false);
            }
            self.packer.sent_as_is(chunk.first(), data, zero);
            shared.books.send(self.index, frame(raw_bytes, Vec::new()));
            self.send_as_is(chunk, data, zero, flags)?;
            raw_bytes
        };
        let totals = &shared.totals;
        totals.data.fetch_add(u64::from(data.count_ones()), Ordering::Relaxed);
        totals.zero.fetch_add(u64::from(zero.count_ones()), Ordering::Relaxed);
        self.unreceipted = if acknowledge { 0 } else { self.unreceipted + bytes };
        self.sent(bytes);
        self.packer.sent(bytes, began.elapsed());
        cpu::let_others_run();
        Ok(true)
    }

    /// Sends pages as they are: straight from where they lie, or a copy of them where they are to be checked: the guest may write
    /// them meanwhile, and what is sent must be what the checksum is of.
    fn send_as_is(&mut self, chunk: ChunkIndex, data: u64, zero: u64, flags: FrameFlags) -> Result<(), LaneError> {
        let frame = BulkFrame::Chunk { first: chunk.first(), data, zero };
        if !self.lane.checksums {
            let header = frame.encode(flags, Checksum::NONE);
            return Ok(live::send(&self.shared.ram, &mut self.stream, &header, chunk, data)?);
        }
        let mut places = self.copy.chunks_exact_mut(PAGE_SIZE);
        for (bit, place) in bits(data).zip(&mut places) {
            if let Ok(place) = place.try_into() {
                self.shared.ram.copy_page(PageIndex(chunk.first().0 + u64::from(bit)), place);
            }
        }
        let pages = &self.copy[..frame.payload()];
        let header = frame.encode(flags, Checksum::of([pages]));
        self.stream.send_all(&[IoSlice::new(&header), IoSlice::new(pages)])?;
        Ok(())
    }

    fn sent(&self, bytes: u64) {
        self.lane.socket.counters().add_sent(bytes);
        self.shared.totals.wire.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many pages a frame may have.
    fn pages_at_once(&self) -> u32 {
        let bytes = match self.shared.bytes_per_second.load(Ordering::Relaxed) {
            0 => u128::MAX,
            rate => u128::from(rate) * FRAME_TIME.as_nanos() / 1_000_000_000,
        };
        let pages = u32::try_from(bytes / u128::from(PAGE_SIZE_U64)).unwrap_or(u32::MAX);
        pages.max(LEAST_PAGES).min(self.shared.pacer.frame_pages())
    }
}

/// Waits until `bytes` may be sent; `false` when a halt comes first.
fn pace(shared: &Shared, bytes: u64) -> bool {
    !shared.pacer.stopped_before(bytes, |span| shared.pause(span))
}

/// The pages of a span that is wanted as a whole and was never touched.
fn untouched(shared: &Shared, span: &Range<usize>, taken: &[u64], holes: &mut Holes<'_>) -> Option<PageCount> {
    let first = ChunkIndex(span.start as u64).first();
    let pages = (shared.pages().0 - first.0).min(span.len() as u64 * CHUNK_PAGES);
    let wanted: u64 = taken.iter().map(|mask| u64::from(mask.count_ones())).sum();
    (wanted == pages && holes.run_from(first).0 >= pages).then_some(PageCount(pages))
}
