//! How a lane sends its next chunk: as it is, or packed.
//!
//! Sending a chunk as it is costs next to no work: the kernel takes it from the guest's memory. Packing it costs a reading
//! of each page and an encoding, and saves bytes. What that is worth, each lane's [`Packer`] measures: the nanoseconds and
//! the bytes that each encoding takes of the pages at hand, and the nanoseconds that a byte takes on its link. It sends
//! each page in the way whose sum is the least. What is not in use is tried on a page now and then, more and more rarely
//! while it does not pay, and soon again when the link has changed.
//!
//! ```text
//!   chunk ─▶ wants? ─no──────────────────────────────────────▶ as it is ─▶ sent_as_is ─▶ sent
//!               └yes─▶ pack: read ─▶ delta? ─▶ same? ─▶ lz4, zstd, raw ─▶ Packed ─────▶ sent
//!                                      │         │
//!                             SentVersions: pages kept, contents known, pins ◀─ acknowledged
//! ```
//!
//! Differences need the last version, so pages are kept from the second round on, which costs a reading too. Whether that
//! gains anything is known only when they are sent again: it is done at first wherever it could pay well, and goes on
//! where it does; where it does not, one chunk in many is still kept, to notice when that changes. Pages with the same
//! content are looked for likewise: always among a sixteenth of all contents, and among all where enough were found. That
//! is only done to pages that are read anyway.

mod chooser;
mod cost;
mod delta_cache;
mod last_round;
mod link;
mod packer;
mod same;
mod versions;

#[cfg(test)]
mod tests;

use std::ops::AddAssign;

pub use last_round::LastRound;
pub use packer::Packer;
use switchover_wire::encoding::Encoding;
use switchover_wire::types::{PAGE_SIZE_U64, PageCount, PageIndex};
pub use versions::SentVersions;

/// Which encodings a migration may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Compression {
    /// None but zero pages, whatever the link: no differences and no references either.
    Off,
    /// Each lane chooses, by what it measures, among all of them. Only here differences and references are used.
    #[default]
    Adaptive,
    /// Always LZ4 where it makes a page smaller.
    Lz4,
    /// Always zstd where it makes a page smaller.
    Zstd,
}

/// What may be tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackSettings {
    /// Which compression.
    pub compression: Compression,
    /// zstd's level, 1 to 20.
    pub zstd_level: i32,
    /// Bytes of pages kept as they were sent, to send differences against; 0 means no differences.
    pub delta_cache_bytes: u64,
    /// Whether pages may be sent as "the same as page X".
    pub same_as: bool,
}

impl PackSettings {
    /// For `delta_cache_bytes`: half of the guest's RAM, and no more than 1 GiB. Memory is taken only as pages are kept, and
    /// none are kept where the link is too fast for differences to pay.
    pub const AS_RAM_ALLOWS: u64 = u64::MAX;

    /// These with a size in place of [`AS_RAM_ALLOWS`](Self::AS_RAM_ALLOWS).
    #[must_use]
    pub fn for_ram(self, pages: PageCount) -> Self {
        let allowed = (pages.bytes() / 2).min(1 << 30);
        let sized = if self.delta_cache_bytes == Self::AS_RAM_ALLOWS { allowed } else { self.delta_cache_bytes };
        Self { delta_cache_bytes: sized, ..self }
    }
}

impl Default for PackSettings {
    fn default() -> Self {
        Self {
            compression: Compression::Adaptive,
            zstd_level: 1,
            delta_cache_bytes: Self::AS_RAM_ALLOWS,
            same_as: true,
        }
    }
}

/// How often each encoding was used, and what it saved. Sums over the lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PackCounts {
    /// Pages sent as they are, in packed chunks or not.
    pub raw: u64,
    /// Pages sent with LZ4.
    pub lz4: u64,
    /// Pages sent with zstd.
    pub zstd: u64,
    /// Pages sent as a difference.
    pub delta: u64,
    /// The bytes of those differences.
    pub delta_bytes: u64,
    /// Pages whose sent version was not kept, where differences were wanted.
    pub delta_misses: u64,
    /// Pages whose difference would have saved too little.
    pub delta_overflows: u64,
    /// Pages sent as a reference to another.
    pub same: u64,
    /// Bytes of all these before encoding.
    pub bytes_in: u64,
    /// And after it, with the tables that say how they are encoded.
    pub bytes_out: u64,
}

/// A packed chunk, ready to be sent in one piece.
#[derive(Debug)]
pub struct Packed<'a> {
    /// Frame header, table and bodies.
    pub bytes: &'a [u8],
    /// Pages that the frame refers to, none of its own: they must not be sent anew before it is acknowledged.
    pub pinned: &'a [PageIndex],
}

impl PackCounts {
    /// Counts a page whose sent version was looked for: whether that was kept, and how long the difference is, if that is sent.
    const fn count_delta(&mut self, kept: bool, sent_bytes: Option<usize>) {
        match sent_bytes {
            Some(bytes) => self.delta_bytes += bytes as u64,
            None if kept => self.delta_overflows += 1,
            None => self.delta_misses += 1,
        }
    }

    fn count(&mut self, encoding: Encoding) {
        self.bytes_in += PAGE_SIZE_U64;
        *match encoding {
            Encoding::Raw => &mut self.raw,
            Encoding::Lz4 => &mut self.lz4,
            Encoding::Zstd => &mut self.zstd,
            Encoding::Delta => &mut self.delta,
            Encoding::Same => &mut self.same,
        } += 1;
    }
}

impl AddAssign for PackCounts {
    fn add_assign(&mut self, other: Self) {
        self.raw += other.raw;
        self.lz4 += other.lz4;
        self.zstd += other.zstd;
        self.delta += other.delta;
        self.delta_bytes += other.delta_bytes;
        self.delta_misses += other.delta_misses;
        self.delta_overflows += other.delta_overflows;
        self.same += other.same;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
    }
}
