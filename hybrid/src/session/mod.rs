//! The two ends of a migration as pure state machines: events in, actions out; no clock, socket or thread inside.
//!
//! A session is consumed by each event and comes back in its next phase, so that no phase can be run twice. What the
//! actions do, and in which thread, is the driver's business ([`crate::outgoing`], [`crate::incoming`]); what may
//! happen when is decided here, and tested here without a machine or a network.
//!
//! ```text
//!  source:       Setup → Active → Handoff → Committed → Postcopy → done
//!                                               ▲ ╲        ╱
//!                                    Rejoining ─┘  ▶ Paused   (the link is lost after the commit)
//!                                        ▲            │
//!                                        └────────────┘
//!  destination:  Preparing → Prepared → Loading ──▶ Postcopy → Drained → done
//!                                              ╲      ╱ ▲
//!                                               ▶ Paused ⇄ Rejoining
//! ```
//!
//! When the two meet again the destination says where it stands, and the source commits once more: who has the commit goes on,
//! who never got it runs now. Until then only the source knows whether it was sent, and only the destination whether it came.

pub mod destination;
pub mod source;

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod together;

use crate::failure::FailureView;
pub use crate::failure::{FailureKind, GuestAfter};

/// Why a migration did not complete, and where that leaves the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What kind of thing happened.
    pub kind: FailureKind,
    /// What happened.
    pub reason: String,
    /// Where the guest is now, as far as this side can know.
    pub guest: GuestAfter,
}

impl Failure {
    /// As a caller acts on it.
    #[must_use]
    pub const fn view(&self) -> FailureView {
        FailureView { kind: self.kind, guest: self.guest }
    }

    /// What happened, and where that leaves the guest.
    #[must_use]
    pub fn sentence(&self) -> String {
        format!("{}; {}", self.reason, self.guest.sentence())
    }
}

/// How a session ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// All of the guest is on the destination, and both sides know it.
    Completed,
    /// All of the guest is on the destination, where it runs; the link was lost, for this reason, before the source could say
    /// that it knows. Only a destination ends like this.
    Unacknowledged(String),
    /// Cancelled before the commit.
    Cancelled,
    /// It failed.
    Failed(Failure),
}
