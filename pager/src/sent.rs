//! Which pages the source has sent, claimed chunk by chunk so that no two threads send the same page unasked.

use switchover_wire::frame::bulk::CHUNK_PAGES;
use switchover_wire::types::{PageCount, PageIndex};

use crate::sync::{AtomicU64, Ordering};
use crate::words::bits_for;

/// The index of a run of [`CHUNK_PAGES`] pages, which travel in one frame.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ChunkIndex(pub u64);

impl ChunkIndex {
    /// The chunk that `page` lies in.
    #[must_use]
    pub const fn of(page: PageIndex) -> Self {
        Self(page.0 / CHUNK_PAGES)
    }

    /// Its first page.
    #[must_use]
    pub const fn first(self) -> PageIndex {
        PageIndex(self.0 * CHUNK_PAGES)
    }
}

/// One bit a page, set when the page is handed to a lane.
#[derive(Debug)]
pub struct SentPages {
    words: Box<[AtomicU64]>,
    pages: PageCount,
}

impl SentPages {
    /// Nothing sent yet.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        Self { words: bits_for(pages.0), pages }
    }

    /// Only the pages with a bit in `missing` are still to be sent; words that it lacks have none. Called before anything is
    /// sent.
    pub fn leave_only(&self, missing: &[u64]) {
        for (index, word) in self.words.iter().enumerate() {
            word.store(!missing.get(index).copied().unwrap_or(0), Ordering::Release);
        }
    }

    /// The bits of the pages that `chunk` has.
    #[must_use]
    pub fn full(&self, chunk: ChunkIndex) -> u64 {
        match self.pages.0.saturating_sub(chunk.first().0) {
            left if left >= CHUNK_PAGES => u64::MAX,
            left => (1 << left) - 1,
        }
    }

    /// Whether all of `chunk` was sent. A plain load, so that a sweep passes over what is done at memory's speed.
    #[must_use]
    pub fn is_done(&self, chunk: ChunkIndex) -> bool {
        self.left(chunk) == 0
    }

    /// The pages of `chunk` that nobody has sent.
    #[must_use]
    pub fn left(&self, chunk: ChunkIndex) -> u64 {
        let word = usize::try_from(chunk.0).ok().and_then(|index| self.words.get(index));
        word.map_or(0, |word| !word.load(Ordering::Acquire) & self.full(chunk))
    }

    /// Takes those of `wanted` that nobody has sent, and returns them: the caller must send them.
    pub fn claim(&self, chunk: ChunkIndex, wanted: u64) -> u64 {
        let wanted = wanted & self.full(chunk);
        let Some(word) = usize::try_from(chunk.0).ok().and_then(|index| self.words.get(index)) else { return 0 };
        wanted & !word.fetch_or(wanted, Ordering::AcqRel)
    }

    /// Notes that `page` is sent in answer to a request, so that the pusher need not.
    pub fn mark(&self, page: PageIndex) {
        self.claim(ChunkIndex::of(page), 1 << (page.0 % CHUNK_PAGES));
    }

    /// Pages that nobody has sent.
    #[must_use]
    pub fn remaining(&self) -> PageCount {
        let left = (0..).zip(&self.words).map(|(chunk, word)| {
            u64::from((!word.load(Ordering::Relaxed) & self.full(ChunkIndex(chunk))).count_ones())
        });
        PageCount(left.sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_claimed_once() {
        let sent = SentPages::new(PageCount(130));
        sent.mark(PageIndex(65));
        assert_eq!(sent.claim(ChunkIndex(1), u64::MAX), !0b10);
        assert_eq!(sent.claim(ChunkIndex(1), u64::MAX), 0);
        assert_eq!(sent.remaining(), PageCount(66));
    }

    #[test]
    fn what_the_destination_has_is_not_sent_again() {
        let sent = SentPages::new(PageCount(130));
        sent.leave_only(&[0b110, 0, u64::MAX]);
        assert_eq!(sent.remaining(), PageCount(4));
        assert_eq!(sent.claim(ChunkIndex(0), u64::MAX), 0b110);
        assert_eq!(sent.claim(ChunkIndex(1), u64::MAX), 0);
        assert_eq!(sent.claim(ChunkIndex(2), u64::MAX), 0b11);
        assert_eq!(sent.remaining(), PageCount(0));
    }

    #[test]
    fn a_short_chunk_ends_with_ram() {
        let sent = SentPages::new(PageCount(130));
        assert_eq!(sent.full(ChunkIndex(2)), 0b11);
        assert_eq!(sent.full(ChunkIndex(3)), 0);
        assert_eq!(sent.claim(ChunkIndex(2), u64::MAX), 0b11);
        assert_eq!(sent.claim(ChunkIndex(9), u64::MAX), 0);
    }
}

#[cfg(test)]
#[cfg(feature = "loom")]
mod models;
