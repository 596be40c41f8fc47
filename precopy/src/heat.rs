//! How recently and how often each page was written.
//!
//! A page's heat after round `n` is the sum, over the rounds `r` in which it was written, of `2^((r - n) / 2)`: one
//! for a write in the last round, half of that for one two rounds before. It is the measure of the LRFU replacement
//! policy (Lee et al., *LRFU: a spectrum of policies that subsumes the least recently used and least frequently used
//! policies*, 2001), between pure recency and pure frequency.
//!
//! All pages cool by the same factor, which changes no order between them. So nothing is cooled: what is kept is
//! `8 * log2` of the sum of `2^(r / 2)`, a *mark* that changes only when the page is written, and compares at any time.
//! A mark is one byte. Time goes on by 4 marks a round, so that two rounds are 8 marks, or half the heat; before marks
//! overflow, all are lowered together, and what falls to 0 then is cold: not written in the last 28 rounds at least.

use switchover_wire::types::{PageCount, PageIndex};

use crate::bitmap::PageBitmap;

/// How much a mark of the same heat grows from round to round.
const ROUND: u8 = 4;

/// How much higher than the present a mark comes to stand when the page is written: `8 * log2(1 + 2^(-age / 8))`,
/// rounded, for ages from [`YOUNGEST`] on; older ones add nothing. The age is the present less the mark so far.
const GAIN: [u8; 46] = [
    14, 13, 13, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 5, 4, 4, 4, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
];

/// The age of a page that was written in every round: its mark stands this much above the present.
const YOUNGEST: i16 = -10;

/// The present is kept below this, so that no mark overflows.
const LATEST: u8 = u8::MAX - GAIN[0];

/// How much marks are lowered when the present reaches [`LATEST`].
const LOWERED: u8 = 128;

/// The heat of every page: a compact mark of recency and frequency, made from the rounds' bitmaps.
#[derive(Clone, Debug)]
pub struct Heat {
    /// 0: never written, or too long ago.
    marks: Vec<u8>,
    /// The mark of a page written in the last round for the first time.
    now: u8,
}

impl Heat {
    /// All pages cold.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        Self { marks: vec![0; usize::try_from(pages.0).unwrap_or(usize::MAX)], now: 0 }
    }

    /// A round is over in which these pages were written. Costs a look at every word and every page that was written,
    /// and a look at every page once in 32 rounds.
    pub fn note_round(&mut self, written: &PageBitmap) {
        if self.now > LATEST - ROUND {
            self.now -= LOWERED;
            for mark in &mut self.marks {
                *mark = mark.saturating_sub(LOWERED);
            }
        }
        self.now += ROUND;
        for (index, mut word) in written.nonzero_words() {
            let marks = self.marks.get_mut(index * 64..).unwrap_or_default();
            while word != 0 {
                if let Some(mark) = marks.get_mut(word.trailing_zeros() as usize) {
                    *mark = self.now + gain(self.now, *mark);
                }
                word &= word - 1;
            }
        }
    }

    /// Up to `most` pages of `among`, the hottest first, in ascending order where they are equally hot; cold ones are
    /// left out. Costs two looks at every page of `among`.
    #[must_use]
    pub fn hottest(&self, among: &PageBitmap, most: usize) -> Vec<PageIndex> {
        let mark = |page: PageIndex| usize::try_from(page.0).ok().and_then(|page| self.marks.get(page)).copied();
        // Counted first: then each page's place among the hottest is known without comparing any two.
        let mut counts = [0_usize; 256];
        among.iter().filter_map(mark).for_each(|mark| counts[usize::from(mark)] += 1);
        let mut places = [most; 256];
        let mut hotter = 0;
        for (place, count) in places[1..].iter_mut().zip(&counts[1..]).rev() {
            *place = hotter;
            hotter += count;
        }
        let mut pages = vec![PageIndex(0); hotter.min(most)];
        for page in among.iter() {
            let Some(place) = mark(page).map(|mark| &mut places[usize::from(mark)]) else { continue };
            if let Some(slot) = pages.get_mut(*place) {
                *slot = page;
                *place += 1;
            }
        }
        pages
    }
}

/// How much above `now` the mark of a page comes to stand that is written now.
fn gain(now: u8, mark: u8) -> u8 {
    let age = i16::from(now) - i16::from(mark);
    match usize::try_from(age - YOUNGEST) {
        // A cold page has no past to add.
        _ if mark == 0 => 0,
        Ok(index) => GAIN.get(index).copied().unwrap_or(0),
        Err(_) => GAIN[0],
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(pages: u64, written: impl IntoIterator<Item = u64>) -> PageBitmap {
        let mut set = PageBitmap::new(PageCount(pages));
        written.into_iter().for_each(|page| assert!(set.insert(PageIndex(page))));
        set
    }

    fn order(heat: &Heat, pages: u64, most: usize) -> Vec<u64> {
        heat.hottest(&PageBitmap::full(PageCount(pages)), most).iter().map(|page| page.0).collect()
    }

    #[test]
    fn the_table_is_the_formula() {
        for (gain, age) in GAIN.iter().zip(YOUNGEST..) {
            let exact = 8.0 * (1.0 + (-f64::from(age) / 8.0).exp2()).log2();
            assert!((f64::from(*gain) - exact).abs() <= 0.5, "age {age}: {gain} for {exact}");
        }
        // What an age past the table would add rounds to nothing, and a page written in every round is the youngest.
        let next = f64::from(YOUNGEST) + GAIN.len() as f64;
        assert!(8.0 * (1.0 + (-next / 8.0).exp2()).log2() < 0.5);
        assert_eq!(i16::from(ROUND) - i16::from(GAIN[0]), YOUNGEST);
    }

    #[test]
    fn often_and_lately_is_hotter_than_often_or_lately() {
        let mut heat = Heat::new(PageCount(4));
        for round in 0..10 {
            // Page 0 always; page 1 until lately; page 2 lately only; page 3 once, at the start.
            let written = [(0, true), (1, round < 8), (2, round == 9), (3, round == 0)];
            heat.note_round(&set(4, written.into_iter().filter(|(_, is)| *is).map(|(page, _)| page)));
        }
        assert_eq!(order(&heat, 4, 9), [0, 1, 2, 3]);
        assert_eq!(order(&heat, 4, 2), [0, 1]);
        // Habit is outlived in the end.
        for _ in 0..6 {
            heat.note_round(&set(4, [2]));
        }
        assert_eq!(order(&heat, 4, 9), [2, 0, 1, 3]);
    }

    #[test]
    fn what_was_never_written_or_long_ago_is_cold() {
        // Marks are lowered at some time within any 64 rounds: try all.
        for before in 0..64 {
            let mut heat = Heat::new(PageCount(3));
            (0..before).for_each(|_| heat.note_round(&set(3, [0])));
            heat.note_round(&set(3, [0, 1]));
            for _ in 0..28 {
                assert!(order(&heat, 3, 9).contains(&1), "{before} rounds before");
                heat.note_round(&set(3, [0]));
            }
            (0..64).for_each(|_| heat.note_round(&set(3, [0])));
            assert_eq!(order(&heat, 3, 9), [0]);
        }
    }

    #[test]
    fn only_pages_asked_for_are_named_and_equals_in_ascending_order() {
        let mut heat = Heat::new(PageCount(200));
        heat.note_round(&PageBitmap::full(PageCount(200)));
        heat.note_round(&set(200, [150, 70, 3]));
        let among = set(200, [199, 150, 70, 64]);
        assert_eq!(heat.hottest(&among, 3), [70, 150, 64].map(PageIndex));
        assert!(heat.hottest(&among, 0).is_empty());
        // A set over another RAM names no page that this one lacks.
        assert!(heat.hottest(&set(300, [250]), 3).is_empty());
        heat.note_round(&PageBitmap::full(PageCount(500)));
    }

    proptest! {
        /// Half a round's worth of heat is what rounding may cost.
        #[test]
        fn the_order_is_that_of_the_exact_heat(rounds in prop::collection::vec(prop::collection::vec(any::<bool>(), 8), 1..100)) {
            let mut heat = Heat::new(PageCount(8));
            let mut exact = [0_f64; 8];
            for round in &rounds {
                heat.note_round(&set(8, (0..8).zip(round).filter(|(_, is)| **is).map(|(page, _)| page)));
                for (exact, is) in exact.iter_mut().zip(round) {
                    *exact = *exact * (-0.5_f64).exp2() + f64::from(u8::from(*is));
                }
            }
            for (mark, exact) in heat.marks.iter().zip(exact).filter(|(mark, _)| **mark > 0) {
                let expected = f64::from(heat.now) + 8.0 * exact.log2();
                prop_assert!((f64::from(*mark) - expected).abs() <= 2.0, "{mark} for {expected}");
            }
            let found = order(&heat, 8, 8);
            prop_assert!((0..8).all(|page| found.contains(&page) || exact[usize::try_from(page).unwrap()] < 1e-3));
            for pair in found.windows(2) {
                let heat_of = |page: u64| exact[usize::try_from(page).unwrap()].log2();
                prop_assert!(heat_of(pair[0]) >= heat_of(pair[1]) - 0.5, "{pair:?} of {found:?}: {exact:?}");
            }
        }
    }
}
