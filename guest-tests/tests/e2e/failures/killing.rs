//! A process is killed, and a migration is called off.

use serde_json::json;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::waiting::until;

use super::cell::{CELLS, Cell, Phase, Place};
use crate::lab;

#[test]
fn a_source_that_is_killed() {
    let lab = lab!("a_source_that_is_killed");
    for (plan, phase) in CELLS {
        let cell = Cell::reach(&lab, plan, phase);
        source_is_killed(cell);
    }
}

fn source_is_killed(mut cell: Cell) {
    cell.source.kill();
    cell.link.let_go();
    // What was on its way when it died may still arrive, and bring the destination one phase further.
    let may_be_restored = matches!(cell.phase, Phase::Pausing | Phase::StateSent);
    match cell.place() {
        Place::Source if !(may_be_restored && cell.there_is_paused()) => {
            cell.there_ends();
            cell.journey.log();
            return;
        }
        Place::Source | Place::SourceAlone => cell.there_waits_without_a_guest(),
        // The commit was on its way, and arrives, unless the end of another lane is seen before: then it is too late.
        Place::Nowhere if cell.there_is_undecided() => cell.there_waits_without_a_guest(),
        Place::Nowhere | Place::Split | Place::Destination | Place::Moved => {
            let (status, _) = Cell::status(&mut cell.there, &["postcopy-paused", "completed"]);
            assert_eq!(cell.there.run_state(), "running");
            cell.journey.goes_to(&cell.there);
            if status == "completed" {
                cell.journey.works_on(1);
            }
        }
    }
    cell.there.quit();
    cell.journey.log();
}

#[test]
fn a_source_whose_host_is_lost_with_what_it_was_saying() {
    let lab = lab!("a_source_whose_host_is_lost_with_what_it_was_saying");
    for (plan, phase) in CELLS {
        let mut cell = Cell::reach(&lab, plan, phase);
        cell.link.cut(switchover_guest_tests::link::Ended::Reset);
        cell.source.kill();
        match cell.place() {
            Place::Source => {
                cell.there_ends();
                cell.journey.log();
                continue;
            }
            Place::SourceAlone | Place::Nowhere => cell.there_waits_without_a_guest(),
            Place::Split => {
                Cell::status(&mut cell.there, &["postcopy-paused"]);
                assert_eq!(cell.there.run_state(), "running");
                cell.journey.goes_to(&cell.there);
            }
            Place::Destination | Place::Moved => {
                Cell::status(&mut cell.there, &["completed"]);
                cell.journey.goes_to(&cell.there);
                cell.journey.works_on(1);
            }
        }
        cell.there.quit();
        cell.journey.log();
    }
}

#[test]
fn a_destination_that_is_killed() {
    let lab = lab!("a_destination_that_is_killed");
    for (plan, phase) in CELLS {
        destination_is_killed(&lab, Cell::reach(&lab, plan, phase));
    }
}

fn destination_is_killed(lab: &Lab, mut cell: Cell) {
    cell.link.cut(switchover_guest_tests::link::Ended::Reset);
    cell.there.kill();
    match cell.place() {
        Place::Source | Place::SourceAlone => {
            cell.source_goes_on("failed");
            assert!(cell.there.serial().to_end().is_empty(), "a guest ran without a commit");
            return cell.moves_after_all(lab);
        }
        Place::Moved => {
            cell.source.wait_migration("completed");
            assert_eq!(cell.source.run_state(), "postmigrate");
            cell.journey.goes_to(&cell.there);
        }
        Place::Nowhere | Place::Split | Place::Destination => {
            cell.source_waits();
            // Trying to join what is not there changes nothing.
            let to = cell.link.address().to_owned();
            cell.source.execute("migrate", json!({ "uri": to, "resume": true }));
            cell.source_waits();
            // It may still be trying.
            until("it can be reclaimed", || cell.source.qmp().execute("x-switchover-reclaim", json!({})).ok());
            let (_, error) = Cell::status(&mut cell.source, &["failed"]);
            assert!(error.contains("it was reclaimed"), "{error}");
            assert_eq!(cell.source.run_state(), "running");
            // What it did at the destination is lost, and it goes on from where it was.
            cell.journey.works_on(1);
        }
    }
    cell.source.quit();
    cell.journey.log();
}

#[test]
fn a_migration_that_is_called_off() {
    let lab = lab!("a_migration_that_is_called_off");
    for (plan, phase) in CELLS {
        let mut cell = Cell::reach(&lab, plan, phase);
        match cell.place() {
            Place::Source | Place::SourceAlone => {
                cell.source.execute("migrate_cancel", json!({}));
                cell.link.let_go();
                cell.source_goes_on("cancelled");
                cell.there_ends();
                cell.moves_after_all(&lab);
            }
            Place::Nowhere | Place::Split | Place::Destination => {
                let refusal = cell.source.refuses("migrate_cancel", json!({}));
                println!("   {refusal}");
                assert!(refusal.contains("handed to the destination already"), "{refusal}");
                cell.link.let_go();
                cell.ends_well();
            }
            Place::Moved => {
                cell.source.wait_migration("completed");
                cell.source.execute("migrate_cancel", json!({}));
                cell.link.let_go();
                cell.ends_well();
            }
        }
    }
}
