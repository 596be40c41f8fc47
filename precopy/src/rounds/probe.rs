//! A sample of RAM that tells of the rest of it.

use switchover_wire::types::{PageCount, PageIndex};

use crate::bitmap::PageBitmap;

/// Odd, and far from any simple ratio: 2^32 over the golden ratio.
const STEP: u64 = 0x9E37_79B9;

/// About `count` single pages, evenly spread over a RAM of `pages`: one of each stretch of equal length, at a place in it that
/// follows no pattern that a guest might have. All of them, where there are no more.
#[must_use]
pub fn spread(pages: PageCount, count: u64) -> PageBitmap {
    if pages.0 <= count {
        return PageBitmap::full(pages);
    }
    let mut sample = PageBitmap::new(pages);
    let stretch = pages.0 / count.max(1);
    for index in 0..pages.0 / stretch {
        let place = ((index.wrapping_mul(STEP) & 0xFFFF_FFFF) * stretch) >> 32;
        sample.insert(PageIndex(index * stretch + place));
    }
    sample
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stretch_has_its_page_at_a_place_of_its_own() {
        let sample = spread(PageCount(65_536), 512);
        assert_eq!(sample.count().0, 512);
        let places: Vec<u64> = sample.iter().map(|page| page.0).collect();
        assert!(places.iter().zip(0_u64..).all(|(page, index)| page / 128 == index));
        for low in 0..8 {
            // Whichever page of eight a guest writes, its share of them is in the sample.
            let found = places.iter().filter(|page| **page % 8 == low).count();
            assert!((48..80).contains(&found), "{found} pages are {low} modulo 8");
        }
    }

    #[test]
    fn a_small_ram_is_its_own_sample() {
        assert_eq!(spread(PageCount(100), 512).count().0, 100);
        assert_eq!(spread(PageCount(0), 512).count().0, 0);
        assert!(spread(PageCount(1000), 512).count().0 >= 500);
        assert_eq!(spread(PageCount(1000), 0).count().0, 1);
    }
}
