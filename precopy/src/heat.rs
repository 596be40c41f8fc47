//! How recently and how often each page was written.

use switchover_wire::types::{PageCount, PageIndex};

use crate::bitmap::PageBitmap;

/// The heat of every page: a compact mark of recency and frequency, made from the rounds' bitmaps.
#[derive(Clone, Debug)]
pub struct Heat {
    marks: Vec<u8>,
}

impl Heat {
    /// All pages cold.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        Self { marks: vec![0; usize::try_from(pages.0).unwrap_or(usize::MAX)] }
    }

    /// A round is over in which these pages were written.
    pub fn note_round(&mut self, written: &PageBitmap) {
        for mark in &mut self.marks {
            *mark >>= 1;
        }
        for page in written.iter() {
            if let Some(mark) = usize::try_from(page.0).ok().and_then(|index| self.marks.get_mut(index)) {
                *mark |= 0x80;
            }
        }
    }

    /// Up to `most` pages of `among`, the hottest first; cold ones are left out.
    #[must_use]
    pub fn hottest(&self, among: &PageBitmap, most: usize) -> Vec<PageIndex> {
        let mark = |page: &PageIndex| usize::try_from(page.0).ok().and_then(|index| self.marks.get(index)).copied();
        let mut pages: Vec<_> = among.iter().filter(|page| mark(page).is_some_and(|mark| mark > 0)).collect();
        pages.sort_by_key(|page| std::cmp::Reverse(mark(page)));
        pages.truncate(most);
        pages
    }
}
