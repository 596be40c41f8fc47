//! Guests move over TLS, and only to and from those who have a certificate.

use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use serde_json::json;
use switchover_guest_tests::certificates::{FLAWS, Flaw, Folders, of_source};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::{Lab, switchover};
use switchover_guest_tests::link::{Ended, Link};
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{
    Transport, Way, allow_postcopy, begin, choose, destination, join_and_finish, lose_link, migrate, migrate_as, set,
    slow_down,
};
use switchover_guest_tests::waiting::until;
use switchover_wire::address::Address;
use switchover_wire::handshake::{Hello, greet, read_hello, secure_as_source};
use switchover_wire::socket::{Listener, Socket};
use switchover_wire::tls::{CLIENT_CERT, Role, SERVER_CERT, SessionSecret};
use switchover_wire::types::{LaneId, LaneRole};

use crate::lab;

/// A guest that works, on a source with credentials from a folder.
pub fn source(lab: &Lab, folder: &Path) -> (Spec, Machine, Journey) {
    let spec = Spec { tls_creds: Some(folder.to_owned()), ..lab.guest("random", "ws=16M period=50") };
    let source = Machine::start(lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    (spec, source, journey)
}

#[test]
fn guests_move_over_tls_by_every_mode_on_several_lanes() {
    for (way, transport) in [
        (Way::new("postcopy", 3), Transport::Tcp),
        (Way::new("hybrid", 2), Transport::Tcp),
        (Way::new("precopy", 2), Transport::Unix),
    ] {
        let lab = lab!("guests_move_over_tls_by_every_mode_on_several_lanes");
        let good = Folders::new(&lab).good();
        let (spec, mut source, mut journey) = source(&lab, &good);
        let (mut there, to) = destination(&lab, &spec, transport);
        // A unix socket's host has no name of its own.
        set(&mut source, json!({ "x-switchover-fault-lanes": 2, "tls-hostname": "127.0.0.1" }));
        migrate_as(&mut source, &mut there, &to, way);
        journey.ends_at(&mut source, &mut there, 3);
        lab.close();
    }
}

#[test]
fn the_commands_make_certificates_and_move_a_guest_with_them() {
    let lab = lab!("the_commands_make_certificates_and_move_a_guest_with_them");
    let (made, path) = (lab.path("made"), lab.path("made").display().to_string());
    let ended = switchover(&["certs", "--out", &path, "--name", "b.example"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let again = switchover(&["certs", "--out", &path]);
    assert_eq!(again.status, Some(1));
    assert!(again.stderr.contains("nothing is overwritten"), "{}", again.stderr);
    let spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (mut there, to) = destination(&lab, &Spec { tls_creds: Some(made), ..spec }, Transport::Tcp);
    let from = source.qmp_endpoint();
    let base = ["migrate", "--qmp", &from, "--to", &to, "--mode", "postcopy"];
    let run = |more: &[&str]| switchover(&[&base[..], more].concat());
    for (more, words) in [
        (&[][..], "this destination takes TLS lanes only"),
        (&["--tls-creds", &path], "certificate is not for 127.0.0.1, but for"),
        (&["--tls-creds", "/nowhere"], "cannot read /nowhere/ca-cert.pem"),
    ] {
        let ended = run(more);
        assert_eq!(ended.status, Some(1), "{}", ended.stdout);
        assert!(ended.stderr.contains(words), "`{words}` is not in {}", ended.stderr);
        assert_eq!(source.run_state(), "running");
    }
    let ended = run(&["--tls-creds", &path, "--tls-hostname", "b.example"]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    there.wait_migration("completed");
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

/// Has the source fail to move its guest to `to`; both sides say why, and the guest runs on.
pub fn fails(source: &mut Machine, there: &mut Machine, to: &str, near: &str, far: &str) {
    allow_postcopy(source);
    source.execute("migrate", json!({ "uri": to }));
    let error = source.wait_migration("failed")["error-desc"].as_str().unwrap().to_owned();
    assert!(error.contains(near), "the source does not say `{near}`: {error}");
    says(there, far);
    assert_eq!((&*source.run_state(), &*there.run_state()), ("running", "inmigrate"));
}

/// Waits until a machine has said this.
pub fn says(machine: &Machine, words: &str) {
    until(&format!("it says `{words}`"), || machine.stderr().text().contains(words).then_some(()));
}

#[test]
fn only_good_certificates_open_a_control_lane() {
    let lab = lab!("only_good_certificates_open_a_control_lane");
    let folders = Folders::new(&lab);
    let good = folders.good();
    let (spec, mut source, mut journey) = source(&lab, &good);
    for role in [Role::Source, Role::Destination] {
        for flaw in FLAWS.into_iter().filter(|flaw| *flaw != Flaw::OtherName || role == Role::Destination) {
            let flawed = folders.flawed(flaw, role);
            let (here, beyond) = if role == Role::Source { (&flawed, &good) } else { (&good, &flawed) };
            set(&mut source, json!({ "tls-creds": here }));
            let there = Spec { tls_creds: Some(beyond.clone()), ..spec.clone() };
            let (mut there, to) = destination(&lab, &there, Transport::Tcp);
            let (sees, shows) = flaw.said(role);
            let (near, far) = if role == Role::Source { (shows, sees) } else { (sees, shows) };
            println!("{flaw:?} of the {role:?}");
            fails(&mut source, &mut there, &to, near, far);
            there.quit();
        }
    }
    // What is missing is noticed before anything is said to anybody.
    for (name, is_source) in [(CLIENT_CERT, true), (SERVER_CERT, false)] {
        let lacking = lab.path(&format!("without-{name}"));
        fs::create_dir(&lacking).unwrap();
        for file in fs::read_dir(&good).unwrap().map(Result::unwrap).filter(|file| file.file_name() != name) {
            fs::copy(file.path(), lacking.join(file.file_name())).unwrap();
        }
        if is_source {
            set(&mut source, json!({ "tls-creds": lacking }));
            let refusal = source.refuses("migrate", json!({ "uri": "tcp:127.0.0.1:1" }));
            assert!(refusal.contains(name), "{refusal}");
        } else {
            let folder = lacking.to_str().unwrap();
            let ended = switchover(&["run", "--incoming", "tcp:127.0.0.1:0", "--memory", "64M", "--tls-creds", folder]);
            assert_eq!(ended.status, Some(1));
            assert!(ended.stderr.contains(name), "{}", ended.stderr);
        }
    }
    // One side alone.
    let bare = Spec { tls_creds: None, ..spec.clone() };
    set(&mut source, json!({ "tls-creds": good }));
    let (mut there, to) = destination(&lab, &bare, Transport::Tcp);
    fails(
        &mut source,
        &mut there,
        &to,
        "has it credentials at all",
        "speaks TLS, and this destination has no credentials",
    );
    there.quit();
    set(&mut source, json!({ "tls-creds": "" }));
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    fails(&mut source, &mut there, &to, "takes TLS lanes only", "the source has no TLS");
    set(&mut source, json!({ "tls-creds": good }));
    migrate(&mut source, &mut there, &to);
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

/// What `source` says first on its control lane, as one that has no credentials.
fn hello_of(source: &mut Machine) -> Hello {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = listener.address().to_string();
    let heard = thread::spawn(move || {
        let lane = listener.accept().unwrap().unwrap();
        read_hello(&lane).unwrap().proven(&lane).unwrap()
    });
    allow_postcopy(source);
    source.execute("migrate", json!({ "uri": to }));
    source.wait_migration("failed");
    heard.join().unwrap()
}

/// A lane that this test opens as a source would, or why not.
fn open(to: &Address, folder: &Path, hello: &Hello, secret: Option<&SessionSecret>) -> Result<Arc<Socket>, String> {
    let socket = Socket::connect(to, Duration::from_secs(5)).unwrap();
    secure_as_source(&socket, &of_source(folder), "127.0.0.1").map_err(|error| error.to_string())?;
    let tls = socket.tls().unwrap();
    let proof = secret.map(|secret| tls.prove(secret, hello.session, hello.lane));
    greet(&socket, &Hello { proof, ..hello.clone() }).map_err(|error| error.to_string())?;
    Ok(Arc::new(socket))
}

#[test]
fn every_lane_needs_the_certificate_and_the_secret_of_its_session() {
    let lab = lab!("every_lane_needs_the_certificate_and_the_secret_of_its_session");
    let folders = Folders::new(&lab);
    let good = folders.good();
    let (spec, mut source, mut journey) = source(&lab, &good);
    set(&mut source, json!({ "tls-creds": "" }));
    let hello = hello_of(&mut source);
    let (there, to) = destination(&lab, &spec, Transport::Tcp);
    let (mut other, other_to) = destination(&lab, &spec, Transport::Tcp);
    let [at, other_at] = [&to, &other_to].map(|to| to.parse::<Address>().unwrap());
    let session = |control: &Socket| control.tls().unwrap().session_secret();
    let control = open(&at, &good, &hello, None).unwrap();
    // The same session by name, with another destination.
    let other_control = open(&other_at, &good, &hello, None).unwrap();
    let secret = session(&control);
    // Another holder of a good certificate.
    let second = lab.path("second");
    fs::rename(&good, &second).unwrap();
    let good = folders.good();
    for role in [LaneRole::Fault, LaneRole::Bulk] {
        let lane = LaneId { role, index: 0 };
        let hello = Hello { lane, description: None, ..hello.clone() };
        for flaw in FLAWS.into_iter().filter(|flaw| *flaw != Flaw::OtherName) {
            let error = open(&at, &folders.flawed(flaw, Role::Source), &hello, Some(&secret)).unwrap_err();
            let (sees, shows) = flaw.said(Role::Source);
            assert!(error.contains(shows), "{lane}, {flaw:?}: {error}");
            says(&there, sees);
        }
        for (folder, secret, words) in [
            (&second, None, "does not prove that it belongs to session"),
            (&second, Some(&session(&other_control)), "does not prove that it belongs to session"),
            (&good, Some(&secret), "shows another certificate than the session's control lane did"),
        ] {
            let error = open(&at, folder, &hello, secret).unwrap_err();
            assert!(error.contains(words), "{lane}: {error}");
            says(&there, words);
        }
    }
    // All that was wrong left the lanes free for the right ones.
    let fault = LaneId { role: LaneRole::Fault, index: 0 };
    let hello = Hello { lane: fault, description: None, ..hello };
    let lane = open(&at, &second, &hello, Some(&secret)).unwrap();
    let replayed = open(&at, &second, &hello, Some(&secret)).unwrap_err();
    assert!(replayed.contains("is open already"), "{replayed}");
    for socket in [control, other_control, lane] {
        socket.shutdown();
    }
    set(&mut source, json!({ "tls-creds": good }));
    migrate(&mut source, &mut other, &other_to);
    journey.ends_at(&mut source, &mut other, 1);
    drop(there);
}

#[test]
fn a_lost_link_is_joined_again_over_tls_by_its_own_source_alone() {
    let lab = lab!("a_lost_link_is_joined_again_over_tls_by_its_own_source_alone");
    let good = Folders::new(&lab).good();
    let spec = Spec { tls_creds: Some(good.clone()), ..lab.guest("random", "ws=32M period=50 pace=2000000") };
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let link = Link::to(&to);
    slow_down(&mut source, 400_000);
    choose(&mut source, Way::new("postcopy", 2));
    begin(&mut source, link.address());
    lose_link(&mut source, &mut there, &link);
    let report = source.execute("x-switchover-report", json!({}));
    let session = report["session"].as_str().unwrap().to_owned();
    // Somebody with a good certificate who has learned the session's name.
    let mut second = Machine::start(&lab, &Spec { tls_creds: None, ..spec.clone() });
    let mut stolen = hello_of(&mut second);
    let bytes: Vec<u8> = (0..16).map(|at| u8::from_str_radix(&session[2 * at..2 * at + 2], 16).unwrap()).collect();
    stolen.session.0.copy_from_slice(&bytes);
    // Post-copy, and joining again.
    stolen.capabilities |= switchover_hybrid::capability::REJOIN;
    let error = open(&to.parse().unwrap(), &good, &stolen, None).unwrap_err();
    assert!(error.contains("does not prove that it belongs to session"), "{error}");
    second.quit();
    link.mend();
    for _ in 0..3 {
        source.execute("migrate", json!({ "uri": link.address(), "resume": true }));
        source.wait_migration("postcopy-active");
        there.wait_migration("postcopy-active");
        link.cut(Ended::Reset);
        source.wait_migration("postcopy-paused");
        there.wait_migration("postcopy-paused");
        link.mend();
    }
    join_and_finish(&mut source, &mut there, link.address());
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

#[test]
fn plain_lanes_leave_the_host_only_where_that_is_allowed() {
    let lab = lab!("plain_lanes_leave_the_host_only_where_that_is_allowed");
    let ended = switchover(&["run", "--incoming", "tcp:0.0.0.0:0", "--memory", "64M"]);
    assert_eq!(ended.status, Some(1));
    assert!(ended.stderr.contains("cannot listen at tcp:0.0.0.0:0 without TLS"), "{}", ended.stderr);
    // An address of this host that is none of its loopback's. Nothing is sent to find it.
    let probe = UdpSocket::bind("0.0.0.0:0").unwrap();
    if probe.connect("192.0.2.1:9").is_err() {
        println!("SKIP plain_lanes_leave_the_host_only_where_that_is_allowed: this host has the loopback alone");
        return;
    }
    let host = probe.local_addr().unwrap().ip();
    let spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut there = Machine::start(&lab, &spec.incoming("defer"));
    let refusal = there.refuses("migrate-incoming", json!({ "uri": format!("tcp:{host}:0") }));
    assert!(refusal.contains("--allow-plain"), "{refusal}");
    set(&mut there, json!({ "x-switchover-allow-plain": true }));
    there.execute("migrate-incoming", json!({ "uri": format!("tcp:{host}:0") }));
    let to = there.address();
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    allow_postcopy(&mut source);
    source.execute("migrate", json!({ "uri": to }));
    let error = source.wait_migration("failed")["error-desc"].as_str().unwrap().to_owned();
    assert!(error.contains("for everybody on the way to read"), "{error}");
    assert_eq!(source.run_state(), "running");
    set(&mut source, json!({ "x-switchover-allow-plain": true }));
    migrate(&mut source, &mut there, &to);
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}
