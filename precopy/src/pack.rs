//! How a lane sends its next chunk: as it is, or packed.

use std::sync::Arc;
use std::time::Duration;

use switchover_wire::types::{PAGE_SIZE, PageIndex};

/// Which encodings a migration may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Compression {
    /// None but zero pages, whatever the link.
    Off,
    /// Each lane chooses, by what it measures, among all of them.
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

impl Default for PackSettings {
    fn default() -> Self {
        Self { compression: Compression::Adaptive, zstd_level: 1, delta_cache_bytes: 64 << 20, same_as: true }
    }
}

/// What all lanes of a migration know of the versions that the destination holds.
#[derive(Debug, Default)]
pub struct SentVersions {}

/// How often each encoding was used, and what it saved. Sums over the lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PackCounts {
    /// Pages sent as they are.
    pub raw: u64,
    /// Pages sent with LZ4.
    pub lz4: u64,
    /// Pages sent with zstd.
    pub zstd: u64,
    /// Pages sent as a difference.
    pub delta: u64,
    /// Pages sent as a reference to another.
    pub same: u64,
    /// Bytes of all these before encoding.
    pub bytes_in: u64,
    /// And after it.
    pub bytes_out: u64,
}

impl PackCounts {
    /// Adds another lane's.
    pub fn add(&mut self, other: &Self) {
        self.raw += other.raw;
        self.lz4 += other.lz4;
        self.zstd += other.zstd;
        self.delta += other.delta;
        self.same += other.same;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
    }
}

/// A packed chunk, ready to be sent in one piece.
#[derive(Debug)]
pub struct Packed<'a> {
    /// Frame header, table and bodies.
    pub bytes: &'a [u8],
    /// Pages of other chunks that the frame refers to: they must not be sent anew before it is acknowledged.
    pub pinned: &'a [PageIndex],
}

/// One lane's packer.
#[derive(Debug)]
pub struct Packer {
    counts: PackCounts,
}

impl Packer {
    /// A packer for one lane; all lanes share `versions`.
    #[must_use]
    pub fn new(_settings: PackSettings, _versions: Arc<SentVersions>) -> Self {
        Self { counts: PackCounts::default() }
    }

    /// Whether the next chunk, in round `round` (counted from 1), should be packed rather than sent as it is.
    #[must_use]
    pub fn wants(&mut self, _round: u32) -> bool {
        false
    }

    /// Packs the pages of `data` (bit i: page `first + i`), each read once with `read`, and notes those of `zero`.
    /// `flags` go into the header. `None` where it came out no smaller than the pages: what was read must then be thrown
    /// away, and the chunk sent as it is (the caller then calls [`sent_as_is`](Self::sent_as_is)).
    pub fn pack(
        &mut self,
        _first: PageIndex,
        _data: u64,
        _zero: u64,
        _flags: u8,
        _read: &mut dyn FnMut(PageIndex, &mut [u8; PAGE_SIZE]),
    ) -> Option<Packed<'_>> {
        None
    }

    /// A chunk went as it is: no difference can be sent against these pages until they are packed again.
    pub fn sent_as_is(&mut self, _first: PageIndex, _data: u64, _zero: u64) {}

    /// `bytes` of a frame took `elapsed` to be handed to the socket, waiting for a rate limit included.
    pub fn sent(&mut self, _bytes: u64, _elapsed: Duration) {}

    /// What it did so far.
    #[must_use]
    pub fn counts(&self) -> PackCounts {
        self.counts
    }
}

impl SentVersions {
    /// Versions for a RAM of this size.
    #[must_use]
    pub fn new(_settings: PackSettings) -> Arc<Self> {
        Arc::new(Self {})
    }

    /// The destination has processed the frame with these pages: they may be referred to.
    pub fn acknowledged(&self, _first: PageIndex, _data: u64, _pinned: &[PageIndex]) {}

    /// Whether `page` is referred to by a frame that is under way, so that it must not be sent anew yet.
    #[must_use]
    pub fn is_pinned(&self, _page: PageIndex) -> bool {
        false
    }
}
