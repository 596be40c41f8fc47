//! How guest RAM is divided among several userfaultfds.
//!
//! Each page belongs to one *shard*: one userfaultfd, one fault thread, one fault lane. Shards take turns, stripe by stripe, so
//! that a hot region of some megabytes keeps all of them busy; contiguous parts would leave it to one.
//!
//! ```text
//!   RAM     │ stripe 0 │ stripe 1 │ stripe 2 │ stripe 3 │ stripe 4 │ …
//!   shard   │    0     │    1     │    2     │    0     │    1     │ …
//! ```
//!
//! A stripe is a mapping of its own in the kernel's eyes, as its neighbours' faults go elsewhere. Hence `MOST_STRIPES`; and
//! hence `LEAST_STRIPE`, because no huge page can lie in two mappings. It is also a multiple of a bulk chunk, so that the runs
//! that bulk lanes map are whole.

use switchover_wire::types::{PageCount, PageIndex};

/// 2 MiB: a huge page of x86-64, or of aarch64 with pages of 4 KiB. Smaller stripes only where RAM has less for each shard.
const LEAST_STRIPE: u64 = 512;

/// How many mappings guest RAM may become. A process may have 65,530 (`vm.max_map_count`), and finding one among a thousand takes
/// the kernel the steps of a tree.
const MOST_STRIPES: u64 = 1024;

/// RAM, divided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stripes {
    pages: PageCount,
    shards: u64,
    /// Pages of a stripe; the last one may have fewer.
    stripe: u64,
}

impl Stripes {
    /// RAM of `pages` for this many shards, one at least.
    #[must_use]
    pub fn new(pages: PageCount, shards: u8) -> Self {
        let shards = u64::from(shards.max(1));
        if shards == 1 {
            return Self { pages, shards, stripe: pages.0.max(1) };
        }
        let large = pages.0.div_ceil(MOST_STRIPES).next_power_of_two().max(LEAST_STRIPE);
        // The largest power of two that leaves none without a page, where that can be.
        let fair = (pages.0 / shards).checked_ilog2().map_or(1, |power| 1 << power);
        Self { pages, shards, stripe: large.min(fair) }
    }

    /// How many shards.
    #[must_use]
    pub fn shards(&self) -> usize {
        usize::try_from(self.shards).unwrap_or(usize::MAX)
    }

    /// How many stripes.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.pages.0.div_ceil(self.stripe)
    }

    /// The stripe that `page` lies in.
    #[must_use]
    pub const fn stripe_of(&self, page: PageIndex) -> u64 {
        page.0 / self.stripe
    }

    /// The shard that stripe `index` belongs to.
    #[must_use]
    pub fn owner(&self, index: u64) -> usize {
        usize::try_from(index % self.shards).unwrap_or(usize::MAX)
    }

    /// The shard that `page` belongs to.
    #[must_use]
    pub fn shard_of(&self, page: PageIndex) -> usize {
        self.owner(self.stripe_of(page))
    }

    /// The pages of stripe `index`, none past the end.
    #[must_use]
    pub fn range(&self, index: u64) -> (PageIndex, PageCount) {
        let first = index.saturating_mul(self.stripe).min(self.pages.0);
        (PageIndex(first), PageCount((self.pages.0 - first).min(self.stripe)))
    }

    /// A run of pages, cut where stripes meet: each piece with its stripe.
    pub fn cut(&self, first: PageIndex, count: PageCount) -> impl Iterator<Item = (u64, PageIndex, PageCount)> + use<> {
        let (stripe, end) = (self.stripe, first.0 + count.0);
        let mut at = first.0;
        std::iter::from_fn(move || {
            let piece = (at < end).then(|| {
                let index = at / stripe;
                (index, PageIndex(at), PageCount(end.min((index + 1).saturating_mul(stripe)) - at))
            });
            at += piece.map_or(0, |(_, _, pages)| pages.0);
            piece
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 18;

    #[test]
    fn one_shard_has_it_in_one_piece() {
        let stripes = Stripes::new(PageCount(5003), 1);
        assert_eq!((stripes.count(), stripes.range(0)), (1, (PageIndex(0), PageCount(5003))));
        assert_eq!(Stripes::new(PageCount(8), 0), Stripes::new(PageCount(8), 1));
    }

    #[test]
    fn stripes_are_huge_pages_and_not_too_many() {
        for (pages, stripe) in
            [(GIB / 2, 512), (2 * GIB, 512), (2 * GIB + 1, 1024), (64 * GIB, 16384), (4096 * GIB, GIB << 2)]
        {
            let stripes = Stripes::new(PageCount(pages), 4);
            assert_eq!(stripes.stripe, stripe, "{pages} pages");
            assert!(stripes.count() <= MOST_STRIPES, "{pages} pages");
        }
    }

    #[test]
    fn every_page_has_one_owner_and_every_shard_its_share() {
        for (pages, shards) in [(5003, 3), (64, 4), (8, 3), (4096, 16), (2, 5), (1, 2), (100_000, 7)] {
            let stripes = Stripes::new(PageCount(pages), shards);
            let mut owned = vec![0; usize::from(shards)];
            let mut next = 0;
            for index in 0..stripes.count() {
                let (first, count) = stripes.range(index);
                assert!(first.0 == next && count.0 > 0);
                next += count.0;
                owned[stripes.owner(index)] += count.0;
                for page in [first.0, first.0 + count.0 - 1].map(PageIndex) {
                    assert_eq!((stripes.stripe_of(page), stripes.shard_of(page)), (index, stripes.owner(index)));
                }
            }
            assert_eq!(next, pages);
            assert!(u64::from(shards) > pages || owned.iter().all(|pages| *pages > 0), "{pages} pages: {owned:?}");
        }
    }

    #[test]
    fn a_run_is_cut_where_stripes_meet_and_loses_nothing() {
        let stripes = Stripes::new(PageCount(64), 4);
        assert_eq!(stripes.stripe, 16);
        for first in 0..64 {
            for end in first..=64 {
                let mut next = first;
                for (index, piece, count) in stripes.cut(PageIndex(first), PageCount(end - first)) {
                    let (start, length) = stripes.range(index);
                    assert_eq!(piece.0, next);
                    assert!(count.0 > 0 && piece.0 >= start.0 && piece.0 + count.0 <= start.0 + length.0);
                    next += count.0;
                }
                assert_eq!(next, end);
            }
        }
        assert_eq!(stripes.cut(PageIndex(10), PageCount(30)).count(), 3);
    }
}
