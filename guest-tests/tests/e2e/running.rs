//! A machine's own life: paused and moved, told by its command line, ended by its guest, its user, or a signal.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::json;
use switchover_guest_tests::guest_log::GuestLog;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::{Lab, switchover};
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, begin, destination, migrate, slow_down};
use switchover_guest_tests::waiting::until;

use crate::lab;

#[test]
fn a_guest_that_was_stopped_arrives_stopped() {
    let lab = lab!("a_guest_that_was_stopped_arrives_stopped");
    let spec = lab.guest("sequential", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    source.execute("stop", json!({}));
    source.wait_run_state("paused");
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    migrate(&mut source, &mut there, &to);
    assert_eq!(source.run_state(), "postmigrate");
    assert_eq!(there.run_state(), "paused");
    source.quit();
    journey.goes_to(&there);
    journey.log();
    assert!(there.serial().is_empty(), "a guest that is stopped has printed");
    there.execute("cont", json!({}));
    assert_eq!(there.run_state(), "running");
    journey.works_on(2);
    there.execute("stop", json!({}));
    assert_eq!(there.run_state(), "paused");
    there.execute("cont", json!({}));
    journey.works_on(1);
    there.quit();
    journey.log();
    lab.close();
}

#[test]
fn a_guest_can_be_stopped_while_its_memory_follows() {
    let lab = lab!("a_guest_can_be_stopped_while_its_memory_follows");
    let spec = lab.guest("random", "ws=16M period=50 pace=500000");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    slow_down(&mut source, 8_000_000);
    begin(&mut source, &to);
    source.execute("migrate-start-postcopy", json!({}));
    there.wait_migration("postcopy-active");
    // As often as one likes: no controller waits for a vCPU that waits for a page.
    for _ in 0..20 {
        there.execute("stop", json!({}));
        assert_eq!(there.run_state(), "paused");
        there.execute("cont", json!({}));
        assert_eq!(there.run_state(), "running");
    }
    there.execute("stop", json!({}));
    assert_eq!(there.execute("query-migrate", json!({}))["status"], "postcopy-active");
    source.wait_migration("completed");
    there.wait_migration("completed");
    assert_eq!(there.run_state(), "paused");
    there.execute("cont", json!({}));
    journey.ends_at(&mut source, &mut there, 2);
    lab.close();
}

/// Runs a built-in guest to its own end.
fn to_its_end(lab: &Lab, name: &str, append: &str, serial: &str) -> switchover_guest_tests::lab::Ended {
    let kernel = lab.guest(name, "").kernel.unwrap();
    let kernel = kernel.to_str().unwrap();
    switchover(&["run", "--kernel", kernel, "--append", append, "--memory", "64M", "--serial", serial])
}

#[test]
fn the_command_line_reaches_the_guest_and_its_word_becomes_the_exit_status() {
    let lab = lab!("the_command_line_reaches_the_guest_and_its_word_becomes_the_exit_status");
    let ended = to_its_end(&lab, "random", "ws=3M period=50 stop=3", "stdio");
    assert_eq!((ended.status, ended.stderr.as_str()), (Some(0), ""));
    assert!(ended.stdout.starts_with("R ready ws 3145728 "), "{}", ended.stdout);
    let mut log = GuestLog::default();
    log.feed(ended.stdout.as_bytes());
    assert_eq!((log.problems.as_slice(), log.periods.len()), (&[][..], 3));

    let ended = to_its_end(&lab, "random", "colour=blue", "stdio");
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert!(ended.stdout.starts_with("E ") && ended.stdout.contains("colour=blue"), "{}", ended.stdout);
    assert!(ended.stderr.contains("code 1"), "{}", ended.stderr);
}

#[test]
fn the_serial_port_leads_to_a_file_or_nowhere() {
    let lab = lab!("the_serial_port_leads_to_a_file_or_nowhere");
    let path = lab.path("serial.log");
    let ended = to_its_end(&lab, "idle", "ws=3M period=50 stop=3", &format!("file:{}", path.display()));
    assert_eq!((ended.status, ended.stdout.as_str()), (Some(0), ""), "{}", ended.stderr);
    let mut log = GuestLog::default();
    log.feed(&fs::read(&path).unwrap());
    assert_eq!((log.problems.as_slice(), log.periods.len()), (&[][..], 3));

    let ended = to_its_end(&lab, "idle", "ws=3M period=50 stop=3", "null");
    assert_eq!((ended.status, ended.stdout.as_str(), ended.stderr.as_str()), (Some(0), "", ""));

    let ended = to_its_end(&lab, "idle", "", "file:/nowhere/serial.log");
    assert_eq!(ended.status, Some(1));
    assert!(ended.stderr.contains("/nowhere/serial.log"), "{}", ended.stderr);
}

#[test]
fn what_is_printed_to_files_moves_without_a_seam() {
    let lab = lab!("what_is_printed_to_files_moves_without_a_seam");
    let files = [lab.path("source.log"), lab.path("destination.log")];
    let [here, beyond] = files.clone().map(|path| format!("file:{}", path.display()));
    let spec = Spec { serial: here, ..lab.guest("random", "ws=8M period=50") };
    let read = |path: &std::path::Path| fs::read(path).unwrap_or_default();
    let mut source = Machine::start(&lab, &spec);
    until("the guest prints", || (read(&files[0]).len() > 500).then_some(()));
    let (mut there, to) = destination(&lab, &Spec { serial: beyond, ..spec }, Transport::Unix);
    migrate(&mut source, &mut there, &to);
    until("the guest prints", || (read(&files[1]).len() > 500).then_some(()));
    source.quit();
    there.quit();
    let mut log = GuestLog::default();
    log.feed(&read(&files[0]));
    log.feed(&read(&files[1]));
    assert_eq!(log.problems, Vec::<String>::new());
    assert!(source.serial().is_empty() && there.serial().is_empty());
    lab.close();
}

#[test]
fn signals_end_a_machine_and_its_sockets() {
    let lab = lab!("signals_end_a_machine_and_its_sockets");
    let spec = lab.guest("random", "ws=8M period=50");
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut machine = Machine::start(&lab, &spec);
        Journey::from(&machine).works_on(1);
        machine.signal(signal);
        assert_eq!(machine.wait_end(), 0, "{signal}");
    }
    let (mut waiting, _) = destination(&lab, &spec, Transport::Unix);
    waiting.signal(Signal::SIGINT);
    assert_eq!(waiting.wait_end(), 0);
    lab.close();
}

#[test]
fn a_deferred_destination_listens_when_it_is_told() {
    let lab = lab!("a_deferred_destination_listens_when_it_is_told");
    let spec = lab.guest("reader", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let mut there = Machine::start(&lab, &spec.incoming("defer"));
    assert_eq!(there.run_state(), "inmigrate");
    let refusal = there.refuses("migrate-incoming", json!({ "uri": "unix:/nowhere/lane" }));
    assert!(refusal.contains("/nowhere/lane"), "{refusal}");
    there.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
    assert!(!there.refuses("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" })).is_empty());
    let to = there.address();
    migrate(&mut source, &mut there, &to);
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}
