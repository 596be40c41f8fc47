//! What `run --audit` notes, and that it stands in nobody's way.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::switchover;
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, allow_postcopy, destination, migrate};
use switchover_guest_tests::waiting::until;

use crate::lab;

fn with_audit(spec: &Spec, file: &Path) -> Spec {
    Spec { more: vec!["--audit".to_owned(), file.display().to_string()], ..spec.clone() }
}

fn records(file: &Path) -> Vec<Value> {
    fs::read_to_string(file).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Whether these events are there, in this order; others may be between them.
fn happened(file: &Path, wanted: &[&str]) {
    let all: Vec<_> = records(file).iter().map(|record| record["event"].as_str().unwrap().to_owned()).collect();
    let mut wanted = wanted.iter().peekable();
    for event in &all {
        wanted.next_if(|next| **next == event);
    }
    assert_eq!(wanted.next(), None, "in {all:?}");
}

#[test]
fn a_migration_is_noted_on_both_sides_and_tampering_is_found() {
    let lab = lab!("a_migration_is_noted_on_both_sides_and_tampering_is_found");
    let (from, to) = (lab.path("source.audit"), lab.path("destination.audit"));
    let spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &with_audit(&spec, &from));
    let mut journey = Journey::from(&source);
    let (mut there, address) = destination(&lab, &with_audit(&spec, &to), Transport::Tcp);
    let mut stranger = std::net::TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    let _ = std::io::Write::write_all(&mut stranger, b"GET / HTTP/1.1\r\n\r\n");
    let _ = std::io::Read::read_to_end(&mut stranger, &mut Vec::new());
    migrate(&mut source, &mut there, &address);
    source.refuses("migrate", json!({ "uri": address }));
    source.quit();
    journey.goes_to(&there);
    journey.works_on(1);
    there.quit();
    happened(
        &from,
        &[
            "start",
            "command",
            "command",
            "lane-opened",
            "handoff",
            "commit-sent",
            "running",
            "drained",
            "command",
            "end",
        ],
    );
    happened(
        &to,
        &["start", "connection-refused", "lane-opened", "lane-opened", "commit-taken", "running", "drained", "end"],
    );
    let refused = |record: &Value| record["data"]["outcome"]["refused"].is_string();
    assert!(records(&from).iter().any(refused), "a refused command is noted as one");
    assert!(!records(&from).iter().any(|record| record["data"]["name"] == "query-migrate"), "looking changes nothing");

    let verify = |file: &Path| switchover(&["audit", "verify", file.to_str().unwrap()]);
    let whole = verify(&from);
    assert_eq!(whole.status, Some(0), "{whole:?}");
    assert_eq!(verify(&lab.path("none")).status, Some(2));
    let text = fs::read_to_string(&from).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let join = |lines: &[&str]| lines.join("\n") + "\n";
    let altered = text.replacen("\"commit-sent\"", "\"commit-lost\"", 1);
    let (mut missing, mut moved) = (lines.clone(), lines.clone());
    missing.remove(2);
    moved.swap(2, 3);
    for (what, log) in [
        ("altered", altered),
        ("missing", join(&missing)),
        ("moved", join(&moved)),
        ("half a line", text[..text.len() - 9].to_owned()),
    ] {
        let file = lab.file("forged", log.as_bytes());
        let found = verify(&file);
        assert!(
            found.status == Some(1) && found.stdout.contains(what) && found.stdout.contains("line "),
            "{what}: {found:?}"
        );
    }
    // The next process goes on with it.
    let mut again = Machine::start(&lab, &with_audit(&spec, &from));
    again.quit();
    assert_eq!(verify(&from).status, Some(0));
    assert!(records(&from).len() > lines.len());
    journey.log();
    lab.close();
}

#[test]
fn a_disk_that_takes_nothing_stops_neither_guest_nor_migration() {
    let lab = lab!("a_disk_that_takes_nothing_stops_neither_guest_nor_migration");
    let full = Path::new("/dev/full");
    let spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &with_audit(&spec, full));
    let mut journey = Journey::from(&source);
    let (mut there, address) = destination(&lab, &spec, Transport::Tcp);
    allow_postcopy(&mut source);
    until("it is said aloud", || source.stderr().text().contains("cannot be written").then_some(()));
    migrate(&mut source, &mut there, &address);
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}
