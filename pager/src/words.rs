//! Tables with an entry for every page, or for every 64.

use crate::sync::{AtomicU8, AtomicU64, Ordering};

/// A bit for each of so many pages, in words of 64.
pub fn bits_for(pages: u64) -> Box<[AtomicU64]> {
    let words: Box<[AtomicU64]> = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
    // Written now, which changes nothing but that the memory is there: fresh memory that is all zero comes from the kernel page by
    // page, with a fault for each, and the first to touch it would be the handoff.
    words.iter().for_each(|word| _ = word.fetch_or(0, Ordering::Relaxed));
    words
}

/// A byte for each of so many pages.
pub fn bytes_for(pages: u64) -> Box<[AtomicU8]> {
    let bytes: Box<[AtomicU8]> = (0..pages).map(|_| AtomicU8::new(0)).collect();
    // As above; a byte a cache line is enough to touch every page of it.
    bytes.iter().step_by(64).for_each(|byte| _ = byte.fetch_or(0, Ordering::Relaxed));
    bytes
}
