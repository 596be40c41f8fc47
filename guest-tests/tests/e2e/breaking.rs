//! Migrations that break: at every point exactly one side has the guest, says so, and no guest sees a wrong byte.

use nix::sys::signal::Signal;
use serde_json::json;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::machine::Machine;
use switchover_guest_tests::moving::{Transport, allow_postcopy, begin, destination, migrate, slow_down};
use switchover_guest_tests::waiting::until;

use crate::lab;

/// A guest whose memory takes long to follow: it asks for few pages, and `slow_down` bounds the rest.
const SLOW: &str = "ws=32M period=50 pace=2000000";
/// Bytes a second: the working set takes more than a minute.
const CRAWL: u64 = 400_000;

/// A machine with a working guest.
fn source(lab: &Lab, append: &str) -> (Machine, Journey) {
    let machine = Machine::start(lab, &lab.guest("random", append));
    let mut journey = Journey::from(&machine);
    journey.works_on(1);
    (machine, journey)
}

/// Two machines in the middle of a post-copy that does not end soon.
fn in_postcopy(lab: &Lab) -> (Machine, Machine, Journey) {
    let (mut source, journey) = source(lab, SLOW);
    let (mut there, to) = destination(lab, &lab.guest("random", ""), Transport::Tcp);
    slow_down(&mut source, CRAWL);
    begin(&mut source, &to);
    source.execute("migrate-start-postcopy", json!({}));
    source.wait_migration("postcopy-active");
    there.wait_migration("postcopy-active");
    (source, there, journey)
}

/// The guest still works on `source`, and can be moved from there.
fn moves_after_all(lab: &Lab, source: &mut Machine, journey: &mut Journey) {
    assert_eq!(source.run_state(), "running");
    journey.works_on(1);
    let (mut there, to) = destination(lab, &lab.guest("random", ""), Transport::Unix);
    migrate(source, &mut there, &to);
    journey.ends_at(source, &mut there, 1);
}

#[test]
fn a_cancelled_migration_leaves_the_guest_where_it_is() {
    let lab = lab!("a_cancelled_migration_leaves_the_guest_where_it_is");
    let (mut source, mut journey) = source(&lab, "ws=8M period=50");
    let (mut there, to) = destination(&lab, &lab.guest("random", ""), Transport::Tcp);
    begin(&mut source, &to);
    source.execute("migrate_cancel", json!({}));
    source.wait_migration("cancelled");
    assert_eq!(there.wait_end(), 1);
    let said = there.stderr().to_end();
    assert!(said.contains("cancelled on the source"), "{said}");
    assert!(there.serial().is_empty());
    moves_after_all(&lab, &mut source, &mut journey);
    lab.close();
}

#[test]
fn a_destination_that_dies_before_the_handoff_costs_nothing() {
    let lab = lab!("a_destination_that_dies_before_the_handoff_costs_nothing");
    let (mut source, mut journey) = source(&lab, "ws=8M period=50");
    let (mut there, to) = destination(&lab, &lab.guest("random", ""), Transport::Tcp);
    begin(&mut source, &to);
    there.kill();
    let error = source.wait_migration("failed")["error-desc"].as_str().unwrap().to_owned();
    assert!(!error.is_empty());
    moves_after_all(&lab, &mut source, &mut journey);
}

#[test]
fn a_source_that_dies_before_the_handoff_ends_its_destination() {
    let lab = lab!("a_source_that_dies_before_the_handoff_ends_its_destination");
    let (mut source, _) = source(&lab, "ws=8M period=50");
    let (mut there, to) = destination(&lab, &lab.guest("random", ""), Transport::Tcp);
    begin(&mut source, &to);
    source.kill();
    assert_eq!(there.wait_end(), 1);
    let said = there.stderr().to_end();
    assert!(said.contains("the incoming migration failed"), "{said}");
    assert!(there.serial().is_empty());
}

#[test]
fn a_destination_that_dies_in_postcopy_leaves_a_source_that_never_runs_again() {
    let lab = lab!("a_destination_that_dies_in_postcopy_leaves_a_source_that_never_runs_again");
    let (mut source, mut there, mut journey) = in_postcopy(&lab);
    let printed = source.serial().len();
    there.kill();
    let error = source.wait_migration("postcopy-paused")["error-desc"].as_str().unwrap().to_owned();
    assert!(!error.is_empty());
    assert_eq!(source.run_state(), "postmigrate");
    let refusal = source.refuses("cont", json!({}));
    assert!(refusal.contains("moved to another host"), "{refusal}");
    allow_nothing(&mut source);
    journey.log();
    assert_eq!(source.serial().len(), printed, "the guest ran at the source after it had been given away");
}

/// A source that has given its guest away does not move it once more either.
fn allow_nothing(source: &mut Machine) {
    let refusal = source.refuses("migrate", json!({ "uri": "tcp:127.0.0.1:1" }));
    assert!(refusal.contains("in progress"), "{refusal}");
    let refusal = source.refuses("quit", json!({}));
    assert!(refusal.contains("only here yet"), "{refusal}");
    assert_eq!(source.run_state(), "postmigrate");
}

#[test]
fn a_source_that_dies_in_postcopy_leaves_the_guest_what_it_has_and_feeds_it_no_zeros() {
    let lab = lab!("a_source_that_dies_in_postcopy_leaves_the_guest_what_it_has_and_feeds_it_no_zeros");
    let (mut source, mut there, mut journey) = in_postcopy(&lab);
    source.kill();
    let error = there.wait_migration("postcopy-paused")["error-desc"].as_str().unwrap().to_owned();
    assert!(!error.is_empty());
    assert_eq!(there.run_state(), "running");
    journey.goes_to(&there);
    // It is stopped and runs on as its user likes, and waits by itself for pages that will not come. What it says is sound.
    for _ in 0..20 {
        there.execute("stop", json!({}));
        assert_eq!(there.run_state(), "paused");
        there.execute("cont", json!({}));
        assert_eq!(there.run_state(), "running");
        journey.log();
    }
    there.quit();
    journey.log();
}

#[test]
fn a_source_that_is_still_needed_does_not_quit() {
    let lab = lab!("a_source_that_is_still_needed_does_not_quit");
    let (mut source, mut there, mut journey) = in_postcopy(&lab);
    let refusal = source.refuses("quit", json!({}));
    assert!(refusal.contains("only here yet"), "{refusal}");
    let refusal = source.refuses("migrate_cancel", json!({}));
    assert!(refusal.contains("handed to the destination"), "{refusal}");
    // Nor by Ctrl-C, the first time.
    source.signal(Signal::SIGINT);
    until("the source has said why it stays", || source.stderr().text().contains("only here yet").then_some(()));
    assert_eq!(source.run_state(), "postmigrate");
    // And its guest does not move on before it is whole.
    allow_postcopy(&mut there);
    let refusal = there.refuses("migrate", json!({ "uri": "tcp:127.0.0.1:1" }));
    assert!(refusal.contains("in progress"), "{refusal}");
    assert_eq!(there.run_state(), "running");
    let printed = there.serial().len();
    there.serial().wait_for_more(printed, std::time::Instant::now() + switchover_guest_tests::waiting::PATIENCE);
    assert!(there.serial().len() > printed, "the guest does not run while its memory follows");
    journey.log();
}
