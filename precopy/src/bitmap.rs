//! One bit a page, walked a word at a time: page `i` is bit `i % 64` of word `i / 64`, as in KVM's dirty log.

mod atomic;

use switchover_wire::types::{PageCount, PageIndex};

pub use self::atomic::AtomicPageBitmap;

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

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The set as words. Bits past the end of RAM are 0.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The word at `index`; 0 past the end.
    #[must_use]
    pub fn word(&self, index: usize) -> u64 {
        self.words.get(index).copied().unwrap_or(0)
    }

    /// Adds those pages of the word at `index` that `bits` says, if RAM has them.
    pub fn insert_word(&mut self, index: usize, bits: u64) {
        if let Some(word) = self.words.get_mut(index) {
            *word |= bits & bits_of(self.pages, index);
        }
    }

    /// Takes the pages of the word at `index` out, and returns them.
    pub fn take_word(&mut self, index: usize) -> u64 {
        self.words.get_mut(index).map_or(0, std::mem::take)
    }

    /// Adds all pages of another set over the same RAM.
    pub fn unite(&mut self, other: &Self) {
        self.combine(other, |own, theirs| own | theirs);
    }

    /// Takes all pages of another set over the same RAM out.
    pub fn subtract(&mut self, other: &Self) {
        self.combine(other, |own, theirs| own & !theirs);
    }

    /// Leaves only the pages that another set over the same RAM has too.
    pub fn intersect(&mut self, other: &Self) {
        self.combine(other, |own, theirs| own & theirs);
    }

    /// How many pages this set and another over the same RAM have in common.
    #[must_use]
    pub fn intersect_count(&self, other: &Self) -> PageCount {
        debug_assert_eq!(self.pages, other.pages);
        let both = self.words.iter().zip(&other.words).map(|(own, theirs)| u64::from((own & theirs).count_ones()));
        PageCount(both.sum())
    }

    /// The words that are not 0, with their indices, in ascending order.
    pub fn nonzero_words(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.words.iter().copied().enumerate().filter(|(_, word)| *word != 0)
    }

    /// The longest runs of pages in the set, in ascending order: the first page of each, and how many.
    pub fn runs(&self) -> impl Iterator<Item = (PageIndex, PageCount)> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let first = self.next_from(from, 0)?;
            from = self.next_from(first, u64::MAX).unwrap_or(self.pages.0);
            Some((PageIndex(first), PageCount(from - first)))
        })
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

    /// The first page from `from` on that is in the set, with `flip` 0, or that is not, with `flip` all ones.
    fn next_from(&self, from: u64, flip: u64) -> Option<u64> {
        let start = usize::try_from(from / 64).ok()?;
        let mut seen = u64::MAX << (from % 64);
        for (word, first) in self.words.get(start..)?.iter().zip((from - from % 64..).step_by(64)) {
            let bits = (word ^ flip) & seen;
            if bits != 0 {
                return Some(first + u64::from(bits.trailing_zeros()));
            }
            seen = u64::MAX;
        }
        None
    }

    fn combine(&mut self, other: &Self, operation: impl Fn(u64, u64) -> u64) {
        debug_assert_eq!(self.pages, other.pages);
        for (own, theirs) in self.words.iter_mut().zip(&other.words) {
            *own = operation(*own, *theirs);
        }
        // Should the other set be of a larger RAM.
        self.trim();
    }

    fn trim(&mut self) {
        let pages = self.pages;
        if let Some((index, last)) = self.words.iter_mut().enumerate().next_back() {
            *last &= bits_of(pages, index);
        }
    }
}

/// The bits of the word at `index` that stand for pages of a RAM of this size.
fn bits_of(pages: PageCount, index: usize) -> u64 {
    match pages.0.saturating_sub(64 * index as u64) {
        left @ 0..64 => (1 << left) - 1,
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests;
