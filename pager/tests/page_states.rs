//! Every interleaving of the threads that contend for a page, explored by loom.
//!
//! The states are compiled a second time here, with loom's atomics in the place of the real ones.
#![allow(missing_docs, dead_code, clippy::unwrap_used)]

mod sync {
    pub use loom::sync::atomic::{AtomicU8, Ordering};
}
#[path = "../src/state.rs"]
mod state;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use state::{Arrival, Claim, FaultVerdict, LaneTag, PageStates};
use switchover_wire::types::{PageCount, PageIndex};

const PAGE: PageIndex = PageIndex(0);

fn lane(number: u8) -> LaneTag {
    LaneTag::new(number).unwrap()
}

/// A page's bytes in the alias, whose every access loom checks for races, and what KVM would let the guest see.
struct Memory {
    alias: UnsafeCell<u64>,
    mapped: AtomicU64,
}

struct World {
    states: PageStates,
    memory: Memory,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            states: PageStates::new(PageCount(1)),
            memory: Memory { alias: UnsafeCell::new(0), mapped: AtomicU64::new(0) },
        })
    }

    /// What a lane does with a page that arrives: claim, write the alias, publish, map. Returns whether it won.
    fn receive(&self, tag: LaneTag) -> bool {
        match self.states.claim(PAGE, tag) {
            Claim::Lost => false,
            Claim::Won { .. } => {
                self.memory.alias.with_mut(|bytes| {
                    // SAFETY: loom reports it when this access races with another.
                    unsafe { *bytes += 1 };
                });
                if matches!(self.states.arrived(PAGE, tag), Arrival::Present { .. }) {
                    self.map();
                }
                true
            }
        }
    }

    fn map(&self) {
        self.memory.alias.with(|bytes| {
            // SAFETY: as above.
            assert_eq!(unsafe { *bytes }, 1, "the guest sees each page written exactly once");
        });
        self.memory.mapped.store(1, Ordering::SeqCst);
    }
}

#[test]
fn two_lanes_never_both_write_a_page() {
    loom::model(|| {
        let world = World::new();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.receive(lane(1)))
        };
        let mine = world.receive(lane(0));
        let theirs = other.join().unwrap();
        assert!(mine ^ theirs, "exactly one lane places the page");
        assert!(world.states.is_resident(PAGE));
    });
}

#[test]
fn a_fault_is_always_answered() {
    loom::model(|| {
        let world = World::new();
        let bulk = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.receive(lane(1)))
        };
        // The fault thread: whatever it finds, the page ends up mapped without the fault being forgotten.
        match world.states.fault(PAGE) {
            FaultVerdict::Ask => {
                // The answer comes later, on the fault lane; it wins or loses against the bulk lane.
                world.receive(lane(0));
            }
            FaultVerdict::Landing => {}
            FaultVerdict::Map => world.map(),
            verdict => panic!("nobody else asks or sends zeros: {verdict:?}"),
        }
        bulk.join().unwrap();
        assert_eq!(world.memory.mapped.load(Ordering::SeqCst), 1);
    });
}

#[test]
fn a_dead_lanes_page_is_not_forgotten() {
    loom::model(|| {
        let world = World::new();
        let dying = {
            let world = Arc::clone(&world);
            thread::spawn(move || match world.states.claim(PAGE, lane(1)) {
                Claim::Won { .. } => world.states.release(PAGE, lane(1)),
                Claim::Lost => false,
            })
        };
        let verdict = world.states.fault(PAGE);
        let must_ask_again = dying.join().unwrap();
        // A fault that was told to wait for the dying lane is handed back by it; one that asked gets its answer.
        match verdict {
            FaultVerdict::Landing => assert!(must_ask_again),
            FaultVerdict::Ask => {}
            verdict => panic!("{verdict:?}"),
        }
        assert!(world.receive(lane(0)), "the page can be claimed again");
    });
}

#[test]
fn a_removed_page_stays_removed() {
    loom::model(|| {
        let world = World::new();
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.states.remove(PAGE);
            })
        };
        if matches!(world.states.claim(PAGE, lane(0)), Claim::Won { .. }) {
            let _ = world.states.arrived(PAGE, lane(0));
        }
        guest.join().unwrap();
        assert_eq!(world.states.fault(PAGE), FaultVerdict::MapZero);
        assert_eq!(world.states.claim(PAGE, lane(1)), Claim::Lost);
        assert_eq!(world.states.claim_zero(PAGE), Claim::Lost);
    });
}

#[test]
fn zero_and_data_exclude_each_other() {
    loom::model(|| {
        let world = World::new();
        let zero = {
            let world = Arc::clone(&world);
            thread::spawn(move || matches!(world.states.claim_zero(PAGE), Claim::Won { .. }))
        };
        let data = world.receive(lane(0));
        assert!(data ^ zero.join().unwrap());
    });
}
