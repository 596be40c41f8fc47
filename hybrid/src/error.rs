//! What a caller of a migration is told at once. What happens later is in [`crate::progress::Progress::error`].

use std::io;
use std::path::PathBuf;

use switchover_image::error::ImageError;
use switchover_wire::address::Address;
use switchover_wire::socket::SocketError;
use thiserror::Error;

use crate::lazy::LazyError;

/// A migration could not be started, or a wish of its controller not be met.
#[derive(Debug, Error)]
pub enum MigrationError {
    /// The controller wants a handoff before all of memory is there, and never allowed it.
    #[error("post-copy was not allowed when this migration began (capability `postcopy-ram`)")]
    PostcopyNotAllowed,
    /// A number of lanes that cannot be.
    #[error("{asked} bulk lanes were asked for; between 1 and {limit} are possible")]
    BulkLanes {
        /// The number asked for.
        asked: u8,
        /// The most that are possible.
        limit: u8,
    },
    /// A number of lanes that cannot be.
    #[error("{asked} fault lanes were asked for; between 1 and {limit} are possible")]
    FaultLanes {
        /// The number asked for.
        asked: u8,
        /// The most that are possible.
        limit: u8,
    },
    /// The destination cannot listen.
    #[error(transparent)]
    Listen(#[from] SocketError),
    /// A destination that whoever reaches it could give a guest.
    #[error(
        "cannot listen at {at} without TLS: whoever reaches it could give this machine a guest, and everybody on the way read and change \
         one; give it credentials (`tls-creds`), or allow plain lanes on both sides (`--allow-plain`, `x-switchover-allow-plain`)"
    )]
    Plain {
        /// Where it was to listen.
        at: Address,
    },
    /// The image cannot be written or read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The guest of an image cannot go on here.
    #[error(
        "cannot restore the guest of {} here: {reason}, where the source is the machine that was saved and the destination is this \
         one; nothing was touched", path.display()
    )]
    ImageMismatch {
        /// The image.
        path: PathBuf,
        /// What differs.
        reason: String,
    },
    /// Memory that is to come while the guest runs cannot be watched or served.
    #[error("cannot restore the guest lazily: {0}")]
    Lazy(#[from] LazyError),
    /// No thread.
    #[error("cannot start the migration's thread: {0}; is the number of threads limited (`ulimit -u`)?")]
    Thread(#[source] io::Error),
    /// A wish that only a lost link can be met for.
    #[error("cannot {wish} the migration: its link is not lost (it is in state `postcopy-paused` then)")]
    NotLost {
        /// "resume", "reclaim", "recover".
        wish: &'static str,
    },
    /// A wish that comes too late.
    #[error("cannot {wish}: {why}")]
    TooLate {
        /// "cancel", "start post-copy".
        wish: &'static str,
        /// Why not any more.
        why: &'static str,
    },
}
