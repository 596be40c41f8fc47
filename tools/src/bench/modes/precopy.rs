//! Pre-copy alone: rounds until the rest fits into the downtime limit. It may never do so: then the source gives up, or
//! the bench loses its patience, and the guest goes on where it is.

use std::time::Instant;

use serde_json::{Value, json};
use switchover_wire::clock::Nanos;

use super::{BANDWIDTH, Family, MOVE_TIMEOUT, Mode, Moved, Pair, SETUP_TIMEOUT, SOURCE, Stayed};
use crate::bench::run_error::RunError;
use crate::qmp_client::{QmpClient, QmpError};

/// The mode.
#[derive(Debug)]
pub struct Precopy;

impl Mode for Precopy {
    fn name(&self) -> &'static str {
        "precopy"
    }

    fn precopies(&self) -> bool {
        true
    }

    fn family(&self) -> Family {
        Family::PreCopy
    }

    fn migrate(&self, pair: &mut Pair<'_>) -> Result<Moved, RunError> {
        pair.set_up(self, &[BANDWIDTH])?;
        pair.precopy()
    }
}

impl Pair<'_> {
    /// Begins, and waits until the guest has moved or the source has given up, as far as patience goes.
    ///
    /// # Errors
    /// When the migration fails for another reason, or the user ends it.
    pub fn precopy(&mut self) -> Result<Moved, RunError> {
        let began = Instant::now();
        let migrate = self.begin()?;
        let patience = self.patience.unwrap_or(MOVE_TIMEOUT);
        let stayed = match self.wait_source(&["completed"], patience) {
            Ok(_) => return Ok(Moved { migrate, handoff: None, ended: self.complete_there()?, stayed: None }),
            Err(RunError::Qmp { source: QmpError::MigrationFailed { desc, .. }, .. }) => Stayed::Failed(desc),
            Err(RunError::Qmp { source: QmpError::Timeout { .. }, .. }) if self.patience.is_some() => {
                if !cancel(self.source).map_err(RunError::on(SOURCE))? {
                    // It was over before it could be cancelled.
                    return Ok(Moved { migrate, handoff: None, ended: self.complete_there()?, stayed: None });
                }
                Stayed::Cancelled(began.elapsed())
            }
            Err(error) => return Err(error),
        };
        Ok(Moved { migrate, handoff: None, ended: Nanos::now(), stayed: Some(stayed) })
    }
}

/// Cancels the migration; false where it completed meanwhile.
fn cancel(source: &mut QmpClient) -> Result<bool, QmpError> {
    let asked = source.execute("migrate_cancel", json!({}));
    let answer = source.wait_status(&["cancelled", "failed", "completed"], SETUP_TIMEOUT)?;
    let completed = answer.get("status").and_then(Value::as_str) == Some("completed");
    // A refusal is no trouble where the migration is over by itself.
    if completed { Ok(false) } else { asked.map(|_| true) }
}
