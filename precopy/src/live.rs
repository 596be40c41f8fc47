//! Reading memory that the guest is writing.
//!
//! The one unsafe module of this crate. What is read here may be torn: half of it from before a write and half from after.
//! That is harmless, because pages are read only after they were rearmed: a write that was missed is noted, and the page is
//! sent again.
//!
//! Memory is read through the alias, a mapping that nobody watches, and only with atomic loads, here and where a lane is sealed, or by the kernel, so that a
//! write at the same time is no undefined behaviour.

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};

use switchover_pager::ram::Ram;
use switchover_pager::runs::{CHUNK_LEN, runs};
use switchover_pager::sent::ChunkIndex;
use switchover_wire::ring::{RingError, Stream};
use switchover_wire::types::{PAGE_SIZE, PageIndex};

const WORDS: usize = PAGE_SIZE / 8;
/// Words that are looked at before each early end.
const STRIDE: usize = 32;

/// Whether all of `page` is zero. Past the end of RAM everything is.
pub fn is_zero(ram: &Ram, page: PageIndex) -> bool {
    let Some(words) = words_of(ram, page) else { return true };
    // Pages that are not zero seldom are at their ends.
    let load = |index: usize| words[index].load(Ordering::Relaxed);
    if load(0) | load(WORDS - 1) | load(WORDS / 2) != 0 {
        return false;
    }
    words
        .chunks_exact(STRIDE)
        .all(|stride| stride.iter().fold(0, |seen, word| seen | word.load(Ordering::Relaxed)) == 0)
}

/// Sends `header`, and behind it the pages of `chunk` with a bit in `data`, straight from where they lie.
pub fn send(ram: &Ram, stream: &mut Stream, header: &[u8], chunk: ChunkIndex, data: u64) -> Result<(), RingError> {
    // A chunk has at most 32 runs: every other page.
    let mut parts = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 1 + CHUNK_LEN / 2];
    parts[0] = libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() };
    let mut used = 1;
    for (bit, count) in runs(data) {
        let Some(start) = ram.alias_of(PageIndex(chunk.first().0 + u64::from(bit))) else {
            return Err(RingError::Io { operation: "send", source: io::ErrorKind::InvalidInput.into() });
        };
        parts[used] = libc::iovec { iov_base: start.cast(), iov_len: count as usize * PAGE_SIZE };
        used += 1;
    }
    // SAFETY: the header is borrowed for the call. The other parts are runs of pages within RAM (a chunk's bits end with
    // RAM, and each run's first page was checked), in the alias, which `ram` keeps mapped; the guest may write them
    // meanwhile, and torn content is allowed: see the head of this file.
    unsafe { stream.send_all_raw(&mut parts[..used]) }.map(drop)
}

/// Sends bytes of ours.
pub fn send_bytes(stream: &mut Stream, bytes: &[u8]) -> Result<(), RingError> {
    stream.send_all(&[IoSlice::new(bytes)]).map(drop)
}

fn words_of(ram: &Ram, page: PageIndex) -> Option<&[AtomicU64; WORDS]> {
    let start = ram.alias_of(page)?;
    // SAFETY: a whole page of the alias, which `ram` keeps mapped for as long as it is borrowed; its address is aligned for
    // any integer, every bit pattern is a number, and all that Rust does with it is atomic.
    Some(unsafe { &*start.cast::<[AtomicU64; WORDS]>() })
}

#[cfg(test)]
mod tests {
    use switchover_wire::types::PageCount;

    use super::*;

    #[test]
    fn a_page_is_read_as_it_lies_there() {
        let ram = Ram::new(PageCount(2)).unwrap();
        assert!(is_zero(&ram, PageIndex(1)));
        for at in [0, 7, 8, 100, 2048, 4095] {
            // SAFETY: the mapping is live and this test's own.
            unsafe { ram.alias_of(PageIndex(1)).unwrap().add(at).write(9) };
            assert!(!is_zero(&ram, PageIndex(1)), "byte {at}");
            let mut bytes = [1; PAGE_SIZE];
            assert!(ram.copy_page(PageIndex(1), &mut bytes) && !ram.copy_page(PageIndex(2), &mut bytes));
            assert!((0..PAGE_SIZE).all(|index| bytes[index] == if index == at { 9 } else { 0 }));
            // SAFETY: as above.
            unsafe { ram.alias_of(PageIndex(1)).unwrap().add(at).write(0) };
        }
    }
}
