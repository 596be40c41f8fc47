//! The working set of earlier restores, and where in it a page is.

use std::ops::Range;
use std::sync::OnceLock;

use switchover_image::working_set::{Recorded, WorkingSet};
use switchover_wire::types::PageIndex;

/// Recorded pages in order.
#[derive(Debug)]
pub struct Known {
    set: WorkingSet,
    /// Pages with their places in the order, sorted by page. Made when there is time for it: until then no page has a place.
    places: OnceLock<Box<[(u64, usize)]>>,
}

impl Known {
    pub fn new(set: WorkingSet) -> Self {
        Self { set, places: OnceLock::new() }
    }

    pub fn set(&self) -> &WorkingSet {
        &self.set
    }

    /// Sorts, so that places can be told.
    pub fn sort(&self) {
        self.places.get_or_init(|| {
            let mut places: Box<[_]> = (0..).zip(self.set.pages()).map(|(at, known)| (known.page.0, at)).collect();
            places.sort_unstable();
            places
        });
    }

    /// Where in the order `page` is.
    pub fn place_of(&self, page: PageIndex) -> Option<usize> {
        let places = self.places.get()?;
        places.binary_search_by_key(&page.0, |(page, _)| *page).ok().map(|at| places[at].1)
    }

    /// Those at `places`, as far as there are any.
    pub fn at(&self, places: Range<usize>) -> &[Recorded] {
        let pages = self.set.pages();
        let end = places.end.min(pages.len());
        &pages[places.start.min(end)..end]
    }
}
