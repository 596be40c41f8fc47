//! Why a run could not be finished.

use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::qmp_client::QmpError;

/// A run could not be finished.
#[derive(Debug, Error)]
pub enum RunError {
    /// A process could not be started.
    #[error("cannot start {who}: {source}")]
    Start {
        /// Which.
        who: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A process ended before it was told to.
    #[error("{who} ended too early, with {status}{said}")]
    Ended {
        /// Which.
        who: &'static str,
        /// How.
        status: String,
        /// What it said on stderr, with a colon in front.
        said: String,
    },
    /// A process was told to end and did not.
    #[error("{who} did not end within {waited:?} after `quit`, and was killed: {source}")]
    Stop {
        /// Which.
        who: &'static str,
        /// How long it was waited for.
        waited: Duration,
        /// The kind of failure.
        source: io::Error,
    },
    /// A controller's command failed.
    #[error("{who}: {source}")]
    Qmp {
        /// Whose.
        who: &'static str,
        /// Why.
        source: QmpError,
    },
    /// The guest says that it will not.
    #[error("the guest refused to start{said}; see `switchover bench --help` for what --append takes")]
    Refused {
        /// What it printed, with a colon in front.
        said: String,
    },
    /// The guest did not come up.
    #[error(
        "the guest did not print `R ready …` within {waited:?}{said}; does it print the built-in guests' lines, and \
         are its parameters right?"
    )]
    NotReady {
        /// How long it was waited for.
        waited: Duration,
        /// What it printed instead, with a colon in front.
        said: String,
    },
    /// An answer lacks what it must have.
    #[error("{who} answered `{command}` without {what}")]
    Answer {
        /// Whose.
        who: &'static str,
        /// The command.
        command: &'static str,
        /// What is missing.
        what: String,
    },
    /// A side is not what it must be once its guest has moved.
    #[error("{who} is in run state `{state}` after the move, not `{wanted}`: it is not proven where the guest runs")]
    RunState {
        /// Which.
        who: &'static str,
        /// What it says of itself.
        state: String,
        /// What it must say.
        wanted: &'static str,
    },
    /// The migration failed, and not because it did not converge.
    #[error("the migration failed: {reason}")]
    Failed {
        /// The source's words.
        reason: String,
    },
    /// Someone wants the bench to end.
    #[error("interrupted")]
    Interrupted,
}

impl RunError {
    /// Says on whose side a command failed.
    pub fn on(who: &'static str) -> impl Fn(QmpError) -> Self {
        move |source| Self::Qmp { who, source }
    }
}
