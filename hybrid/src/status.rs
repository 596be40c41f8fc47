//! Where a migration stands, in QEMU's words.

use serde::{Deserialize, Serialize};

/// A migration's state. The names are QEMU's, so that clients written for it need no change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// No migration was asked for.
    #[default]
    None,
    /// Lanes are being opened, descriptions compared, the destination prepared.
    Setup,
    /// The guest runs on the source; pages may be moving.
    Active,
    /// Ready to pause, waiting for the controller's word.
    PreSwitchover,
    /// The guest is paused; its state is on the way.
    Device,
    /// The commit is out: the guest runs on the destination, and its memory follows.
    PostcopyActive,
    /// The link was lost after the commit.
    PostcopyPaused,
    /// The two sides are joining again.
    PostcopyRecover,
    /// All of the guest is on the destination, and this side knows it. A source knows it only from the destination.
    Completed,
    /// It did not happen, or cannot be finished; the error says which.
    Failed,
    /// A cancellation is being carried out.
    Cancelling,
    /// Cancelled: the guest runs on the source.
    Cancelled,
}

impl MigrationStatus {
    /// QEMU's name for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::PostcopyActive => "postcopy-active",
            Self::PostcopyPaused => "postcopy-paused",
            Self::PostcopyRecover => "postcopy-recover",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether the migration is over, one way or the other.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// Whether the commit was sent and the other side may still need what is here.
    #[must_use]
    pub const fn is_in_postcopy(self) -> bool {
        matches!(self, Self::PostcopyActive | Self::PostcopyPaused | Self::PostcopyRecover)
    }

    /// Whether a migration is under way.
    #[must_use]
    pub const fn is_under_way(self) -> bool {
        !self.is_final() && !matches!(self, Self::None)
    }
}

impl std::fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
