//! What the two sides report is true of this migration: of its pages, its instants, and what the guest felt.

use serde_json::{Value, json};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::machine::Machine;
use switchover_guest_tests::moving::{Transport, destination, migrate};

use crate::lab;

/// Bytes of a sign of life on the control lane: a head, and one for its kind.
const HEARTBEAT: u64 = 9;
/// How much shorter than true the guest may measure a gap: its clock is calibrated against an emulated timer.
const CLOCK_ERROR_PERCENT: u64 = 5;

fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer} is missing in {value:#}"))
}

#[test]
fn reports_agree_with_each_other_and_with_the_guest() {
    let lab = lab!("reports_agree_with_each_other_and_with_the_guest");
    let spec = lab.guest("random", "ws=16M period=50");
    let mut source = Machine::start(&lab, &spec);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let mut journey = Journey::from(&source);
    let before = journey.works_on(1);
    migrate(&mut source, &mut there, &to);
    let look = source.execute("query-migrate", json!({}));
    let gave = source.execute("x-switchover-report", json!({}));
    let took = there.execute("x-switchover-report", json!({}));
    source.quit();
    journey.goes_to(&there);
    journey.works_on(2);

    assert_eq!(gave["session"], took["session"]);
    assert_eq!((&gave["status"], &took["status"]), (&json!("completed"), &json!("completed")));
    let pages = (64 << 20) / 4096;
    assert_eq!(number(&took, "/ram_pages"), pages);
    let [zero, pushed, requested] =
        ["zero", "pushed", "requested"].map(|class| number(&took, &format!("/pages/{class}")));
    assert_eq!(zero + pushed + requested, pages, "pages are counted twice or not at all: {took:#}");
    assert!(pushed + requested >= (16 << 20) / 4096, "less has arrived than the guest has written");
    // Every byte that was said to be sent was received, lane by lane.
    for lane in gave["lanes"].as_array().unwrap() {
        let same = |other: &&Value| other["lane"] == lane["lane"];
        let other = took["lanes"].as_array().unwrap().iter().find(same).unwrap();
        // Either may have given a sign of life when the other had read the last that it waits for.
        let signs = if lane["lane"] == "control lane 0" { 2 } else { 0 };
        for (one, another) in [(lane, other), (other, lane)] {
            let unread = number(one, "/sent").checked_sub(number(another, "/received"));
            let mut whole = (0..=signs).map(|signs| signs * HEARTBEAT);
            assert!(unread.is_some_and(|unread| whole.any(|whole| whole == unread)), "{lane} {other}");
        }
    }
    // Both run on this host's clock, so instants of both sides are in order.
    let last_exit = number(&gave, "/instants/last_exit_ns");
    let first_entry = number(&took, "/instants/first_entry_ns");
    let last_page = number(&took, "/instants/last_page_ns");
    let drained = number(&took, "/instants/drained_ns");
    assert!(last_exit < number(&gave, "/instants/commit_ns"), "{gave:#}");
    assert!(number(&gave, "/instants/commit_ns") < number(&took, "/instants/commit_ns"), "{gave:#} {took:#}");
    assert!(number(&took, "/instants/commit_ns") < first_entry && first_entry < drained, "{took:#}");
    assert!(last_page <= drained, "{took:#}");
    // What is called the blackout is no more and no less than those instants, and the guest felt at least that.
    let blackout = number(&look, "/x-switchover-downtime-ns");
    assert_eq!(blackout, first_entry - last_exit);
    let felt_us = journey.log().periods[before - 1..].iter().map(|period| period.max_gap_us).max().unwrap();
    assert!(
        felt_us * (100 + CLOCK_ERROR_PERCENT) / 100 >= blackout / 1000,
        "a blackout of {blackout} ns is reported, and the guest felt no gap longer than {felt_us} µs"
    );
    there.quit();
    journey.log();
    lab.close();
}
