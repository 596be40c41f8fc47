//! Pages to bodies.

use std::fmt;

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use zstd::zstd_safe::{CCtx, CParameter};

use super::{Page, delta, zstd_frame};
use crate::types::{PAGE_SIZE, PageIndex};

/// Encodes pages, one after another, in memory that it allocates once.
///
/// Each method appends a body to `out` and says whether it did: where the body would not take less than `limit` bytes,
/// nor less than a page, `out` is left as it was.
pub struct PageEncoder {
    zstd_level: i32,
    lz4: CompressTable,
    /// Made when it is first needed: it takes several 100 KiB.
    zstd: Option<CCtx<'static>>,
    scratch: Vec<u8>,
}

impl PageEncoder {
    /// An encoder that uses zstd at this level (1 to 22; beyond, the nearest).
    #[must_use]
    pub fn new(zstd_level: i32) -> Self {
        let room = get_maximum_output_size(PAGE_SIZE).max(zstd::compress_bound(PAGE_SIZE));
        Self { zstd_level, lz4: CompressTable::small(), zstd: None, scratch: vec![0; room] }
    }

    /// As an LZ4 block.
    pub fn lz4(&mut self, page: &Page, limit: usize, out: &mut Vec<u8>) -> bool {
        match compress_into_with_table(page, &mut self.scratch, &mut self.lz4) {
            Ok(length) => self.append(length, limit, out),
            Err(_) => false,
        }
    }

    /// As a zstd frame. Never where zstd has no memory for its work.
    pub fn zstd(&mut self, page: &Page, limit: usize, out: &mut Vec<u8>) -> bool {
        if self.zstd.is_none() {
            self.zstd = CCtx::try_create().and_then(|mut context| {
                context.set_parameter(CParameter::CompressionLevel(self.zstd_level)).is_ok().then_some(context)
            });
        }
        let Some(context) = &mut self.zstd else { return false };
        match context.compress2(&mut self.scratch[..], page) {
            // Another version of the library may write frames that hold as much, but that no decoder here would take.
            Ok(length) if zstd_frame::check(&self.scratch[..length]).is_ok() => self.append(length, limit, out),
            _ => false,
        }
    }

    /// As what changed since `old`.
    pub fn delta(&mut self, old: &Page, page: &Page, limit: usize, out: &mut Vec<u8>) -> bool {
        delta::encode(old, page, out, limit.min(PAGE_SIZE))
    }

    /// As "the same as page `other`", whose content has this hash.
    pub fn same(other: PageIndex, hash: &blake3::Hash, out: &mut Vec<u8>) {
        out.extend_from_slice(&other.0.to_le_bytes());
        out.extend_from_slice(hash.as_bytes());
    }

    fn append(&self, length: usize, limit: usize, out: &mut Vec<u8>) -> bool {
        let smaller = length < limit.min(PAGE_SIZE);
        if smaller {
            out.extend_from_slice(&self.scratch[..length]);
        }
        smaller
    }
}

impl fmt::Debug for PageEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageEncoder").field("zstd_level", &self.zstd_level).finish_non_exhaustive()
    }
}
