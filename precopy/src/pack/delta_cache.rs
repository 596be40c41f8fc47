//! The versions of pages that the destination holds, as far as they were kept.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use switchover_pager::runs;
use switchover_wire::encoding::Page;
use switchover_wire::frame::bulk::CHUNK_PAGES;
use switchover_wire::types::{PAGE_SIZE_U64, PageIndex};

/// Locks, so that lanes seldom wait for each other.
const SHARDS: u64 = 64;

/// Chunks looked at to make room for another. Bounded, because a lane waits for it.
const LOOKED_AT: usize = 4;

/// Rounds after which a chunk may make room for others. One that was sent in the round before stays: when the guest
/// writes more in a round than there is room for, a part that is kept is worth more than a whole that is always replaced.
const STALE: u32 = 2;

/// Pages of a chunk: one for each bit of a mask.
pub(super) const PLACES: usize = u64::BITS as usize;

/// The pages of a chunk, by their place in it.
pub(super) type Pages = [Option<Box<Page>>; PLACES];

/// A bounded number of pages, by chunk.
#[derive(Debug)]
pub(super) struct DeltaCache {
    shards: Vec<Mutex<Shard>>,
    /// Pages that there is still room for.
    room: AtomicU64,
    most: u64,
}

#[derive(Debug, Default)]
struct Shard {
    chunks: BTreeMap<u64, Kept>,
    /// The chunk that was last looked at to make room.
    hand: u64,
}

#[derive(Debug)]
struct Kept {
    /// The round in which it was last packed.
    round: u32,
    pages: Box<Pages>,
}

/// Pages taken out of the cache, with their room: whoever packs them owns them, since nobody else may send them.
#[derive(Debug)]
pub(super) struct Taken {
    pub pages: Box<Pages>,
    room: u64,
}

impl DeltaCache {
    pub fn new(bytes: u64) -> Self {
        let most = bytes / PAGE_SIZE_U64;
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, room: AtomicU64::new(most), most }
    }

    fn shard(&self, chunk: u64) -> MutexGuard<'_, Shard> {
        // The remainder is below SHARDS.
        let index = usize::try_from(chunk % SHARDS).unwrap_or(0);
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_empty(&self) -> bool {
        self.room.load(Ordering::Relaxed) == self.most
    }

    /// Takes the versions of the pages of `data` out, and forgets those of `zero`. `None` where there are none and there
    /// is no room for new ones.
    pub fn take(&self, first: PageIndex, data: u64, zero: u64, round: u32) -> Option<Taken> {
        self.forget(first, zero);
        let chunk = first.0 / CHUNK_PAGES;
        let mut taken = Taken { pages: Box::new([const { None }; PLACES]), room: 0 };
        let mut shard = self.shard(chunk);
        if let Some(kept) = shard.chunks.get_mut(&chunk) {
            for bit in bits(data) {
                taken.pages[bit] = kept.pages[bit].take();
                taken.room += u64::from(taken.pages[bit].is_some());
            }
        }
        let wanted = u64::from(data.count_ones()) - taken.room;
        if wanted > self.room.load(Ordering::Relaxed) {
            let freed = shard.make_room(round);
            self.room.fetch_add(freed, Ordering::Relaxed);
        }
        (taken.room > 0 || self.room.load(Ordering::Relaxed) > 0).then_some(taken)
    }

    /// Keeps what was sent, as far as there is room.
    pub fn put(&self, first: PageIndex, round: u32, mut taken: Taken) {
        let chunk = first.0 / CHUNK_PAGES;
        let mut shard = self.shard(chunk);
        let none = || Kept { round, pages: Box::new([const { None }; PLACES]) };
        let kept = shard.chunks.entry(chunk).or_insert_with(none);
        kept.round = round;
        for (place, page) in kept.pages.iter_mut().zip(taken.pages.iter_mut()) {
            if let Some(page) = page.take()
                && (taken.room > 0 || self.reserve())
            {
                taken.room = taken.room.saturating_sub(1);
                // Nobody else should have put anything here, as the page was in this lane's hands.
                let other = place.replace(page);
                taken.room += u64::from(other.is_some());
            }
        }
        if kept.pages.iter().all(Option::is_none) {
            shard.chunks.remove(&chunk);
        }
        self.room.fetch_add(taken.room, Ordering::Relaxed);
    }

    /// Shows the version of `page`, where it is kept and nobody has taken it out.
    pub fn look<R>(&self, page: PageIndex, look: impl FnOnce(&Page) -> R) -> Option<R> {
        if self.is_empty() {
            return None;
        }
        let chunk = page.0 / CHUNK_PAGES;
        let place = usize::try_from(page.0 % CHUNK_PAGES).ok()?;
        let shard = self.shard(chunk);
        shard.chunks.get(&chunk)?.pages.get(place)?.as_deref().map(look)
    }

    /// Pages that are kept, or taken out to be packed.
    pub fn len(&self) -> u64 {
        self.most - self.room.load(Ordering::Relaxed).min(self.most)
    }

    /// Drops everything, for good: there is no room afterwards.
    pub fn clear(&self) {
        self.room.store(0, Ordering::Relaxed);
        for shard in &self.shards {
            shard.lock().unwrap_or_else(PoisonError::into_inner).chunks.clear();
        }
    }

    /// Drops what was taken.
    pub fn give_up(&self, taken: &Taken) {
        self.room.fetch_add(taken.room, Ordering::Relaxed);
    }

    /// The destination holds something else by now.
    pub fn forget(&self, first: PageIndex, pages: u64) {
        if pages == 0 || self.is_empty() {
            return;
        }
        let chunk = first.0 / CHUNK_PAGES;
        let mut shard = self.shard(chunk);
        if let Some(kept) = shard.chunks.get_mut(&chunk) {
            let dropped = bits(pages).filter(|&bit| kept.pages[bit].take().is_some()).count();
            self.room.fetch_add(dropped as u64, Ordering::Relaxed);
            if kept.pages.iter().all(Option::is_none) {
                shard.chunks.remove(&chunk);
            }
        }
    }

    fn reserve(&self) -> bool {
        let less = |room: u64| room.checked_sub(1);
        self.room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    #[cfg(test)]
    pub fn held(&self) -> u64 {
        let pages = |kept: &Kept| kept.pages.iter().flatten().count() as u64;
        let held = self.shards.iter().map(|shard| shard.lock().unwrap().chunks.values().map(pages).sum::<u64>()).sum();
        assert_eq!(held + self.room.load(Ordering::Relaxed), self.most, "room is lost or made up");
        held
    }
}

impl Shard {
    /// Drops a stale chunk if it finds one, and says how many pages it had.
    fn make_room(&mut self, round: u32) -> u64 {
        for _ in 0..LOOKED_AT {
            let next = self.chunks.range((Excluded(self.hand), Unbounded)).next().or_else(|| self.chunks.iter().next());
            let Some((&chunk, kept)) = next else { return 0 };
            self.hand = chunk;
            if kept.round.saturating_add(STALE) <= round {
                let pages = kept.pages.iter().flatten().count();
                self.chunks.remove(&chunk);
                return pages as u64;
            }
        }
        0
    }
}

/// The places of a mask's bits, as indices.
pub(super) fn bits(mask: u64) -> impl Iterator<Item = usize> {
    runs::bits(mask).map(|bit| bit as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(cache: &DeltaCache, chunk: u64, data: u64, round: u32) -> bool {
        let first = PageIndex(chunk * CHUNK_PAGES);
        let Some(mut taken) = cache.take(first, data, 0, round) else { return false };
        bits(data).for_each(|bit| taken.pages[bit] = Some(Box::new([1; size_of::<Page>()])));
        cache.put(first, round, taken);
        true
    }

    #[test]
    fn it_holds_no_more_than_it_may_and_keeps_what_is_in_use() {
        let cache = DeltaCache::new(100 * 4096 + 4095);
        assert!(put(&cache, 0, u64::MAX, 2) && put(&cache, 64, u64::MAX, 2));
        assert_eq!(cache.held(), 100);
        assert!(!put(&cache, 128, 1, 3), "what was sent a round ago stays");
        assert!(put(&cache, 64, u64::MAX, 3), "what is held can be replaced");
        assert_eq!(cache.held(), 100);
        assert!(put(&cache, 128, 1, 4), "chunk 0 is stale now");
        assert_eq!(cache.held(), 37);
    }

    #[test]
    fn what_is_forgotten_makes_room() {
        let cache = DeltaCache::new(64 * 4096);
        assert!(put(&cache, 5, u64::MAX, 2));
        assert_eq!(cache.look(PageIndex(321), |page| page[7]), Some(1));
        assert_eq!(cache.look(PageIndex(319), |page| page[7]), None);
        cache.forget(PageIndex(320), 0xFF);
        assert_eq!(cache.held(), 56);
        let taken = cache.take(PageIndex(320), 0xFFFF, 0xF << 20, 3).unwrap();
        assert_eq!(taken.pages.iter().flatten().count(), 8);
        cache.give_up(&taken);
        assert_eq!(cache.held(), 44);
        cache.forget(PageIndex(320), u64::MAX);
        assert!(cache.held() == 0 && cache.is_empty());
        assert!(DeltaCache::new(4095).take(PageIndex(0), 1, 0, 2).is_none());
    }
}
