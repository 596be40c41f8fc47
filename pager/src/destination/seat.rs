//! The fault lane that there is, or none, or the next one: between the session, which opens lanes, and the fault thread, which
//! must be done with one before it takes up another.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::lane::PageLane;

/// How long the fault threads may take to let go of lanes that are shut down: microseconds, unless they have no processor.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Where the fault lane sits.
#[derive(Debug, Default)]
pub struct Seat {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The fault thread uses a lane, and may still report its end.
    taken: bool,
    next: Option<PageLane>,
}

impl Seat {
    /// The fault thread begins with a lane.
    pub fn sit(&self) {
        self.state().taken = true;
    }

    /// The fault thread has reported the end of its lane, or its own.
    pub fn leave(&self) {
        self.state().taken = false;
        self.left.notify_all();
    }

    /// Waits until the fault thread has reported the end of its lane, which was shut down, or until `deadline`. No other is next
    /// then.
    pub fn wait_left(&self, deadline: Instant) {
        self.state().next = None;
        let patience = deadline.saturating_duration_since(Instant::now());
        let left = self.left.wait_timeout_while(self.state(), patience, |state| state.taken);
        if left.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            tracing::error!("the fault thread does not let go of its lane");
        }
    }

    /// This lane is next.
    pub fn offer(&self, lane: PageLane) {
        self.state().next = Some(lane);
    }

    /// The lane that is next. Whoever takes it sits down.
    pub fn take(&self) -> Option<PageLane> {
        let mut state = self.state();
        let next = state.next.take();
        state.taken |= next.is_some();
        next
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
