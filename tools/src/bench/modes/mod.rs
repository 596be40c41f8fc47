//! The ways to move a guest, one file each. A peer brings its own, in its file in `vmm`.

use std::fmt::{self, Debug};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use switchover_wire::clock::Nanos;

use super::bandwidth::Bandwidth;
use super::run_error::RunError;
use super::trace;
use crate::failure::Failure;
use crate::qmp_client::{QmpClient, QmpError};
use crate::signals::EndRequests;

mod hold;
mod hybrid;
mod postcopy;
mod precopy;
mod secured;

pub use self::hold::Hold;
pub use self::secured::secured;

/// Connecting, comparing and reserving memory takes well under a second; more is a hang.
pub const SETUP_TIMEOUT: Duration = Duration::from_secs(60);
/// 1 TiB at 10 Gbit/s takes a quarter of an hour.
const MOVE_TIMEOUT: Duration = Duration::from_secs(1200);

/// How often a wait looks whether the user wants to end it.
const LOOK: Duration = Duration::from_millis(100);

/// QMP's name for how a migration may end its pre-copy.
const MODE: &str = "x-switchover-mode";
/// QMP's bound on what is sent before the handoff, in bytes a second; 0 for none.
pub const BANDWIDTH: &str = "max-bandwidth";
/// QMP's bound on what is pushed after the handoff, likewise.
pub const POSTCOPY_BANDWIDTH: &str = "max-postcopy-bandwidth";
/// Asks for each round's bitmap of dirtied pages in the report.
const RECORD_BITMAPS: &str = "x-switchover-record-bitmaps";

/// What errors call the source.
pub const SOURCE: &str = "the source";
/// What they call the destination.
pub const DESTINATION: &str = "the destination";

/// The names of all of this VMM's modes, in the order in which they are compared.
pub const NAMES: [&str; 3] = ["precopy", "postcopy", "hybrid"];

/// Whether a guest may be handed over before all of its memory is: only modes of one family promise it the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Not before. The guest stays where it is if it writes too fast.
    PreCopy,
    /// It may, at some time.
    PostCopy,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
        })
    }
}

/// A way to move a guest, driven over QMP as any controller would.
pub trait Mode: Debug + Sync {
    /// Its name on the command line and in reports.
    fn name(&self) -> &'static str;

    /// Whether memory is sent before the handoff.
    fn precopies(&self) -> bool;

    /// What it promises.
    fn family(&self) -> Family;

    /// Tells both sides what they must know before the destination listens.
    ///
    /// # Errors
    /// When a command is refused.
    fn prepare(&self, _source: &mut QmpClient, _destination: &mut QmpClient) -> Result<(), RunError> {
        Ok(())
    }

    /// Moves the guest of `pair` and returns when both sides have completed, or when the source has given up and its
    /// guest goes on there.
    ///
    /// # Errors
    /// When a command is refused, the migration fails for another reason, or it takes too long.
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
    /// What the migration may use of the link.
    pub bandwidth: Bandwidth,
    /// How long a mode that may never end is waited for; then it is cancelled.
    pub patience: Option<Duration>,
    /// Whether a trace is made of it: the source records what each round dirtied, and pushes nothing while the guest touches
    /// its pages for the first time.
    pub trace: bool,
    /// Whether and how long the pusher is held back after the handoff.
    pub hold: Option<Hold>,
    /// Whether the user wants to end it all.
    pub ends: &'a EndRequests,
}

/// When a guest moved, on this process' clock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Moved {
    /// Just before `migrate` was sent.
    pub migrate: Nanos,
    /// Just before the handoff was asked for; nothing, where nobody asks for it.
    pub handoff: Option<Nanos>,
    /// Both sides had been seen as completed, or the source as failed or cancelled.
    pub ended: Nanos,
    /// Why the guest stayed where it was, in the source's words or the bench's.
    pub stayed: Option<Stayed>,
}

/// Why a guest was not moved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stayed {
    /// The source ended the migration by itself; its words.
    Failed(String),
    /// The bench ended it.
    Cancelled(Duration),
}

/// The mode called `name`.
///
/// # Errors
/// When there is none.
pub fn by_name(name: &str) -> Result<&'static dyn Mode, Failure> {
    match name {
        "precopy" => Ok(&precopy::Precopy),
        "postcopy" => Ok(&postcopy::Postcopy),
        "hybrid" => Ok(&hybrid::Hybrid),
        _ => {
            Err(Failure::usage(format_args!("--modes {name}: there is no such mode; choose from {}", NAMES.join(", "))))
        }
    }
}

impl Pair<'_> {
    /// Lets the source hand off before all memory is over.
    fn allow_postcopy(&mut self) -> Result<(), RunError> {
        let capability = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
        self.source.execute("migrate-set-capabilities", capability).map(drop).map_err(RunError::on(SOURCE))
    }

    /// Sets the source's parameters: those in `bounds` to the bandwidth, and the mode.
    fn set_up(&mut self, mode: &dyn Mode, bounds: &[&str]) -> Result<(), RunError> {
        let mut parameters = Map::new();
        for bound in bounds {
            parameters.insert((*bound).to_owned(), self.bandwidth.for_qmp().into());
        }
        if self.trace {
            if mode.precopies() {
                parameters.insert(RECORD_BITMAPS.to_owned(), true.into());
            }
            if bounds.contains(&POSTCOPY_BANDWIDTH) {
                parameters.insert(POSTCOPY_BANDWIDTH.to_owned(), trace::HELD.into());
            }
        }
        self.set(Value::Object(parameters)).map_err(RunError::on(SOURCE))?;
        match self.set(json!({ MODE: mode.name() })) {
            // Where there are no modes, `migrate-start-postcopy` hands off all the same.
            Err(QmpError::Refused { .. }) if !mode.precopies() => Ok(()),
            set => set.map_err(RunError::on(SOURCE)),
        }
    }

    fn set(&mut self, parameters: Value) -> Result<(), QmpError> {
        self.source.execute("migrate-set-parameters", parameters).map(drop)
    }

    /// Begins, and says when.
    ///
    /// # Errors
    /// When the source refuses.
    pub fn begin(&mut self) -> Result<Nanos, RunError> {
        self.hold_push()?;
        let migrate = Nanos::now();
        self.source.execute("migrate", json!({ "uri": self.uri })).map_err(RunError::on(SOURCE))?;
        Ok(migrate)
    }

    /// Hands off, and says when that was asked for.
    ///
    /// # Errors
    /// When the source refuses.
    pub fn start_postcopy(&mut self) -> Result<Nanos, RunError> {
        let handoff = Nanos::now();
        self.source.execute("migrate-start-postcopy", json!({})).map_err(RunError::on(SOURCE))?;
        Ok(handoff)
    }

    /// Waits until the source's migration is in one of the states `wanted`.
    ///
    /// # Errors
    /// When it fails, does not come there in time, or the user ends it.
    pub fn wait_source(&mut self, wanted: &[&str], timeout: Duration) -> Result<Value, RunError> {
        wait(self.source, self.ends, wanted, timeout)
            .map_err(|error| error.map_or(RunError::Interrupted, RunError::on(SOURCE)))
    }

    /// Waits until both sides have completed, and says when that was seen.
    ///
    /// # Errors
    /// When the migration fails, takes too long, or the user ends it.
    pub fn complete(&mut self) -> Result<Nanos, RunError> {
        self.release_push()?;
        if self.trace {
            self.wait_source(&["postcopy-active", "completed"], MOVE_TIMEOUT)?;
            trace::watch_first_touches(self.source, self.ends).map_err(RunError::on(SOURCE))?;
            let bandwidth = self.bandwidth.for_qmp();
            self.set(json!({ POSTCOPY_BANDWIDTH: bandwidth })).map_err(RunError::on(SOURCE))?;
        }
        self.wait_source(&["completed"], MOVE_TIMEOUT)?;
        self.complete_there()
    }

    /// Waits until the destination has completed too.
    fn complete_there(&mut self) -> Result<Nanos, RunError> {
        wait(self.destination, self.ends, &["completed"], SETUP_TIMEOUT)
            .map_err(|error| error.map_or(RunError::Interrupted, RunError::on(DESTINATION)))?;
        Ok(Nanos::now())
    }
}

/// [`QmpClient::wait_status`], in steps between which the user is listened to; `None` is the user's end.
fn wait(
    side: &mut QmpClient,
    ends: &EndRequests,
    wanted: &[&str],
    timeout: Duration,
) -> Result<Value, Option<QmpError>> {
    let until = Instant::now() + timeout;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match side.wait_status(wanted, left.min(LOOK)) {
            Err(QmpError::Timeout { .. }) if ends.count() > 0 => return Err(None),
            Err(QmpError::Timeout { .. }) if left > LOOK => {}
            // The whole wait, not its last step.
            Err(QmpError::Timeout { waiting_for, last, .. }) => {
                return Err(Some(QmpError::Timeout { waiting_for, waited: timeout, last }));
            }
            answer => return answer.map_err(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_is_found_by_its_name() {
        for name in NAMES {
            assert_eq!(by_name(name).unwrap().name(), name);
        }
        assert_eq!(by_name("teleport").unwrap_err().status, 2);
    }
}
