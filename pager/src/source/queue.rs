//! In which order pages are pushed: what is known to be wanted, then around the latest faults, then a sweep.

use std::ops::Range;
use std::sync::PoisonError;
use std::time::Duration;

use switchover_wire::frame::bulk::CHUNK_PAGES;
use switchover_wire::types::{LaneId, PageCount, PageIndex};

use crate::sent::ChunkIndex;
use crate::sync::{ArrayQueue, AtomicU64, Condvar, Mutex, MutexGuard, Ordering, SegQueue};

/// Faults remembered for pushing around them. Older ones give way: the latest matter most.
const RECENT_FAULTS: usize = 64;

/// How many chunks a lane takes from the sweep at a time: 4 MiB, so that lanes work on memory of their own without
/// one being left with much at the end.
const SPAN_CHUNKS: u64 = 16;

/// What a pusher sends next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// These pages of a chunk, a bit each: they are wanted soonest.
    Part(ChunkIndex, u64),
    /// The chunk around a fault.
    Around(ChunkIndex),
}

/// The chunks of one lane, each with its pages.
type Kept = (LaneId, Vec<(ChunkIndex, u64)>);

/// The order of the push, shared by all bulk lanes.
#[derive(Debug)]
pub struct PushQueue {
    first: SegQueue<(ChunkIndex, u64)>,
    recent: ArrayQueue<PageIndex>,
    /// What each bulk lane must send itself, because its stream holds an older version.
    kept: Mutex<Vec<Kept>>,
    swept: AtomicU64,
    chunks: u64,
    gate: Mutex<Gate>,
    changed: Condvar,
}

/// What pushers wait for.
#[derive(Clone, Copy, Debug, Default)]
struct Gate {
    sweep: bool,
    stopping: bool,
}

impl PushQueue {
    /// Nothing wanted yet; the sweep at the start of RAM.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        Self {
            first: SegQueue::new(),
            recent: ArrayQueue::new(RECENT_FAULTS),
            kept: Mutex::default(),
            swept: AtomicU64::new(0),
            chunks: pages.0.div_ceil(CHUNK_PAGES),
            gate: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Adds pages that go before all else, in this order. Neighbours in the list that are neighbours in memory go together.
    pub fn put_first(&self, pages: &[PageIndex]) {
        for part in pages.chunk_by(|one, next| ChunkIndex::of(*one) == ChunkIndex::of(*next)) {
            if let Some(page) = part.first() {
                let mask = part.iter().fold(0, |mask, page| mask | 1 << (page.0 % CHUNK_PAGES));
                self.first.push((ChunkIndex::of(*page), mask));
            }
        }
    }

    /// Keeps chunks for the one lane that may send them; they count as sent to all others.
    pub fn keep_for(&self, lane: LaneId, chunks: Vec<(ChunkIndex, u64)>) {
        self.kept().push((lane, chunks));
    }

    /// What was kept for `lane`, once.
    pub fn take_kept(&self, lane: LaneId) -> Vec<(ChunkIndex, u64)> {
        let mut kept = self.kept();
        let found = kept.iter().position(|(owner, _)| *owner == lane);
        found.map(|index| kept.swap_remove(index).1).unwrap_or_default()
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a fault: its neighbours are likely to be wanted.
    pub fn note_fault(&self, page: PageIndex) {
        self.recent.force_push(page);
    }

    /// The most urgent thing, if anything is more urgent than the sweep.
    pub fn urgent(&self) -> Option<Next> {
        let part = self.first.pop().map(|(chunk, mask)| Next::Part(chunk, mask));
        part.or_else(|| self.recent.pop().map(|page| Next::Around(ChunkIndex::of(page))))
    }

    /// Lets the sweep begin.
    pub fn open_sweep(&self) {
        self.gate().sweep = true;
        self.changed.notify_all();
    }

    /// Wakes every pusher that waits for anything.
    pub fn stop(&self) {
        self.gate().stopping = true;
        self.changed.notify_all();
    }

    /// Waits until the sweep may begin, or the push is stopped.
    pub fn wait_for_sweep(&self) {
        let mut gate = self.gate();
        while !gate.sweep && !gate.stopping {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for `span`, or until the push is stopped: says whether it was.
    pub fn pause(&self, span: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.gate(), span, |gate| !gate.stopping);
        waited.unwrap_or_else(PoisonError::into_inner).0.stopping
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next stretch of the sweep, or `None` when it has reached the end.
    pub fn next_span(&self) -> Option<Range<u64>> {
        let start = self.swept.fetch_add(SPAN_CHUNKS, Ordering::Relaxed);
        (start < self.chunks).then(|| start..(start + SPAN_CHUNKS).min(self.chunks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_come_before_faults() {
        let queue = PushQueue::new(PageCount(1000));
        queue.note_fault(PageIndex(130));
        queue.put_first(&[PageIndex(70), PageIndex(7), PageIndex(3)]);
        assert_eq!(queue.urgent(), Some(Next::Part(ChunkIndex(1), 1 << 6)));
        assert_eq!(queue.urgent(), Some(Next::Part(ChunkIndex(0), 0b1000_1000)));
        assert_eq!(queue.urgent(), Some(Next::Around(ChunkIndex(2))));
        assert_eq!(queue.urgent(), None);
    }

    #[test]
    fn the_sweep_covers_every_chunk_once() {
        let queue = PushQueue::new(PageCount(64 * 40 + 1));
        let swept: Vec<u64> = std::iter::from_fn(|| queue.next_span()).flatten().collect();
        assert_eq!(swept, (0..41).collect::<Vec<_>>());
        assert_eq!(queue.next_span(), None);
    }

    #[test]
    fn old_faults_give_way_to_new_ones() {
        let queue = PushQueue::new(PageCount(1 << 20));
        for page in 0..1000 {
            queue.note_fault(PageIndex(page * 64));
        }
        assert_eq!(queue.urgent(), Some(Next::Around(ChunkIndex(1000 - RECENT_FAULTS as u64))));
    }
}

#[cfg(test)]
#[cfg(feature = "loom")]
mod models;
