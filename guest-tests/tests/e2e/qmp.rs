//! QMP against the real process: clients that talk nonsense, in pieces, all at once, or go in the middle.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::machine::Machine;
use switchover_guest_tests::moving::{Transport, allow_postcopy, begin, destination, finish, slow_down};
use switchover_guest_tests::waiting::{PATIENCE, until};

use crate::lab;

/// A connection on which anything can be said.
pub struct Raw {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Raw {
    pub fn connect(machine: &Machine) -> Self {
        let stream = UnixStream::connect(machine.qmp_path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        let mut raw = Self { stream, lines };
        assert!(raw.hear()["QMP"]["version"]["qemu"]["major"].is_u64());
        raw
    }

    pub fn say(&mut self, text: &[u8]) {
        self.stream.write_all(text).unwrap();
    }

    pub fn hear(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.lines.read_line(&mut line).unwrap() > 0, "the machine hung up");
        serde_json::from_str(&line).unwrap()
    }

    /// What is no event: those come whenever they happen.
    pub fn answer(&mut self) -> Value {
        loop {
            let said = self.hear();
            if said.get("event").is_none() {
                return said;
            }
        }
    }
}

#[test]
fn nonsense_is_answered_and_the_machine_goes_on() {
    let lab = lab!("nonsense_is_answered_and_the_machine_goes_on");
    let mut machine = Machine::start(&lab, &lab.guest("idle", "ws=4M period=50"));
    let mut raw = Raw::connect(&machine);
    raw.say(b"{\"execute\":\"query-status\"}");
    assert_eq!(raw.answer()["error"]["class"], "CommandNotFound");
    raw.say(b"{\"execute\":\"qmp_capabilities\",\"id\":{\"any\":[1]}}\n");
    assert_eq!(raw.answer(), json!({ "return": {}, "id": { "any": [1] } }));
    for nonsense in [&b"nonsense\n"[..], b"{\"execute\":}\n", b"}\n", b"\xff\xfe\n", b"[1,2]\n", b"{}\n"] {
        raw.say(nonsense);
        let answer = raw.answer();
        assert_eq!(answer["error"]["class"], "GenericError", "{nonsense:?}: {answer}");
        // However many errors one piece of it makes, the next command is understood.
        raw.say(b"\n{\"execute\":\"query-status\",\"id\":\"next\"}\n");
        while raw.answer()["id"] != "next" {}
    }
    for part in [&b"{\"exe"[..], b"cute\":\"quer", b"y-status\"", b",\"id\":7", b"}"] {
        raw.say(part);
    }
    assert_eq!(raw.answer()["id"], 7);
    // Two at once, without anything between them.
    raw.say(b"{\"execute\":\"query-name\",\"id\":1}{\"execute\":\"query-kvm\",\"id\":2}");
    assert_eq!((raw.answer()["id"].clone(), raw.answer()["id"].clone()), (json!(1), json!(2)));
    // Far too much of it, on a connection that may be ended for that.
    let mut flood = Raw::connect(&machine);
    let _ = flood.stream.write_all(&vec![b'['; 4 << 20]);
    assert_eq!(machine.run_state(), "running");
    drop(flood);
    drop(raw);
    machine.quit();
    lab.close();
}

#[test]
fn two_clients_see_the_same_machine() {
    let lab = lab!("two_clients_see_the_same_machine");
    let spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let mut other = source.client();
    other.execute("stop", json!({})).unwrap();
    source.wait_run_state("paused");
    source.qmp().wait_event("STOP", PATIENCE).unwrap();
    source.execute("cont", json!({}));
    other.wait_event("RESUME", PATIENCE).unwrap();
    // One switches post-copy on, the other migrates, and both see every step.
    allow_postcopy(&mut source);
    other.execute("migrate", json!({ "uri": to })).unwrap();
    source.wait_migration("active");
    assert!(source.refuses("migrate", json!({ "uri": to })).contains("in progress"));
    other.execute("migrate-start-postcopy", json!({})).unwrap();
    source.wait_migration("completed");
    other.wait_status(&["completed"], PATIENCE).unwrap();
    source.qmp().wait_event("STOP", PATIENCE).unwrap();
    other.wait_event("STOP", PATIENCE).unwrap();
    there.wait_migration("completed");
    there.qmp().wait_event("RESUME", PATIENCE).unwrap();
    other.execute("quit", json!({})).unwrap();
    source.qmp().wait_event("SHUTDOWN", PATIENCE).unwrap();
    assert_eq!(source.wait_end(), 0);
    journey.goes_to(&there);
    journey.works_on(1);
    there.quit();
    journey.log();
    lab.close();
}

#[test]
fn clients_that_go_in_the_middle_change_nothing() {
    let lab = lab!("clients_that_go_in_the_middle_change_nothing");
    let spec = lab.guest("random", "ws=16M period=50 pace=200000");
    let mut source = Machine::start(&lab, &spec);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    slow_down(&mut source, 8_000_000);
    begin(&mut source, &to);
    // Gone in `active`, without a goodbye and with half a command on the way.
    source.disconnect();
    there.disconnect();
    let mut raw = Raw::connect(&source);
    raw.say(b"{\"execute\":\"qmp_capabi");
    drop(raw);
    journey.works_on(1);
    // Gone in post-copy, without waiting for the reply.
    let mut raw = Raw::connect(&source);
    raw.say(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"migrate-start-postcopy\"}");
    assert_eq!(raw.hear()["return"], json!({}));
    drop(raw);
    source.client().wait_status(&["completed"], PATIENCE).unwrap();
    there.client().wait_status(&["completed"], PATIENCE).unwrap();
    source.client().execute("quit", json!({})).unwrap();
    assert_eq!(source.wait_end(), 0);
    journey.goes_to(&there);
    journey.works_on(1);
    there.client().execute("quit", json!({})).unwrap();
    assert_eq!(there.wait_end(), 0);
    journey.log();
    lab.close();
}

#[test]
fn postcopy_that_is_asked_for_twice_happens_once() {
    let lab = lab!("postcopy_that_is_asked_for_twice_happens_once");
    let spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let (mut there, to) = destination(&lab, &spec, Transport::Unix);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    begin(&mut source, &to);
    let mut other = source.client();
    other.execute("migrate-start-postcopy", json!({})).unwrap();
    // Refused or taken, as the first has come far; but never a second handoff.
    let _ = other.execute("migrate-start-postcopy", json!({}));
    source.wait_migration("completed");
    there.wait_migration("completed");
    let refusal = source.refuses("migrate-start-postcopy", json!({}));
    assert!(!refusal.is_empty());
    source.quit();
    journey.goes_to(&there);
    journey.works_on(1);
    // And back again, from the destination.
    let (mut back, to) = destination(&lab, &spec, Transport::Tcp);
    begin(&mut there, &to);
    finish(&mut there, &mut back);
    there.quit();
    journey.goes_to(&back);
    journey.works_on(1);
    back.quit();
    lab.close();
}

fn switch_on(machine: &mut Machine, names: &[&str]) {
    let on: Vec<_> = names.iter().map(|name| json!({ "capability": name, "state": true })).collect();
    machine.execute("migrate-set-capabilities", json!({ "capabilities": on }));
}

/// Measures how fast the guest writes, in MiB a second.
fn dirty_rate(machine: &mut Machine, how: &Value) -> u64 {
    machine.execute("calc-dirty-rate", how.clone());
    let measured = until("the dirty rate is measured", || {
        let told = machine.execute("query-dirty-rate", json!({}));
        (told["status"] != "measuring").then_some(told)
    });
    assert_eq!(measured["status"], "measured", "{measured}");
    assert_eq!(measured["mode"], *how.get("mode").unwrap_or(&json!("page-sampling")), "{measured}");
    measured["dirty-rate"].as_u64().unwrap()
}

#[test]
fn a_guests_dirty_rate_is_measured_by_samples() {
    let lab = lab!("a_guests_dirty_rate_is_measured_by_samples");
    let mut machine = Machine::start(&lab, &lab.guest("random", "ws=16M period=50"));
    let mut journey = Journey::from(&machine);
    journey.works_on(1);
    let how = json!({ "calc-time": 200, "calc-time-unit": "millisecond", "sample-pages": 16384 });
    let writing = dirty_rate(&mut machine, &how);
    assert!((1..=64 * 5).contains(&writing), "{writing} MiB/s of 64 MiB in 200 ms");
    machine.execute("stop", json!({}));
    machine.wait_run_state("paused");
    assert_eq!(dirty_rate(&mut machine, &how), 0);
    // One at a time; `quit` does not wait for it.
    let long = json!({ "calc-time": 60 });
    machine.execute("calc-dirty-rate", long.clone());
    assert!(machine.refuses("calc-dirty-rate", long).contains("already being measured"));
    machine.quit();
    lab.close();
}

#[test]
fn a_guests_dirty_rate_is_measured_by_the_machines_book_until_it_moves() {
    let lab = lab!("a_guests_dirty_rate_is_measured_by_the_machines_book_until_it_moves");
    let spec = lab.guest("random", "ws=16M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let how = json!({ "calc-time": 200, "calc-time-unit": "millisecond", "mode": "dirty-bitmap" });
    let writing = dirty_rate(&mut source, &how);
    assert!((1..=64 * 5).contains(&writing), "{writing} MiB/s of 64 MiB in 200 ms");
    let asked = source.refuses("calc-dirty-rate", json!({ "calc-time": 1, "mode": "dirty-ring" }));
    assert_eq!(asked, "mode dirty-ring is not enabled, use other method instead.");
    // A migration ends a measurement, and has the book for itself.
    source.execute("calc-dirty-rate", json!({ "calc-time": 60, "mode": "dirty-bitmap" }));
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    begin(&mut source, &to);
    assert_eq!(source.execute("query-dirty-rate", json!({}))["status"], "unstarted");
    assert!(source.refuses("calc-dirty-rate", json!({ "calc-time": 1 })).contains("during a migration"));
    finish(&mut source, &mut there);
    source.quit();
    journey.goes_to(&there);
    journey.works_on(1);
    // Where it is now it can be measured again.
    assert!(dirty_rate(&mut there, &how) > 0);
    there.quit();
    journey.log();
    lab.close();
}

#[test]
fn precopy_tells_its_rounds_and_heeds_what_is_set_under_way() {
    let lab = lab!("precopy_tells_its_rounds_and_heeds_what_is_set_under_way");
    let spec = lab.guest("idle", "ws=32M period=50");
    let mut source = Machine::start(&lab, &spec);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    switch_on(&mut source, &["events"]);
    // At this pace it would take a day; compressed it would still take far too long for this test.
    source.execute("migrate-set-parameters", json!({ "max-bandwidth": 1024, "x-switchover-compression": "off" }));
    source.execute("migrate", json!({ "uri": to }));
    source.wait_migration("active");
    assert_eq!(source.qmp().wait_event("MIGRATION_PASS", PATIENCE).unwrap()["data"]["pass"], 1);
    let refusal = source.refuses("migrate-set-parameters", json!({ "x-switchover-mode": "hybrid" }));
    assert!(refusal.contains("cannot be changed while a migration is under way"), "{refusal}");
    let refusal = source.refuses("migrate-start-postcopy", json!({}));
    assert!(refusal.contains("Enable postcopy"), "{refusal}");
    journey.works_on(1);
    source.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 }));
    let ended = source.wait_migration("completed");
    assert!(ended["ram"]["dirty-sync-count"].as_u64().unwrap() >= 1, "{ended}");
    // Within the limit of 300 ms the last part of a round may be left to the stop.
    let crossed = |name: &str| ended["ram"][name].as_u64().unwrap();
    assert!(crossed("precopy-bytes") + crossed("downtime-bytes") > 32 << 20, "{ended}");
    there.wait_migration("completed");
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

#[test]
fn a_handoff_waits_for_its_controller_where_it_was_asked_to() {
    let lab = lab!("a_handoff_waits_for_its_controller_where_it_was_asked_to");
    let spec = lab.guest("idle", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    switch_on(&mut source, &["pause-before-switchover"]);
    // Called off where it waits, the guest runs on.
    let (mut left, to) = destination(&lab, &spec, Transport::Tcp);
    source.execute("migrate", json!({ "uri": to }));
    source.wait_migration("pre-switchover");
    source.execute("migrate_cancel", json!({}));
    source.wait_migration("cancelled");
    source.wait_run_state("running");
    assert_eq!(left.wait_end(), 1);
    journey.works_on(1);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    source.execute("migrate", json!({ "uri": to }));
    source.wait_migration("pre-switchover");
    let refusal = source.refuses("migrate-continue", json!({ "state": "device" }));
    assert_eq!(refusal, "Migration not in expected state: pre-switchover");
    source.execute("migrate-continue", json!({ "state": "pre-switchover" }));
    source.wait_migration("completed");
    there.wait_migration("completed");
    assert_eq!(there.run_state(), "running");
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}
