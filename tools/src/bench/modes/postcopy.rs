//! Post-copy from the first byte: hand off at once, and let all memory follow.

use super::{Family, Mode, Moved, POSTCOPY_BANDWIDTH, Pair, SETUP_TIMEOUT};
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

    fn family(&self) -> Family {
        Family::PostCopy
    }

    fn migrate(&self, pair: &mut Pair<'_>) -> Result<Moved, RunError> {
        pair.allow_postcopy()?;
        pair.set_up(self, &[POSTCOPY_BANDWIDTH])?;
        let migrate = pair.begin()?;
        pair.wait_source(&["active"], SETUP_TIMEOUT)?;
        let handoff = pair.start_postcopy()?;
        Ok(Moved { migrate, handoff: Some(handoff), ended: pair.complete()?, stayed: None })
    }
}
