//! Holding the pusher back for a while after the handoff, so that all that the guest touches is a remote fault.

use std::time::{Duration, Instant};

use serde_json::json;
use switchover_wire::clock::Nanos;

use super::{LOOK, MOVE_TIMEOUT, POSTCOPY_BANDWIDTH, Pair, SOURCE};
use crate::bench::run_error::RunError;

/// Bytes a second: no page comes through, and 0 would be no bound. It does not bound the answers to faults.
const HELD: u64 = 1;

/// How long the pusher is to be held back after the handoff.
#[derive(Clone, Copy, Debug)]
pub struct Hold {
    /// For so long.
    pub span: Duration,
    /// When it was let go.
    pub released: Option<Nanos>,
}

impl Hold {
    /// For `seconds`, where there are any.
    #[must_use]
    pub fn for_seconds(seconds: Option<f64>) -> Option<Self> {
        seconds.map(|seconds| Self { span: Duration::from_secs_f64(seconds), released: None })
    }
}

impl Pair<'_> {
    /// Holds the pusher back, if that is wanted. To be called just before the migration begins.
    pub(super) fn hold_push(&mut self) -> Result<(), RunError> {
        if self.hold.is_none() {
            return Ok(());
        }
        self.set(json!({ POSTCOPY_BANDWIDTH: HELD })).map_err(RunError::on(SOURCE))
    }

    /// Waits for the handoff and as long as is wanted after it, and lets the pusher go.
    pub(super) fn release_push(&mut self) -> Result<(), RunError> {
        let Some(Hold { span, released: None }) = self.hold else { return Ok(()) };
        self.wait_source(&["postcopy-active", "completed"], MOVE_TIMEOUT)?;
        let until = Instant::now() + span;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            if self.ends.count() > 0 {
                return Err(RunError::Interrupted);
            }
            std::thread::sleep(left.min(LOOK));
        }
        // Before it goes: nothing was pushed until then.
        let released = Nanos::now();
        self.set(json!({ POSTCOPY_BANDWIDTH: self.bandwidth.for_qmp() })).map_err(RunError::on(SOURCE))?;
        self.hold = Some(Hold { span, released: Some(released) });
        Ok(())
    }
}
