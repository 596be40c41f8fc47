//! Two lanes, the fault thread and a removal on the same pages, all at once.

use super::*;
use crate::sync::explore;

const PAGES: u64 = 2;
/// Preemptions that are tried: with one more, it takes minutes.
const PREEMPTIONS: usize = 2;
/// With two pages there is more to interleave.
const PREEMPTIONS_OF_ALL: usize = 1;

/// One page's bytes, and what became of its fault.
struct Slot {
    alias: UnsafeCell<u64>,
    /// A fault was told that somebody brings the page, and sleeps.
    asleep: AtomicU64,
    /// Somebody was told that a fault waits, and woke it, or mapped the page.
    woken: AtomicU64,
}

struct Crowd {
    states: PageStates,
    slots: Vec<Slot>,
}

impl Crowd {
    fn new() -> Arc<Self> {
        let slot = || Slot { alias: UnsafeCell::new(0), asleep: AtomicU64::new(0), woken: AtomicU64::new(0) };
        Arc::new(Self { states: PageStates::new(PageCount(PAGES)), slots: (0..PAGES).map(|_| slot()).collect() })
    }

    fn slot(&self, page: PageIndex) -> &Slot {
        &self.slots[usize::try_from(page.0).unwrap()]
    }

    fn write(&self, page: PageIndex) {
        self.slot(page).alias.with_mut(|bytes| {
            // SAFETY: loom reports it when this access races with another.
            unsafe { *bytes += 1 };
        });
    }

    fn wake(&self, page: PageIndex) {
        self.slot(page).woken.fetch_add(1, Ordering::SeqCst);
    }

    /// What a lane does with a page that comes whole. Only one that has won may write.
    fn bring(&self, page: PageIndex, tag: LaneTag) {
        if let Claim::Won { wanted } = self.states.claim(page, tag) {
            self.write(page);
            match self.states.arrived(page, tag) {
                Arrival::Present { wanted: now } => {
                    assert!(now || !wanted, "a fault that waited at the claim waits at the arrival");
                    if now {
                        self.wake(page);
                    }
                }
                // The kernel wakes whoever slept on a page that is given back.
                Arrival::Removed => self.wake(page),
            }
        }
    }

    /// A lane that dies after its claim. Whoever waits is handed to the fault thread, which asks anew.
    fn die(&self, page: PageIndex, tag: LaneTag) {
        if let Claim::Won { .. } = self.states.claim(page, tag)
            && self.states.release(page, tag)
            && matches!(self.serve(page, lane(3)), FaultVerdict::Map | FaultVerdict::MapZero)
        {
            self.wake(page);
        }
    }

    /// What the fault thread does; `tag` carries the answer where it must ask.
    fn serve(&self, page: PageIndex, tag: LaneTag) -> FaultVerdict {
        let verdict = self.states.fault(page);
        match verdict {
            FaultVerdict::Ask => self.bring(page, tag),
            FaultVerdict::AlreadyAsked | FaultVerdict::Landing => {
                self.slot(page).asleep.fetch_add(1, Ordering::SeqCst);
            }
            FaultVerdict::Map | FaultVerdict::MapZero => {}
        }
        verdict
    }

    fn remove(&self, page: PageIndex) {
        self.states.remove(page);
        self.wake(page);
    }

    /// Whoever sleeps was woken by somebody who knew of it.
    fn nobody_sleeps(&self) {
        for slot in &self.slots {
            let (asleep, woken) = (slot.asleep.load(Ordering::SeqCst), slot.woken.load(Ordering::SeqCst));
            assert!(asleep == 0 || woken > 0, "a fault sleeps for ever");
        }
    }
}

fn spawn(crowd: &Arc<Crowd>, body: impl FnOnce(&Crowd) + 'static) -> thread::JoinHandle<()> {
    let crowd = Arc::clone(crowd);
    thread::spawn(move || body(&crowd))
}

const FIRST: PageIndex = PageIndex(0);
const SECOND: PageIndex = PageIndex(1);

#[test]
fn lanes_a_fault_and_a_removal_lose_no_page_and_no_sleeper() {
    explore(PREEMPTIONS_OF_ALL, || {
        let crowd = Crowd::new();
        let others = [
            spawn(&crowd, |crowd| {
                crowd.bring(FIRST, lane(1));
                crowd.bring(SECOND, lane(1));
            }),
            spawn(&crowd, |crowd| crowd.bring(SECOND, lane(2))),
            spawn(&crowd, |crowd| crowd.remove(SECOND)),
        ];
        crowd.serve(FIRST, lane(0));
        crowd.serve(SECOND, lane(0));
        others.into_iter().for_each(|other| other.join().unwrap());
        crowd.nobody_sleeps();
        assert!(crowd.states.is_present(FIRST));
        for slot in &crowd.slots {
            slot.alias.with(|bytes| {
                // SAFETY: all threads have ended.
                assert!(unsafe { *bytes } <= 1, "two lanes wrote a page");
            });
        }
        assert!(!crowd.states.is_present(SECOND) && crowd.states.is_resident(SECOND), "a removed page came back");
    });
}

#[test]
fn nor_where_all_meet_on_one_page() {
    explore(PREEMPTIONS, || {
        let crowd = Crowd::new();
        let others = [
            spawn(&crowd, |crowd| crowd.bring(FIRST, lane(1))),
            spawn(&crowd, |crowd| crowd.bring(FIRST, lane(2))),
            spawn(&crowd, |crowd| {
                crowd.serve(FIRST, lane(0));
            }),
        ];
        crowd.serve(FIRST, lane(0));
        others.into_iter().for_each(|other| other.join().unwrap());
        crowd.nobody_sleeps();
        assert!(crowd.states.is_present(FIRST));
    });
}

#[test]
fn a_lane_that_dies_among_others_leaves_its_page_to_them() {
    explore(PREEMPTIONS, || {
        let crowd = Crowd::new();
        let others = [
            spawn(&crowd, |crowd| crowd.die(FIRST, lane(1))),
            spawn(&crowd, |crowd| crowd.bring(FIRST, lane(2))),
            spawn(&crowd, |crowd| {
                crowd.serve(FIRST, lane(0));
            }),
        ];
        crowd.serve(FIRST, lane(0));
        others.into_iter().for_each(|other| other.join().unwrap());
        crowd.nobody_sleeps();
        assert!(crowd.states.is_present(FIRST) || crowd.states.is_absent(FIRST));
        assert!(crowd.slot(FIRST).asleep.load(Ordering::SeqCst) == 0 || crowd.states.is_present(FIRST));
    });
}

/// The fault of a removed page must find zeros, whatever lands for it meanwhile, and nobody may claim it.
#[test]
fn a_release_gives_nothing_back_of_a_page_that_was_removed() {
    explore(PREEMPTIONS, || {
        let crowd = Crowd::new();
        let others = [
            spawn(&crowd, |crowd| crowd.die(FIRST, lane(1))),
            spawn(&crowd, |crowd| crowd.remove(FIRST)),
            spawn(&crowd, |crowd| {
                crowd.states.claim_zero(FIRST);
            }),
        ];
        crowd.serve(FIRST, lane(0));
        others.into_iter().for_each(|other| other.join().unwrap());
        crowd.nobody_sleeps();
        assert_eq!(crowd.states.fault(FIRST), FaultVerdict::MapZero);
        assert_eq!(crowd.states.claim(FIRST, lane(2)), Claim::Lost);
        assert!(!crowd.states.release(FIRST, lane(1)));
    });
}
