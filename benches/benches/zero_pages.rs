//! How fast zero pages are told from others.

use std::hint::black_box;

use switchover_benches::{show, time};
use switchover_pager::ram::Ram;
use switchover_pager::zero::{Holes, is_zero};
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

/// Enough that no cache holds them: 64 MiB.
const PAGES: usize = 16_384;

fn main() {
    // Written first: memory that never was is one zero page over and over, and that page is in the cache.
    let mut pages = vec![1_u8; PAGES * PAGE_SIZE];
    black_box(&mut pages).fill(0);
    let steps = PAGES as u64;
    let count = |pages: &[u8]| pages.chunks_exact(PAGE_SIZE).filter(|page| is_zero(black_box(page))).count();

    let sum = |page: &[u8]| {
        let words = page.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word));
        words.fold(0, u64::wrapping_add)
    };
    let sums = |pages: &[u8]| pages.chunks_exact(PAGE_SIZE).map(|page| sum(black_box(page))).fold(0, u64::wrapping_add);
    show("a plain sum, out of memory", "page", &time(steps, || (), || sums(&pages)));
    show("zero, out of memory", "page", &time(steps, || (), || count(&pages)));
    let cached = vec![0_u8; PAGE_SIZE];
    let again = || (0..PAGES).filter(|_| is_zero(black_box(&cached))).count();
    show("zero, out of the cache", "page", &time(steps, || (), again));
    let again = || (0..PAGES).map(|_| sum(black_box(&cached))).fold(0, u64::wrapping_add);
    show("a plain sum, out of the cache", "page", &time(steps, || (), again));
    // The states that a scan meets most: text and data start with something, or have something before long.
    pages.chunks_exact_mut(PAGE_SIZE).for_each(|page| page[PAGE_SIZE / 2] = 1);
    show("zero but for the middle byte, out of memory", "page", &time(steps, || (), || count(&pages)));
    pages.fill(0);
    pages.chunks_exact_mut(PAGE_SIZE).for_each(|page| page[PAGE_SIZE - 1] = 1);
    show("zero but for the last byte, out of memory", "page", &time(steps, || (), || count(&pages)));
    pages.chunks_exact_mut(PAGE_SIZE).for_each(|page| page[0] = 1);
    show("not zero from the first byte on, out of memory", "page", &time(steps, || (), || count(&pages)));

    match Ram::new(PageCount(steps)) {
        Ok(ram) => {
            show("holes of an untouched memfd", "page", &time(steps, || (), || holes(&ram)));
            for page in (0..steps).step_by(2) {
                if let Some(alias) = ram.alias_of(PageIndex(page)) {
                    // SAFETY: inside the live alias of RAM that only this benchmark uses.
                    unsafe { alias.write(1) };
                }
            }
            show("holes of a memfd whose every other page is touched", "page", &time(steps, || (), || holes(&ram)));
        }
        Err(error) => println!("SKIP holes: {error}"),
    }
}

/// Walks all of `ram`, from hole to hole.
fn holes(ram: &Ram) -> u64 {
    let mut holes = Holes::new(ram.file(), ram.pages());
    let (mut page, mut found) = (0, 0);
    while page < ram.pages().0 {
        let run = holes.run_from(PageIndex(page)).0;
        found += run;
        page += run.max(1);
    }
    found
}
