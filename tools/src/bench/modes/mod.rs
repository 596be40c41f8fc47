//! The ways to move a guest, one file each.

use std::fmt::Debug;

use switchover_wire::clock::Nanos;

use super::run_error::RunError;
use crate::failure::Failure;
use crate::qmp_client::QmpClient;

mod postcopy;

/// A way to move a guest, driven over QMP as any controller would.
pub trait Mode: Debug + Sync {
    /// Its name on the command line and in reports.
    fn name(&self) -> &'static str;

    /// Moves the guest of `pair` and returns when both sides have completed.
    ///
    /// # Errors
    /// When a command is refused, the migration fails, or it takes too long.
    fn migrate(&self, pair: &mut Pair<'_>) -> Result<Moved, RunError>;
}

/// Two machines between which a guest is to move.
pub struct Pair<'a> {
    /// Where it runs.
    pub source: &'a mut QmpClient,
    /// Where it is to go; it listens already.
    pub destination: &'a mut QmpClient,
    /// Where the destination listens.
    pub uri: &'a str,
}

/// When a guest moved, on this process' clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moved {
    /// Just before `migrate` was sent.
    pub migrate: Nanos,
    /// Just before the handoff was asked for; the same, where nobody asks for it.
    pub handoff: Nanos,
    /// Both sides had been seen as completed.
    pub completed: Nanos,
}

/// The mode called `name`.
///
/// # Errors
/// When there is none, or none yet.
pub fn by_name(name: &str) -> Result<&'static dyn Mode, Failure> {
    match name {
        "postcopy" => Ok(&postcopy::Postcopy),
        "precopy" | "hybrid" => Err(Failure::usage(format_args!(
            "--modes {name} is not built yet: bench moves guests by postcopy for now; use --modes postcopy"
        ))),
        _ => Err(Failure::usage(format_args!("--modes {name}: there is no such mode; use --modes postcopy"))),
    }
}
