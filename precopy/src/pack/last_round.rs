//! Packing what the handoff left, with the guest paused.

use std::time::Duration;

use switchover_pager::source::ChunkEncoder;
use switchover_wire::frame::bulk::FrameFlags;
use switchover_wire::types::{PAGE_SIZE, PageIndex};

use super::Packer;

/// A lane's packer after the handoff. It goes on with what it has measured and kept, but refers to no other page: the guest may
/// write that one at any moment, at the destination.
pub struct LastRound {
    packer: Packer,
    round: u32,
}

impl LastRound {
    /// The packer of a lane whose rounds have ended; what follows counts as round `round`.
    #[must_use]
    pub fn new(mut packer: Packer, round: u32) -> Self {
        packer.begin_last_round();
        Self { packer, round }
    }
}

impl ChunkEncoder for LastRound {
    fn encode(
        &mut self,
        first: PageIndex,
        data: u64,
        zero: u64,
        read: &mut dyn FnMut(PageIndex, &mut [u8; PAGE_SIZE]),
    ) -> Option<&[u8]> {
        if !self.packer.wants(self.round) {
            return None;
        }
        self.packer.pack(first, data, zero, FrameFlags::default().bits(), read).map(|packed| packed.bytes)
    }

    fn sent(&mut self, bytes: u64, elapsed: Duration) {
        self.packer.sent(bytes, elapsed);
    }
}
