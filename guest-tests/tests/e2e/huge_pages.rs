//! Guests whose memory is mapped as huge pages once it has arrived.

use serde_json::json;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::machine::Machine;
use switchover_guest_tests::moving::{Way, migrate_as, set};
use switchover_guest_tests::waiting::until;

use crate::lab;

/// Bytes of guest memory in huge mappings: in the mapping with the least of them, and in the one with the most. The alias is in
/// huge mappings since it was reserved, as far as the host has such pages.
fn least_and_most(machine: &Machine) -> (u64, u64) {
    let mappings = machine.huge_mappings();
    let huge = || mappings.iter().map(|(_, huge)| *huge);
    (huge().min().expect("guest memory"), huge().max().expect("guest memory"))
}

/// Moves a guest to a machine that maps memory as huge pages, or does not.
fn moved(lab: &Lab, way: Way, collapse: bool) -> (Machine, Journey) {
    let spec = lab.guest("random", "ws=16M period=50");
    let mut source = Machine::start(lab, &spec);
    let mut there = Machine::start(lab, &spec.incoming("defer"));
    set(&mut there, json!({ "x-switchover-collapse": collapse }));
    there.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
    let to = there.address();
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    migrate_as(&mut source, &mut there, &to, way);
    source.quit();
    journey.goes_to(&there);
    (there, journey)
}

#[test]
fn memory_that_has_arrived_is_mapped_as_huge_pages() {
    for way in [Way::new("postcopy", 1), Way::new("hybrid", 2)] {
        let lab = lab!("memory_that_has_arrived_is_mapped_as_huge_pages");
        let (mut there, mut journey) = moved(&lab, way, true);
        let huge = until("the guest's mapping is as huge as the alias", || {
            let (least, most) = least_and_most(&there);
            (least == most).then_some(most)
        });
        println!("{way:?}: {huge} bytes in huge pages");
        journey.works_on(2);
        there.quit();
        journey.log();
        lab.close();
    }
}

#[test]
fn it_stays_as_it_came_where_that_is_wanted() {
    let lab = lab!("it_stays_as_it_came_where_that_is_wanted");
    let (mut there, mut journey) = moved(&lab, Way::new("postcopy", 1), false);
    // Long enough for a thread that should not be there.
    journey.works_on(3);
    assert_eq!(least_and_most(&there).0, 0);
    there.quit();
    journey.log();
    lab.close();
}
