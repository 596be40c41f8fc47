//! Zero pages: found without reading where the file has no page at all, and by reading where it has.

use std::fs::File;
use std::ops::Range;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};

use crate::ram::cached_pages;
use crate::sync::{AtomicU64, Ordering};
use crate::words::bits_for;

/// Words compared without a branch: a page. Leaving off within a page costs more than reading on, for the processor
/// fetches the lines that follow only while it is read in order (measured: 250 to 350 ns for a page left off in the
/// middle, 165 ns for all of it).
const BLOCK: usize = PAGE_SIZE / size_of::<Word>();

type Word = [u8; 8];

/// Pages behind one that is no hole about which the kernel is asked at once: two bulk frames, some microseconds.
const AHEAD: u64 = 128;

/// Whether all of `page` is zero.
///
/// Few pages begin, end and have their middle with zeros without being zero: those three words are looked at first. A
/// page that passes is read at the speed of memory.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    let (words, tail) = page.as_chunks::<8>();
    let word = |index: usize| words.get(index).map_or(0, |word| u64::from_ne_bytes(*word));
    if word(0) != 0 || (word(words.len() / 2) | word(words.len().saturating_sub(1))) != 0 {
        return false;
    }
    let (blocks, rest) = words.as_chunks::<BLOCK>();
    blocks.iter().all(|block| all_zero(block)) && all_zero(rest) && tail.iter().all(|byte| *byte == 0)
}

/// Without a branch before the end, so that the compiler can use vector registers.
fn all_zero(words: &[Word]) -> bool {
    words.iter().fold(0, |seen, word| seen | u64::from_ne_bytes(*word)) == 0
}

/// Which stretches of a memfd are memory throughout, found out before it matters. What is memory stays so, where nobody punches
/// holes; what is not yet may be at any time.
#[derive(Debug)]
pub struct Survey {
    pages: PageCount,
    /// A bit for each stretch of [`AHEAD`] pages.
    full: Box<[AtomicU64]>,
    /// The first stretch that nobody has looked at.
    next: AtomicU64,
}

impl Survey {
    /// Of a memfd with `pages` pages, about which nothing is known.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        Self { pages, full: bits_for(pages.0.div_ceil(AHEAD)), next: AtomicU64::new(0) }
    }

    /// Looks at the next stretch; several threads may. `false` when there is none, or the kernel cannot tell.
    pub fn go_on(&self, file: &File) -> bool {
        let stretch = self.next.fetch_add(1, Ordering::Relaxed);
        let (first, count) = self.range(stretch);
        if count.0 == 0 {
            return false;
        }
        let cached = cached_pages(file, first, count);
        if cached == Some(count)
            && let Some(word) = self.word(stretch)
        {
            word.fetch_or(1 << (stretch % 64), Ordering::Relaxed);
        }
        cached.is_some()
    }

    /// The pages of the stretch around `page`, if all of them are known to be memory.
    fn full_around(&self, page: PageIndex) -> Option<Range<u64>> {
        let stretch = page.0 / AHEAD;
        let full = self.word(stretch).is_some_and(|word| word.load(Ordering::Relaxed) >> (stretch % 64) & 1 == 1);
        let (first, count) = self.range(stretch);
        full.then(|| first.0..first.0 + count.0)
    }

    fn range(&self, stretch: u64) -> (PageIndex, PageCount) {
        let first = stretch.saturating_mul(AHEAD).min(self.pages.0);
        (PageIndex(first), PageCount(AHEAD.min(self.pages.0 - first)))
    }

    fn word(&self, stretch: u64) -> Option<&AtomicU64> {
        usize::try_from(stretch / 64).ok().and_then(|index| self.full.get(index))
    }
}

/// Knows which pages of a memfd were never touched, asking the kernel as seldom as it can.
///
/// Reading such a page through a mapping would allocate it; this does not.
#[derive(Debug)]
pub struct Holes<'a> {
    file: &'a File,
    pages: PageCount,
    /// The last stretch that the kernel told about, and whether it is a hole.
    known: Range<u64>,
    known_is_hole: bool,
    survey: Option<&'a Survey>,
}

impl<'a> Holes<'a> {
    /// Of a memfd with `pages` pages. What it says of holes is good only while nobody writes them: see
    /// [`forget_holes`](Self::forget_holes).
    #[must_use]
    pub fn new(file: &'a File, pages: PageCount) -> Self {
        Self { file, pages, known: 0..0, known_is_hole: false, survey: None }
    }

    /// Of a memfd of which only pages are asked about that were written: nothing is a hole. The kernel is never asked.
    #[must_use]
    pub fn none(file: &'a File, pages: PageCount) -> Self {
        Self { file, pages, known: 0..pages.0, known_is_hole: false, survey: None }
    }

    /// As [`new`](Self::new), of the file that `survey` has looked at: what that knows the kernel is not asked.
    #[must_use]
    pub fn surveyed(file: &'a File, pages: PageCount, survey: &'a Survey) -> Self {
        Self { survey: Some(survey), ..Self::new(file, pages) }
    }

    /// What was a hole may have been written meanwhile. What was data still is, where nobody punches holes: it need not be
    /// asked for again.
    pub fn forget_holes(&mut self) {
        if self.known_is_hole {
            self.known = 0..0;
        }
    }

    /// How many pages from `first` on have no memory behind them; 0 where `first` itself has, or where the kernel
    /// cannot say.
    pub fn run_from(&mut self, first: PageIndex) -> PageCount {
        if !self.known.contains(&first.0) {
            self.ask(first);
        }
        if self.known_is_hole && self.known.contains(&first.0) {
            PageCount(self.known.end - first.0)
        } else {
            PageCount(0)
        }
    }

    fn ask(&mut self, first: PageIndex) {
        if let Some(full) = self.survey.and_then(|survey| survey.full_around(first)) {
            self.known = full;
            self.known_is_hole = false;
            return;
        }
        let next = |whence| match i64::try_from(first.offset()) {
            // ENXIO: there is no more data behind this point.
            Ok(offset) => match lseek(self.file, offset, whence) {
                Ok(found) => u64::try_from(found).ok().map(|offset| offset / PAGE_SIZE_U64),
                Err(Errno::ENXIO) => Some(self.pages.0),
                Err(_) => None,
            },
            Err(_) => None,
        };
        match next(Whence::SeekData) {
            Some(data) if data > first.0 => {
                self.known = first.0..data.min(self.pages.0);
                self.known_is_hole = true;
            }
            // There is memory behind it, or the kernel cannot say.
            found => {
                // Not with SEEK_HOLE: that looks at every page up to the next hole, a millisecond for a quarter of a gigabyte,
                // in which the kernel may give the processor to nobody else.
                let ahead = AHEAD.min(self.pages.0.saturating_sub(first.0));
                let full =
                    found.is_some() && cached_pages(self.file, first, PageCount(ahead)) == Some(PageCount(ahead));
                self.known = first.0..first.0 + if full { ahead } else { 1 };
                self.known_is_hole = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::Ram;

    #[test]
    fn one_byte_anywhere_makes_a_page_not_zero() {
        // Pages, parts of one, and what ends within a word.
        for len in [0, 1, 7, 8, 24, 100, PAGE_SIZE, PAGE_SIZE + 21, 3 * PAGE_SIZE] {
            let mut page = vec![0; len];
            assert!(is_zero(&page));
            for at in 0..len {
                page[at] = 0x80;
                assert!(!is_zero(&page), "byte {at} of {len}");
                page[at] = 0;
            }
        }
    }

    #[test]
    fn a_hole_that_was_written_is_none_once_holes_are_forgotten() {
        let ram = Ram::new(PageCount(64)).unwrap();
        let mut holes = Holes::new(ram.file(), ram.pages());
        assert_eq!(holes.run_from(PageIndex(0)), PageCount(64));
        // SAFETY: nobody else uses this memory.
        unsafe { ram.alias_of(PageIndex(10)).unwrap().write(1) };
        holes.forget_holes();
        assert_eq!((holes.run_from(PageIndex(10)), holes.run_from(PageIndex(9))), (PageCount(0), PageCount(1)));
    }

    #[test]
    fn a_hole_is_found_however_much_memory_lies_before_it() {
        let ram = Ram::new(PageCount(4 * AHEAD)).unwrap();
        let hole = 2 * AHEAD + 7;
        for page in (0..4 * AHEAD).filter(|page| *page != hole) {
            // SAFETY: nobody else uses this memory.
            unsafe { ram.alias_of(PageIndex(page)).unwrap().write(1) };
        }
        let mut holes = Holes::new(ram.file(), ram.pages());
        let found: Vec<u64> = (0..4 * AHEAD).filter(|page| holes.run_from(PageIndex(*page)).0 > 0).collect();
        assert_eq!(found, [hole]);
    }

    #[test]
    fn what_was_surveyed_is_not_asked_for_again_and_holes_are() {
        let pages = PageCount(3 * AHEAD + 5);
        let ram = Ram::new(pages).unwrap();
        let touch = |page: u64| {
            // SAFETY: nobody else uses this memory.
            unsafe { ram.alias_of(PageIndex(page)).unwrap().write(1) };
        };
        (0..pages.0).filter(|page| *page != AHEAD + 3).for_each(touch);
        let survey = Survey::new(pages);
        while survey.go_on(ram.file()) {}
        let known: Vec<_> = [0, AHEAD, 2 * AHEAD, 3 * AHEAD].map(|page| survey.full_around(PageIndex(page))).into();
        let stretch = |index: u64| Some(index * AHEAD..pages.0.min((index + 1) * AHEAD));
        if cached_pages(ram.file(), PageIndex(0), PageCount(1)).is_none() {
            println!("SKIP what_was_surveyed_is_not_asked_for_again_and_holes_are: this kernel has no cachestat(2)");
            return;
        }
        assert_eq!(known, [stretch(0), None, stretch(2), stretch(3)]);
        let mut holes = Holes::surveyed(ram.file(), pages, &survey);
        let found = |holes: &mut Holes<'_>| -> Vec<u64> {
            (0..pages.0).filter(|page| holes.run_from(PageIndex(*page)).0 > 0).collect()
        };
        assert_eq!(found(&mut holes), [AHEAD + 3]);
        touch(AHEAD + 3);
        assert_eq!(found(&mut Holes::surveyed(ram.file(), pages, &survey)), [0; 0], "written since the survey");
    }

    #[test]
    fn untouched_pages_are_holes() {
        let ram = Ram::new(PageCount(64)).unwrap();
        for page in [10, 11, 40] {
            // SAFETY: nobody else uses this memory.
            unsafe { ram.alias_of(PageIndex(page)).unwrap().write(0) };
        }
        let mut holes = Holes::new(ram.file(), ram.pages());
        assert_eq!(holes.run_from(PageIndex(0)), PageCount(10));
        assert_eq!(holes.run_from(PageIndex(7)), PageCount(3));
        assert_eq!(holes.run_from(PageIndex(10)), PageCount(0));
        assert_eq!(holes.run_from(PageIndex(11)), PageCount(0));
        assert_eq!(holes.run_from(PageIndex(12)), PageCount(28));
        assert_eq!(holes.run_from(PageIndex(40)), PageCount(0));
        assert_eq!(holes.run_from(PageIndex(41)), PageCount(23));
    }
}
