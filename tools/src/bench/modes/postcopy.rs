//! Post-copy from the first byte: hand off at once, and let all memory follow.

use serde_json::json;
use switchover_wire::clock::Nanos;

use super::{Mode, Moved, POSTCOPY_BANDWIDTH, Pair, SETUP_TIMEOUT, SOURCE};
use crate::bench::run_error::RunError;

/// The mode.
#[derive(Debug)]
pub struct Postcopy;

impl Mode for Postcopy {
    fn name(&self) -> &'static str {
        "postcopy"
    }

    fn precopies(&self) -> bool {
        false
    }

    fn migrate(&self, pair: &mut Pair<'_>) -> Result<Moved, RunError> {
        pair.allow_postcopy()?;
        pair.set_up(self, &[POSTCOPY_BANDWIDTH])?;
        let migrate = pair.begin()?;
        pair.wait_source(&["active"], SETUP_TIMEOUT)?;
        let handoff = Nanos::now();
        pair.source.execute("migrate-start-postcopy", json!({})).map_err(RunError::on(SOURCE))?;
        Ok(Moved { migrate, handoff: Some(handoff), ended: pair.complete()?, stayed: None })
    }
}
