//! Chunks of 256 pages: which of their pages are there, and their entry in the index.

use std::ops::Range;

use switchover_pager::zero::is_zero;
use switchover_wire::types::{PAGE_SIZE, PageIndex};

use crate::layout::{CHUNK_PAGES, INDEX_ENTRY, MEMORY_OFFSET};

const WORDS: usize = CHUNK_PAGES / 64;

/// Which pages of a chunk are not zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Present(pub(crate) [u64; WORDS]);

impl Present {
    /// The pages of `bytes`, a chunk or its beginning, that are not zero. Only those in `within` are looked at.
    pub(crate) fn of(bytes: &[u8], within: Range<usize>) -> Self {
        let mut present = Self::default();
        for page in within {
            if !is_zero(&bytes[page * PAGE_SIZE..][..PAGE_SIZE]) {
                present.insert(page);
            }
        }
        present
    }

    /// The next chunk's, of a bitmap's words.
    pub(crate) fn of_words(words: &mut impl Iterator<Item = u64>) -> Self {
        let mut present = Self::default();
        present.0.iter_mut().zip(words).for_each(|(own, word)| *own = word);
        present
    }

    /// The first `count` pages.
    pub(crate) fn first(count: usize) -> Self {
        let mut first = Self::default();
        (0..count.min(CHUNK_PAGES)).for_each(|page| first.insert(page));
        first
    }

    /// Those of these pages that `own` says nothing of, and what it says of the others.
    pub(crate) fn under(self, own: Self, present: Self) -> Self {
        let mut merged = self;
        for ((word, own), present) in merged.0.iter_mut().zip(own.0).zip(present.0) {
            *word = *word & !own | present & own;
        }
        merged
    }

    pub(crate) fn insert(&mut self, page: usize) {
        self.0[page / 64] |= 1 << (page % 64);
    }

    pub(crate) fn remove(&mut self, page: usize) {
        self.0[page / 64] &= !(1 << (page % 64));
    }

    pub(crate) fn contains(self, page: usize) -> bool {
        self.0[page / 64] >> (page % 64) & 1 == 1
    }

    pub(crate) fn count(self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == [0; WORDS]
    }

    /// Stretches of present pages, as far as fewer than `gap` absent ones lie between them: with a `gap` of 1, nothing but present
    /// pages.
    pub(crate) fn runs(self, gap: usize) -> impl Iterator<Item = Range<usize>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = (at..CHUNK_PAGES).find(|page| self.contains(*page))?;
            let mut end = first + 1;
            while let Some(next) = (end..CHUNK_PAGES.min(end + gap)).find(|page| self.contains(*page)) {
                end = next + 1;
            }
            at = end;
            Some(first..end)
        })
    }

    /// The same as offsets in a chunk's bytes.
    pub(crate) fn byte_runs(self, gap: usize) -> impl Iterator<Item = Range<usize>> {
        self.runs(gap).map(|run| run.start * PAGE_SIZE..run.end * PAGE_SIZE)
    }

    /// The hash of a chunk in place: of its present pages, one behind the other.
    pub(crate) fn hash(self, bytes: &[u8]) -> Hash {
        let mut hasher = blake3::Hasher::new();
        for run in self.byte_runs(1) {
            hasher.update(&bytes[run]);
        }
        *hasher.finalize().as_bytes()
    }
}

/// A BLAKE3 hash.
pub(crate) type Hash = [u8; blake3::OUT_LEN];

/// How a chunk is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub(crate) enum Encoding {
    /// Not at all: all of it is zero.
    #[default]
    None = 0,
    /// Each page at its place.
    InPlace = 1,
    /// The present pages one behind the other.
    Raw = 2,
    /// The same as one LZ4 block.
    Lz4 = 3,
}

impl Encoding {
    const ALL: [Self; 4] = [Self::None, Self::InPlace, Self::Raw, Self::Lz4];
}

/// A chunk's entry in the index.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Entry {
    /// Where in the file its bytes begin; 0 where there are none.
    pub(crate) offset: u64,
    /// How many there are, holes included.
    pub(crate) length: u32,
    pub(crate) encoding: Encoding,
    /// Of the bytes as they are stored; of the present pages alone where they are in place.
    pub(crate) hash: Hash,
}

impl Entry {
    /// That of chunk `number` in place, of memory with `pages` pages.
    pub(crate) fn in_place(number: u64, pages: u64, hash: Hash) -> Self {
        // A chunk is of 1 MiB.
        let length = u32::try_from(count_of(number, pages) * PAGE_SIZE).unwrap_or(0);
        Self { offset: place_of(number, pages), length, encoding: Encoding::InPlace, hash }
    }

    pub(crate) fn encode(&self) -> [u8; INDEX_ENTRY] {
        let mut bytes = [0; INDEX_ENTRY];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12] = self.encoding as u8;
        bytes[16..].copy_from_slice(&self.hash);
        bytes
    }

    /// An entry by itself. Whether it fits its chunk is for the reader to say.
    pub(crate) fn decode(bytes: &[u8; INDEX_ENTRY]) -> Result<Self, String> {
        let (numbers, hash) = bytes.split_at(16);
        let encoding = Encoding::ALL.into_iter().find(|known| *known as u8 == numbers[12]);
        let encoding = encoding.ok_or_else(|| format!("of the unknown encoding {}", bytes[12]))?;
        if numbers[13..] != [0; 3] {
            return Err("with other bytes than 0 behind its encoding".to_owned());
        }
        let (mut offset, mut length, mut entry) = ([0; 8], [0; 4], Self { encoding, ..Self::default() });
        offset.copy_from_slice(&numbers[..8]);
        length.copy_from_slice(&numbers[8..12]);
        entry.hash.copy_from_slice(hash);
        Ok(Self { offset: u64::from_le_bytes(offset), length: u32::from_le_bytes(length), ..entry })
    }
}

/// The pages of chunk `number`, of memory with `pages` pages.
pub(crate) fn pages_of(number: u64, pages: u64) -> Range<u64> {
    let first = number.saturating_mul(CHUNK_PAGES as u64).min(pages);
    first..first.saturating_add(CHUNK_PAGES as u64).min(pages)
}

/// The first page of chunk `number`.
pub(crate) fn first_of(number: u64, pages: u64) -> PageIndex {
    PageIndex(pages_of(number, pages).start)
}

/// How many pages chunk `number` has.
pub(crate) fn count_of(number: u64, pages: u64) -> usize {
    let range = pages_of(number, pages);
    // At most `CHUNK_PAGES`.
    usize::try_from(range.end - range.start).unwrap_or(0)
}

/// Where in the file chunk `number` begins, in place.
pub(crate) fn place_of(number: u64, pages: u64) -> u64 {
    MEMORY_OFFSET + first_of(number, pages).offset()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pages: &[usize]) -> Present {
        let mut present = Present::default();
        pages.iter().for_each(|page| present.insert(*page));
        present
    }

    #[test]
    fn runs_end_where_the_gap_is_large_enough() {
        let present = with(&[0, 1, 3, 9, 255]);
        assert_eq!(present.runs(1).collect::<Vec<_>>(), [0..2, 3..4, 9..10, 255..256]);
        assert_eq!(present.runs(2).collect::<Vec<_>>(), [0..4, 9..10, 255..256]);
        assert_eq!(present.runs(8).collect::<Vec<_>>(), [0..10, 255..256]);
        assert_eq!(with(&[]).runs(8).count(), 0);
        assert_eq!(present.count(), 5);
    }

    #[test]
    fn what_is_not_zero_is_present_where_it_is_looked_for() {
        let mut bytes = vec![0; 4 * PAGE_SIZE];
        bytes[PAGE_SIZE + 5] = 1;
        bytes[3 * PAGE_SIZE] = 1;
        assert_eq!(Present::of(&bytes, 0..4), with(&[1, 3]));
        assert_eq!(Present::of(&bytes, 0..3), with(&[1]));
    }

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        let entry = Entry { offset: 1 << 40, length: 77, encoding: Encoding::Lz4, hash: [9; 32] };
        let bytes = entry.encode();
        assert_eq!(Entry::decode(&bytes), Ok(entry));
        for (at, told) in [(12, "unknown encoding"), (13, "other bytes than 0"), (15, "other bytes than 0")] {
            let mut bytes = bytes;
            bytes[at] |= 0x40;
            assert!(Entry::decode(&bytes).unwrap_err().contains(told));
        }
    }

    #[test]
    fn the_last_chunk_is_as_long_as_what_is_left() {
        assert_eq!((pages_of(0, 300), pages_of(1, 300), pages_of(2, 300)), (0..256, 256..300, 300..300));
        assert_eq!(Entry::in_place(1, 300, [0; 32]).length, 44 * 4096);
    }
}
