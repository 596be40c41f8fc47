//! A set of pages that several threads add to and take from at once.

use switchover_wire::types::{PageCount, PageIndex};

use super::{PageBitmap, bits_of};
use crate::sync::{AtomicU64, Ordering};

/// A set of pages shared by threads: the list of what is still to be done to which pages.
///
/// Each word changes in one step, so that a page put in once is taken out once, whoever asks. Whoever takes a page sees
/// everything that was done before it was put in.
#[derive(Debug, Default)]
pub struct AtomicPageBitmap {
    words: Box<[AtomicU64]>,
    pages: PageCount,
}

impl AtomicPageBitmap {
    /// The empty set.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        Self::from(&PageBitmap::new(pages))
    }

    /// The size of the RAM, not of the set.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// How many words the set has: a word has 64 pages, the last one fewer perhaps.
    #[must_use]
    pub fn len_words(&self) -> usize {
        self.words.len()
    }

    /// Adds those pages of the word at `index` that `bits` says, if RAM has them. Returns which of them are new to the
    /// set.
    pub fn insert_word(&self, index: usize, bits: u64) -> u64 {
        let bits = bits & bits_of(self.pages, index);
        self.words.get(index).map_or(0, |word| bits & !word.fetch_or(bits, Ordering::AcqRel))
    }

    /// Takes those pages of the word at `index` out that `bits` says. Returns which of them were in the set.
    pub fn remove_word(&self, index: usize, bits: u64) -> u64 {
        self.words.get(index).map_or(0, |word| bits & word.fetch_and(!bits, Ordering::AcqRel))
    }

    /// Adds a page, if RAM has it; says whether it is new to the set. Always in one step that also writes, so that whoever takes
    /// the page sees what was done before, even where it was in the set already.
    pub fn insert(&self, page: PageIndex) -> bool {
        usize::try_from(page.0 / 64).is_ok_and(|index| self.insert_word(index, 1 << (page.0 % 64)) != 0)
    }

    /// Takes the pages with a bit in `words` out; the first bit is page `first`, a multiple of 64.
    pub fn remove_words(&self, first: PageIndex, words: &[u64]) {
        let Ok(start) = usize::try_from(first.0 / 64) else { return };
        for (index, bits) in (start..).zip(words).filter(|(_, bits)| **bits != 0) {
            self.remove_word(index, *bits);
        }
    }

    /// Takes all pages of the word at `index` out, and returns them.
    pub fn take(&self, index: usize) -> u64 {
        // A look costs other threads nothing; a swap takes the cache line from them.
        self.words.get(index).map_or(0, |word| match word.load(Ordering::Relaxed) {
            0 => 0,
            _ => word.swap(0, Ordering::AcqRel),
        })
    }

    /// The pages of the word at `index`.
    #[must_use]
    pub fn word(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Whether a page is in the set.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        usize::try_from(page.0 / 64).is_ok_and(|index| self.word(index) >> (page.0 % 64) & 1 == 1)
    }

    /// Adds all pages of a set over the same RAM.
    pub fn unite(&self, other: &PageBitmap) {
        debug_assert_eq!(self.pages, other.pages());
        for (index, bits) in other.nonzero_words() {
            self.insert_word(index, bits);
        }
    }

    /// How many pages are in the set. Exact only while no thread changes it, as [`snapshot`](Self::snapshot) is.
    #[must_use]
    pub fn count(&self) -> PageCount {
        PageCount(self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum())
    }

    /// The set as it is. Each word is read in one step, but one after the other: where threads move pages meanwhile, a
    /// page may be seen twice or not at all.
    #[must_use]
    pub fn snapshot(&self) -> PageBitmap {
        let words = self.words.iter().map(|word| word.load(Ordering::Acquire)).collect();
        PageBitmap { words, pages: self.pages }
    }
}

impl From<&PageBitmap> for AtomicPageBitmap {
    fn from(set: &PageBitmap) -> Self {
        Self { words: set.words.iter().copied().map(AtomicU64::new).collect(), pages: set.pages }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Insert(usize, u64),
        Remove(usize, u64),
        Take(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..7_usize, any::<u64>()).prop_map(|(index, bits)| Step::Insert(index, bits)),
            (0..7_usize, any::<u64>()).prop_map(|(index, bits)| Step::Remove(index, bits)),
            (0..7_usize).prop_map(Step::Take),
        ]
    }

    /// The pages that `bits` of the word at `index` stand for.
    fn named(index: usize, bits: u64) -> impl Iterator<Item = u64> {
        (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| index as u64 * 64 + bit)
    }

    proptest! {
        #[test]
        fn it_is_the_set_that_a_tree_would_be(pages in 1_u64..400, steps in prop::collection::vec(step(), 0..60)) {
            let (set, mut tree) = (AtomicPageBitmap::new(PageCount(pages)), BTreeSet::new());
            for step in steps {
                let (index, changed, expected): (_, _, Vec<u64>) = match step {
                    Step::Insert(index, bits) => {
                        let new = named(index, bits).filter(|page| *page < pages && tree.insert(*page));
                        (index, set.insert_word(index, bits), new.collect())
                    }
                    Step::Remove(index, bits) => {
                        let gone = named(index, bits).filter(|page| tree.remove(page));
                        (index, set.remove_word(index, bits), gone.collect())
                    }
                    Step::Take(index) => {
                        let gone = named(index, u64::MAX).filter(|page| tree.remove(page));
                        (index, set.take(index), gone.collect())
                    }
                };
                prop_assert!(named(index, changed).eq(expected));
            }
            prop_assert!(set.snapshot().iter().map(|page| page.0).eq(tree.iter().copied()));
            prop_assert!((0..500).all(|page| set.contains(PageIndex(page)) == tree.contains(&page)));
            prop_assert_eq!(set.count().0, tree.len() as u64);
        }
    }

    #[test]
    fn pages_go_in_one_by_one_and_out_by_words() {
        let set = AtomicPageBitmap::new(PageCount(130));
        assert!(set.insert(PageIndex(64)) && set.insert(PageIndex(129)) && set.insert(PageIndex(3)));
        assert!(!set.insert(PageIndex(64)) && !set.insert(PageIndex(130)) && !set.insert(PageIndex(u64::MAX)));
        set.remove_words(PageIndex(64), &[1, 0b101, u64::MAX]);
        assert_eq!(set.snapshot().words(), [0b1000, 0, 0b10]);
        set.remove_words(PageIndex(64), &[0, u64::MAX, 1]);
        assert_eq!(set.count(), PageCount(1));
    }

    #[test]
    fn a_set_is_taken_over_whole_and_added_whole() {
        let all = PageBitmap::full(PageCount(130));
        assert_eq!(AtomicPageBitmap::from(&all).snapshot(), all);
        let set = AtomicPageBitmap::new(PageCount(130));
        set.unite(&all);
        assert_eq!((set.snapshot(), set.len_words(), set.pages()), (all, 3, PageCount(130)));
    }

    #[test]
    fn threads_that_take_at_once_get_each_page_once() {
        let pages = PageCount(64 * 2000);
        let set = AtomicPageBitmap::from(&PageBitmap::full(pages));
        let take = || (0..set.len_words()).map(|index| u64::from(set.take(index).count_ones())).sum::<u64>();
        let taken: u64 = thread::scope(|scope| {
            let threads = [scope.spawn(take), scope.spawn(take), scope.spawn(take)];
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!((taken, set.count()), (pages.0, PageCount(0)));
    }
}

#[cfg(test)]
#[cfg(feature = "loom")]
mod models;
