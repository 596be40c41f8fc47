//! One bit a page.

use std::sync::atomic::{AtomicU64, Ordering};

use switchover_wire::types::{PageCount, PageIndex};

/// A set of pages of a RAM of fixed size.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: PageCount,
}

impl PageBitmap {
    /// The empty set.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        let words = usize::try_from(pages.0.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: vec![0; words], pages }
    }

    /// The set of all pages.
    #[must_use]
    pub fn full(pages: PageCount) -> Self {
        let mut all = Self::new(pages);
        all.words.fill(u64::MAX);
        all.trim();
        all
    }

    /// The set that KVM's dirty log describes: bit `i % 64` of word `i / 64` stands for page `i`. Words and bits past
    /// the end of RAM are ignored, missing words are empty.
    #[must_use]
    pub fn from_words(words: &[u64], pages: PageCount) -> Self {
        let mut set = Self::new(pages);
        for (own, given) in set.words.iter_mut().zip(words) {
            *own = *given;
        }
        set.trim();
        set
    }

    /// The size of the RAM, not of the set.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// Its words: bit `i % 64` of word `i / 64` stands for page `i`.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> PageCount {
        PageCount(self.words.iter().map(|word| u64::from(word.count_ones())).sum())
    }

    /// Adds a page, if RAM has it; says whether it is new to the set.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        let Some((word, bit)) = self.place(page) else { return false };
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }

    /// Takes a page out; says whether it was in.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        let Some((word, bit)) = self.place(page) else { return false };
        let was_in = self.words[word] & bit != 0;
        self.words[word] &= !bit;
        was_in
    }

    /// Whether a page is in the set.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        self.place(page).is_some_and(|(word, bit)| self.words[word] & bit != 0)
    }

    /// Adds all pages of another set over the same RAM.
    pub fn unite(&mut self, other: &Self) {
        debug_assert_eq!(self.pages, other.pages);
        for (own, theirs) in self.words.iter_mut().zip(&other.words) {
            *own |= theirs;
        }
        self.trim();
    }

    /// How many pages are in both sets.
    #[must_use]
    pub fn intersect_count(&self, other: &Self) -> PageCount {
        PageCount(self.words.iter().zip(&other.words).map(|(own, theirs)| u64::from((own & theirs).count_ones())).sum())
    }

    /// Takes all pages of another set over the same RAM out.
    pub fn subtract(&mut self, other: &Self) {
        debug_assert_eq!(self.pages, other.pages);
        for (own, theirs) in self.words.iter_mut().zip(&other.words) {
            *own &= !theirs;
        }
    }

    /// The pages of the set in ascending order. Empty words cost one comparison.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.words.iter().zip((0_u64..).step_by(64)).flat_map(|(word, first)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                if rest == 0 {
                    return None;
                }
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                Some(PageIndex(first + u64::from(bit)))
            })
        })
    }

    fn place(&self, page: PageIndex) -> Option<(usize, u64)> {
        if page.0 >= self.pages.0 {
            return None;
        }
        Some((usize::try_from(page.0 / 64).ok()?, 1 << (page.0 % 64)))
    }

    fn trim(&mut self) {
        let used = self.pages.0 % 64;
        if let (Some(last), true) = (self.words.last_mut(), used != 0) {
            *last &= (1 << used) - 1;
        }
    }
}

/// A set of pages that several threads change, a word of 64 at a time.
#[derive(Debug)]
pub struct AtomicPageBitmap {
    words: Box<[AtomicU64]>,
    pages: PageCount,
}

impl AtomicPageBitmap {
    /// The empty set.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        Self { words: (0..pages.0.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), pages }
    }

    /// Adds the pages of `bits` to word `index`; says which pages it had before.
    pub fn fetch_or(&self, index: usize, bits: u64) -> u64 {
        self.words.get(index).map_or(0, |word| word.fetch_or(bits, Ordering::AcqRel))
    }

    /// Leaves only the pages of `bits` in word `index`; says which pages it had before.
    pub fn fetch_and(&self, index: usize, bits: u64) -> u64 {
        self.words.get(index).map_or(0, |word| word.fetch_and(bits, Ordering::AcqRel))
    }

    /// Takes all pages out of word `index`.
    pub fn take(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.swap(0, Ordering::AcqRel))
    }

    /// The set as it is now, each word at its own instant.
    #[must_use]
    pub fn snapshot(&self) -> PageBitmap {
        let words: Vec<u64> = self.words.iter().map(|word| word.load(Ordering::Acquire)).collect();
        PageBitmap::from_words(&words, self.pages)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_the_set_that_a_tree_would_be(pages in 1_u64..300, steps in prop::collection::vec((any::<bool>(), 0_u64..320), 0..400)) {
            let (mut bitmap, mut tree) = (PageBitmap::new(PageCount(pages)), BTreeSet::new());
            for (add, page) in steps {
                if add {
                    prop_assert_eq!(bitmap.insert(PageIndex(page)), page < pages && tree.insert(page));
                } else {
                    prop_assert_eq!(bitmap.remove(PageIndex(page)), tree.remove(&page));
                }
            }
            prop_assert_eq!(bitmap.count().0, tree.len() as u64);
            prop_assert!(bitmap.iter().map(|page| page.0).eq(tree.iter().copied()));
        }

        #[test]
        fn words_from_outside_never_name_pages_past_the_end(pages in 1_u64..300, words in prop::collection::vec(any::<u64>(), 0..8)) {
            let bitmap = PageBitmap::from_words(&words, PageCount(pages));
            prop_assert!(bitmap.iter().all(|page| page.0 < pages));
            let named = |page: u64| words.get(usize::try_from(page / 64).unwrap()).is_some_and(|word| word >> (page % 64) & 1 == 1);
            prop_assert!((0..pages).all(|page| bitmap.contains(PageIndex(page)) == named(page)));
        }
    }

    #[test]
    fn all_pages_are_exactly_all_pages() {
        for pages in [1, 63, 64, 65, 128] {
            assert_eq!(PageBitmap::full(PageCount(pages)).count(), PageCount(pages));
        }
    }

    #[test]
    fn a_union_holds_both() {
        let (mut one, mut two) = (PageBitmap::new(PageCount(100)), PageBitmap::new(PageCount(100)));
        one.insert(PageIndex(3));
        two.insert(PageIndex(99));
        one.unite(&two);
        assert!(one.iter().eq([PageIndex(3), PageIndex(99)]));
    }
}
