//! What this process itself writes to guest memory, one bit a page.

use std::sync::Arc;

use switchover_precopy::bitmap::{AtomicPageBitmap, PageBitmap};
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

/// A bit for each page of RAM. Its writers and its reader need no lock.
///
/// A writer sets the bit *after* it has written, always with a read-modify-write: the reader either finds the bit, or has
/// cleared it before and the bit stays for the next time. To look first whether the bit is set, and leave it so, would
/// lose writes: the reader could clear it in between and read the page before the write can be seen.
#[derive(Default, Debug)]
pub struct Book {
    noted: AtomicPageBitmap,
}

impl Book {
    /// With no page noted.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        Self { noted: AtomicPageBitmap::new(pages) }
    }

    /// Notes every page.
    pub fn note_all(&self) {
        self.noted.unite(&PageBitmap::full(self.noted.pages()));
    }

    /// Notes a page.
    pub fn note(&self, page: PageIndex) {
        self.noted.insert(page);
    }

    /// The noted pages.
    #[must_use]
    pub fn noted(&self) -> PageBitmap {
        self.noted.snapshot()
    }

    /// Takes the pages with a bit in `words` out; the first bit is page `first`, a multiple of 64.
    pub fn clear(&self, first: PageIndex, words: &[u64]) {
        self.noted.remove_words(first, words);
    }

    fn holds(&self, page: usize) -> bool {
        self.noted.contains(PageIndex(page as u64))
    }
}

/// The book as a piece of guest memory sees it, from a byte of RAM on.
#[derive(Clone, Default, Debug)]
pub struct BookFrom {
    book: Arc<Book>,
    /// In bytes, from the start of RAM.
    start: usize,
}

impl BookFrom {
    /// From the byte `start` of RAM on.
    #[must_use]
    pub fn new(book: Arc<Book>, start: usize) -> Self {
        Self { book, start }
    }
}

impl WithBitmapSlice<'_> for BookFrom {
    type S = Self;
}

impl BitmapSlice for BookFrom {}

impl Bitmap for BookFrom {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let first = self.start.saturating_add(offset);
        let Some(last) = len.checked_sub(1).map(|rest| first.saturating_add(rest)) else { return };
        for page in first / PAGE_SIZE..=last / PAGE_SIZE {
            self.book.note(PageIndex(page as u64));
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.book.holds(self.start.saturating_add(offset) / PAGE_SIZE)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { book: Arc::clone(&self.book), start: self.start.saturating_add(offset) }
    }
}

impl NewBitmap for BookFrom {
    fn with_len(len: usize) -> Self {
        Self::new(Arc::new(Book::new(PageCount(len.div_ceil(PAGE_SIZE) as u64))), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(book: &Book) -> Vec<u64> {
        book.noted().words().to_vec()
    }

    #[test]
    fn a_write_notes_every_page_that_it_touches() {
        let book = Arc::new(Book::new(PageCount(130)));
        let region = BookFrom::new(Arc::clone(&book), 64 * PAGE_SIZE);
        region.mark_dirty(PAGE_SIZE - 1, 2);
        region.slice_at(4 * PAGE_SIZE).mark_dirty(PAGE_SIZE, 1);
        region.mark_dirty(7 * PAGE_SIZE, 0);
        assert_eq!(noted(&book), [0, 0b10_0011, 0]);
        assert!(region.dirty_at(0) && region.dirty_at(2 * PAGE_SIZE - 1) && !region.dirty_at(2 * PAGE_SIZE));
        region.mark_dirty(usize::MAX - 5, 3);
        assert_eq!(noted(&book), [0, 0b10_0011, 0], "past the end");
    }

    #[test]
    fn only_what_is_named_is_cleared() {
        let book = Book::new(PageCount(192));
        book.note_all();
        book.clear(PageIndex(64), &[0xff00, 1, u64::MAX]);
        assert_eq!(noted(&book), [u64::MAX, !0xff00, !1]);
    }
}
