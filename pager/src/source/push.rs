//! Pushing pages on a `bulk` lane: most wanted first, zeros in a bit, everything once.

use std::io::IoSlice;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use switchover_wire::checksum::Checksum;
use switchover_wire::clock::Nanos;
use switchover_wire::frame::bulk::{BulkFrame, CHUNK_PAGES, FrameFlags};
use switchover_wire::ring::{RingError, Stream};
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};
use thiserror::Error;

use super::order::Step;
use super::{ChunkEncoder, Shared};
use crate::cpu;
use crate::lane::PageLane;
use crate::runs::{CHUNK_LEN, bits, lowest, runs};
use crate::sent::ChunkIndex;
use crate::zero::{Holes, is_zero};

/// Why a bulk lane ended early on the source.
#[derive(Debug, Error)]
pub enum PushError {
    /// Its ring or socket failed, or the destination closed it.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The pager is being stopped.
    #[error("the push was stopped")]
    Stopped,
}

/// One bulk lane.
pub struct Pusher {
    lane: PageLane,
    shared: Arc<Shared>,
    stream: Stream,
    encoder: Option<Box<dyn ChunkEncoder>>,
    pushed: u64,
    /// The sweep has not been waited for yet.
    sweep_closed: bool,
}

impl Pusher {
    /// A pusher for `lane`.
    ///
    /// # Errors
    /// When there is no ring for it.
    pub(super) fn new(lane: PageLane, shared: &Arc<Shared>) -> Result<Self, PushError> {
        let stream = Stream::new(Arc::clone(&lane.socket))?;
        Ok(Self { lane, shared: Arc::clone(shared), stream, encoder: None, pushed: 0, sweep_closed: true })
    }

    /// Pushes until nothing is left, and says so on the lane.
    ///
    /// # Errors
    /// When the lane fails or the pager is stopped.
    pub fn run(mut self) -> Result<(), PushError> {
        let shared = Arc::clone(&self.shared);
        self.take_encoder();
        let (file, pages) = (shared.ram.file(), shared.ram.pages());
        let written = shared.written.load(Ordering::Acquire);
        let mut holes = if written { Holes::none(file, pages) } else { Holes::surveyed(file, pages, &shared.survey) };
        let mut span = 0..0;
        loop {
            if shared.stopping.load(Ordering::Acquire) {
                return Err(PushError::Stopped);
            }
            cpu::let_others_run();
            if let Some(Step { chunk, pages }) = shared.queue.urgent(&shared.sent) {
                self.push_chunk(chunk, pages, &mut holes)?;
                continue;
            }
            if span.is_empty() {
                if std::mem::take(&mut self.sweep_closed) {
                    shared.queue.wait_for_sweep();
                    for (chunk, mut claimed) in shared.queue.take_kept(self.lane.id) {
                        while claimed != 0 {
                            let part = lowest(claimed, shared.pacer.frame_pages());
                            self.push_claimed(chunk, part, &mut holes)?;
                            claimed &= !part;
                        }
                    }
                    continue;
                }
                match shared.queue.next_span() {
                    Some(next) => span = next,
                    None => break,
                }
            }
            let chunk = ChunkIndex(span.start);
            if shared.sent.is_done(chunk) {
                span.start += 1;
                continue;
            }
            span.start += self.push_hole(chunk, span.end, &mut holes)?;
            if chunk.0 == span.start {
                self.push_chunk(chunk, u64::MAX, &mut holes)?;
                span.start += 1;
            }
        }
        self.send(&BulkFrame::End { pages: self.pushed })
    }

    /// The encoder that this lane was given, if any.
    fn take_encoder(&mut self) {
        let mut encoders = self.shared.encoders.lock().unwrap_or_else(PoisonError::into_inner);
        let own = encoders.iter().position(|(id, _)| *id == self.lane.id);
        self.encoder = own.map(|index| encoders.swap_remove(index).1);
    }

    /// Where whole chunks from `chunk` on were never touched, and never sent, says so in one frame. Returns how
    /// many chunks that covered.
    fn push_hole(&mut self, chunk: ChunkIndex, end: u64, holes: &mut Holes<'_>) -> Result<u64, PushError> {
        let untouched = holes.run_from(chunk.first()).0 / CHUNK_PAGES;
        let mut covered = 0;
        while covered < untouched.min(end - chunk.0) {
            let next = ChunkIndex(chunk.0 + covered);
            let full = self.shared.sent.full(next);
            let claimed = self.shared.sent.claim(next, full);
            if claimed != full {
                // Part of it was sent before: say the rest page by page.
                if claimed != 0 {
                    self.send_masks(next.first(), 0, claimed)?;
                }
                break;
            }
            covered += 1;
        }
        if covered > 0 {
            let count = PageCount(covered * CHUNK_PAGES);
            self.shared.counts.zero.fetch_add(count.0, Ordering::Relaxed);
            self.send(&BulkFrame::Zeros { first: chunk.first(), count })?;
        }
        Ok(covered)
    }

    /// Sends those of a chunk's `wanted` pages that nobody has sent, in frames as large as the rate allows.
    fn push_chunk(&mut self, chunk: ChunkIndex, mut wanted: u64, holes: &mut Holes<'_>) -> Result<(), PushError> {
        while wanted != 0 {
            let part = lowest(wanted, self.shared.pacer.frame_pages());
            self.push_part(chunk, part, holes)?;
            wanted &= !part;
        }
        Ok(())
    }

    fn push_part(&mut self, chunk: ChunkIndex, wanted: u64, holes: &mut Holes<'_>) -> Result<(), PushError> {
        let claimed = self.shared.sent.claim(chunk, wanted);
        self.push_claimed(chunk, claimed, holes)
    }

    fn push_claimed(&mut self, chunk: ChunkIndex, claimed: u64, holes: &mut Holes<'_>) -> Result<(), PushError> {
        if claimed == 0 {
            return Ok(());
        }
        let mut zero = 0;
        for bit in bits(claimed) {
            let page = PageIndex(chunk.first().0 + u64::from(bit));
            if holes.run_from(page).0 > 0 || is_zero(bytes_of(&self.shared, page, 1)) {
                zero |= 1 << bit;
            }
        }
        let data = claimed & !zero;
        let index = usize::try_from(chunk.0).unwrap_or(usize::MAX);
        let as_they_are = self.shared.as_they_are.get().and_then(|words| words.get(index)).copied().unwrap_or(0);
        if data & as_they_are != 0 {
            self.send_masks(chunk.first(), data & as_they_are, 0)?;
        }
        let data = data & !as_they_are;
        if data | zero == 0 || self.send_encoded(chunk.first(), data, zero)? {
            return Ok(());
        }
        self.send_masks(chunk.first(), data, zero)
    }

    /// Sends the pages in fewer bytes, where that is faster. `false` when nothing was sent.
    fn send_encoded(&mut self, first: PageIndex, data: u64, zero: u64) -> Result<bool, PushError> {
        let Some(encoder) = self.encoder.as_mut().filter(|_| data != 0) else { return Ok(false) };
        let ram = &self.shared.ram;
        let mut read = |page, bytes: &mut _| {
            ram.copy_page(page, bytes);
        };
        let Some(frame) = encoder.encode(first, data, zero, &mut read) else { return Ok(false) };
        let began = Instant::now();
        let bytes = frame.len() as u64;
        if self.shared.pacer.stopped_before(bytes, |span| self.shared.queue.pause(span)) {
            return Err(PushError::Stopped);
        }
        self.stream.send_all(&[IoSlice::new(frame)])?;
        encoder.sent(bytes, began.elapsed());
        self.count(data, zero, bytes);
        Ok(true)
    }

    fn count(&mut self, data: u64, zero: u64, bytes: u64) {
        self.shared.idleness.note_push(Nanos::now());
        let counts = &self.shared.counts;
        counts.zero.fetch_add(u64::from(zero.count_ones()), Ordering::Relaxed);
        counts.data.fetch_add(u64::from(data.count_ones()), Ordering::Relaxed);
        self.pushed += u64::from(data.count_ones());
        self.lane.socket.counters().add_sent(bytes);
    }

    fn send_masks(&mut self, first: PageIndex, data: u64, zero: u64) -> Result<(), PushError> {
        self.count(data, zero, 0);
        self.send(&BulkFrame::Chunk { first, data, zero })
    }

    /// Sends a frame and the pages of its data mask, straight from guest memory.
    fn send(&mut self, frame: &BulkFrame) -> Result<(), PushError> {
        let (first, data) = match *frame {
            BulkFrame::Chunk { first, data, .. } => (first, data),
            BulkFrame::Zeros { first, .. } => (first, 0),
            // A packed chunk comes whole from its encoder.
            BulkFrame::Packed { .. } | BulkFrame::Check | BulkFrame::End { .. } => (PageIndex(0), 0),
        };
        let bytes = BulkFrame::LEN as u64 + u64::from(data.count_ones()) * PAGE_SIZE_U64;
        if self.shared.pacer.stopped_before(bytes, |span| self.shared.queue.pause(span)) {
            return Err(PushError::Stopped);
        }
        // A chunk has at most 32 runs: every other page.
        let mut parts = [IoSlice::new(&[]); 1 + CHUNK_LEN / 2];
        let mut used = 1;
        for (bit, count) in runs(data) {
            parts[used] = IoSlice::new(bytes_of(&self.shared, PageIndex(first.0 + u64::from(bit)), count));
            used += 1;
        }
        // What it reads is read again at once, to be sent.
        let checksum =
            if self.lane.checksums { Checksum::of(parts[1..used].iter().map(|part| &**part)) } else { Checksum::NONE };
        let header = frame.encode(FrameFlags::default(), checksum);
        parts[0] = IoSlice::new(&header);
        self.stream.send_all(&parts[..used])?;
        self.lane.socket.counters().add_sent(bytes);
        Ok(())
    }
}

/// The bytes of `count` pages from `page` on. Chunks are claimed within RAM, so none lies past its end.
fn bytes_of(shared: &Shared, page: PageIndex, count: u32) -> &[u8] {
    debug_assert!(shared.serving.load(Ordering::Relaxed));
    let Some(start) = shared.ram.readable(page) else { return &[] };
    // SAFETY: the pages were claimed in `sent`, which has bits for pages of RAM only, so they lie in a mapping that
    // `shared.ram` keeps. A pusher runs only while `serving` is set: the guest is paused and nothing else on a source
    // writes its memory, so the bytes do not change under the slice.
    unsafe { std::slice::from_raw_parts(start, count as usize * PAGE_SIZE) }
}
