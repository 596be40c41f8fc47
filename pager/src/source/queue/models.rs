//! Pushers share the order of the push while faults are noted and the sweep is opened or stopped.

use loom::sync::Arc;
use loom::thread;

use super::*;
use crate::sync::explore;

const PREEMPTIONS: usize = 3;
/// Nothing was sent, and nothing is.
const ALL: Nothing = Nothing;
/// Two stretches of the sweep, the second one chunk long.
const PAGES: PageCount = PageCount(64 * (SPAN_CHUNKS + 1));
const SPAN_CHUNKS: u64 = super::super::order::SPAN_CHUNKS;

struct Nothing;

impl Left for Nothing {
    fn left(&self, _: ChunkIndex) -> u64 {
        u64::MAX
    }
}

fn in_thread<T: 'static>(
    queue: &Arc<PushQueue>,
    body: impl FnOnce(&PushQueue) -> T + 'static,
) -> thread::JoinHandle<T> {
    let queue = Arc::clone(queue);
    thread::spawn(move || body(&queue))
}

/// What a pusher would send of the sweep.
fn sweep(queue: &PushQueue) -> Vec<u64> {
    queue.wait_for_sweep();
    std::iter::from_fn(|| queue.next_span()).flatten().collect()
}

#[test]
fn two_pushers_sweep_each_chunk_once() {
    explore(PREEMPTIONS, || {
        let queue = Arc::new(PushQueue::new("around".parse().unwrap(), PAGES));
        let pushers = [in_thread(&queue, sweep), in_thread(&queue, sweep)];
        queue.open_sweep();
        let mut swept: Vec<_> = pushers.into_iter().flat_map(|pusher| pusher.join().unwrap()).collect();
        swept.sort_unstable();
        assert_eq!(swept, (0..=SPAN_CHUNKS).collect::<Vec<_>>());
    });
}

/// Loom reports a deadlock where somebody is not woken.
#[test]
fn who_waits_is_woken_by_a_stop() {
    explore(PREEMPTIONS, || {
        let queue = Arc::new(PushQueue::new("around".parse().unwrap(), PAGES));
        let swept = in_thread(&queue, PushQueue::wait_for_sweep);
        let paced = in_thread(&queue, |queue| queue.pause(Duration::from_secs(1)));
        queue.stop();
        swept.join().unwrap();
        assert!(paced.join().unwrap(), "a pause that a stop ends says so");
    });
}

#[test]
fn what_is_wanted_goes_to_one_pusher_and_is_not_lost() {
    explore(PREEMPTIONS, || {
        let queue = Arc::new(PushQueue::new("around".parse().unwrap(), PAGES));
        queue.put_first(&[PageIndex(5)]);
        let bulk = LaneId { role: switchover_wire::types::LaneRole::Bulk, index: 1 };
        queue.keep_for(bulk, vec![(ChunkIndex(2), 1)]);
        let faults = in_thread(&queue, |queue| queue.note_fault(Fault { page: PageIndex(64), lane: 0 }));
        let other = in_thread(&queue, move |queue| (queue.urgent(&ALL), queue.take_kept(bulk)));
        let mine = queue.urgent(&ALL);
        let (theirs, kept) = other.join().unwrap();
        faults.join().unwrap();
        assert_eq!((kept.len(), queue.take_kept(bulk).len()), (1, 0));
        let found: Vec<_> =
            [mine, theirs].into_iter().chain([queue.urgent(&ALL), queue.urgent(&ALL)]).flatten().collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found.contains(&Step { chunk: ChunkIndex(0), pages: 1 << 5 })
                && found.contains(&Step { chunk: ChunkIndex(1), pages: u64::MAX })
        );
    });
}
