//! A bit is flipped on its way.

use serde_json::{Value, json};
use switchover_guest_tests::link::{Role, Toward};
use switchover_guest_tests::machine::Machine;
use switchover_guest_tests::moving::{Transport, Way, destination, migrate_as, set};
use switchover_guest_tests::waiting::until;

use super::cell::{Cell, Phase, Plan};
use crate::lab;

/// Whether one of the two sides says what was wrong.
fn says_what_was_wrong(cell: &mut Cell) -> bool {
    [&mut cell.source, &mut cell.there].into_iter().any(|side| {
        let look = side.execute("query-migrate", json!({}));
        look["error-desc"].as_str().is_some_and(|error| error.contains("CRC-32") || error.contains("frame is wrong"))
    })
}

#[test]
fn a_bit_that_is_flipped_after_the_handoff_is_noticed_and_all_comes_again() {
    let lab = lab!("a_bit_that_is_flipped_after_the_handoff_is_noticed_and_all_comes_again");
    let mut cell = Cell::reach(&lab, Plan::Postcopy, Phase::Running);
    set(&mut cell.source, json!({ "max-postcopy-bandwidth": 1 << 20 }));
    let to = cell.link.address().to_owned();
    cell.link.let_go();
    const PAGE: u64 = 4096 * 8;
    for (role, toward, bit) in [
        // What follows is in the middle of a frame, whose pages take a second at this rate.
        (Role::Bulk, Toward::Destination, 3 * PAGE + 12_345),
        // The next header of an answer, its kind; and its page.
        (Role::Fault, Toward::Destination, 1),
        (Role::Fault, Toward::Destination, 24 * 8 + 30_000),
        // A request's page, and its checksum.
        (Role::Fault, Toward::Source, 9 * 8),
        (Role::Fault, Toward::Source, 21 * 8 + 3),
        // A heartbeat's length, and its body.
        (Role::Control, Toward::Destination, 8 + 6),
        (Role::Control, Toward::Source, 12 * 8),
    ] {
        println!("-- {role:?} {toward:?} {bit}");
        cell.link.damage(role, toward, bit);
        cell.link.wait_damaged();
        cell.source_waits();
        Cell::status(&mut cell.there, &["postcopy-paused"]);
        assert!(says_what_was_wrong(&mut cell), "nobody says what was wrong");
        cell.join_again(&to);
        cell.there.wait_migration("postcopy-active");
    }
    set(&mut cell.source, json!({ "max-postcopy-bandwidth": 0 }));
    cell.ends_well();
}

#[test]
fn a_bit_that_is_flipped_before_the_handoff_leaves_the_guest_where_it_is() {
    let lab = lab!("a_bit_that_is_flipped_before_the_handoff_leaves_the_guest_where_it_is");
    for (role, toward, bit) in [
        (Role::Bulk, Toward::Destination, 1_234_567),
        (Role::Bulk, Toward::Source, 9 * 8),
        (Role::Control, Toward::Destination, 12 * 8),
        (Role::Control, Toward::Source, 3 * 8),
    ] {
        println!("-- {role:?} {toward:?} {bit}");
        let mut cell = Cell::reach(&lab, Plan::Rounds, Phase::Round(3));
        cell.link.damage(role, toward, bit);
        cell.link.let_go();
        cell.link.wait_damaged();
        cell.source_goes_on("failed");
        cell.there_ends();
        cell.moves_after_all(&lab);
    }
}

#[test]
fn guest_memory_that_is_compared_matches_in_every_mode() {
    let lab = lab!("guest_memory_that_is_compared_matches_in_every_mode");
    for mode in ["postcopy", "precopy", "hybrid"] {
        let mut cell = Cell::begin(&lab, Plan::Postcopy, Phase::Running, &lab.guest("random", "ws=16M period=50"));
        set(&mut cell.source, json!({ "x-switchover-verify-memory": true, "downtime-limit": 10_000 }));
        let to = cell.link.address().to_owned();
        migrate_as(&mut cell.source, &mut cell.there, &to, Way::new(mode, 2));
        for side in [&mut cell.source, &mut cell.there] {
            let look = side.execute("query-migrate", json!({}));
            assert_eq!(look["x-switchover-memory-matches"], json!(true), "{mode}: {look:#}");
        }
        cell.ends_well();
    }
}

#[test]
fn a_page_that_is_damaged_where_nobody_checks_is_found_by_comparing() {
    let lab = lab!("a_page_that_is_damaged_where_nobody_checks_is_found_by_comparing");
    let spec = lab.guest("random", "ws=16M period=50 pace=1000000");
    let mut cell = Cell::begin(&lab, Plan::Postcopy, Phase::Running, &spec);
    set(&mut cell.source, json!({ "x-switchover-verify-memory": true, "x-switchover-checksums": false }));
    cell.link.damage(Role::Bulk, Toward::Destination, 8 * 1_000_000);
    let to = cell.link.address().to_owned();
    set(&mut cell.source, json!({ "x-switchover-compression": "off" }));
    migrate_as(&mut cell.source, &mut cell.there, &to, Way::new("postcopy", 1));
    for side in [&mut cell.source, &mut cell.there] {
        let look = side.execute("query-migrate", json!({}));
        assert_eq!(look["x-switchover-memory-matches"], json!(false), "{look:#}");
        let differs = look["x-switchover-memory-differs"].as_array().unwrap();
        assert!(differs.len() == 1 && differs[0]["pages"].as_u64() == Some(64), "{look:#}");
        assert!(look["error-desc"].as_str().unwrap().contains("did not arrive as it was left"), "{look:#}");
    }
    // The next migration of another guest is not concerned.
    let (mut next, to) = destination(&lab, &spec, Transport::Unix);
    until("the destination can be moved from", || (cell.there.run_state() == "running").then_some(()));
    migrate_as(&mut cell.there, &mut next, &to, Way::new("precopy", 1));
    let look: Value = next.execute("query-migrate", json!({}));
    assert_eq!(look.get("x-switchover-memory-matches"), None, "{look:#}");
    [&mut cell.source, &mut cell.there, &mut next].into_iter().for_each(Machine::quit);
}
