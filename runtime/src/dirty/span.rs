//! RAM's pages against the pages of one memory slot.

use switchover_wire::types::PageIndex;

/// The pages of a slot, counted as RAM's are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotSpan {
    /// KVM's number of the slot.
    pub slot: u32,
    /// Its first page.
    pub first: u64,
    /// How many it has, at least one.
    pub pages: u64,
}

/// A range of a slot's pages as KVM_CLEAR_DIRTY_LOG wants it, and some of them chosen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotPart {
    /// Counted in the slot; a multiple of 64.
    pub first: u64,
    /// A multiple of 64, or as many as there are up to the slot's end.
    pub pages: u64,
    /// Bit `i % 64` of word `i / 64` stands for page `first + i` of the slot.
    pub words: Vec<u64>,
}

impl SlotSpan {
    /// What of the choice `words`, whose first bit is page `first` of RAM, lies in this slot; `None` where nothing does.
    pub fn part(self, first: PageIndex, words: &[u64]) -> Option<SlotPart> {
        let end = first.0.saturating_add((words.len() as u64).saturating_mul(64)).min(self.first + self.pages);
        let begin = first.0.max(self.first);
        if begin >= end {
            return None;
        }
        let from = (begin - self.first) & !63;
        let to = (end - self.first).next_multiple_of(64).min(self.pages);
        let chosen: Vec<u64> = (from..to)
            .step_by(64)
            .map(|page| {
                let inside = to - page;
                let mask = if inside < 64 { (1 << inside) - 1 } else { u64::MAX };
                bits_at(words, first.0, self.first + page) & mask
            })
            .collect();
        chosen.iter().any(|word| *word != 0).then_some(SlotPart { first: from, pages: to - from, words: chosen })
    }

    /// Adds the slot's bitmap to that of RAM. Bits past either's end are ignored.
    pub fn add_to(self, ram: &mut [u64], slot: &[u64]) {
        let shift = self.first % 64;
        let first = usize::try_from(self.first / 64).unwrap_or(usize::MAX);
        for ((page, at), word) in (0..self.pages).step_by(64).zip(first..).zip(slot) {
            let left = self.pages - page;
            let word = if left < 64 { word & ((1 << left) - 1) } else { *word };
            if let Some(low) = ram.get_mut(at) {
                *low |= word << shift;
            }
            if let Some(high) = ram.get_mut(at + 1).filter(|_| shift != 0) {
                *high |= word >> (64 - shift);
            }
        }
    }
}

/// The 64 bits from `page` on out of `words`, which begin at `first`, a multiple of 64; zeros where there are none.
fn bits_at(words: &[u64], first: u64, page: u64) -> u64 {
    let word = |index: u64| {
        let index = index.checked_sub(first / 64).and_then(|index| usize::try_from(index).ok());
        index.and_then(|index| words.get(index)).copied().unwrap_or(0)
    };
    match page % 64 {
        0 => word(page / 64),
        shift => word(page / 64) >> shift | word(page / 64 + 1) << (64 - shift),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pages_of(words: &[u64], first: u64) -> impl Iterator<Item = u64> + '_ {
        (0..words.len() as u64 * 64)
            .filter(|bit| words[usize::try_from(bit / 64).unwrap()] >> (bit % 64) & 1 == 1)
            .map(move |bit| first + bit)
    }

    proptest! {
        #[test]
        fn the_parts_of_all_slots_are_the_choice(
            low in 1_u64..300,
            high in 1_u64..300,
            first in (0_u64..8).prop_map(|word| word * 64),
            words in prop::collection::vec(prop_oneof![Just(0), any::<u64>()], 0..6),
        ) {
            let spans = [SlotSpan { slot: 0, first: 0, pages: low }, SlotSpan { slot: 1, first: low, pages: high }];
            let mut found = Vec::new();
            for span in spans {
                let Some(part) = span.part(PageIndex(first), &words) else { continue };
                prop_assert_eq!(part.first % 64, 0);
                prop_assert!(part.pages % 64 == 0 || part.first + part.pages == span.pages);
                prop_assert!(part.first + part.pages <= span.pages);
                prop_assert_eq!(part.words.len() as u64, part.pages.div_ceil(64));
                found.extend(pages_of(&part.words, span.first + part.first));
            }
            prop_assert_eq!(found, pages_of(&words, first).filter(|page| *page < low + high).collect::<Vec<_>>());
        }

        #[test]
        fn a_slots_bitmap_lands_on_its_pages(
            first in 0_u64..200,
            pages in 1_u64..200,
            words in prop::collection::vec(any::<u64>(), 0..5),
        ) {
            let span = SlotSpan { slot: 0, first, pages };
            let mut ram = vec![0; usize::try_from((first + pages).div_ceil(64)).unwrap()];
            span.add_to(&mut ram, &words);
            let expected: Vec<_> = pages_of(&words, first).filter(|page| *page < first + pages).collect();
            prop_assert_eq!(pages_of(&ram, 0).collect::<Vec<_>>(), expected);
        }
    }
}
