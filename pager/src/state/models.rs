//! Every interleaving of the threads that contend for a page, explored by loom.

mod crowd;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;
use switchover_wire::types::{PageCount, PageIndex};

use super::{Arrival, Claim, FaultVerdict, LaneTag, PageStates};

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

/// What the bytes of the page are: nothing, the version that pre-copy brought, the one that counts.
const OLD: u64 = 1;
const NEW: u64 = 2;

/// Pre-copy, the handoff and what follows it, of one page.
struct Moving {
    states: PageStates,
    alias: UnsafeCell<u64>,
    /// The handoff was made. Held while pages are claimed for pre-copy, and while they arrive.
    handed_over: Mutex<bool>,
    mapped: AtomicU64,
    /// A fault waits for the page and nobody brings it: the fault thread must ask.
    orphans: AtomicU64,
}

impl Moving {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            states: PageStates::new(PageCount(1)),
            alias: UnsafeCell::new(0),
            handed_over: Mutex::new(false),
            mapped: AtomicU64::new(0),
            orphans: AtomicU64::new(0),
        })
    }

    fn write(&self, version: u64) {
        self.alias.with_mut(|bytes| {
            // SAFETY: loom reports it when this access races with another.
            unsafe { *bytes = version };
        });
    }

    /// The guest sees the page.
    fn map(&self) {
        self.alias.with(|bytes| {
            // SAFETY: as above.
            assert_eq!(unsafe { *bytes }, NEW, "the guest sees the version that counts");
        });
        self.mapped.store(1, Ordering::SeqCst);
    }

    /// A lane brings a version before the handoff, as zero or with bytes. Says whether it was still before it in the end;
    /// `None` where another version was under way.
    fn bring_version(&self, tag: LaneTag, zero: bool) -> Option<bool> {
        {
            let handed_over = self.handed_over.lock().unwrap();
            if *handed_over {
                return Some(false);
            }
            self.states.reclaim(PAGE, tag)?;
        }
        self.write(if zero { 0 } else { OLD });
        let handed_over = self.handed_over.lock().unwrap();
        if *handed_over {
            if self.states.release(PAGE, tag) {
                self.orphans.fetch_add(1, Ordering::SeqCst);
            }
        } else {
            self.states.version_arrived(PAGE, tag, zero);
        }
        Some(!*handed_over)
    }

    /// The handoff, with the page among those that must come again.
    fn hand_over(&self) {
        let mut handed_over = self.handed_over.lock().unwrap();
        self.states.forget(0, 1);
        *handed_over = true;
    }

    /// A lane brings the version that counts, after the handoff.
    fn bring(&self, tag: LaneTag) {
        if let Claim::Won { .. } = self.states.claim(PAGE, tag) {
            self.write(NEW);
            assert!(matches!(self.states.arrived(PAGE, tag), Arrival::Present { .. }));
            self.map();
        }
    }

    /// What the fault thread does with a fault, or with a page that nobody brings after all.
    fn serve(&self) {
        match self.states.fault(PAGE) {
            FaultVerdict::Ask => self.bring(lane(0)),
            FaultVerdict::Map => self.map(),
            FaultVerdict::Landing => {}
            verdict => panic!("no zero was ever sent that counts, and nobody else asks: {verdict:?}"),
        }
    }
}

/// A version of pre-copy is landing, the handoff forgets the page, a fault comes, and another lane brings the new version.
fn a_late_version(zero: bool, resident: bool) {
    loom::model(move || {
        let world = Moving::new();
        if resident {
            assert_eq!(world.bring_version(lane(1), false), Some(true));
        }
        let late = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.bring_version(lane(1), zero))
        };
        world.hand_over();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.bring(lane(2)))
        };
        world.serve();
        assert!(late.join().unwrap().is_some(), "no other version was under way");
        other.join().unwrap();
        for _ in 0..world.orphans.load(Ordering::SeqCst) {
            world.serve();
        }
        assert_eq!(world.mapped.load(Ordering::SeqCst), 1, "the page is lost");
        assert!(world.states.is_resident(PAGE));
    });
}

#[test]
fn a_version_that_lands_across_the_handoff_is_never_seen_and_its_page_never_lost() {
    a_late_version(false, false);
}

#[test]
fn nor_one_that_replaces_what_was_here() {
    a_late_version(false, true);
}

#[test]
fn nor_one_that_is_zero() {
    a_late_version(true, true);
}

/// A page that nobody will send again counts, whatever came of it, once it has arrived.
#[test]
fn before_the_handoff_the_last_version_stays() {
    for zero in [false, true] {
        loom::model(move || {
            let world = Moving::new();
            assert_eq!(world.bring_version(lane(1), false), Some(true));
            let last = {
                let world = Arc::clone(&world);
                thread::spawn(move || world.bring_version(lane(1), zero))
            };
            assert_eq!(last.join().unwrap(), Some(true));
            *world.handed_over.lock().unwrap() = true;
            let expected = if zero { FaultVerdict::MapZero } else { FaultVerdict::Map };
            assert_eq!(world.states.fault(PAGE), expected);
            assert_eq!(world.states.claim(PAGE, lane(2)), Claim::Lost, "it may be written no more");
        });
    }
}

#[test]
fn two_versions_never_land_at_once() {
    loom::model(|| {
        let world = Moving::new();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.bring_version(lane(1), false))
        };
        // Loom would report it if both wrote.
        let mine = world.bring_version(lane(2), false);
        let theirs = other.join().unwrap();
        assert!(mine.is_some() || theirs.is_some(), "one of them lands");
        assert!(world.states.is_resident(PAGE));
    });
}

/// A lane dies in the middle of a version: the page is needed again, whether or not one was here before.
#[test]
fn a_version_that_is_cut_off_leaves_nothing() {
    for resident in [false, true] {
        loom::model(move || {
            let world = Moving::new();
            if resident {
                assert_eq!(world.bring_version(lane(1), false), Some(true));
            }
            assert_eq!(world.states.reclaim(PAGE, lane(1)), Some(resident));
            let dying = {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    world.write(OLD);
                    if world.states.release(PAGE, lane(1)) {
                        world.orphans.fetch_add(1, Ordering::SeqCst);
                    }
                })
            };
            world.hand_over();
            world.serve();
            dying.join().unwrap();
            for _ in 0..world.orphans.load(Ordering::SeqCst) {
                world.serve();
            }
            assert!(world.states.is_resident(PAGE));
            assert_eq!(world.mapped.load(Ordering::SeqCst), 1);
        });
    }
}
