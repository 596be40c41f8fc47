//! Processes are killed at any moment, and a witness hears both sides: the guest prints into one pipe, whichever side it runs
//! at. Were there ever two guests, both would be heard, and their words would not make one text.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use std::{hint, thread};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::json;
use switchover_guest_tests::capture::Capture;
use switchover_guest_tests::guest_log::GuestLog;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::link::{Ended, Link, Mark, Message};
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, Way, choose, destination, set};
use switchover_guest_tests::waiting::until;

use crate::lab;

/// Kills, unless `SWITCHOVER_KILLS` says otherwise.
const KILLS: usize = 20;

/// A pipe that both sides print into.
struct Witness {
    heard: Arc<Capture>,
    path: String,
    /// While it is open, the pipe does not end.
    _keeper: File,
}

impl Witness {
    fn new(lab: &Lab, number: usize) -> Self {
        let path = lab.path(&format!("witness{number}"));
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let keeper = File::options().read(true).write(true).open(&path).unwrap();
        let heard = Capture::of(File::open(&path).unwrap());
        Self { heard, path: format!("file:{}", path.display()), _keeper: keeper }
    }
}

/// Random numbers, the same ones for the same seed (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Victim {
    Source,
    Destination,
    /// Both, as by a power cut: nobody runs.
    Both,
}

/// How the survivor was found.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Found {
    /// The guest runs at the source, and was never anywhere else.
    AtSource,
    /// The source waits, or knows that the guest has moved.
    GivenAway,
    /// The destination has ended without a guest.
    NeverThere,
    /// The destination does not know whether the guest was given to it.
    Unknown,
    /// The guest runs at the destination, which lacks parts of its memory.
    InParts,
    /// All of the guest runs at the destination.
    Whole,
    /// Nobody is left.
    Nothing,
}

#[test]
fn processes_that_are_killed_at_any_moment() {
    let lab = lab!("processes_that_are_killed_at_any_moment");
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let kills = number("SWITCHOVER_KILLS").map_or(KILLS, |kills| usize::try_from(kills).unwrap());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = number("SWITCHOVER_SEED").unwrap_or(u64::from(now.subsec_nanos()));
    println!("SWITCHOVER_SEED={seed}");
    let mut dice = Dice(seed | 1 << 63);
    let mut tally = std::collections::BTreeMap::new();
    let began = Instant::now();
    for kill in 0..kills {
        let found = kill_once(&lab, kill, &mut dice);
        *tally.entry(found).or_insert(0) += 1;
        if (kill + 1).is_multiple_of(20) {
            println!("{} kills in {:.0?}: {tally:?}", kill + 1, began.elapsed());
        }
    }
}

/// An operator who takes a guest back that runs on elsewhere has two. The witness hears both: it can tell.
#[test]
fn a_guest_that_runs_twice_is_heard() {
    let lab = lab!("a_guest_that_runs_twice_is_heard");
    let witness = Witness::new(&lab, 0);
    let spec = Spec { serial: witness.path.clone(), ..lab.guest("random", "ws=8M period=20") };
    let mut source = Machine::start(&lab, &spec);
    Journey::hearing(Arc::clone(&witness.heard)).works_on(1);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let link = Link::to(&to);
    choose(&mut source, Way::new("precopy", 1));
    set(&mut source, json!({ "downtime-limit": 10_000 }));
    link.hold(Mark::Message(Message::Running));
    source.execute("migrate", json!({ "uri": link.address() }));
    link.wait_held();
    link.cut(Ended::Reset);
    source.wait_migration("postcopy-paused");
    assert_eq!(there.run_state(), "running");
    source.execute("x-switchover-reclaim", json!({}));
    until("the witness hears both", || {
        let mut log = GuestLog::default();
        log.feed(witness.heard.text().as_bytes());
        (!log.problems.is_empty()).then_some(())
    });
}

fn kill_once(lab: &Lab, number: usize, dice: &mut Dice) -> Found {
    let witness = Witness::new(lab, number);
    let spec = Spec { serial: witness.path.clone(), ..lab.guest("random", "ws=8M period=20") };
    let mut source = Machine::start(lab, &spec);
    let mut journey = Journey::hearing(Arc::clone(&witness.heard));
    journey.works_on(1);
    let (mut there, to) = destination(lab, &spec, if dice.below(2) == 0 { Transport::Tcp } else { Transport::Unix });
    let mode = ["postcopy", "postcopy", "hybrid", "precopy"][usize::try_from(dice.below(4)).unwrap()];
    choose(&mut source, Way::new(mode, u8::try_from(dice.below(3)).unwrap() + 1));
    set(&mut source, json!({ "downtime-limit": 10_000 }));
    if dice.below(2) == 0 {
        set(&mut source, json!({ "max-postcopy-bandwidth": 16 << 20 }));
    }
    let victim = [Victim::Source, Victim::Destination, Victim::Source, Victim::Destination, Victim::Both]
        [usize::try_from(dice.below(5)).unwrap()];
    source.execute("migrate", json!({ "uri": to }));
    // Most of what can go wrong is over in some milliseconds: they are counted from the beginning, or from the handoff.
    let at_handoff = mode == "postcopy" && dice.below(3) > 0;
    if at_handoff {
        source.wait_migration("active");
    }
    if mode == "postcopy" {
        source.execute("migrate-start-postcopy", json!({}));
    }
    let most = [3_000, 20_000, 100_000, 600_000][usize::try_from(dice.below(if at_handoff { 3 } else { 4 })).unwrap()];
    let moment = Duration::from_micros(dice.below(most));
    wait_exactly(moment);
    match victim {
        Victim::Source => source.kill(),
        Victim::Destination => there.kill(),
        // In this order: a destination may end by itself when its source is gone.
        Victim::Both => {
            there.kill();
            source.kill();
        }
    }
    let found = match victim {
        Victim::Source => judge_destination(&mut there, &mut journey),
        Victim::Destination => judge_source(&mut source, &mut journey, &witness),
        Victim::Both => Found::Nothing,
    };
    println!("{number}: {mode}, {victim:?} after {moment:?}: {found:?}");
    journey.log();
    found
}

/// Without a sleep's own time, which is longer than a handoff.
fn wait_exactly(time: Duration) {
    let end = Instant::now() + time;
    if let Some(long) = time.checked_sub(Duration::from_millis(1)) {
        thread::sleep(long);
    }
    while Instant::now() < end {
        hint::spin_loop();
    }
}

fn judge_source(source: &mut Machine, journey: &mut Journey, witness: &Witness) -> Found {
    let (status, error) = until("the source has come to a decision", || {
        let look = source.execute("query-migrate", json!({}));
        let text = |key: &str| look[key].as_str().unwrap_or_default().to_owned();
        let status = text("status");
        matches!(&*status, "failed" | "completed" | "postcopy-paused").then(|| (status, text("error-desc")))
    });
    let state = source.run_state();
    match (&*status, &*state) {
        ("failed", "running") => {
            assert!(error.contains("unharmed on the source"), "{error}");
            journey.works_on(1);
            source.quit();
            Found::AtSource
        }
        ("postcopy-paused" | "completed", "postmigrate") => {
            assert!(!source.refuses("cont", json!({})).is_empty());
            // Nobody speaks any more: the destination is gone, and the source must not.
            journey.log();
            let printed = witness.heard.len();
            let refused = source.qmp().execute("quit", json!({})).is_err();
            assert_eq!(refused, status == "postcopy-paused", "{status}");
            if refused {
                assert_eq!(source.run_state(), "postmigrate");
                source.kill();
            } else {
                assert_eq!(source.wait_end(), 0);
            }
            assert_eq!(witness.heard.len(), printed, "the guest ran at a source that had given it away");
            Found::GivenAway
        }
        other => panic!("{other:?}: {error}"),
    }
}

fn judge_destination(there: &mut Machine, journey: &mut Journey) -> Found {
    let mut waiting_since = None;
    let decided = until("the destination has come to a decision", || {
        if there.has_ended().is_some() {
            return Some(None);
        }
        // It may end between the two looks.
        let look = there.qmp().execute("query-migrate", json!({})).ok()?;
        let status = look["status"].as_str()?.to_owned();
        // One that has not seen all of its source's lanes waits for another source, and nothing announces that.
        if status == "setup" && waiting_since.get_or_insert_with(Instant::now).elapsed() > Duration::from_secs(2) {
            return Some(Some(status));
        }
        matches!(&*status, "completed" | "postcopy-paused").then_some(Some(status))
    });
    let Some(status) = decided else {
        assert_eq!(there.wait_end(), 1);
        assert!(there.stderr().to_end().contains("the incoming migration failed"));
        return Found::NeverThere;
    };
    let found = match (&*status, &*there.run_state()) {
        ("completed", "running") => {
            journey.works_on(1);
            Found::Whole
        }
        ("setup", "inmigrate") => Found::NeverThere,
        ("postcopy-paused", "running") => Found::InParts,
        ("postcopy-paused", _) => {
            assert!(!there.refuses("cont", json!({})).is_empty());
            Found::Unknown
        }
        other => panic!("{other:?}"),
    };
    there.quit();
    found
}
