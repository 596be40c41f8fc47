//! The order of the push as pushers and fault lanes share it: the policy of [`super::order`] behind a lock, and what is waited for.

use std::ops::Range;
use std::sync::PoisonError;
use std::time::Duration;

use switchover_wire::frame::bulk::CHUNK_PAGES;
use switchover_wire::types::{LaneId, PageCount, PageIndex};

use super::order::{Fault, Left, Order, Policy, Step};
use crate::sent::ChunkIndex;
use crate::sync::{ArrayQueue, Condvar, Mutex, MutexGuard};

/// Faults that no pusher has looked at yet. Older ones give way: the latest matter most.
const RECENT_FAULTS: usize = 64;

/// The chunks of one lane, each with its pages.
type Kept = (LaneId, Vec<(ChunkIndex, u64)>);

/// The order of the push, shared by all bulk lanes.
#[derive(Debug)]
pub struct PushQueue {
    /// Only pushers take it, and for a bounded time. Fault lanes never do: an answer must not wait for who plans a push.
    order: Mutex<Order>,
    /// From the fault lanes to whoever plans the next step.
    recent: ArrayQueue<Fault>,
    /// What each bulk lane must send itself, because its stream holds an older version.
    kept: Mutex<Vec<Kept>>,
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
    pub fn new(policy: Policy, pages: PageCount) -> Self {
        Self {
            order: Mutex::new(Order::new(policy, pages)),
            recent: ArrayQueue::new(RECENT_FAULTS),
            kept: Mutex::default(),
            gate: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Adds pages known to be wanted, in this order. Neighbours in the list that are neighbours in memory go together.
    pub fn put_first(&self, pages: &[PageIndex]) {
        let steps: Vec<_> = pages
            .chunk_by(|one, next| ChunkIndex::of(*one) == ChunkIndex::of(*next))
            .filter_map(|part| {
                let pages = part.iter().fold(0, |mask, page| mask | 1 << (page.0 % CHUNK_PAGES));
                part.first().map(|page| Step { chunk: ChunkIndex::of(*page), pages })
            })
            .collect();
        self.order().hint(steps);
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

    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a fault: what comes after it is likely to be wanted. Takes no lock and no memory.
    pub fn note_fault(&self, fault: Fault) {
        self.recent.force_push(fault);
    }

    /// The most urgent pages, if any are more urgent than the sweep. They are not claimed: another lane may be sending them.
    pub fn urgent(&self, left: &impl Left) -> Option<Step> {
        loop {
            let mut order = self.order();
            // No more than there was room for: new ones may come for ever.
            for fault in std::iter::from_fn(|| self.recent.pop()).take(RECENT_FAULTS) {
                order.note_fault(fault);
            }
            let step = order.step(left);
            // A step looks at so many hints, which may all have been sent: whoever waits for the sweep must have seen the rest too.
            // There are no new ones for ever.
            if step.is_some() || !order.has_hints() {
                return step;
            }
        }
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

    /// The next stretch of the sweep, or `None` when all of it was given out.
    pub fn next_span(&self) -> Option<Range<u64>> {
        self.order().span()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sent::SentPages;

    fn fault(page: u64) -> Fault {
        Fault { page: PageIndex(page), lane: 0 }
    }

    fn step(chunk: u64, pages: u64) -> Option<Step> {
        Some(Step { chunk: ChunkIndex(chunk), pages })
    }

    fn queue(pages: u64) -> (PushQueue, SentPages) {
        let policy = "around".parse().unwrap();
        (PushQueue::new(policy, PageCount(pages)), SentPages::new(PageCount(pages)))
    }

    #[test]
    fn hints_come_before_faults() {
        let (queue, sent) = queue(1000);
        queue.note_fault(fault(130));
        queue.put_first(&[PageIndex(70), PageIndex(7), PageIndex(3)]);
        let next = || {
            let step = queue.urgent(&sent);
            step.inspect(|step| assert_eq!(sent.claim(step.chunk, step.pages), step.pages))
        };
        assert_eq!(next(), step(1, 1 << 6));
        assert_eq!(next(), step(0, 0b1000_1000));
        assert_eq!(next(), step(2, u64::MAX));
        assert_eq!(next(), None);
    }

    #[test]
    fn hints_that_were_all_sent_hide_none_that_was_not() {
        struct OnlyTheLast;
        impl Left for OnlyTheLast {
            fn left(&self, chunk: ChunkIndex) -> u64 {
                u64::from(chunk.0 == 999)
            }
        }
        let queue = PushQueue::new("around".parse().unwrap(), PageCount(64 * 1000));
        let pages: Vec<_> = (0..1000).map(|chunk| PageIndex(chunk * 64)).collect();
        queue.put_first(&pages);
        assert_eq!(queue.urgent(&OnlyTheLast), Some(Step { chunk: ChunkIndex(999), pages: 1 }));
        assert_eq!(queue.urgent(&OnlyTheLast), None);
    }

    #[test]
    fn the_sweep_covers_every_chunk_once() {
        let (queue, _) = queue(64 * 40 + 1);
        let swept: Vec<u64> = std::iter::from_fn(|| queue.next_span()).flatten().collect();
        assert_eq!(swept, (0..41).collect::<Vec<_>>());
        assert_eq!(queue.next_span(), None);
    }

    #[test]
    fn old_faults_give_way_to_new_ones() {
        let (queue, sent) = queue(1 << 20);
        for page in 0..1000 {
            queue.note_fault(fault(page * 64));
        }
        assert_eq!(queue.urgent(&sent), step(1000 - RECENT_FAULTS as u64, u64::MAX));
    }
}

#[cfg(test)]
#[cfg(feature = "loom")]
mod models;
