//! What is under way: which pages, in which lane's stream, in which order.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};

use switchover_pager::lane::PageLane;
use switchover_pager::sent::ChunkIndex;
use switchover_pager::source::UnderWay;
use switchover_wire::types::{LaneId, PageCount, PageIndex};

use crate::bitmap::{AtomicPageBitmap, PageBitmap};
use crate::pack::SentVersions;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering};

/// A frame that the destination has not acknowledged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// Its chunk, or its first one.
    pub chunk: ChunkIndex,
    /// The pages with bytes of that chunk.
    pub data: u64,
    /// The pages that are zero; of each of its chunks, where it has several.
    pub zero: u64,
    /// How many chunks it covers.
    pub chunks: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Pages of other frames that it refers to.
    pub pinned: Vec<PageIndex>,
}

/// The books of all lanes.
pub struct Books {
    /// A bit a page: taken by a lane, and not acknowledged.
    under_way: AtomicPageBitmap,
    streams: Box<[Stream]>,
    taken_bytes: AtomicU64,
    versions: Arc<SentVersions>,
}

struct Stream {
    lane: LaneId,
    book: Mutex<StreamBook>,
}

#[derive(Default)]
struct StreamBook {
    frames: VecDeque<Frame>,
    /// Frames acknowledged so far.
    taken: u64,
}

/// The destination acknowledged what it cannot have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NeverSent;

impl Books {
    /// Empty books.
    pub fn new(pages: PageCount, lanes: &[PageLane], versions: Arc<SentVersions>) -> Self {
        let streams = lanes.iter().map(|lane| Stream { lane: lane.id, book: Mutex::default() }).collect();
        Self { under_way: AtomicPageBitmap::new(pages), streams, taken_bytes: AtomicU64::new(0), versions }
    }

    /// A lane wants to send these pages of `chunk`: says which it may. The others are under way already, or referred to by
    /// a frame that is.
    pub fn take(&self, chunk: ChunkIndex, wanted: u64) -> u64 {
        let Ok(index) = usize::try_from(chunk.0) else { return 0 };
        let free = self.under_way.insert_word(index, wanted);
        let pinned = self.versions.withdraw(chunk.first(), free);
        if pinned != 0 {
            self.under_way.remove_word(index, pinned);
        }
        free & !pinned
    }

    /// Lane number `lane` is about to send `frame`, whose pages it has taken.
    pub fn send(&self, lane: usize, frame: Frame) {
        if let Some(stream) = self.streams.get(lane) {
            stream.book().frames.push_back(frame);
        }
    }

    /// The destination has taken `frames` frames of lane number `lane`, in all.
    ///
    /// # Errors
    /// When that is more than were sent, or fewer than it said before.
    pub fn taken(&self, lane: usize, frames: u64) -> Result<(), NeverSent> {
        let stream = self.streams.get(lane).ok_or(NeverSent)?;
        loop {
            let frame = {
                let mut book = stream.book();
                if frames < book.taken {
                    return Err(NeverSent);
                }
                if frames == book.taken {
                    return Ok(());
                }
                book.taken += 1;
                // Gone from the stream before it is gone from the set: what the set lacks is in no stream.
                book.frames.pop_front().ok_or(NeverSent)?
            };
            self.taken_bytes.fetch_add(frame.bytes, Ordering::Relaxed);
            self.versions.acknowledged(frame.chunk.first(), frame.data, &frame.pinned);
            for chunk in frame.chunk.0..frame.chunk.0 + frame.chunks {
                if let Ok(index) = usize::try_from(chunk) {
                    self.under_way.remove_word(index, frame.data | frame.zero);
                }
            }
        }
    }

    /// Whether no lane's stream holds a frame that was not acknowledged.
    pub fn all_taken(&self) -> bool {
        self.streams.iter().all(|stream| stream.book().frames.is_empty())
    }

    /// Every page that is under way.
    pub fn under_way(&self) -> PageBitmap {
        self.under_way.snapshot()
    }

    /// What each lane's stream still holds.
    pub fn in_streams(&self) -> Vec<UnderWay> {
        let chunks_of = |frame: &Frame| {
            let pages = frame.data | frame.zero;
            (frame.chunk.0..frame.chunk.0 + frame.chunks).map(move |chunk| (ChunkIndex(chunk), pages))
        };
        let of = |stream: &Stream| UnderWay {
            lane: stream.lane,
            chunks: stream.book().frames.iter().flat_map(chunks_of).collect(),
        };
        self.streams.iter().map(of).collect()
    }

    /// Bytes of all frames that were acknowledged.
    pub fn taken_bytes(&self) -> u64 {
        self.taken_bytes.load(Ordering::Relaxed)
    }
}

impl Stream {
    fn book(&self) -> MutexGuard<'_, StreamBook> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use switchover_wire::socket::Socket;
    use switchover_wire::types::LaneRole;

    use super::*;
    use crate::pack::PackSettings;

    fn books(lanes: u8) -> Books {
        let lane = |index| {
            let socket = Arc::new(Socket::pair().unwrap().0);
            PageLane { id: LaneId { role: LaneRole::Bulk, index }, socket, checksums: true }
        };
        let lanes: Vec<_> = (0..lanes).map(lane).collect();
        Books::new(PageCount(1000), &lanes, SentVersions::new(PackSettings::default()))
    }

    fn frame(chunk: u64, data: u64, chunks: u64) -> Frame {
        Frame { chunk: ChunkIndex(chunk), data, zero: 0, chunks, bytes: 10, pinned: Vec::new() }
    }

    #[test]
    fn a_page_is_taken_again_only_after_its_frame_was_acknowledged() {
        let books = books(2);
        assert_eq!(books.take(ChunkIndex(3), 0b111), 0b111);
        books.send(0, frame(3, 0b111, 1));
        assert_eq!(books.take(ChunkIndex(3), 0b1110), 0b1000);
        books.send(1, frame(3, 0b1000, 1));
        books.taken(1, 1).unwrap();
        assert_eq!(books.take(ChunkIndex(3), 0b1111), 0b1000);
        books.taken(0, 1).unwrap();
        assert_eq!(books.take(ChunkIndex(3), 0b0111), 0b0111);
        assert_eq!(books.taken_bytes(), 20);
    }

    #[test]
    fn streams_hold_what_was_sent_and_the_set_also_what_was_taken() {
        let books = books(2);
        books.take(ChunkIndex(0), u64::MAX);
        books.take(ChunkIndex(1), u64::MAX);
        books.take(ChunkIndex(2), 1);
        books.send(1, frame(0, u64::MAX, 2));
        assert_eq!(books.under_way().count(), PageCount(129));
        let streams = books.in_streams();
        assert_eq!(streams[0].chunks, []);
        assert_eq!(streams[1].chunks, [(ChunkIndex(0), u64::MAX), (ChunkIndex(1), u64::MAX)]);
        books.taken(1, 1).unwrap();
        assert_eq!(books.under_way().count(), PageCount(1));
    }

    #[test]
    fn nobody_acknowledges_what_was_never_sent() {
        let books = books(1);
        assert_eq!(books.taken(0, 1), Err(NeverSent));
        books.send(0, frame(0, 1, 1));
        assert_eq!(books.taken(0, 3), Err(NeverSent));
        assert_eq!(books.taken(7, 0), Err(NeverSent));
    }
}

#[cfg(test)]
#[cfg(feature = "loom")]
mod models;
