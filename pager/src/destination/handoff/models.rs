//! The handoff among the lanes: one that still brings an old version, and one whose new version has overtaken it.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use super::*;
use crate::state::{Arrival, Claim, LaneTag};
use crate::sync::explore;

const PREEMPTIONS: usize = 3;
const PAGE: PageIndex = PageIndex(0);
const OLD: u64 = 1;
const NEW: u64 = 2;

/// One page, and what its lanes share.
struct World {
    handoff: Handoff,
    states: PageStates,
    absent: AtomicU64,
    alias: UnsafeCell<u64>,
}

impl World {
    fn new() -> Arc<Self> {
        let states = PageStates::new(PageCount(1));
        let (absent, alias) = (AtomicU64::new(1), UnsafeCell::new(0));
        Arc::new(Self { handoff: Handoff::default(), states, absent, alias })
    }

    fn write(&self, version: u64) {
        self.alias.with_mut(|bytes| {
            // SAFETY: loom reports it when this access races with another.
            unsafe { *bytes = version };
        });
    }

    fn bytes(&self) -> u64 {
        self.alias.with(|bytes| {
            // SAFETY: as above.
            unsafe { *bytes }
        })
    }

    /// A frame of pre-copy, as `BulkReceiver` takes it.
    fn bring_version(&self, tag: LaneTag) {
        {
            let stage = self.handoff.stage();
            if stage.phase == Phase::Postcopy {
                return;
            }
            let resident = self.states.reclaim(PAGE, tag).unwrap();
            self.absent.fetch_add(u64::from(resident), Ordering::AcqRel);
        }
        self.write(OLD);
        let stage = self.handoff.stage();
        if stage.phase == Phase::Precopy {
            self.states.version_arrived(PAGE, tag, false);
            self.absent.fetch_sub(1, Ordering::AcqRel);
        } else {
            assert!(!self.states.release(PAGE, tag), "nobody runs before the handoff is done");
        }
    }

    /// A frame of after the handoff, which may come before the handoff's own message does.
    fn bring(&self, tag: LaneTag) {
        let stage = self.handoff.wait_until(|stage| stage.phase == Phase::Postcopy);
        assert_eq!(stage.phase, Phase::Postcopy);
        if let Claim::Won { .. } = self.states.claim(PAGE, tag) {
            self.write(NEW);
            assert_eq!(self.states.arrived(PAGE, tag), Arrival::Present { wanted: false });
        }
    }
}

fn lane(number: u8) -> LaneTag {
    LaneTag::new(number).unwrap()
}

fn spawn(world: &Arc<World>, body: impl FnOnce(&World) + 'static) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || body(&world))
}

#[test]
fn an_old_version_is_never_the_guests() {
    explore(PREEMPTIONS, || {
        let world = World::new();
        let late = spawn(&world, |world| world.bring_version(lane(1)));
        let overtaking = spawn(&world, |world| world.bring(lane(2)));
        assert_eq!(world.handoff.cross(&world.states, &world.absent, &[1]).unwrap().to_come, 1);
        late.join().unwrap();
        overtaking.join().unwrap();
        if world.states.is_absent(PAGE) {
            // The late lane held it: somebody asks for it once more.
            world.bring(lane(0));
        }
        assert!(world.states.is_present(PAGE));
        assert_eq!(world.bytes(), NEW);
        assert_eq!(world.absent.load(Ordering::Acquire), 1);
    });
}

#[test]
fn the_handoff_is_made_once() {
    explore(PREEMPTIONS, || {
        let world = World::new();
        let cross = |world: &World| world.handoff.cross(&world.states, &world.absent, &[1]).is_ok();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || cross(&world))
        };
        let mine = cross(&world);
        assert!(mine ^ other.join().unwrap());
        assert!(world.handoff.is_over());
    });
}

/// Loom reports a deadlock where somebody is not woken.
#[test]
fn who_waits_for_the_handoff_is_woken_by_it_or_by_the_end() {
    for stops in [false, true] {
        explore(PREEMPTIONS, move || {
            let world = World::new();
            let waiting = spawn(&world, move |world| {
                let stage = world.handoff.wait_until(|stage| stage.phase == Phase::Postcopy || stage.map_the_rest);
                assert_eq!(stage.stopping, stops);
            });
            let round = spawn(&world, |world| world.handoff.begin_round(1));
            if stops {
                world.handoff.stop();
            } else {
                world.handoff.cross(&world.states, &world.absent, &[1]).unwrap();
            }
            waiting.join().unwrap();
            round.join().unwrap();
        });
    }
}
