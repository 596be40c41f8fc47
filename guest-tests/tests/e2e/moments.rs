//! One side dies at any moment of a handoff: whatever the moment, at most one side runs the guest, the survivor says
//! which one it is, and what the guest has said is sound to its last word.

use std::thread;
use std::time::Duration;

use serde_json::json;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::machine::Machine;
use switchover_guest_tests::moving::{Transport, begin, destination};
use switchover_guest_tests::waiting::until;

use crate::lab;

/// When the blow falls, in µs after `migrate-start-postcopy` was taken. A handoff takes some 3 ms in a release build
/// and 10 in a debug build, and the memory of this guest some 50 ms more.
const MOMENTS: [u64; 8] = [0, 500, 1_500, 3_000, 5_000, 8_000, 15_000, 40_000];

fn under_way(lab: &Lab) -> (Machine, Machine, Journey) {
    let spec = lab.guest("random", "ws=16M period=50");
    let mut source = Machine::start(lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (there, to) = destination(lab, &spec, Transport::Tcp);
    begin(&mut source, &to);
    source.execute("migrate-start-postcopy", json!({}));
    (source, there, journey)
}

fn status(machine: &mut Machine) -> (String, String) {
    let look = machine.execute("query-migrate", json!({}));
    let text = |key: &str| look[key].as_str().unwrap_or_default().to_owned();
    (text("status"), text("error-desc"))
}

fn ended(machine: &mut Machine) -> (String, String) {
    until("the migration has ended", || {
        let found = status(machine);
        matches!(&*found.0, "failed" | "completed" | "cancelled" | "postcopy-paused").then_some(found)
    })
}

#[test]
fn a_destination_may_die_at_any_moment() {
    let lab = lab!("a_destination_may_die_at_any_moment");
    for moment in MOMENTS {
        let (mut source, mut there, mut journey) = under_way(&lab);
        thread::sleep(Duration::from_micros(moment));
        there.kill();
        let ran_there = !there.serial().to_end().is_empty();
        let (status, error) = ended(&mut source);
        let state = source.run_state();
        println!("after {moment} µs: {status}, {state}: {error}");
        match (&*state, &*status) {
            ("running", "failed") => {
                assert!(error.contains("unharmed on the source"), "{error}");
                assert!(!ran_there, "the guest has run on both sides");
                journey.works_on(1);
            }
            ("postmigrate", "postcopy-paused") => assert!(!error.is_empty()),
            ("postmigrate", "completed") => assert!(ran_there || moment > 0),
            other => panic!("{other:?}: {error}"),
        }
        let printed = source.serial().len();
        if state == "postmigrate" {
            assert!(!source.refuses("cont", json!({})).is_empty());
        }
        if status == "postcopy-paused" {
            // What it has may be the last of the guest: it goes only by force.
            assert!(source.refuses("quit", json!({})).contains("only here yet"));
            source.kill();
        } else {
            source.quit();
        }
        if state == "postmigrate" {
            assert_eq!(source.serial().to_end().len(), printed, "the guest ran at a source that had given it away");
            journey.goes_to(&there);
        }
        journey.log();
    }
}

#[test]
fn a_source_may_die_at_any_moment() {
    let lab = lab!("a_source_may_die_at_any_moment");
    for moment in MOMENTS {
        let (mut source, mut there, mut journey) = under_way(&lab);
        thread::sleep(Duration::from_micros(moment));
        source.kill();
        // Either it never had the guest and ends, or it has it and stays.
        let found = until("the destination has come to a decision", || {
            if there.has_ended().is_some() {
                return Some(None);
            }
            // It may end between the two looks.
            let look = there.qmp().execute("query-migrate", json!({})).ok()?;
            let text = |key: &str| look[key].as_str().unwrap_or_default().to_owned();
            // A migration that failed before the commit is about to end its process.
            let decided = matches!(&*text("status"), "completed" | "postcopy-paused");
            decided.then(|| Some((text("status"), text("error-desc"))))
        });
        println!("after {moment} µs: {found:?}");
        let Some((status, error)) = found else {
            assert_eq!(there.wait_end(), 1);
            let said = there.stderr().to_end();
            assert!(said.contains("the incoming migration failed"), "{said}");
            assert!(there.serial().is_empty(), "a guest ran without a commit");
            journey.log();
            continue;
        };
        journey.goes_to(&there);
        match (&*status, &*there.run_state()) {
            ("completed", "running") => drop(journey.works_on(1)),
            ("postcopy-paused", "running") => assert!(!error.is_empty()),
            // Only the source knew whether the guest had been given away.
            ("postcopy-paused", "inmigrate") => {
                assert!(!there.refuses("cont", json!({})).is_empty());
                assert!(there.serial().is_empty(), "a guest ran without a commit");
            }
            other => panic!("{other:?}: {error}"),
        }
        there.quit();
        journey.log();
    }
}
