//! The chunk around each of the latest faults.

use switchover_wire::types::PageIndex;

use super::{Left, Looks, Step};
use crate::sent::ChunkIndex;

/// Faults remembered. Older ones give way: the latest matter most.
const RECENT_FAULTS: usize = 64;

/// The latest faults' chunks, in a ring.
#[derive(Debug)]
pub struct Around {
    chunks: [ChunkIndex; RECENT_FAULTS],
    /// Where the oldest is, and how many there are.
    oldest: usize,
    count: usize,
    latest_first: bool,
}

impl Around {
    /// No faults.
    pub const fn new(latest_first: bool) -> Self {
        Self { chunks: [ChunkIndex(0); RECENT_FAULTS], oldest: 0, count: 0, latest_first }
    }

    /// Remembers a fault.
    pub fn note(&mut self, page: PageIndex) {
        let end = (self.oldest + self.count) % RECENT_FAULTS;
        self.chunks[end] = ChunkIndex::of(page);
        if self.count == RECENT_FAULTS {
            self.oldest = (self.oldest + 1) % RECENT_FAULTS;
        } else {
            self.count += 1;
        }
    }

    /// What is left of the next chunk.
    pub fn step(&mut self, looks: &mut Looks<'_, impl Left>) -> Option<Step> {
        while looks.more() && self.count > 0 {
            self.count -= 1;
            let at = if self.latest_first { (self.oldest + self.count) % RECENT_FAULTS } else { self.oldest };
            if !self.latest_first {
                self.oldest = (self.oldest + 1) % RECENT_FAULTS;
            }
            let step = looks.wanted(Step { chunk: self.chunks[at], pages: u64::MAX });
            if step.is_some() {
                return step;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Pages;
    use super::*;

    fn order(around: &mut Around, pages: &Pages) -> Vec<u64> {
        let mut looks = Looks { left: pages, spent: 0 };
        std::iter::from_fn(|| around.step(&mut looks)).map(|step| step.chunk.0).collect()
    }

    #[test]
    fn old_faults_give_way_to_new_ones() {
        let pages = Pages::new(64 * 1000);
        let note_all = |around: &mut Around| (0..1000).for_each(|chunk| around.note(PageIndex(chunk * 64 + 5)));
        let kept: Vec<_> = (1000 - RECENT_FAULTS as u64..1000).collect();
        let mut around = Around::new(false);
        note_all(&mut around);
        assert_eq!(order(&mut around, &pages), kept);
        let mut around = Around::new(true);
        note_all(&mut around);
        assert_eq!(order(&mut around, &pages), kept.into_iter().rev().collect::<Vec<_>>());
    }
}
