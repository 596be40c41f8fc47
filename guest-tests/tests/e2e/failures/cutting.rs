//! A link is cut, for a while or for good, or stalls.

use std::time::Duration;

use serde_json::json;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::link::{Ended, Mark, Role, Toward};
use switchover_guest_tests::moving::{set, switch};
use switchover_guest_tests::waiting::until;

use super::cell::{CELLS, Cell, Phase, Place, Plan};
use crate::lab;

/// What is left on both sides of a link that is gone. Whether there is something to be joined again.
fn loses_link(lab: &Lab, mut cell: Cell) -> Option<Cell> {
    match cell.place() {
        Place::Source => {
            cell.source_goes_on("failed");
            cell.there_ends();
            cell.moves_after_all(lab);
            None
        }
        Place::SourceAlone => {
            cell.source_goes_on("failed");
            cell.there_waits_without_a_guest();
            cell.there.quit();
            cell.moves_after_all(lab);
            None
        }
        Place::Nowhere => {
            cell.source_waits();
            cell.there_waits_without_a_guest();
            Some(cell)
        }
        Place::Split => {
            cell.source_waits();
            Cell::status(&mut cell.there, &["postcopy-paused"]);
            assert_eq!(cell.there.run_state(), "running");
            Some(cell)
        }
        Place::Destination => {
            cell.source_waits();
            Cell::status(&mut cell.there, &["completed"]);
            Some(cell)
        }
        Place::Moved => {
            cell.ends_well();
            None
        }
    }
}

#[test]
fn a_link_that_is_cut_for_a_second() {
    let lab = lab!("a_link_that_is_cut_for_a_second");
    for (number, (plan, phase)) in CELLS.into_iter().enumerate() {
        let cell = Cell::reach(&lab, plan, phase);
        cell.link.cut_for(Duration::from_secs(1), if number % 2 == 0 { Ended::Reset } else { Ended::Closed });
        if let Some(mut cell) = loses_link(&lab, cell) {
            let to = cell.link.address().to_owned();
            cell.join_again(&to);
            cell.ends_well();
        }
    }
}

#[test]
fn a_link_that_is_cut_for_good() {
    let lab = lab!("a_link_that_is_cut_for_good");
    for (number, (plan, phase)) in CELLS.into_iter().enumerate() {
        let cell = Cell::reach(&lab, plan, phase);
        cell.link.cut(if number % 2 == 0 { Ended::Closed } else { Ended::Reset });
        let Some(mut cell) = loses_link(&lab, cell) else { continue };
        // The old way stays shut.
        let old = cell.link.address().to_owned();
        cell.source.execute("migrate", json!({ "uri": old, "resume": true }));
        cell.source_waits();
        let there = format!("unix:{}", lab.path(&format!("again{number}")).display());
        cell.there.execute("migrate-recover", json!({ "uri": there }));
        cell.join_again(&there);
        cell.ends_well();
    }
    lab.close();
}

/// The cells for links that stall: it takes 5 s to notice each.
fn stalls(name: &str, cells: &[(Plan, Phase)]) {
    let Some(lab) = Lab::open(name) else { return };
    for &(plan, phase) in cells {
        let mut cell = Cell::reach(&lab, plan, phase);
        cell.link.stall();
        cell.silent = true;
        if let Some(mut cell) = loses_link(&lab, cell) {
            // The old lanes stay as they are, and nobody waits for them.
            cell.link.mend();
            let to = cell.link.address().to_owned();
            cell.join_again(&to);
            cell.ends_well();
        }
    }
}

#[test]
fn a_link_that_stalls_before_the_handoff() {
    stalls("a_link_that_stalls_before_the_handoff", &CELLS[..5]);
}

#[test]
fn a_link_that_stalls_in_the_handoff() {
    stalls("a_link_that_stalls_in_the_handoff", &CELLS[5..11]);
}

#[test]
fn a_link_that_stalls_after_the_commit() {
    stalls("a_link_that_stalls_after_the_commit", &CELLS[11..]);
}

#[test]
fn a_link_that_only_takes_its_time_is_not_lost() {
    let lab = lab!("a_link_that_only_takes_its_time_is_not_lost");
    for (plan, phase) in [(Plan::Postcopy, Phase::Acknowledged), (Plan::StopAndCopy, Phase::Acknowledged)] {
        let cell = Cell::begin(&lab, plan, phase, &lab.guest("random", "ws=4M period=50 pace=1000000"));
        cell.link.delay(Duration::from_millis(20));
        let cell = cell.come_to_phase();
        cell.link.let_go();
        cell.ends_well();
    }
}

#[test]
fn a_link_that_is_cut_in_the_middle_of_a_page() {
    let lab = lab!("a_link_that_is_cut_in_the_middle_of_a_page");
    let mut cell = Cell::reach(&lab, Plan::Postcopy, Phase::Running);
    set(&mut cell.source, json!({ "max-postcopy-bandwidth": 1 << 20 }));
    let to = cell.link.address().to_owned();
    for (number, (role, toward, bytes)) in [
        (Role::Bulk, Toward::Destination, 1),
        (Role::Bulk, Toward::Destination, 100_001),
        (Role::Fault, Toward::Destination, 5),
        (Role::Fault, Toward::Destination, 3 * 4096 + 7),
        (Role::Fault, Toward::Source, 17),
        (Role::Bulk, Toward::Destination, 4097),
    ]
    .into_iter()
    .enumerate()
    {
        cell.link.hold(Mark::Bytes(role, toward, bytes));
        cell.link.wait_held();
        cell.link.cut(if number % 2 == 0 { Ended::Reset } else { Ended::Closed });
        cell.source_waits();
        cell.link.mend();
        cell.join_again(&to);
    }
    set(&mut cell.source, json!({ "max-postcopy-bandwidth": 0 }));
    cell.ends_well();
}

/// However much a migration has held its guest back, nothing of that is left when it has come to nothing.
#[test]
fn a_guest_that_was_slowed_down_runs_on_at_full_speed() {
    let lab = lab!("a_guest_that_was_slowed_down_runs_on_at_full_speed");
    let mut cell = Cell::begin(&lab, Plan::Rounds, Phase::Round(6), &lab.guest("random", "ws=16M period=50"));
    switch(&mut cell.source, "auto-converge", true);
    set(&mut cell.source, json!({ "cpu-throttle-initial": 99, "max-cpu-throttle": 99, "cpu-throttle-increment": 99 }));
    let mut cell = cell.come_to_phase();
    until("it is held back", || {
        let look = cell.source.execute("query-migrate", json!({}));
        (look["cpu-throttle-percentage"].as_u64()? >= 99).then_some(())
    });
    let visits = |cell: &mut Cell| {
        let from = cell.journey.works_on(1);
        let to = cell.journey.works_on(4);
        cell.journey.log().visits_since(from, 0) / u64::try_from(to - from).unwrap()
    };
    // The first look may still be at periods that began before it was held back, and any at ones in which others had the processor.
    let slow = (0..3).map(|_| visits(&mut cell)).min().unwrap();
    cell.link.cut(Ended::Reset);
    cell.source_goes_on("failed");
    let fast = (0..3).map(|_| visits(&mut cell)).max().unwrap();
    println!("   {slow} visits a period, and {fast}");
    assert!(fast > 5 * slow, "it is still held back: {slow} visits a period, and {fast}");
    cell.there_ends();
    cell.moves_after_all(&lab);
}
