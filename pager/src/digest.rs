//! Digests of guest memory as it was handed off, taken on both sides and compared when all of it has arrived.
//!
//! A page's digest is 128 bits of its BLAKE3 hash, keyed by the session and the page's number; zero pages have one that needs no
//! reading. The digests of a chunk's pages are added up (exclusive or), in whatever order they come: 16 bytes for 64 pages, so that
//! what differs is known to the chunk. On the source its paused memory is read. On the destination each page is digested when its
//! bytes lie in the alias, before the guest can see it, let alone write it:
//!
//! - what comes after the handoff, between its claim and its arrival;
//! - what was here at the handoff, at the handoff: nobody runs on it then;
//! - a page that is zero and was never written here, without reading it: nobody but the kernel has made it zero.
//!
//! So a difference says that what the guest was given here is not what it left there: whatever the reason, on the way or on either
//! side. What happens to a page afterwards is its guest's business, and not looked at.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex, SessionId};

use crate::ram::Ram;
use crate::runs::CHUNK_LEN;
use crate::zero::{Holes, is_zero};

/// Bytes of a chunk's digest.
pub const DIGEST_LEN: usize = 16;

const CHUNK_PAGES: u64 = CHUNK_LEN as u64;

/// The digests of a guest's memory, chunk by chunk.
#[derive(Debug)]
pub struct MemoryDigest {
    session: SessionId,
    pages: PageCount,
    chunks: Box<[[AtomicU64; 2]]>,
}

/// A stretch of pages.
pub type PageRange = (PageIndex, PageCount);

impl MemoryDigest {
    /// Of no page yet.
    #[must_use]
    pub fn new(session: SessionId, pages: PageCount) -> Self {
        let chunks = (0..pages.0.div_ceil(CHUNK_PAGES)).map(|_| Default::default()).collect();
        Self { session, pages, chunks }
    }

    /// Of paused memory, all of which is read but for holes. `None` where it was called off meanwhile.
    #[must_use]
    pub fn of(session: SessionId, ram: &Ram, called_off: &AtomicBool) -> Option<Self> {
        let digest = Self::new(session, ram.pages());
        let mut holes = Holes::new(ram.file(), ram.pages());
        let mut bytes = Box::new([0; PAGE_SIZE]);
        for page in (0..ram.pages().0).map(PageIndex) {
            if called_off.load(Ordering::Acquire) {
                return None;
            }
            if page.0.is_multiple_of(CHUNK_PAGES) {
                crate::cpu::let_others_run();
            }
            if holes.run_from(page).0 > 0 || !ram.copy_page(page, &mut bytes) {
                digest.add_zero(page);
            } else {
                digest.add(page, &bytes);
            }
        }
        Some(digest)
    }

    /// Adds a page. Each must be added once.
    pub fn add(&self, page: PageIndex, bytes: &[u8; PAGE_SIZE]) {
        if is_zero(bytes) {
            self.add_zero(page);
        } else {
            self.add_hash(page, &blake3::keyed_hash(&self.key(page), bytes));
        }
    }

    /// Adds a page that is zero.
    pub fn add_zero(&self, page: PageIndex) {
        self.add_hash(page, &blake3::keyed_hash(&self.key(page), &[]));
    }

    /// The digests as bytes, [`DIGEST_LEN`] for each chunk.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.chunks.iter().flatten().flat_map(|half| half.load(Ordering::Acquire).to_le_bytes()).collect()
    }

    /// Where memory whose digests are `other` differs from this, the chunks that follow one another as one.
    ///
    /// # Errors
    /// When they are not of as many chunks.
    pub fn differing(&self, other: &[u8]) -> Result<Vec<PageRange>, String> {
        let own = self.to_bytes();
        if own.len() != other.len() {
            return Err(format!("{} bytes of digests were sent where {} were due", other.len(), own.len()));
        }
        let mut ranges: Vec<PageRange> = Vec::new();
        let chunks = own.chunks_exact(DIGEST_LEN).zip(other.chunks_exact(DIGEST_LEN));
        for (first, _) in (0..).step_by(CHUNK_LEN).zip(chunks).filter(|(_, (ours, theirs))| ours != theirs) {
            let pages = CHUNK_PAGES.min(self.pages.0 - first);
            match ranges.last_mut() {
                Some((start, count)) if start.0 + count.0 == first => count.0 += pages,
                _ => ranges.push((PageIndex(first), PageCount(pages))),
            }
        }
        Ok(ranges)
    }

    fn key(&self, page: PageIndex) -> [u8; blake3::KEY_LEN] {
        let mut key = [0; blake3::KEY_LEN];
        key[..16].copy_from_slice(&self.session.0);
        key[16..24].copy_from_slice(&page.0.to_le_bytes());
        key
    }

    fn add_hash(&self, page: PageIndex, hash: &blake3::Hash) {
        let index = usize::try_from(page.0 / CHUNK_PAGES).unwrap_or(usize::MAX);
        let Some(chunk) = self.chunks.get(index) else { return };
        for (half, bytes) in chunk.iter().zip(hash.as_bytes().as_chunks::<8>().0) {
            half.fetch_xor(u64::from_le_bytes(*bytes), Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId([7; 16]);
    const PAGES: PageCount = PageCount(200);

    fn ram(written: &[(u64, u8)]) -> Ram {
        let ram = Ram::new(PAGES).unwrap();
        for (page, byte) in written {
            // SAFETY: the mapping is live and this test's own.
            unsafe { ram.alias_of(PageIndex(*page)).unwrap().add(100).write(*byte) };
        }
        ram
    }

    fn of(ram: &Ram) -> MemoryDigest {
        MemoryDigest::of(SESSION, ram, &AtomicBool::new(false)).unwrap()
    }

    #[test]
    fn the_same_memory_has_the_same_digest_in_any_order() {
        let one = ram(&[(3, 1), (64, 2), (199, 3)]);
        // One page is written and zero: it is no hole.
        let other = ram(&[(3, 1), (64, 2), (199, 3), (5, 0)]);
        assert_eq!(of(&one).differing(&of(&other).to_bytes()), Ok(vec![]));
        let digest = MemoryDigest::new(SESSION, PAGES);
        let mut bytes = [0; PAGE_SIZE];
        for page in (0..PAGES.0).rev().map(PageIndex) {
            assert!(one.copy_page(page, &mut bytes));
            digest.add(page, &bytes);
        }
        assert_eq!(digest.differing(&of(&one).to_bytes()), Ok(vec![]));
    }

    #[test]
    fn what_differs_is_known_to_the_chunk() {
        let one = of(&ram(&[(3, 1), (70, 2), (199, 3)]));
        let differing = |other: &[(u64, u8)]| one.differing(&of(&ram(other)).to_bytes()).unwrap();
        let range = |first, pages| (PageIndex(first), PageCount(pages));
        assert_eq!(differing(&[(3, 1), (70, 2)]), [range(192, 8)]);
        assert_eq!(differing(&[(3, 9), (70, 9), (199, 3)]), [range(0, 128)]);
        // The same pages under each other's numbers, within a chunk too.
        assert_eq!(differing(&[(4, 1), (70, 2), (199, 3)]), [range(0, 64)]);
        assert_eq!(differing(&[(3, 1), (71, 2), (198, 3)]), [range(64, 64), range(192, 8)]);
        assert!(one.differing(&[0; 16]).is_err());
        let another = MemoryDigest::new(SessionId([8; 16]), PAGES);
        (0..PAGES.0).map(PageIndex).for_each(|page| another.add_zero(page));
        assert_eq!(of(&ram(&[])).differing(&another.to_bytes()), Ok(vec![range(0, 200)]));
    }

    #[test]
    fn it_can_be_called_off() {
        assert!(MemoryDigest::of(SESSION, &ram(&[]), &AtomicBool::new(true)).is_none());
    }
}
