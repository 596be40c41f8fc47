//! Every built-in guest moves by post-copy and goes on, with every page and every period intact.

use serde_json::json;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, allow_postcopy, destination, finish};
use switchover_tools::guests::NAMES;

use crate::lab;

/// Moves the guest of `spec`, driven as QEMU is, and looks at every state on the way.
fn moves(lab: &switchover_guest_tests::lab::Lab, spec: &Spec, transport: Transport, set_on_both: bool) {
    let mut source = Machine::start(lab, spec);
    let (mut there, to) = destination(lab, spec, transport);
    if set_on_both {
        allow_postcopy(&mut there);
    }
    assert_eq!(there.run_state(), "inmigrate");
    let mut journey = Journey::from(&source);
    journey.works_on(2);

    allow_postcopy(&mut source);
    source.execute("migrate", json!({ "uri": to }));
    source.wait_migration("active");
    assert_eq!(source.run_state(), "running");
    journey.works_on(1);
    finish(&mut source, &mut there);

    assert_eq!(source.run_state(), "postmigrate");
    let refusal = source.refuses("cont", json!({}));
    assert!(refusal.contains("moved to another host"), "{refusal}");
    assert_eq!(there.run_state(), "running");
    let moved = source.execute("query-migrate", json!({}));
    for figure in ["total-time", "setup-time", "downtime", "x-switchover-downtime-ns"] {
        assert!(moved[figure].is_u64(), "{figure} is missing: {moved}");
    }
    assert_eq!(moved["ram"]["remaining"], 0, "{moved}");
    // The destination prints while the source still answers.
    let printed = there.serial().len();
    let soon = std::time::Instant::now() + switchover_guest_tests::waiting::PATIENCE;
    there.serial().wait_for_more(printed, soon);
    assert!(there.serial().len() > printed, "the guest prints nothing at the destination");
    assert_eq!(source.run_state(), "postmigrate");
    let last = source.serial().len();

    source.quit();
    assert_eq!(source.serial().to_end().len(), last, "the guest printed at the source after it had moved");
    journey.goes_to(&there);
    journey.works_on(3);
    there.quit();
    journey.log();
}

fn every_guest(test: &str, vcpus: u8, transport: Transport, set_on_both: bool) {
    for name in NAMES {
        let Some(lab) = switchover_guest_tests::lab::Lab::open(test) else { return };
        let spec = Spec { vcpus, ..lab.guest(name, &format!("ws=8M period=50 vcpus={vcpus}")) };
        println!("{name}");
        moves(&lab, &spec, transport, set_on_both);
        lab.close();
    }
}

#[test]
fn every_guest_moves_over_tcp() {
    every_guest("every_guest_moves_over_tcp", 1, Transport::Tcp, false);
}

#[test]
fn every_guest_moves_over_unix_sockets() {
    every_guest("every_guest_moves_over_unix_sockets", 1, Transport::Unix, true);
}

#[test]
fn every_guest_moves_with_two_vcpus_over_tcp() {
    every_guest("every_guest_moves_with_two_vcpus_over_tcp", 2, Transport::Tcp, true);
}

#[test]
fn every_guest_moves_with_two_vcpus_over_unix_sockets() {
    every_guest("every_guest_moves_with_two_vcpus_over_unix_sockets", 2, Transport::Unix, false);
}

/// The judge itself: a guest that is damaged on purpose says so, and the journey does not let it pass.
#[test]
fn a_corrupt_page_does_not_go_unnoticed() {
    let lab = lab!("a_corrupt_page_does_not_go_unnoticed");
    let spec = lab.guest("random", "ws=4M period=50 corrupt=5000 stop=40");
    let machine = Machine::start(&lab, &spec);
    let mut log = switchover_guest_tests::guest_log::GuestLog::default();
    log.feed(machine.serial().to_end().as_bytes());
    assert!(log.problems.iter().any(|problem| problem.contains("corrupt pages")), "{:?}", log.problems);
}
