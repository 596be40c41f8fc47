//! What does not fit is refused before the guest is touched, with a sentence that says what differs.

use serde_json::json;
use switchover_guest_tests::foreign::{counter, elf};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::switchover;
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, allow_postcopy, begin, destination, finish, migrate};

use crate::lab;

#[test]
fn files_that_are_no_kernel_are_refused() {
    let lab = lab!("files_that_are_no_kernel_are_refused");
    let whole = counter();
    let hlt = [0xf4];
    for (name, bytes, words) in [
        ("truncated", &whole[..whole.len() - 10], "truncated"),
        ("header-only", &whole[..70], "truncated"),
        ("cut-header", &whole[..20], "truncated"),
        ("script", b"#!/bin/sh\necho hello\n", "not an ELF file"),
        ("empty", b"", "not an ELF file"),
        ("no-note", &elf(&hlt, false)[..], "no PVH note"),
    ] {
        let path = lab.file(name, bytes);
        let qmp = format!("unix:{}", lab.path("q").display());
        let ended = switchover(&["run", "--kernel", path.to_str().unwrap(), "--memory", "64M", "--qmp", &qmp]);
        assert_eq!((ended.status, ended.stdout.as_str()), (Some(1), ""), "{name}: {}", ended.stderr);
        let said = &ended.stderr;
        assert!(said.contains(words) && said.contains(name), "{name}: `{words}` is not in {said}");
    }
    let ended = switchover(&["run", "--kernel", "/nowhere/guest.elf", "--memory", "64M"]);
    assert_eq!(ended.status, Some(1));
    assert!(ended.stderr.contains("/nowhere/guest.elf"), "{}", ended.stderr);
    lab.close();
}

#[test]
fn a_destination_that_differs_is_named_before_the_guest_is_touched() {
    let lab = lab!("a_destination_that_differs_is_named_before_the_guest_is_touched");
    let spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    source.qmp().take_events();
    for (other, words) in [
        (Spec { memory: "96M".to_owned(), ..spec.clone() }, ["96", "64"]),
        (Spec { vcpus: 2, ..spec.clone() }, ["2", "1"]),
    ] {
        let (mut wrong, to) = destination(&lab, &other, Transport::Tcp);
        allow_postcopy(&mut source);
        source.execute("migrate", json!({ "uri": to }));
        let error = source.wait_migration("failed")["error-desc"].as_str().unwrap().to_owned();
        // Ports have digits too: look behind the address.
        let sentence = error.replace(&to, "");
        for word in words {
            assert!(sentence.contains(word), "`{word}` is not in {error}");
        }
        assert_eq!(source.run_state(), "running");
        journey.works_on(1);
        assert!(wrong.has_ended().is_none(), "a source that does not fit ended the destination");
        assert_eq!(wrong.run_state(), "inmigrate");
        wrong.quit();
    }
    let events = source.qmp().take_events();
    assert!(!events.iter().any(|event| event["event"] == "STOP"), "the guest was touched: {events:?}");
    let (mut right, to) = destination(&lab, &spec, Transport::Tcp);
    migrate(&mut source, &mut right, &to);
    journey.ends_at(&mut source, &mut right, 2);
    lab.close();
}

#[test]
fn the_second_of_two_sources_is_refused_and_the_first_completes() {
    let lab = lab!("the_second_of_two_sources_is_refused_and_the_first_completes");
    let spec = lab.guest("random", "ws=8M period=50");
    let (mut first, mut second) = (Machine::start(&lab, &spec), Machine::start(&lab, &spec));
    let (mut journey, mut other) = (Journey::from(&first), Journey::from(&second));
    journey.works_on(1);
    other.works_on(1);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    begin(&mut first, &to);
    allow_postcopy(&mut second);
    second.execute("migrate", json!({ "uri": to }));
    let error = second.wait_migration("failed")["error-desc"].as_str().unwrap().to_owned();
    assert!(error.contains("already receives another guest"), "{error}");
    assert_eq!(second.run_state(), "running");
    finish(&mut first, &mut there);
    other.works_on(1);
    first.quit();
    journey.goes_to(&there);
    journey.works_on(1);
    there.quit();
    second.quit();
    journey.log();
    other.log();
    lab.close();
}

#[test]
fn without_postcopy_a_handoff_is_refused_with_a_sentence() {
    let lab = lab!("without_postcopy_a_handoff_is_refused_with_a_sentence");
    let mut source = Machine::start(&lab, &lab.guest("idle", "ws=4M period=50"));
    let refusal = source.refuses("migrate-start-postcopy", json!({}));
    assert!(refusal.contains("postcopy"), "{refusal}");
    allow_postcopy(&mut source);
    let refusal = source.refuses("migrate", json!({ "uri": "nowhere" }));
    assert!(refusal.contains("write for example"), "{refusal}");
    assert_eq!(source.run_state(), "running");
    source.quit();
    lab.close();
}
