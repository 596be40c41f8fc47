//! Pages on both sides of the latest faults, several at a time, growing with each further fault near them.
//!
//! After the bubbles of Hines, Deshpande and Gopalan, *Post-copy live migration of virtual machines* (2009): a fault is a
//! pivot, and what is pushed grows outwards from several pivots at once. There each bubble grows for ever; here by what it has
//! earned, for behind the bubbles comes the sweep, which gets all the rest.

use switchover_wire::types::{PageCount, PageIndex};

use super::{Left, Looks, Step, part};

/// Bubbles at once.
const MOST: usize = 16;
/// Pages on either side of a first fault.
const FIRST: u64 = 16;
/// Pages that one fault earns a side at most: 4 MiB.
const MOST_EARNED: u64 = 1024;

/// Where faults were, and how far around them everything was offered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Bubble {
    /// Everything of `low..high` was offered.
    low: u64,
    high: u64,
    /// Pages to be offered below and above.
    below: u64,
    above: u64,
    /// What the next fault beside it earns.
    earns: u64,
    /// The side of the last step, for taking turns.
    upwards: bool,
}

/// The bubbles, the one with the latest fault first.
#[derive(Debug)]
pub struct Bubbles {
    pages: u64,
    bubbles: [Option<Bubble>; MOST],
}

impl Bubbles {
    /// None.
    pub const fn new(pages: PageCount) -> Self {
        Self { pages: pages.0, bubbles: [None; MOST] }
    }

    /// A fault: makes the bubble grow that it is at, or begins one.
    pub fn note(&mut self, page: PageIndex) {
        let page = page.0;
        let of_it = |bubble: &Bubble| {
            let reach = bubble.earns * 2;
            (bubble.low.saturating_sub(reach)..bubble.high.saturating_add(reach)).contains(&page)
        };
        let found = self.bubbles.iter().position(|bubble| bubble.as_ref().is_some_and(of_it));
        let bubble = match found.and_then(|index| self.bubbles[index]) {
            Some(bubble) => bubble.hit(page),
            None => Bubble { low: page, high: page + 1, below: FIRST, above: FIRST, earns: 2 * FIRST, upwards: false },
        };
        // The one that gives way: itself, an empty place, or the one that was hit longest ago.
        let last = found.unwrap_or(MOST - 1);
        self.bubbles.copy_within(..last, 1);
        self.bubbles[0] = Some(bubble);
    }

    /// The next pages of a bubble that has some to offer. Bubbles take turns.
    pub fn step(&mut self, looks: &mut Looks<'_, impl Left>) -> Option<Step> {
        let pages = self.pages;
        for bubble in self.bubbles.iter_mut().flatten() {
            while looks.more() {
                let Some(offered) = bubble.offer(pages) else { break };
                let step = looks.wanted(offered);
                if step.is_some() {
                    return step;
                }
            }
        }
        None
    }
}

impl Bubble {
    /// A fault in it, or close to it: what lies between is offered too, and the side of the fault earns more.
    fn hit(mut self, page: u64) -> Self {
        if page >= self.high {
            self.above = (page - self.high + self.earns).max(self.above);
        } else if page < self.low {
            self.below = (self.low - page + self.earns).max(self.below);
        } else {
            self.above = self.above.max(self.earns);
            self.below = self.below.max(self.earns);
        }
        self.earns = (self.earns * 2).min(MOST_EARNED);
        self
    }

    /// The next pages on one of its sides, within one chunk.
    fn offer(&mut self, pages: u64) -> Option<Step> {
        let (room_below, room_above) = (self.below.min(self.low), self.above.min(pages.saturating_sub(self.high)));
        self.upwards = match (room_below, room_above) {
            (0, 0) => return None,
            (0, _) => true,
            (_, 0) => false,
            // The larger side first: it is where the faults go.
            _ => room_above > room_below || (room_above == room_below && !self.upwards),
        };
        let step;
        if self.upwards {
            step = part(self.high, self.high + room_above);
            let count = u64::from(step.pages.count_ones());
            self.high += count;
            self.above = room_above - count;
        } else {
            // Down to the start of the chunk of the page below.
            let from = (self.low - room_below).max((self.low - 1) / 64 * 64);
            step = part(from, self.low);
            self.below = room_below - (self.low - from);
            self.low = from;
        }
        Some(step)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Pages;
    use super::*;

    fn offered(bubbles: &mut Bubbles, pages: &mut Pages) -> Vec<u64> {
        let mut all = Vec::new();
        loop {
            let mut looks = Looks { left: &*pages, spent: 0 };
            let Some(step) = bubbles.step(&mut looks) else { return all };
            all.extend(pages.send(step));
        }
    }

    #[test]
    fn a_first_fault_has_neighbours_on_both_sides() {
        let (mut bubbles, mut pages) = (Bubbles::new(PageCount(1000)), Pages::new(1000));
        pages.mark(130);
        bubbles.note(PageIndex(130));
        let mut all = offered(&mut bubbles, &mut pages);
        all.sort_unstable();
        assert_eq!(all, (114..147).filter(|page| *page != 130).collect::<Vec<_>>());
    }

    #[test]
    fn further_faults_make_it_grow_to_their_side() {
        let (mut bubbles, mut pages) = (Bubbles::new(PageCount(100_000)), Pages::new(100_000));
        let mut sizes = Vec::new();
        let mut page = 50_000;
        for _ in 0..12 {
            bubbles.note(PageIndex(page));
            pages.mark(page);
            let all = offered(&mut bubbles, &mut pages);
            sizes.push(all.len());
            page = *all.iter().max().unwrap() + 1;
        }
        assert!(sizes.windows(2).skip(1).all(|pair| pair[1] >= pair[0]), "{sizes:?}");
        assert!(sizes[11] >= 1000, "{sizes:?}");
        assert!(pages.is_left(50_000 - FIRST - 1), "nothing asked for what lies below");
    }

    #[test]
    fn the_ends_of_ram_are_respected() {
        let (mut bubbles, mut pages) = (Bubbles::new(PageCount(70)), Pages::new(70));
        for page in [0, 69, 3, 66] {
            bubbles.note(PageIndex(page));
            assert!(offered(&mut bubbles, &mut pages).iter().all(|page| *page < 70));
        }
    }

    #[test]
    fn the_oldest_bubble_gives_way() {
        let (mut bubbles, mut pages) = (Bubbles::new(PageCount(1 << 20)), Pages::new(1 << 20));
        (0..=MOST as u64).for_each(|index| bubbles.note(PageIndex(index * 10_000 + 5_000)));
        let all = offered(&mut bubbles, &mut pages);
        assert!(!all.contains(&5_001) && all.contains(&15_001), "{}", all.len());
        assert!(all[0].abs_diff(MOST as u64 * 10_000 + 5_000) <= FIRST, "the latest first");
    }
}
