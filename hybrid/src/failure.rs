//! Why a migration did not complete, in kinds that a caller can act on, and where that leaves the guest.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What went wrong. The names are stable; new ones may come.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FailureKind {
    /// Nobody answered at the address, or something that is no destination.
    Unreachable,
    /// The destination did not take the guest: its machine does not match, it has no memory, or it has another guest. Its reason
    /// says which.
    Refused,
    /// The link was cut, or the other side fell silent or ended.
    LinkLost,
    /// The other side was there, and did not do its part of the handoff in time.
    TimedOut,
    /// Pre-copy did not come below the downtime limit within its budget, and nothing else was allowed.
    NotConverging,
    /// The machine here could not be paused, saved, loaded, run, or asked what it writes.
    Machine,
    /// Pages can no longer be served: userfaultfd, a ring or memory failed.
    Pager,
    /// The other side said what it must not.
    Protocol,
    /// The controller has taken the guest back from a destination that it fenced.
    Reclaimed,
    /// The image could not be written, or not be read, or is damaged.
    Image,
}

impl FailureKind {
    /// Whether the same migration may succeed when it is tried again, nothing else being changed: what failed was the link or the
    /// time, and not what was asked for.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Unreachable | Self::LinkLost | Self::TimedOut)
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Refused => "refused",
            Self::LinkLost => "link-lost",
            Self::TimedOut => "timed-out",
            Self::NotConverging => "not-converging",
            Self::Machine => "machine",
            Self::Pager => "pager",
            Self::Protocol => "protocol",
            Self::Reclaimed => "reclaimed",
            Self::Image => "image",
        }
    }
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a migration that did not complete leaves the guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestAfter {
    /// It runs on the source (or stays paused there, if its user had paused it).
    OnSource,
    /// It stands still on the source, which has the right to run it but could not.
    PausedOnSource,
    /// It is the destination's, and not all of it is there: the link is lost, and can be joined again.
    Divided,
    /// It stands still on the destination, which was not told to run it before the link was lost. Whether it was given away is known
    /// to the source alone.
    Undecided,
    /// It is on the destination, stopped, because its memory cannot be completed: it is lost.
    Lost,
    /// It is in its image, as before, and ran nowhere since.
    InImage,
}

impl GuestAfter {
    /// The sentence that goes with a reason.
    #[must_use]
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::OnSource => "the guest is unharmed on the source",
            Self::PausedOnSource => "the guest stays paused on the source; `cont` runs it",
            Self::Divided => {
                "the guest is the destination's and parts of its memory may be on the source alone: join the two again with \
                 `migrate` and `resume` on the source"
            }
            Self::Undecided => {
                "this side does not run the guest; whether it was given away is known to the source: where it runs there, `quit` \
                 here, and where it says `postcopy-paused`, join the two again with `migrate` and `resume` on it"
            }
            Self::InImage => "nothing of the guest has run here, and it is in its image as before",
            Self::Lost => "the guest was stopped on the destination, because parts of its memory can no longer come",
        }
    }
}

/// A failure as a caller acts on it. The sentence for people is in [`crate::progress::Progress::error`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct FailureView {
    /// What went wrong.
    pub kind: FailureKind,
    /// Where that leaves the guest.
    pub guest: GuestAfter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_is_written_in_reports() {
        for kind in [
            FailureKind::Unreachable,
            FailureKind::Refused,
            FailureKind::LinkLost,
            FailureKind::TimedOut,
            FailureKind::NotConverging,
            FailureKind::Machine,
            FailureKind::Pager,
            FailureKind::Protocol,
            FailureKind::Reclaimed,
            FailureKind::Image,
        ] {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }
}
