//! Memory for one chunk, where a disk takes it without a copy.

use std::io;

use memmap2::MmapMut;

use crate::layout::CHUNK_LEN;

/// A chunk's bytes, at the start of a page, as direct I/O needs it.
pub(crate) struct ChunkBuffer(MmapMut);

impl ChunkBuffer {
    /// A new one.
    pub(crate) fn new() -> io::Result<Self> {
        MmapMut::map_anon(CHUNK_LEN).map(Self)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
