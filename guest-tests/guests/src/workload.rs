//! Which page a vCPU visits next.

use crate::params::Params;
use crate::rng::{Shuffle, below, mix, percent};

/// A page to visit, and whether to write it.
#[derive(Clone, Copy)]
pub struct Choice {
    /// Its number among the vCPU's pages.
    pub page: usize,
    /// Whether the visit writes; it verifies in any case.
    pub write: bool,
}

/// A way of going through pages.
pub trait Workload {
    /// Least ns between two visits, unless `pace` says otherwise.
    const PACE_NS: u64 = 0;
    /// Whether the vCPU sleeps until the next tick after each visit.
    const SLEEPS: bool = false;

    /// One vCPU's, which has `pages` pages (at least 64).
    fn new(params: &Params, pages: usize) -> Self;

    /// Chooses. `random` is different every time; its lower half is not to be relied on but through [`percent`].
    fn next(&mut self, random: u64) -> Choice;
}

/// Writes every page in order, over and over.
pub struct Sequential {
    pages: usize,
    next: usize,
}

impl Workload for Sequential {
    fn new(_: &Params, pages: usize) -> Self {
        Self { pages, next: 0 }
    }

    #[inline]
    fn next(&mut self, _: u64) -> Choice {
        let page = self.next;
        self.next = if page + 1 == self.pages { 0 } else { page + 1 };
        Choice { page, write: true }
    }
}

/// Writes pages chosen uniformly.
pub struct Random {
    pages: usize,
}

impl Workload for Random {
    fn new(_: &Params, pages: usize) -> Self {
        Self { pages }
    }

    #[inline]
    fn next(&mut self, random: u64) -> Choice {
        Choice { page: below(random, self.pages), write: true }
    }
}

/// Writes few pages often and the others seldom, or reads them. The hot ones are scattered over the working set.
pub struct HotSet {
    pages: usize,
    hot: usize,
    hot_visits: u64,
    writes: u64,
    order: Shuffle,
}

impl Workload for HotSet {
    #[expect(clippy::cast_possible_truncation, reason = "a percentage")]
    fn new(params: &Params, pages: usize) -> Self {
        let hot = (pages * params.hot as usize / 100).clamp(1, pages - 1);
        let (hot_visits, writes) = (params.hot_visits, params.writes.unwrap_or(100));
        Self { pages, hot, hot_visits, writes, order: Shuffle::new(pages, params.seed) }
    }

    #[inline]
    fn next(&mut self, random: u64) -> Choice {
        let rank = if percent(random, self.hot_visits) {
            below(random, self.hot)
        } else {
            self.hot + below(random, self.pages - self.hot)
        };
        // Whether it writes has nothing to do with whether the page is hot.
        Choice { page: self.order.apply(rank), write: percent(mix(random), self.writes) }
    }
}

/// Reads pages chosen uniformly, and writes a few of them.
pub struct Reader {
    pages: usize,
    writes: u64,
}

impl Workload for Reader {
    fn new(params: &Params, pages: usize) -> Self {
        Self { pages, writes: params.writes.unwrap_or(5) }
    }

    #[inline]
    fn next(&mut self, random: u64) -> Choice {
        Choice { page: below(random, self.pages), write: percent(random, self.writes) }
    }
}

/// Sleeps, and writes one page a tick.
pub struct Idle(Random);

impl Workload for Idle {
    const SLEEPS: bool = true;

    fn new(params: &Params, pages: usize) -> Self {
        Self(Random::new(params, pages))
    }

    #[inline]
    fn next(&mut self, random: u64) -> Choice {
        self.0.next(random)
    }
}

/// Writes each page once, in a shuffled order. A few pages are set apart, and those it visits when it is through, so
/// that it goes on reporting.
pub struct Once {
    order: Shuffle,
    pages: usize,
    next: usize,
}

const SET_APART: usize = 16;

impl Workload for Once {
    /// 256 MiB take 6.5 s: long enough to be moved meanwhile.
    const PACE_NS: u64 = 100_000;

    fn new(params: &Params, pages: usize) -> Self {
        let pages = pages - SET_APART;
        Self { order: Shuffle::new(pages, params.seed), pages, next: 0 }
    }

    #[inline]
    fn next(&mut self, random: u64) -> Choice {
        let page = if self.next < self.pages {
            self.next += 1;
            self.order.apply(self.next - 1)
        } else {
            self.pages + below(random, SET_APART)
        };
        Choice { page, write: true }
    }
}
