//! Guests whose faults are served over several lanes, from memory that is divided among as many userfaultfds.

use serde_json::{Value, json};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, Way, begin, destination, migrate_as, set, slow_down};
use switchover_guest_tests::waiting::until;

use crate::lab;

/// Bytes a second: so little that faults bring most of what the guest works in.
const CRAWL: u64 = 4 << 20;

/// A guest with two vCPUs, and a machine that waits for it.
fn machines(lab: &Lab, append: &str, transport: Transport) -> (Machine, Machine, String, Journey) {
    let spec = Spec { vcpus: 2, ..lab.guest("random", &format!("{append} vcpus=2")) };
    let source = Machine::start(lab, &spec);
    let (there, to) = destination(lab, &spec, transport);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    (source, there, to, journey)
}

/// What came on each fault lane, in bytes.
fn fault_bytes(there: &mut Machine) -> Vec<u64> {
    let report = there.execute("x-switchover-report", json!({}));
    let lanes = report["lanes"].as_array().expect("lanes");
    let is_fault = |lane: &&Value| lane["lane"].as_str().is_some_and(|name| name.starts_with("fault lane"));
    lanes.iter().filter(is_fault).filter_map(|lane| lane["received"].as_u64()).collect()
}

#[test]
fn two_vcpus_move_over_two_fault_lanes() {
    for (way, transport) in [
        (Way::new("postcopy", 1), Transport::Tcp),
        (Way::new("postcopy", 2), Transport::Unix),
        (Way::new("hybrid", 2), Transport::Tcp),
    ] {
        let lab = lab!("two_vcpus_move_over_two_fault_lanes");
        let (mut source, mut there, to, mut journey) = machines(&lab, "ws=16M period=50", transport);
        set(&mut source, json!({ "x-switchover-fault-lanes": 2 }));
        slow_down(&mut source, CRAWL);
        migrate_as(&mut source, &mut there, &to, way);
        let bytes = fault_bytes(&mut there);
        assert_eq!(bytes.len(), 2, "{way:?}");
        // How many faults a hybrid leaves is its own affair.
        assert!(way.mode == "hybrid" || bytes.iter().all(|bytes| *bytes > 64 * 4096), "{way:?}: {bytes:?}");
        journey.ends_at(&mut source, &mut there, 3);
        lab.close();
    }
}

#[test]
fn a_link_of_three_fault_lanes_is_lost_and_joined_again() {
    let lab = lab!("a_link_of_three_fault_lanes_is_lost_and_joined_again");
    let (mut source, mut there, to, mut journey) = machines(&lab, "ws=32M period=50 pace=1000000", Transport::Tcp);
    set(&mut source, json!({ "x-switchover-fault-lanes": 3 }));
    slow_down(&mut source, 1 << 20);
    begin(&mut source, &to);
    assert!(source.refuses("migrate-set-parameters", json!({ "x-switchover-fault-lanes": 1 })).contains("fault-lanes"));
    source.execute("migrate-start-postcopy", json!({}));
    there.wait_migration("postcopy-active");
    let mut before = vec![0; 3];
    for _ in 0..3 {
        before = until("faults have come on every lane of this link", || {
            let now = fault_bytes(&mut there);
            (now.len() == 3 && now.iter().zip(&before).all(|(now, before)| now > before)).then_some(now)
        });
        there.execute("migrate-pause", json!({}));
        there.wait_migration("postcopy-paused");
        source.wait_migration("postcopy-paused");
        source.execute("migrate", json!({ "uri": to, "resume": true }));
        source.wait_migration("postcopy-active");
    }
    set(&mut source, json!({ "max-postcopy-bandwidth": 0 }));
    source.wait_migration("completed");
    there.wait_migration("completed");
    journey.ends_at(&mut source, &mut there, 3);
    lab.close();
}
