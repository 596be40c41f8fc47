//! The two ends of a migration as pure state machines: events in, actions out; no clock, socket or thread inside.
//!
//! A session is consumed by each event and comes back in its next phase, so that no phase can be run twice. What the
//! actions do, and in which thread, is the driver's business ([`crate::outgoing`], [`crate::incoming`]); what may
//! happen when is decided here, and tested here without a machine or a network.
//!
//! ```text
//!  source:       Setup → Active → Handoff → Committed → Postcopy → done
//!  destination:  Preparing → Prepared → Loading → Restored → Postcopy → Drained → done
//! ```

pub mod destination;
pub mod source;

#[cfg(test)]
mod together;

/// Why a migration did not complete, and where that leaves the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What happened.
    pub reason: String,
    /// Where the guest is now, as far as this side can know.
    pub guest: GuestAfter,
}

/// Where a migration that did not complete leaves the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestAfter {
    /// It runs on the source (or stays paused there, if its user had paused it).
    OnSource,
    /// The commit was sent, so the source must never run it again; the destination may or may not have it.
    GivenAway,
    /// It is on the destination, stopped, because its memory cannot be completed.
    Stopped,
    /// It is on the destination with all of its memory, and runs; only the source's acknowledgement is missing.
    OnDestination,
}

impl GuestAfter {
    /// The sentence that goes with a reason.
    #[must_use]
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::OnSource => "the guest is unharmed on the source",
            Self::GivenAway => {
                "the commit was already sent, so the guest belongs to the destination and stays paused here; its memory \
                 is kept until `quit`"
            }
            Self::Stopped => "the guest was stopped on the destination, because parts of its memory can no longer come",
            Self::OnDestination => "the guest is complete on the destination and runs",
        }
    }
}

/// How a session ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// All of the guest is on the destination, and both sides know it.
    Completed,
    /// Cancelled before the commit.
    Cancelled,
    /// It failed.
    Failed(Failure),
}
