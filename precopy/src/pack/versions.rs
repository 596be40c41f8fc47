//! What all lanes of a migration know of the versions that the destination holds.

use std::sync::Arc;

use switchover_wire::encoding::{Page, PageEncoder};
use switchover_wire::types::{PAGE_SIZE, PageIndex};

use super::PackSettings;
use super::delta_cache::DeltaCache;
use super::same::SameIndex;

/// What all lanes of a migration know of the versions that the destination holds.
///
/// It is right as long as every frame that was packed is sent, and a page is sent again only after its last frame was
/// acknowledged, and not while it is pinned. After the loss of a lane it cannot be: begin with a new one.
#[derive(Debug)]
pub struct SentVersions {
    pub(super) kept: DeltaCache,
    pub(super) same: SameIndex,
}

impl SentVersions {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(settings: PackSettings) -> Arc<Self> {
        Arc::new(Self { kept: DeltaCache::new(settings.delta_cache_bytes), same: SameIndex::new() })
    }

    /// Pages that a difference could be sent to.
    #[must_use]
    pub fn kept_pages(&self) -> u64 {
        self.kept.len()
    }

    /// The bytes that `page` would take as a difference to its kept version, being `now`: a whole page where a difference would
    /// be no shorter, and `None` where no version is kept. `body` is room to encode into.
    pub(crate) fn difference(
        &self,
        page: PageIndex,
        now: &Page,
        encoder: &mut PageEncoder,
        body: &mut Vec<u8>,
    ) -> Option<usize> {
        self.kept.look(page, |old| {
            body.clear();
            if encoder.delta(old, now, PAGE_SIZE, body) { body.len() } else { PAGE_SIZE }
        })
    }

    /// Forgets all that is known, and gives its memory back. Nothing may be packed afterwards.
    pub fn clear(&self) {
        self.kept.clear();
    }

    /// The destination has processed the frame with these pages, those that came as they are included: they may be
    /// referred to, and what that frame referred to (`pinned`) may be sent anew. To be called before any lane may send
    /// them again.
    pub fn acknowledged(&self, first: PageIndex, data: u64, pinned: &[PageIndex]) {
        self.same.acknowledged(first, data);
        self.same.unpin(pinned);
    }

    /// Whether `page` is referred to by a frame that is under way, so that it must not be sent anew yet. It may become
    /// so at once after the answer; [`withdraw`](Self::withdraw) gives one that lasts.
    #[must_use]
    pub fn is_pinned(&self, page: PageIndex) -> bool {
        self.same.is_pinned(page)
    }

    /// Asks for pages of a chunk (bit i: page `first + i`) to be sent anew, zero or not. Returns those that a frame under
    /// way refers to: they must wait. No frame will refer to the others until they are sent and acknowledged.
    #[must_use]
    pub fn withdraw(&self, first: PageIndex, pages: u64) -> u64 {
        self.same.withdraw(first, pages)
    }
}
