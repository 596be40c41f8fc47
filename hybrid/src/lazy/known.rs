//! The working set of earlier restores, and where in it a page is.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::OnceLock;

use switchover_image::layout::CHUNK_PAGES;
use switchover_image::working_set::{Recorded, WorkingSet};
use switchover_wire::types::PageIndex;

/// Recorded pages of one chunk that take longer one by one than the whole chunk does, some 6 µs each.
const DENSE: usize = CHUNK_PAGES / 4;

/// Recorded pages in order.
#[derive(Debug)]
pub struct Known {
    set: WorkingSet,
    /// Made when there is time for it: until then no page has a place.
    sorted: OnceLock<Sorted>,
}

#[derive(Debug)]
struct Sorted {
    /// Pages with their places in the order, sorted by page.
    places: Box<[(u64, usize)]>,
    /// Chunks of which so much is recorded that they had better be brought whole.
    dense: HashSet<u64>,
}

impl Known {
    pub fn new(set: WorkingSet) -> Self {
        Self { set, sorted: OnceLock::new() }
    }

    pub fn set(&self) -> &WorkingSet {
        &self.set
    }

    /// Sorts, so that places can be told, and dense chunks.
    pub fn sort(&self) {
        self.sorted.get_or_init(|| {
            let mut places: Box<[_]> = (0..).zip(self.set.pages()).map(|(at, known)| (known.page.0, at)).collect();
            places.sort_unstable();
            let mut counts = HashMap::new();
            places.iter().for_each(|(page, _)| *counts.entry(page / CHUNK_PAGES as u64).or_insert(0) += 1);
            let dense = counts.into_iter().filter(|(_, count)| *count >= DENSE).map(|(chunk, _)| chunk).collect();
            Sorted { places, dense }
        });
    }

    /// Where in the order `page` is.
    pub fn place_of(&self, page: PageIndex) -> Option<usize> {
        let places = &self.sorted.get()?.places;
        places.binary_search_by_key(&page.0, |(page, _)| *page).ok().map(|at| places[at].1)
    }

    /// Whether chunk `number` had better be brought whole.
    pub fn is_dense(&self, number: u64) -> bool {
        self.sorted.get().is_some_and(|sorted| sorted.dense.contains(&number))
    }

    /// Those at `places`, as far as there are any.
    pub fn at(&self, places: Range<usize>) -> &[Recorded] {
        let pages = self.set.pages();
        let end = places.end.min(pages.len());
        &pages[places.start.min(end)..end]
    }
}
