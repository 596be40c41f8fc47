//! Whoever else connects to a destination: nothing that they send ends it, keeps its source out or reaches its guest, and what they
//! cost it has a bound.

use std::fs;
use std::io::Write as _;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};
use switchover_guest_tests::certificates::Folders;
use switchover_guest_tests::cost::{Cost, Watched};
use switchover_guest_tests::crowd::{self, Came, Heard, first_words, is_told, noise, not_taken};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::link::{Link, Recording};
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{
    Transport, Way, allow_postcopy, begin, choose, destination, finish, lose_link, set, slow_down,
};
use switchover_guest_tests::waiting::{PATIENCE, until};

use crate::lab;

/// How many come in all, unless `SWITCHOVER_STRANGERS` says otherwise.
const STRANGERS: usize = 300;

/// How many a destination listens to at once before it knows whose they are.
const PLACES: usize = 64;

/// What they may cost it together: a place's thread, and what it has heard and has to say, need not have more than a quarter of this.
const MEMORY: u64 = 64 << 20;

/// The places, one that waits for a place, and a few that the process opens for itself meanwhile.
const FILES: usize = PLACES + 8;

fn connect(to: &str) -> TcpStream {
    TcpStream::connect(to.strip_prefix("tcp:").unwrap()).unwrap()
}

/// Says each kind of garbage on a connection of its own, and hears each one being ended.
fn garbage(to: &str) {
    let noise = noise(0, 100_000);
    for bytes in [b"GET / HTTP/1.1\r\nHost: destination\r\n\r\n", &noise[..], &[0; 4096], &[0xff; 4096], b"", b"x"] {
        let mut stranger = connect(to);
        // It may be hung up on while it still speaks.
        let _ = stranger.write_all(bytes);
        let _ = stranger.shutdown(Shutdown::Write);
        not_taken(&is_told(&stranger));
    }
}

/// Moves a guest past `strangers`, who come before the migration and again in the middle of it.
fn moves_past(lab: Lab, strangers: impl Fn(&str) -> Vec<TcpStream>) {
    let spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let before = strangers(&to);
    begin(&mut source, &to);
    let during = strangers(&to);
    finish(&mut source, &mut there);
    drop((before, during));
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

#[test]
fn garbage_on_the_port_does_no_harm() {
    moves_past(lab!("garbage_on_the_port_does_no_harm"), |to| {
        garbage(to);
        Vec::new()
    });
}

#[test]
fn fifty_connections_that_come_and_go_do_no_harm() {
    moves_past(lab!("fifty_connections_that_come_and_go_do_no_harm"), |to| {
        for _ in 0..50 {
            let _ = connect(to).write_all(b"hello?");
        }
        Vec::new()
    });
}

#[test]
fn half_a_handshake_kept_open_does_no_harm() {
    moves_past(lab!("half_a_handshake_kept_open_does_no_harm"), |to| {
        let mut silent: Vec<_> = (0..5).map(|_| connect(to)).collect();
        for (length, stranger) in silent.iter_mut().enumerate() {
            // What a source would begin with, cut short. None at all is a stranger who never speaks.
            let _ = stranger.write_all(&b"SWITCHOVER"[..length]);
        }
        silent
    });
}

/// Moves a guest while strangers have all of a destination's places, and more wait for one: they have said nothing, or what a source says
/// first, and say nothing more.
fn moves_past_the_silent(lab: Lab, tls: bool, introduced: bool) {
    let good = Folders::new(&lab).good();
    let credentials = if tls { good.to_str().unwrap() } else { "" };
    let spec = Spec { tls_creds: tls.then(|| good.clone()), ..lab.guest("random", "ws=8M period=50") };
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let words = if introduced { introduction(&mut source, credentials) } else { Vec::new() };
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let handshakes = |there: &Machine| there.thread_names().iter().filter(|name| *name == "handshake").count();
    let speak = |_| {
        let mut stranger = connect(&to);
        stranger.write_all(&words).unwrap();
        stranger
    };
    let silent: Vec<_> = (0..PLACES + 36).map(speak).collect();
    until("every place is taken", || (handshakes(&there) == PLACES).then_some(()));
    let asked = Instant::now();
    begin(&mut source, &to);
    println!("a source had its lanes {:?} after it was told to, past {} strangers", asked.elapsed(), silent.len());
    let displaced = "too many others are in their handshake, and it has been there for longest";
    assert!(there.stderr().text().contains(displaced), "nobody had to go: {}", there.stderr().text());
    finish(&mut source, &mut there);
    drop(silent);
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

#[test]
fn a_source_gets_in_while_silent_strangers_have_every_place() {
    moves_past_the_silent(lab!("a_source_gets_in_while_silent_strangers_have_every_place"), false, false);
}

#[test]
fn a_source_gets_in_while_strangers_with_half_a_handshake_have_every_place() {
    moves_past_the_silent(lab!("a_source_gets_in_while_strangers_with_half_a_handshake_have_every_place"), false, true);
}

#[test]
fn a_source_gets_in_over_tls_while_strangers_with_half_a_handshake_have_every_place() {
    let lab = lab!("a_source_gets_in_over_tls_while_strangers_with_half_a_handshake_have_every_place");
    moves_past_the_silent(lab, true, true);
}

/// A guest that works, and faults so seldom that it stays in post-copy for as long as its memory is held back.
fn guest(lab: &Lab) -> Spec {
    lab.guest("random", "ws=16M period=50 pace=1000000")
}

/// Lanes that `audit`, a destination's log, says were opened.
fn lanes_opened(audit: &std::path::Path) -> usize {
    let text = fs::read_to_string(audit).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.filter(|record| record["event"] == "lane-opened").count()
}

/// What a source with these credentials, or none, says first to whom it takes for a destination.
fn introduction(source: &mut Machine, credentials: &str) -> Vec<u8> {
    set(source, json!({ "tls-creds": credentials }));
    allow_postcopy(source);
    let words = first_words(|to| drop(source.execute("migrate", json!({ "uri": to }))));
    source.wait_migration("failed");
    words
}

fn bytes(recordings: Vec<Recording>) -> impl Iterator<Item = Vec<u8>> {
    recordings.into_iter().map(|recording| recording.bytes)
}

/// Says what a crowd cost, and that this is within bounds.
fn is_bounded(when: &str, came: Came, cost: Cost) {
    let Cost { memory, files, threads } = cost;
    println!(
        "{when}: {} strangers, {} of them with a recorded handshake: {} KiB, {files} descriptors, {threads} threads",
        came.connected,
        came.repeated,
        memory >> 10
    );
    assert!(memory < MEMORY, "{memory} bytes for strangers, {when}");
    assert!(files <= FILES, "{files} descriptors for strangers, {when}");
}

fn moves_past_a_crowd(lab: Lab, tls: bool) {
    let strangers = std::env::var("SWITCHOVER_STRANGERS").map_or(STRANGERS, |text| text.parse().unwrap());
    let good = Folders::new(&lab).good();
    let spec = Spec { tls_creds: tls.then(|| good.clone()), ..guest(&lab) };
    let mut first = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&first);
    journey.works_on(1);
    // A migration that strangers listen in on.
    let mut heard = Heard::default();
    let [right, wrong] = if tls { [good.to_str().unwrap(), ""] } else { ["", good.to_str().unwrap()] };
    heard.handshakes = [wrong, right].map(|credentials| introduction(&mut first, credentials)).to_vec();
    let (mut source, to) = destination(&lab, &spec, Transport::Tcp);
    let link = Link::to(&to);
    begin(&mut first, link.address());
    finish(&mut first, &mut source);
    first.quit();
    journey.goes_to(&source);
    heard.handshakes.extend(bytes(link.recordings()));

    let audit = lab.path("destination.audit");
    let more = vec!["--audit".to_owned(), audit.display().to_string()];
    let (mut there, to) = destination(&lab, &Spec { more, ..spec.clone() }, Transport::Tcp);
    let link = Link::to(&to);
    let began = Instant::now();
    let idle = there.holdings();
    let watched = Watched::from_now(there.pid());
    let came = crowd::comes(&to, &heard, strangers / 3);
    is_bounded("before the migration", came, watched.grew_by());
    until("all strangers are gone", || (there.holdings().files <= idle.files).then_some(()));

    // While lanes are opened and the guest is handed off: they come as long as that takes.
    choose(&mut source, Way::new("postcopy", 1));
    slow_down(&mut source, 20_000);
    let handed_off = AtomicBool::new(false);
    thread::scope(|scope| {
        let crowd = scope.spawn(|| {
            let mut came = crowd::comes(&to, &heard, strangers / 3).connected;
            // Not without end, where it never is.
            while !handed_off.load(Ordering::Acquire) && began.elapsed() < PATIENCE {
                came += crowd::comes(&to, &heard, strangers / 3).connected;
            }
            came
        });
        begin(&mut source, link.address());
        source.execute("migrate-start-postcopy", json!({}));
        there.wait_migration("postcopy-active");
        handed_off.store(true, Ordering::Release);
        println!("while it was handed off: {} strangers", crowd.join().unwrap());
    });

    // While its memory comes, with what was said on this very migration's lanes.
    heard.handshakes.splice(0..0, bytes(link.recordings()));
    let watched = Watched::from_now(there.pid());
    let came = crowd::comes(&to, &heard, strangers / 3);
    is_bounded("in post-copy", came, watched.grew_by());
    assert_eq!(
        there.execute("query-migrate", json!({}))["status"],
        "postcopy-active",
        "it was over before the strangers were"
    );
    assert_eq!(came.connected, strangers / 3);
    println!("all strangers and the handoff took {:?}", began.elapsed());

    set(&mut source, json!({ "max-postcopy-bandwidth": 0 }));
    source.wait_migration("completed");
    there.wait_migration("completed");
    assert_eq!(lanes_opened(&audit), 3, "a control, a fault and a bulk lane");
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

#[test]
fn a_crowd_of_strangers_does_no_harm() {
    moves_past_a_crowd(lab!("a_crowd_of_strangers_does_no_harm"), false);
}

#[test]
fn a_crowd_of_strangers_does_no_harm_over_tls() {
    moves_past_a_crowd(lab!("a_crowd_of_strangers_does_no_harm_over_tls"), true);
}

/// What a source said before its lane was taken: two texts, each with its length behind eight bytes, and a checksum.
fn handshake(recording: &[u8]) -> &[u8] {
    let end = |start: usize| {
        let length = u32::from_le_bytes(recording[start + 8..start + 12].try_into().unwrap());
        start + 16 + usize::try_from(length).unwrap()
    };
    &recording[..end(end(0))]
}

#[test]
fn what_was_recorded_of_a_migration_neither_opens_a_lane_nor_cuts_the_link() {
    let lab = lab!("what_was_recorded_of_a_migration_neither_opens_a_lane_nor_cuts_the_link");
    let spec = guest(&lab);
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let audit = lab.path("destination.audit");
    let more = vec!["--audit".to_owned(), audit.display().to_string()];
    let (mut there, to) = destination(&lab, &Spec { more, ..spec.clone() }, Transport::Tcp);
    let link = Link::to(&to);
    slow_down(&mut source, 20_000);
    begin(&mut source, link.address());
    lose_link(&mut source, &mut there, &link);
    let say_again = |recordings: &[Recording]| {
        for Recording { role, bytes } in recordings {
            let mut stranger = connect(&to);
            stranger.write_all(handshake(bytes)).unwrap();
            let told = is_told(&stranger);
            not_taken(&told);
            let told = String::from_utf8_lossy(&told).into_owned();
            assert!(told.contains("it was said on another one"), "{role:?}: {told}");
        }
    };
    // The lanes of the link that is lost, for which the destination waits.
    let lost = link.recordings();
    assert_eq!(lost.len(), 3);
    say_again(&lost);
    link.mend();
    source.execute("migrate", json!({ "uri": link.address(), "resume": true }));
    for machine in [&mut source, &mut there] {
        machine.wait_migration("postcopy-active");
    }
    // Those of the link that there is. Its control lane's asks for the link that there is to be given up.
    let all = link.recordings();
    assert_eq!(all.len(), 6);
    say_again(&all);
    let look = there.execute("query-migrate", json!({}));
    assert_eq!(look["status"], "postcopy-active", "{look:#}");
    let interruptions = look["x-switchover-interruptions"].as_array().map_or(0, Vec::len);
    assert_eq!(interruptions, 1, "a recording cut the link: {look:#}");
    set(&mut source, json!({ "max-postcopy-bandwidth": 0 }));
    source.wait_migration("completed");
    there.wait_migration("completed");
    assert_eq!(lanes_opened(&audit), 6);
    journey.ends_at(&mut source, &mut there, 1);
    // Nor at a destination that waits for its first source.
    let audit = lab.path("another.audit");
    let more = vec!["--audit".to_owned(), audit.display().to_string()];
    let (mut another, to_another) = destination(&lab, &Spec { more, ..spec.clone() }, Transport::Tcp);
    for Recording { bytes, .. } in &all {
        let mut stranger = connect(&to_another);
        stranger.write_all(handshake(bytes)).unwrap();
        not_taken(&is_told(&stranger));
    }
    assert_eq!((another.run_state(), lanes_opened(&audit)), ("inmigrate".to_owned(), 0));
    another.quit();
    lab.close();
}
