//! What it costs to notice damage: the checksum of a header, a page and a frame, and a page's digest.

use std::hint::black_box;

use switchover_benches::{show, time};
use switchover_pager::digest::MemoryDigest;
use switchover_wire::checksum::Checksum;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex, SessionId};

/// Bytes that are summed up in each repetition: 16 MiB.
const BYTES: usize = 16 << 20;

fn main() {
    let bytes: Vec<u8> =
        (0_u32..).map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()[3]).take(BYTES).collect();
    // A frame stays in the cache, as it does between its reception and its check.
    for (what, length) in [
        ("a header of 24 bytes", 24),
        ("a header of 40 bytes", 40),
        ("a page", PAGE_SIZE),
        ("a frame of 64 pages", 64 * PAGE_SIZE),
    ] {
        let steps = (BYTES / length / 4) as u64;
        let sum = || (0..steps).fold(0, |seen, _| seen ^ of(black_box(&bytes[..length])));
        show(&format!("CRC-32 of {what}, in the cache"), "sum", &time(steps, || (), sum));
    }
    let frames = || bytes.chunks_exact(64 * PAGE_SIZE).fold(0, |seen, frame| seen ^ of(frame));
    show("CRC-32 of a frame of 64 pages, out of memory", "sum", &time((BYTES / PAGE_SIZE / 64) as u64, || (), frames));

    let pages = bytes.as_chunks::<PAGE_SIZE>().0;
    let digest = MemoryDigest::new(SessionId([1; 16]), PageCount(pages.len() as u64));
    let all = || (0..).map(PageIndex).zip(pages).for_each(|(page, bytes)| digest.add(page, bytes));
    show("digest of a page, out of memory", "page", &time(pages.len() as u64, || (), all));
    let zeros = || (0..pages.len() as u64).for_each(|page| digest.add_zero(PageIndex(page)));
    show("digest of a page that is known to be zero", "page", &time(pages.len() as u64, || (), zeros));
}

fn of(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(Checksum::of([bytes]).to_bytes())
}
