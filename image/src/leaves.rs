//! A chunk's hash, kept by its pages: so that some of them can be written again, and the others need not be read for the hash of all.
//!
//! BLAKE3 hashes a tree. A page of 4 KiB is a whole subtree of it, as long as it stays where it is among the present pages of its chunk,
//! which is what the chunk's hash is of ([`Present::hash`]). Its value depends on that place.

use blake3::Hasher;
use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64};

use crate::chunk::{Hash, Present};
use crate::layout::CHUNK_PAGES;

/// The subtrees of a chunk's present pages, two at least: a page alone is the whole tree. 32 bytes for each.
#[derive(Clone, Debug)]
pub(crate) struct Leaves {
    present: Present,
    /// As many as there are present pages, in their order.
    values: Box<[ChainingValue]>,
}

impl Leaves {
    /// Those of `present`, all of which are in `bytes`, at their places in the chunk; `None` for fewer than two.
    pub(crate) fn of(present: Present, bytes: &[u8]) -> Option<Self> {
        let count = Some(present.count()).filter(|count| *count > 1)?;
        let mut leaves = Self { present, values: vec![ChainingValue::default(); count].into() };
        leaves.renew(present, bytes);
        Some(leaves)
    }

    /// The same after the pages `written` were written, which are in `bytes`; `present` are all that the chunk has now. `None` where the
    /// others are in other places than before.
    pub(crate) fn rewritten(this: Option<Self>, present: Present, written: Present, bytes: &[u8]) -> Option<Self> {
        let all_here = (0..CHUNK_PAGES).all(|page| !present.contains(page) || written.contains(page));
        if all_here {
            return Self::of(present, bytes);
        }
        let mut leaves = this.filter(|leaves| leaves.present == present)?;
        leaves.renew(written, bytes);
        Some(leaves)
    }

    fn renew(&mut self, which: Present, bytes: &[u8]) {
        let places = (0..CHUNK_PAGES).filter(|page| self.present.contains(*page)).zip(&mut self.values);
        for (place, (page, value)) in (0..).zip(places).filter(|(_, (page, _))| which.contains(*page)) {
            let mut hasher = Hasher::new();
            hasher.set_input_offset(place * PAGE_SIZE_U64).update(&bytes[page * PAGE_SIZE..][..PAGE_SIZE]);
            *value = hasher.finalize_non_root();
        }
    }

    /// The chunk's hash.
    pub(crate) fn hash(&self) -> Hash {
        let (left, right) = halves(&self.values);
        *merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash).as_bytes()
    }
}

fn subtree(values: &[ChainingValue]) -> ChainingValue {
    match values {
        [one] => *one,
        _ => {
            let (left, right) = halves(values);
            merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

/// How BLAKE3 divides so many pages, two at least.
fn halves(values: &[ChainingValue]) -> (&[ChainingValue], &[ChainingValue]) {
    let left = left_subtree_len(values.len() as u64 * PAGE_SIZE_U64) / PAGE_SIZE_U64;
    values.split_at(usize::try_from(left).unwrap_or(values.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::CHUNK_LEN;

    fn present(pages: &[usize]) -> Present {
        let mut present = Present::default();
        pages.iter().for_each(|page| present.insert(*page));
        present
    }

    fn filled(seed: u8) -> Vec<u8> {
        (0..CHUNK_LEN)
            .map(|at| u8::try_from(at / 7 % 251).unwrap() ^ u8::try_from(at / PAGE_SIZE).unwrap() ^ seed)
            .collect()
    }

    #[test]
    fn every_count_of_pages_has_the_hash_of_its_bytes() {
        let bytes = filled(1);
        for count in 1..=CHUNK_PAGES {
            let which = Present::first(count);
            let expected = (count > 1).then(|| which.hash(&bytes));
            assert_eq!(Leaves::of(which, &bytes).map(|leaves| leaves.hash()), expected, "{count}");
        }
    }

    #[test]
    fn pages_that_moved_are_not_taken_for_what_they_were() {
        let (before, bytes) = (present(&[1, 5, 9]), filled(1));
        let leaves = Leaves::of(before, &bytes);
        for (now, written) in [(&[1, 9][..], &[5][..]), (&[1, 2, 5, 9], &[2]), (&[1, 5, 9, 200], &[200])] {
            assert!(Leaves::rewritten(leaves.clone(), present(now), present(written), &bytes).is_none(), "{now:?}");
        }
        assert!(Leaves::rewritten(None, before, present(&[1]), &bytes).is_none());
        // All of it is at hand.
        let all = Leaves::rewritten(None, before, present(&[0, 1, 5, 9]), &bytes).unwrap();
        assert_eq!(all.hash(), before.hash(&bytes));
    }

    proptest! {
        #[test]
        fn what_was_written_again_counts(
            pages in prop::collection::btree_set(0..CHUNK_PAGES, 2..40),
            again in prop::collection::vec(0..40_usize, 0..20),
            seed: u8,
        ) {
            let pages: Vec<_> = pages.into_iter().collect();
            let (which, mut bytes, other) = (present(&pages), filled(seed), filled(!seed));
            let leaves = Leaves::of(which, &bytes);
            let written: Vec<_> = again.iter().filter_map(|at| pages.get(*at).copied()).collect();
            let new = Leaves::rewritten(leaves, which, present(&written), &other).unwrap();
            for page in written {
                bytes[page * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(&other[page * PAGE_SIZE..][..PAGE_SIZE]);
            }
            prop_assert_eq!(new.hash(), which.hash(&bytes));
        }
    }
}
