//! Post-copy from the first byte: hand off at once, and let all memory follow.

use std::time::Duration;

use serde_json::json;
use switchover_wire::clock::Nanos;

use super::{Mode, Moved, Pair};
use crate::bench::run_error::RunError;

/// Connecting, comparing and reserving memory takes well under a second; more is a hang.
const SETUP_TIMEOUT: Duration = Duration::from_secs(60);
/// 1 TiB at 10 Gbit/s takes a quarter of an hour.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1200);

/// The mode.
#[derive(Debug)]
pub struct Postcopy;

impl Mode for Postcopy {
    fn name(&self) -> &'static str {
        "postcopy"
    }

    fn migrate(&self, pair: &mut Pair<'_>) -> Result<Moved, RunError> {
        let capability = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
        pair.source.execute("migrate-set-capabilities", capability).map_err(RunError::on("the source"))?;
        let migrate = Nanos::now();
        pair.source.execute("migrate", json!({ "uri": pair.uri })).map_err(RunError::on("the source"))?;
        pair.source.wait_status(&["active"], SETUP_TIMEOUT).map_err(RunError::on("the source"))?;
        let handoff = Nanos::now();
        pair.source.execute("migrate-start-postcopy", json!({})).map_err(RunError::on("the source"))?;
        pair.source.wait_status(&["completed"], DRAIN_TIMEOUT).map_err(RunError::on("the source"))?;
        pair.destination.wait_status(&["completed"], SETUP_TIMEOUT).map_err(RunError::on("the destination"))?;
        Ok(Moved { migrate, handoff, completed: Nanos::now() })
    }
}
