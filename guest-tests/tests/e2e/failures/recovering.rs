//! One post-copy, whose link is lost again and again.

use std::thread;
use std::time::Duration;

use serde_json::json;
use switchover_guest_tests::link::Ended;
use switchover_guest_tests::moving::set;

use super::cell::{Cell, Phase, Plan};
use crate::lab;

/// How often, unless `SWITCHOVER_RECOVERIES` says otherwise.
const RECOVERIES: usize = 12;
/// How long each link lasts.
const LIFE: Duration = Duration::from_millis(50);

#[test]
fn a_link_that_is_lost_again_and_again() {
    let lab = lab!("a_link_that_is_lost_again_and_again");
    let recoveries = std::env::var("SWITCHOVER_RECOVERIES").map_or(RECOVERIES, |text| text.parse().unwrap());
    let spec = lab.guest("random", "ws=32M period=50 pace=1000000");
    let mut cell = Cell::begin(&lab, Plan::Postcopy, Phase::Running, &spec).come_to_phase();
    // It must not be over before.
    set(&mut cell.source, json!({ "max-postcopy-bandwidth": 1 << 20 }));
    cell.link.let_go();
    let to = cell.link.address().to_owned();
    for number in 0..recoveries {
        match number % 4 {
            0 => cell.link.cut(Ended::Reset),
            1 => cell.link.cut(Ended::Closed),
            // A side's own controller may be refused: the link is hardly joined.
            2 => drop(cell.source.qmp().execute("migrate-pause", json!({}))),
            _ => drop(cell.there.qmp().execute("migrate-pause", json!({}))),
        }
        // Both are lost, even where only one side knows it yet.
        cell.link.cut(Ended::Reset);
        cell.source_waits();
        cell.link.mend();
        if number % 3 == 0 {
            // This one does not come far: it is cut while the two meet.
            cell.source.execute("migrate", json!({ "uri": to, "resume": true }));
            thread::sleep(Duration::from_millis(u64::try_from(number).unwrap() % 20));
            cell.link.cut(Ended::Reset);
            cell.source_waits();
            cell.link.mend();
        }
        cell.join_again(&to);
        thread::sleep(LIFE);
        cell.journey.log();
    }
    let look = cell.there.execute("query-migrate", json!({}));
    assert_eq!(look["status"], "postcopy-active", "it was over too soon: {look:#}");
    let report = cell.there.execute("x-switchover-report", json!({}));
    let interruptions = report["interruptions"].as_array().unwrap().len();
    assert!(interruptions >= recoveries, "{interruptions}");
    println!("{recoveries} recoveries, {interruptions} interruptions");
    set(&mut cell.source, json!({ "max-postcopy-bandwidth": 0 }));
    cell.ends_well();
}
