//! Which pages of the destination have which content, and which of them a frame under way refers to.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use switchover_wire::frame::bulk::CHUNK_PAGES;
use switchover_wire::types::PageIndex;

use super::delta_cache::{PLACES, bits};

/// Locks on either side of the index, so that lanes seldom wait for each other.
const SHARDS: u64 = 64;

/// Pages noted at most: 1 GiB of the guest, for some 25 MiB of ours.
const MOST_NOTED: u64 = 1 << 18;

/// The first half of a content's hash. It suffices to find: the destination compares the whole.
type Key = [u8; 16];

/// Contents that the destination holds, and pins on their pages.
#[derive(Debug)]
pub(super) struct SameIndex {
    chunks: Vec<Mutex<Shard>>,
    /// The page that has a content. A chunk's lock is taken before one of these, never while one is held.
    contents: Vec<Mutex<HashMap<Key, PageIndex>>>,
    noted: AtomicU64,
    pins: AtomicU64,
}

#[derive(Debug, Default)]
struct Shard {
    notes: HashMap<u64, Box<Notes>>,
    /// How many frames under way refer to a page.
    pins: HashMap<PageIndex, u32>,
}

/// What is known of a chunk's pages.
#[derive(Debug)]
struct Notes {
    /// Sent, and not yet acknowledged.
    under_way: u64,
    /// The destination holds them, and they can be found by their content.
    held: u64,
    keys: [Key; PLACES],
}

impl SameIndex {
    pub fn new() -> Self {
        Self {
            chunks: (0..SHARDS).map(|_| Mutex::default()).collect(),
            contents: (0..SHARDS).map(|_| Mutex::default()).collect(),
            noted: AtomicU64::new(0),
            pins: AtomicU64::new(0),
        }
    }

    fn chunk(&self, chunk: u64) -> MutexGuard<'_, Shard> {
        // The remainder is below SHARDS.
        let index = usize::try_from(chunk % SHARDS).unwrap_or(0);
        self.chunks[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn contents(&self, key: &Key) -> MutexGuard<'_, HashMap<Key, PageIndex>> {
        let index = usize::try_from(u64::from(key[0]) % SHARDS).unwrap_or(0);
        self.contents[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages of a chunk are about to be sent with these contents; none of them is known any more.
    pub fn note(&self, first: PageIndex, contents: &[(usize, blake3::Hash)]) {
        if contents.is_empty() || self.noted.load(Ordering::Relaxed) >= MOST_NOTED {
            return;
        }
        let chunk = first.0 / CHUNK_PAGES;
        let mut shard = self.chunk(chunk);
        let none = || Box::new(Notes { under_way: 0, held: 0, keys: [[0; 16]; PLACES] });
        let notes = shard.notes.entry(chunk).or_insert_with(none);
        let before = notes.under_way | notes.held;
        for (bit, hash) in contents {
            notes.keys[*bit] = key(hash);
            notes.under_way |= 1 << bit;
        }
        let new = notes.under_way & !before;
        self.noted.fetch_add(u64::from(new.count_ones()), Ordering::Release);
    }

    /// The destination holds these pages as they were last sent.
    pub fn acknowledged(&self, first: PageIndex, pages: u64) {
        if self.noted.load(Ordering::Acquire) == 0 {
            return;
        }
        let chunk = first.0 / CHUNK_PAGES;
        let mut shard = self.chunk(chunk);
        let Some(notes) = shard.notes.get_mut(&chunk) else { return };
        let arrived = notes.under_way & pages;
        notes.under_way &= !arrived;
        let mut known_twice = 0;
        for bit in bits(arrived) {
            let key = notes.keys[bit];
            let page = PageIndex(chunk * CHUNK_PAGES + bit as u64);
            if *self.contents(&key).entry(key).or_insert(page) == page {
                notes.held |= 1 << bit;
            } else {
                known_twice += 1;
            }
        }
        self.noted.fetch_sub(known_twice, Ordering::Release);
        if notes.under_way | notes.held == 0 {
            shard.notes.remove(&chunk);
        }
    }

    /// A page that the destination holds with this content. It is pinned: it must not be sent anew until
    /// [`unpin`](Self::unpin).
    pub fn find(&self, hash: &blake3::Hash) -> Option<PageIndex> {
        let key = key(hash);
        let page = *self.contents(&key).get(&key)?;
        let chunk = page.0 / CHUNK_PAGES;
        let mut shard = self.chunk(chunk);
        // It may have been withdrawn since.
        let notes = shard.notes.get(&chunk)?;
        let bit = page.0 % CHUNK_PAGES;
        if notes.held >> bit & 1 == 0 || notes.keys[usize::try_from(bit).ok()?] != key {
            return None;
        }
        *shard.pins.entry(page).or_default() += 1;
        self.pins.fetch_add(1, Ordering::Release);
        Some(page)
    }

    /// A frame that refers to these pages has been processed.
    pub fn unpin(&self, pages: &[PageIndex]) {
        for &page in pages {
            let mut shard = self.chunk(page.0 / CHUNK_PAGES);
            if let Some(count) = shard.pins.get_mut(&page) {
                *count -= 1;
                if *count == 0 {
                    shard.pins.remove(&page);
                }
                self.pins.fetch_sub(1, Ordering::Release);
            }
        }
    }

    pub fn is_pinned(&self, page: PageIndex) -> bool {
        self.pins.load(Ordering::Acquire) > 0 && self.chunk(page.0 / CHUNK_PAGES).pins.contains_key(&page)
    }

    /// Which of these pages are pinned. The others cannot be found any more, so they stay as they are.
    pub fn withdraw(&self, first: PageIndex, pages: u64) -> u64 {
        if self.noted.load(Ordering::Acquire) == 0 && self.pins.load(Ordering::Acquire) == 0 {
            return 0;
        }
        let chunk = first.0 / CHUNK_PAGES;
        let mut shard = self.chunk(chunk);
        let mut pinned = 0;
        if !shard.pins.is_empty() {
            let is_pinned = |bit: &usize| shard.pins.contains_key(&PageIndex(chunk * CHUNK_PAGES + *bit as u64));
            pinned = bits(pages).filter(is_pinned).fold(0, |mask, bit| mask | 1 << bit);
        }
        self.forget_in(&mut shard, chunk, pages & !pinned);
        pinned
    }

    /// The destination will hold something else. Unlike with [`withdraw`](Self::withdraw), whether it is pinned or not.
    pub fn forget(&self, first: PageIndex, pages: u64) {
        if self.noted.load(Ordering::Acquire) > 0 {
            let chunk = first.0 / CHUNK_PAGES;
            self.forget_in(&mut self.chunk(chunk), chunk, pages);
        }
    }

    fn forget_in(&self, shard: &mut Shard, chunk: u64, pages: u64) {
        let Some(notes) = shard.notes.get_mut(&chunk) else { return };
        for bit in bits(notes.held & pages) {
            let key = notes.keys[bit];
            self.contents(&key).remove(&key);
        }
        let known = (notes.held | notes.under_way) & pages;
        notes.held &= !known;
        notes.under_way &= !known;
        self.noted.fetch_sub(u64::from(known.count_ones()), Ordering::Release);
        if notes.under_way | notes.held == 0 {
            shard.notes.remove(&chunk);
        }
    }
}

fn key(hash: &blake3::Hash) -> Key {
    let mut key = [0; 16];
    key.copy_from_slice(&hash.as_bytes()[..16]);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(content: u8) -> blake3::Hash {
        blake3::hash(&[content])
    }

    #[test]
    fn only_what_was_acknowledged_is_found() {
        let index = SameIndex::new();
        index.note(PageIndex(64), &[(3, hash(1)), (4, hash(2))]);
        assert_eq!(index.find(&hash(1)), None);
        index.acknowledged(PageIndex(64), 1 << 3);
        assert_eq!(index.find(&hash(1)), Some(PageIndex(67)));
        assert_eq!(index.find(&hash(2)), None);
    }

    #[test]
    fn what_is_sent_anew_is_not_found_any_more() {
        let index = SameIndex::new();
        for again in [SameIndex::forget, |index: &SameIndex, first, pages| assert_eq!(index.withdraw(first, pages), 0)]
        {
            index.note(PageIndex(0), &[(0, hash(1)), (1, hash(2))]);
            index.acknowledged(PageIndex(0), 3);
            again(&index, PageIndex(0), 1);
            assert_eq!(index.find(&hash(1)), None);
            assert_eq!(index.find(&hash(2)), Some(PageIndex(1)));
            index.unpin(&[PageIndex(1)]);
            again(&index, PageIndex(0), 2);
            assert_eq!(index.noted.load(Ordering::Relaxed), 0);
            assert!(index.contents.iter().all(|contents| contents.lock().unwrap().is_empty()));
        }
    }

    #[test]
    fn a_pinned_page_is_not_withdrawn() {
        let index = SameIndex::new();
        index.note(PageIndex(0), &[(0, hash(1)), (1, hash(2))]);
        index.acknowledged(PageIndex(0), u64::MAX);
        assert!(!index.is_pinned(PageIndex(0)));
        assert_eq!((index.find(&hash(1)), index.find(&hash(1))), (Some(PageIndex(0)), Some(PageIndex(0))));
        assert!(index.is_pinned(PageIndex(0)) && !index.is_pinned(PageIndex(1)));
        assert_eq!(index.withdraw(PageIndex(0), u64::MAX), 1);
        assert_eq!(index.find(&hash(2)), None, "the other is withdrawn");
        index.unpin(&[PageIndex(0)]);
        assert_eq!(index.withdraw(PageIndex(0), u64::MAX), 1, "two frames referred to it");
        index.unpin(&[PageIndex(0)]);
        assert_eq!(index.withdraw(PageIndex(0), u64::MAX), 0);
        assert!(!index.is_pinned(PageIndex(0)));
        assert_eq!(index.noted.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn of_two_pages_with_a_content_the_first_is_found() {
        let index = SameIndex::new();
        index.note(PageIndex(0), &[(0, hash(1)), (1, hash(1))]);
        index.acknowledged(PageIndex(0), 3);
        assert_eq!(index.noted.load(Ordering::Relaxed), 1);
        index.forget(PageIndex(0), 2);
        assert_eq!(index.find(&hash(1)), Some(PageIndex(0)));
    }
}
