//! What sets of pages cost, above all those that are looked at inside the blackout: a bitmap of 64 GiB of guest.

use std::hint::black_box;

use switchover_benches::{show, time};
use switchover_precopy::bitmap::{AtomicPageBitmap, PageBitmap};
use switchover_precopy::heat::Heat;
use switchover_wire::bitmap::{decode, encode};
use switchover_wire::types::{PageCount, PageIndex};

/// 64 GiB of guest: 2 MiB of bitmap.
const PAGES: PageCount = PageCount(1 << 24);
/// KiB of bitmap.
const KIB: u64 = PAGES.0 / 8 / 1024;

fn main() {
    // Written first: memory that never was is one zero page over and over, and that page is in the cache.
    let mut empty = PageBitmap::full(PAGES);
    black_box(&mut empty).clear();
    let sets = [
        ("empty", empty),
        ("full", PageBitmap::full(PAGES)),
        ("one page in 100,000", every(100_000)),
        ("one page in 1000", every(1000)),
        ("every other page", every(2)),
    ];
    let sum = |set: &PageBitmap| black_box(set.words()).iter().fold(0, |all: u64, word| all.wrapping_add(*word));
    show("plain sum of the words", "KiB", &time(KIB, || (), || sum(&sets[0].1)));
    for (name, set) in &sets {
        let (words, bytes) = (set.words(), encode(set.words()));
        println!("{name}: {} pages, {} bytes on the wire", set.count().0, bytes.len());
        show("  encode", "KiB", &time(KIB, || (), || encode(black_box(words))));
        show("  decode", "KiB", &time(KIB, || (), || decode(black_box(&bytes), words.len())));
        show("  count", "KiB", &time(KIB, || (), || black_box(set).count()));
        show("  walk the pages", "KiB", &time(KIB, || (), || black_box(set).iter().map(|page| page.0).sum::<u64>()));
        let runs = || black_box(set).runs().map(|(_, count)| count.0).sum::<u64>();
        show("  walk the runs", "KiB", &time(KIB, || (), runs));
        let shared = AtomicPageBitmap::new(PAGES);
        let take = || (0..shared.len_words()).map(|index| shared.take(index)).filter(|word| *word != 0).count();
        show("  take from the shared set", "KiB", &time(KIB, || shared.unite(set), take));
        let mut heat = Heat::new(PAGES);
        show("  note a round's heat", "KiB", &time(KIB, || (), || heat.note_round(black_box(set))));
        show("  the 4096 hottest", "KiB", &time(KIB, || (), || heat.hottest(black_box(set), 4096)));
    }
}

/// The first page of every `step`.
fn every(step: usize) -> PageBitmap {
    let mut set = PageBitmap::new(PAGES);
    for page in (0..PAGES.0).step_by(step) {
        set.insert(PageIndex(page));
    }
    set
}
