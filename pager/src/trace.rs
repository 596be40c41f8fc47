//! Every fault of a guest, in order, kept on request: what it missed, when, and for how long.
//!
//! For replaying them against other push orders, and for seeing what a guest waits for in its first milliseconds.

use std::sync::{Mutex, OnceLock, PoisonError};

use switchover_wire::clock::Nanos;
use switchover_wire::types::PageIndex;

/// Faults that are kept, the first ones; 8 MiB of them.
pub const MOST_TRACED: usize = 1 << 18;

/// How a fault was answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Its page was asked for and came as the answer.
    Remote,
    /// Its page was asked for, but the pushed copy won.
    Raced,
    /// Its page was here, and only had to be mapped.
    Local,
}

/// One fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TracedFault {
    /// The page that was touched.
    pub page: PageIndex,
    /// When the pager took the fault.
    pub taken: Nanos,
    /// When it had woken whoever waited; not known of a raced fault whose lane has ended.
    pub woken: Option<Nanos>,
    /// How it was answered.
    pub answer: Answer,
}

/// The faults of one destination. Does nothing until it is [started](Self::start).
#[derive(Debug, Default)]
pub struct FaultTrace {
    faults: OnceLock<Mutex<Vec<TracedFault>>>,
}

impl FaultTrace {
    /// Keeps faults from now on. Takes its memory now, so that noting one does not allocate.
    pub fn start(&self) {
        self.faults.get_or_init(|| Mutex::new(Vec::with_capacity(MOST_TRACED)));
    }

    /// Keeps `fault`, where that was asked for and there is room.
    pub fn note(&self, fault: TracedFault) {
        let Some(faults) = self.faults.get() else { return };
        let mut faults = faults.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.len() < MOST_TRACED {
            faults.push(fault);
        }
    }

    /// What was kept, in the order in which it was answered.
    #[must_use]
    pub fn faults(&self) -> Vec<TracedFault> {
        self.faults
            .get()
            .map(|faults| faults.lock().unwrap_or_else(PoisonError::into_inner).clone())
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(page: u64) -> TracedFault {
        TracedFault { page: PageIndex(page), taken: Nanos(page), woken: None, answer: Answer::Raced }
    }

    #[test]
    fn nothing_is_kept_before_it_is_asked_for() {
        let trace = FaultTrace::default();
        trace.note(fault(1));
        assert_eq!(trace.faults(), []);
        trace.start();
        trace.note(fault(2));
        trace.start();
        assert_eq!(trace.faults(), [fault(2)]);
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let trace = FaultTrace::default();
        trace.start();
        (0..MOST_TRACED as u64 + 10).for_each(|page| trace.note(fault(page)));
        let faults = trace.faults();
        assert_eq!((faults.len(), faults.last().copied()), (MOST_TRACED, Some(fault(MOST_TRACED as u64 - 1))));
    }
}
