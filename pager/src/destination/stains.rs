//! Which pages' memory holds bytes of a version that came before the handoff, whether or not that version counts.
//!
//! A page that is zero after all must have them wiped out first: memory that was never written needs no wiping, and has
//! perhaps not even been allocated.

use switchover_wire::types::{PageCount, PageIndex};

use crate::sync::{AtomicU64, Ordering};
use crate::words::bits_for;

/// One bit a page.
#[derive(Debug)]
pub struct Stains(Box<[AtomicU64]>);

impl Stains {
    /// Memory that nobody has written.
    pub fn new(pages: PageCount) -> Self {
        Self(bits_for(pages.0))
    }

    /// Something may be written into `page`.
    pub fn add(&self, page: PageIndex) {
        if let Some(word) = self.word(page) {
            word.fetch_or(1 << (page.0 % 64), Ordering::AcqRel);
        }
    }

    /// Whether something may have been.
    pub fn has(&self, page: PageIndex) -> bool {
        self.word(page).is_none_or(|word| word.load(Ordering::Acquire) >> (page.0 % 64) & 1 == 1)
    }

    fn word(&self, page: PageIndex) -> Option<&AtomicU64> {
        usize::try_from(page.0 / 64).ok().and_then(|index| self.0.get(index))
    }
}
