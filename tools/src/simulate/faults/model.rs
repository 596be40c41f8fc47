//! What a page and a fault cost: link and pager in a few numbers.

use serde::Serialize;
use switchover_wire::frame::bulk::BulkFrame;
use switchover_wire::types::PAGE_SIZE_U64;

/// A link with a pager at either end.
///
/// ```text
///  vCPU       touch ├───────────── waits ─────────────┤├ outside ┤ goes on
///  pager             ask      delay  page  delay   wake
///  link   ──frame──frame──frame──[answer]──frame──frame──▶
/// ```
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Model {
    /// What the link carries: pushed pages and answers share it, answers first.
    pub bytes_per_second: u64,
    /// One way.
    pub delay_ns: u64,
    /// From a touch until the source has the answer on its way, without the link's delay: userfaultfd, two threads, a request.
    pub ask_ns: u64,
    /// From a page's arrival until its vCPU is woken: placement, mapping, wake-up.
    pub wake_ns: u64,
    /// How many times that both take while pages are being pushed.
    pub loaded: f64,
    /// What a fault costs the vCPU before the pager has it and after it was woken: leaving and entering the guest.
    pub outside_ns: u64,
    /// What a pushed frame costs besides its bytes.
    pub frame_ns: u64,
    /// Frames handed to the lane and not arrived: so much later than chosen a page leaves.
    pub ahead: usize,
    /// Fault lanes that the vCPUs are spread over.
    pub fault_lanes: u8,
}

impl Model {
    /// This kind of host over loopback: docs/prefetch.md says what was measured.
    pub const HERE: Self = Self {
        bytes_per_second: 1_250_000_000,
        delay_ns: 0,
        ask_ns: 40_000,
        wake_ns: 5_000,
        loaded: 1.8,
        outside_ns: 90_000,
        frame_ns: 5_000,
        ahead: 8,
        fault_lanes: 1,
    };

    /// The same link with a pager that costs nothing.
    #[must_use]
    pub const fn free_of_charge(self) -> Self {
        Self { ask_ns: 0, wake_ns: 0, outside_ns: 0, frame_ns: 0, loaded: 1.0, ..self }
    }

    /// The time that bytes take on the link.
    #[must_use]
    pub fn bytes_ns(&self, bytes: u64) -> u64 {
        let ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.max(1));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// The time of a page on the link.
    #[must_use]
    pub fn page_ns(&self) -> u64 {
        self.bytes_ns(PAGE_SIZE_U64)
    }

    /// The time of a frame of so many data pages on the link.
    #[must_use]
    pub fn frame_of_ns(&self, data_pages: u64) -> u64 {
        self.frame_ns + self.bytes_ns(BulkFrame::LEN as u64 + data_pages * PAGE_SIZE_U64)
    }

    /// A pager's step, beside a push or not.
    #[must_use]
    pub fn step_ns(&self, idle_ns: u64, pushing: bool) -> u64 {
        if pushing { super::super::bits::whole(idle_ns as f64 * self.loaded) } else { idle_ns }
    }
}
