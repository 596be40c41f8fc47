//! Pre-copy for as long as it pays, then whichever handoff costs the guest less: the source decides.

use super::{BANDWIDTH, Family, Mode, Moved, POSTCOPY_BANDWIDTH, Pair};
use crate::bench::run_error::RunError;

/// The mode.
#[derive(Debug)]
pub struct Hybrid;

impl Mode for Hybrid {
    fn name(&self) -> &'static str {
        "hybrid"
    }

    fn precopies(&self) -> bool {
        true
    }

    fn family(&self) -> Family {
        Family::PostCopy
    }

    fn migrate(&self, pair: &mut Pair<'_>) -> Result<Moved, RunError> {
        pair.allow_postcopy()?;
        pair.set_up(self, &[BANDWIDTH, POSTCOPY_BANDWIDTH])?;
        let migrate = pair.begin()?;
        Ok(Moved { migrate, handoff: None, ended: pair.complete()?, stayed: None })
    }
}
