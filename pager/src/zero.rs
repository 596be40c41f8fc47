//! Zero pages: found without reading where the file has no page at all, and by reading where it has.

use std::fs::File;
use std::ops::Range;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use switchover_wire::types::{PAGE_SIZE_U64, PageCount, PageIndex};

/// Bytes compared before each early exit: a multiple of the widest vector registers, so that the compiler can keep
/// the inner loop in them.
const STRIDE: usize = 256;

/// Whether all of `page` is zero.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    let strides = page.chunks_exact(STRIDE);
    strides.remainder().iter().all(|byte| *byte == 0)
        && page.chunks_exact(STRIDE).all(|stride| stride.iter().fold(0, |seen, byte| seen | byte) == 0)
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
}

impl<'a> Holes<'a> {
    /// Of a memfd with `pages` pages. Only good while nobody writes it.
    #[must_use]
    pub fn new(file: &'a File, pages: PageCount) -> Self {
        Self { file, pages, known: 0..0, known_is_hole: false }
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
            Some(_) => {
                let end = next(Whence::SeekHole).unwrap_or(first.0 + 1);
                self.known = first.0..end.clamp(first.0 + 1, self.pages.0.max(first.0 + 1));
                self.known_is_hole = false;
            }
            None => {
                self.known = first.0..first.0 + 1;
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
        let mut page = vec![0; 4096];
        assert!(is_zero(&page));
        for at in [0, 1, 255, 256, 2049, 4095] {
            page[at] = 0x80;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
        assert!(!is_zero(&[0, 0, 1]));
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
