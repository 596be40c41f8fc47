//! Huge pages for guest RAM, 2 MiB each, asked for piece by piece: huge pages of shared memory are off for all on most hosts, and
//! `MADV_COLLAPSE` (Linux 6.1) is there nonetheless.

use std::io;
use std::sync::atomic::Ordering;

use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};

use super::{Ram, cached_pages};

/// What one huge page holds.
pub const PIECE_BYTES: usize = 2 << 20;
const PIECE_PAGES: u64 = PIECE_BYTES as u64 / PAGE_SIZE_U64;

/// After so many refusals in a row for want of a free huge page no more are asked for: each may have had the kernel move other
/// memory about.
const PATIENCE: u32 = 8;

/// When to give up after refusals.
#[derive(Debug, Default)]
pub struct Refusals {
    /// All of them.
    pub total: u64,
    in_a_row: u32,
}

impl Refusals {
    /// Takes note of an answer. Says whether to ask for more.
    pub fn note(&mut self, answer: &io::Result<()>) -> bool {
        let Err(error) = answer else {
            self.in_a_row = 0;
            return true;
        };
        self.total += 1;
        // EINVAL: this memory, or this kernel, has no huge pages at all.
        self.in_a_row = if error.raw_os_error() == Some(libc::EINVAL) { PATIENCE } else { self.in_a_row + 1 };
        self.in_a_row < PATIENCE
    }
}

impl Ram {
    /// The pieces of 2 MiB that were reserved on huge pages.
    pub(crate) fn huge_pieces(&self) -> Vec<usize> {
        let huge = self.inner.huge.iter().enumerate();
        huge.filter(|(_, huge)| huge.load(Ordering::Acquire)).map(|(piece, _)| piece).collect()
    }

    /// Maps a piece that lies on one huge page as one in the guest mapping. Not a byte changes, and it may be used meanwhile. Nobody
    /// may watch it.
    ///
    /// # Errors
    /// When the kernel refuses: the piece is past the end of RAM, or something holds part of it.
    pub(crate) fn map_hugely(&self, piece: usize) -> io::Result<()> {
        self.inner.guest.advise(piece.saturating_mul(PIECE_BYTES), PIECE_BYTES, libc::MADV_COLLAPSE)
    }

    /// Takes huge pages for what is not allocated yet, as far as there are any.
    pub(super) fn populate_hugely(&self) {
        let (mut refusals, alias) = (Refusals::default(), &self.inner.alias);
        for (piece, huge) in self.inner.huge.iter().enumerate() {
            let first = PageIndex(piece as u64 * PIECE_PAGES);
            // What is there would have to be copied, which costs ten times as much; where it cannot be told, nothing is asked.
            if cached_pages(&self.inner.file, first, PageCount(PIECE_PAGES)) != Some(PageCount(0)) {
                continue;
            }
            let offset = piece * PIECE_BYTES;
            // The kernel collapses around a page, and not out of nothing. Where memory is short, populating says so.
            if alias.advise(offset, PAGE_SIZE, libc::MADV_POPULATE_WRITE).is_err() {
                break;
            }
            let answer = alias.advise(offset, PIECE_BYTES, libc::MADV_COLLAPSE);
            huge.store(answer.is_ok(), Ordering::Release);
            if !refusals.note(&answer) {
                break;
            }
        }
        if refusals.total > 0 {
            tracing::debug!(refused = refusals.total, "guest memory is not all on huge pages");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(errno: i32) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn asking_ends_at_once_where_it_is_useless_and_else_after_some_refusals_in_a_row() {
        assert!(!Refusals::default().note(&refused(libc::EINVAL)));
        let mut refusals = Refusals::default();
        let mut answers = |errno, times: u32| (0..times).map(|_| refusals.note(&refused(errno))).last().unwrap();
        assert!(answers(libc::ENOMEM, PATIENCE - 1));
        assert!(!answers(libc::EAGAIN, 1));
        assert!(refusals.note(&Ok(())), "one success begins the count anew");
        assert!(refusals.note(&refused(libc::ENOMEM)));
        assert_eq!(refusals.total, u64::from(PATIENCE) + 1);
    }

    #[test]
    fn populating_keeps_what_is_there_and_leaves_nothing_out() {
        let pages = PageCount(3 * PIECE_PAGES + 5);
        let ram = Ram::new(pages).unwrap();
        let kept = ram.alias_of(PageIndex(PIECE_PAGES + 3)).unwrap();
        // SAFETY: a page of the alias that only this test uses.
        unsafe { kept.write(9) };
        ram.populate().unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { kept.read() }, 9);
        assert_eq!(cached_pages(ram.file(), PageIndex(0), pages), Some(pages));
        assert!(!ram.huge_pieces().contains(&1), "it would have been copied");
    }
}
