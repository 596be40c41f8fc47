//! What a migration tells its observer beside its status: what an auditor wants to know of later.

use switchover_wire::types::{LaneId, SessionId};

/// Something that happened. Sessions are told of by their hint only: whoever knows the name of one may join it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Happening {
    /// A lane is open: its handshake is done, and neither side refused.
    LaneOpened {
        /// The lane.
        lane: LaneId,
        /// The beginning of its session's name.
        session: String,
        /// The other side.
        peer: String,
    },
    /// Destination: a connection was not taken.
    NotTaken {
        /// The other side.
        peer: String,
        /// Why.
        reason: String,
    },
    /// Destination: further connections were not taken, more than are told of one by one.
    MoreNotTaken {
        /// How many.
        count: u64,
    },
    /// Source: the guest stands still for the handoff.
    HandoffBegun,
    /// Source: the right to run was given away, and the commit is about to be sent.
    CommitSent,
    /// Destination: the commit has come, and with it the right to run.
    CommitTaken,
    /// The guest runs on the destination.
    Running,
    /// All of the guest is on the destination, and both sides know it.
    Drained,
    /// Source: it has the right to run again that it had given away: by the destination's final word, or its controller's.
    TakenBack,
    /// The migration failed, or its link is lost.
    Trouble {
        /// What happened, and where that leaves the guest.
        reason: String,
    },
}

impl Happening {
    pub(crate) fn opened(lane: LaneId, session: SessionId, peer: &str) -> Self {
        Self::LaneOpened { lane, session: session.hint(), peer: peer.to_owned() }
    }
}
