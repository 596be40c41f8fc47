//! A lane that carries pages, and what the pager tells its owner about it.

use std::sync::Arc;

use switchover_wire::socket::Socket;
use switchover_wire::types::LaneId;

/// The most fault lanes that a session may have. Each costs the destination a thread and a userfaultfd; where faults keep this
/// many threads busy, the link is what they wait for.
pub const FAULT_LANES_LIMIT: u8 = 16;

/// An open lane.
#[derive(Clone, Debug)]
pub struct PageLane {
    /// Its role and number.
    pub id: LaneId,
    /// Its connection, which counts what crosses it.
    pub socket: Arc<Socket>,
    /// The payloads of its frames carry checksums, and whoever receives them checks them. Needed where nothing below the lane
    /// notices what is damaged. Headers always carry theirs.
    pub checksums: bool,
}

/// What a pager tells the session that owns it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PagerEvent {
    /// Source: every page has been handed to a lane.
    AllPushed,
    /// Destination: every page is here and mapped.
    Complete,
    /// A lane can carry no more. On a destination, faults on pages that are here go on being served.
    LaneFailed {
        /// Which lane.
        lane: LaneId,
        /// Why.
        reason: String,
    },
    /// The pager itself cannot go on: the guest's memory can no longer be completed by it.
    Broken {
        /// Why.
        reason: String,
    },
}

/// Where a pager's threads send their events. Called on those threads: must return at once.
pub type Notify = Arc<dyn Fn(PagerEvent) + Send + Sync>;
