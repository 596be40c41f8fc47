//! Whole migrations in a deterministic world: both state machines, their drivers' rules, a machine on each side whose guest writes
//! its memory, lanes that reorder, stall and break, processes that die, and an operator who does what can be done. Everything that
//! happens follows from a seed; after each step the invariants are checked.
//!
//! ```text
//!   mishaps ──▶ ┌───────────────┐  links of lanes   ┌────────────────────┐ ◀── mishaps
//!   operator ─▶ │ source_side   │ ◀───network────▶  │ destination_side   │
//!               │ SourceSession │    connecting     │ DestinationSession │
//!               └──── inbox ────┘                   └───── inbox ────────┘
//!                        memory: what the guest wrote, and what it reads
//! ```
//!
//! `SWITCHOVER_SEEDS=100000` runs more of them than the few thousand of an ordinary test, `SWITCHOVER_FIRST_SEED=5000` others, and
//! `SWITCHOVER_SEED=17` that one alone, with its whole story.

mod connecting;
mod destination_side;
mod inbox;
mod memory;
mod mishaps;
mod network;
mod operator;
mod random;
mod source_side;
mod world;

use std::env;

use self::world::World;
use super::Outcome;

/// Seeds of an ordinary test: some seconds without optimisation.
const SEEDS: u64 = 5000;

/// Lines of a failing seed's story that are printed, unless it is the only one to run.
const LINES: usize = 60;

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number, not `{text}`")))
}

/// Runs a seed once more, and tells how it went.
fn tell(seed: u64, lines: usize) {
    let mut world = World::new(seed, true);
    world.run();
    let trace = world.trace();
    println!("seed {seed}, its last {} of {} lines:", lines.min(trace.len()), trace.len());
    trace.iter().skip(trace.len().saturating_sub(lines)).for_each(|line| println!("{line}"));
}

/// What became of many seeds: a simulation in which nothing is ever lost or found again proves nothing.
#[derive(Default, Debug)]
struct Tally {
    seeds: u64,
    steps: usize,
    mishaps: u64,
    completed: u64,
    on_source: u64,
    unacknowledged: u64,
    rejoined: u64,
    stopped: u64,
    killed: u64,
}

impl Tally {
    fn add(&mut self, world: &World) {
        let (source, destination) = (&world.source, &world.destination);
        self.seeds += 1;
        self.steps += world.steps;
        self.mishaps += u64::from(world.struck);
        self.completed += u64::from(source.outcome == Some(Outcome::Completed));
        self.on_source += u64::from(source.alive && source.machine.runs);
        self.unacknowledged += u64::from(matches!(destination.outcome, Some(Outcome::Unacknowledged(_))));
        self.rejoined += u64::from(source.link > 0 && source.outcome == Some(Outcome::Completed));
        self.stopped +=
            u64::from(destination.alive && destination.over && !destination.machine.runs && destination.ever_ran);
        self.killed += u64::from(!source.alive || !destination.alive);
    }
}

#[test]
fn the_invariants_hold_whatever_happens() {
    if let Some(seed) = number("SWITCHOVER_SEED") {
        tell(seed, usize::MAX);
    }
    let (first, count) = match number("SWITCHOVER_SEED") {
        Some(seed) => (seed, 1),
        None => (number("SWITCHOVER_FIRST_SEED").unwrap_or(0), number("SWITCHOVER_SEEDS").unwrap_or(SEEDS)),
    };
    let mut tally = Tally::default();
    for seed in first..first + count {
        let mut world = World::new(seed, false);
        world.run();
        if let Some(violation) = &world.violation {
            tell(seed, LINES);
            panic!("seed {seed}: {violation}; SWITCHOVER_SEED={seed} tells the whole story");
        }
        tally.add(&world);
    }
    println!("{tally:?}");
    if count >= SEEDS {
        let kinds =
            [tally.completed, tally.on_source, tally.unacknowledged, tally.rejoined, tally.stopped, tally.killed];
        assert!(kinds.iter().all(|kind| *kind > count / 200), "some ends hardly ever happen: {tally:?}");
    }
}

#[test]
fn a_seed_happens_the_same_way_each_time() {
    let story = |seed| {
        let mut world = World::new(seed, true);
        world.run();
        world.trace()
    };
    for seed in [1, 2, 3] {
        assert_eq!(story(seed), story(seed));
    }
}
