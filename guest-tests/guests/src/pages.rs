//! Page contents, and how a visit compares them.
//!
//! A page is 512 words. Word 0 counts the writes. Words 1 to 255 never change: they are a pattern of the page's
//! number and the seed. Of words 256 to 511 each write picks one and marks it with the count, so that a visit that
//! finds the counter of the last write also knows one word, elsewhere in the page, that must be as new: a page that
//! was put together of an old and a new version is noticed, as is one that is old, empty, or another page.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::memory::Memory;
use crate::rng::{below, mix};

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;
const WORDS: usize = PAGE_BYTES / 8;
const COUNTER: usize = 0;
const MARKED: usize = WORDS / 2;

/// A page of the working set. Its words are atomic because they change behind the guest's back where a migration is
/// broken.
#[repr(C, align(4096))]
pub struct Page([AtomicU64; WORDS]);

/// What a corrupt visit found.
#[derive(Clone, Copy, Default)]
pub struct Corruption {
    /// Number of the page in the working set.
    pub page: u64,
    /// The counter in the page, and the one in the table.
    pub counter: [u64; 2],
    /// The compared word.
    pub word: u64,
    /// What it was, and what it should have been.
    pub value: [u64; 2],
}

/// The pages of one vCPU, which alone visits them.
#[derive(Clone, Copy)]
pub struct Part {
    pages: &'static [Page],
    expected: &'static [AtomicU64],
    first: usize,
    seed: u64,
}

/// The pattern of one page.
#[derive(Clone, Copy)]
struct Pattern(u64);

impl Pattern {
    #[inline]
    fn new(page: usize, seed: u64) -> Self {
        Self(mix((page as u64).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ seed))
    }

    /// Word `i` as it is initialised.
    #[inline]
    fn word(self, i: usize) -> u64 {
        self.0.wrapping_add((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// The word that write number `count` marks.
    #[inline]
    fn marked(self, count: u64) -> usize {
        MARKED + below((self.0 ^ count).wrapping_mul(0xff51_afd7_ed55_8ccd), WORDS - MARKED)
    }

    /// What it writes there. Write number 0 is the initialisation.
    #[inline]
    fn mark(self, count: u64) -> u64 {
        self.word(self.marked(count)) ^ count.wrapping_mul(0xa076_1d64_78bd_642f)
    }
}

impl Part {
    /// Share number `cpu` of `cpus`.
    pub fn new(memory: Memory, cpu: usize, cpus: usize, seed: u64) -> Self {
        let total = memory.pages.len();
        let range = total * cpu / cpus..total * (cpu + 1) / cpus;
        Self {
            pages: &memory.pages[range.clone()],
            expected: &memory.expected[range.clone()],
            first: range.start,
            seed,
        }
    }

    /// How many pages there are.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Writes every page for the first time.
    pub fn fill(&self) {
        for (i, (page, expected)) in self.pages.iter().zip(self.expected).enumerate() {
            let pattern = self.pattern(i);
            expected.store(0, Relaxed);
            page.0[COUNTER].store(0, Relaxed);
            for (i, word) in page.0.iter().enumerate().skip(1) {
                word.store(pattern.word(i), Relaxed);
            }
        }
    }

    /// Verifies a page and, for a visit that writes, counts in it. `random` chooses the word that is compared.
    /// A write makes the counter right again, whatever it was.
    ///
    /// # Panics
    /// When there is no such page.
    #[inline]
    pub fn visit(&self, page: usize, write: bool, random: u64) -> Result<(), Corruption> {
        let (words, expected) = (&self.pages[page].0, &self.expected[page]);
        let pattern = self.pattern(page);
        let count = expected.load(Relaxed);
        let steady = steady_word(random);
        let marked = pattern.marked(count);
        let found = [words[COUNTER].load(Relaxed), words[steady].load(Relaxed), words[marked].load(Relaxed)];
        let wanted = [count, pattern.word(steady), pattern.mark(count)];
        if write {
            let count = count.wrapping_add(1);
            words[pattern.marked(count)].store(pattern.mark(count), Relaxed);
            words[COUNTER].store(count, Relaxed);
            expected.store(count, Relaxed);
        }
        if found == wanted { Ok(()) } else { Err(self.corruption(page, [steady, marked], found, wanted)) }
    }

    /// Flips a bit in one of the three words that a visit with the same `random` compares.
    pub fn damage(&self, page: usize, which: u64, random: u64) {
        let count = self.expected[page].load(Relaxed);
        let word = match which % 3 {
            0 => COUNTER,
            1 => steady_word(random),
            _ => self.pattern(page).marked(count),
        };
        self.pages[page].0[word].fetch_xor(1 << (which % 64), Relaxed);
    }

    #[inline]
    fn pattern(&self, page: usize) -> Pattern {
        Pattern::new(self.first + page, self.seed)
    }

    #[cold]
    fn corruption(&self, page: usize, words: [usize; 2], found: [u64; 3], wanted: [u64; 3]) -> Corruption {
        let shown = if found[1] == wanted[1] { 1 } else { 0 };
        Corruption {
            page: (self.first + page) as u64,
            counter: [found[0], wanted[0]],
            word: words[shown] as u64,
            value: [found[shown + 1], wanted[shown + 1]],
        }
    }
}

/// One of words 1 to 255; by bits of `random` that choose neither page nor kind of visit.
#[inline]
fn steady_word(random: u64) -> usize {
    1 + below(random << 40, MARKED - 1)
}
