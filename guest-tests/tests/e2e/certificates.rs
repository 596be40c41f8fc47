//! Every lane looks at the other side's certificate, when a link is opened and when it is joined again: a bad one on any lane is told
//! on both sides, and the guest runs on where it was. (The control lane's first opening is in `tls.rs`.)

use std::path::PathBuf;

use serde_json::{Value, json};
use switchover_guest_tests::certificates::{FLAWS, Flaw, Folders};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::link::Link;
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{
    Transport, begin, destination, join_and_finish, lose_link, migrate, set, slow_down,
};
use switchover_guest_tests::waiting::until;
use switchover_wire::tls::{CA_CERT, Role};

use crate::lab;
use crate::tls::{fails, says, source};

/// The lanes in the order in which a source opens them.
const LANES: [&str; 3] = ["control lane", "fault lane 0", "bulk lane 0"];

/// A destination that no source should take for the right one.
struct Impostor {
    what: String,
    machine: Machine,
    address: String,
    /// What a source says of it, and what it says itself.
    said: (&'static str, &'static str),
}

/// One with each flaw, and one without credentials.
fn impostors(lab: &Lab, folders: &Folders<'_>, spec: &Spec) -> Vec<Impostor> {
    let bare = ("has it credentials at all", "speaks TLS, and this destination has no credentials");
    let flawed = FLAWS
        .map(|flaw| (format!("{flaw:?}"), Some(folders.flawed(flaw, Role::Destination)), flaw.said(Role::Destination)));
    let start = |(what, tls_creds, said): (String, Option<PathBuf>, _)| {
        let (machine, address) = destination(lab, &Spec { tls_creds, ..spec.clone() }, Transport::Tcp);
        Impostor { what, machine, address, said }
    };
    flawed.into_iter().chain([("no credentials".to_owned(), None, bare)]).map(start).collect()
}

/// How often a machine says `words`.
fn count(machine: &Machine, words: &str) -> usize {
    machine.stderr().text().matches(words).count()
}

#[test]
fn a_destination_that_is_another_on_one_lane_gets_no_guest() {
    let lab = lab!("a_destination_that_is_another_on_one_lane_gets_no_guest");
    let folders = Folders::new(&lab);
    let (spec, mut source, mut journey) = source(&lab, &folders.good());
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let link = Link::to(&to);
    for impostor in &mut impostors(&lab, &folders, &spec) {
        for (number, lane) in LANES.iter().enumerate() {
            println!("{} on the {lane}", impostor.what);
            let (near, far) = impostor.said;
            let before = count(&impostor.machine, far);
            link.divert(number, &impostor.address);
            fails(&mut source, &mut impostor.machine, link.address(), near, far);
            let error = source.execute("query-migrate", json!({}))["error-desc"].as_str().unwrap().to_owned();
            assert!(error.contains(lane), "it does not say which lane: {error}");
            until("the impostor says it once more", || (count(&impostor.machine, far) > before).then_some(()));
            assert_eq!(there.run_state(), "inmigrate", "the true one waits on");
        }
        impostor.machine.quit();
    }
    migrate(&mut source, &mut there, link.address());
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

/// The interruption that there was last.
fn failed_attempts(source: &mut Machine) -> u64 {
    let look = source.execute("query-migrate", json!({}));
    let last = look["x-switchover-interruptions"].as_array().and_then(|all| all.last().cloned());
    last.and_then(|last| last["failed-attempts"].as_u64()).unwrap_or_else(|| panic!("no interruption: {look:#}"))
}

/// Has the source fail to join its lost link again; the guest runs on at the destination, with what it has.
fn does_not_join(source: &mut Machine, there: &mut Machine, to: &str, near: &str) {
    let before = failed_attempts(source);
    source.execute("migrate", json!({ "uri": to, "resume": true }));
    until("the attempt has failed", || (failed_attempts(source) > before).then_some(()));
    let look: Value = source.execute("query-migrate", json!({}));
    let error = look["error-desc"].as_str().unwrap_or_default();
    assert!(error.contains(near), "the source does not say `{near}`: {look:#}");
    assert_eq!(look["status"], "postcopy-paused", "{look:#}");
    let look: Value = there.execute("query-migrate", json!({}));
    assert_eq!(look["status"], "postcopy-paused", "{look:#}");
    assert_eq!(there.run_state(), "running");
}

#[test]
fn a_link_is_joined_again_with_good_certificates_alone() {
    let lab = lab!("a_link_is_joined_again_with_good_certificates_alone");
    let folders = Folders::new(&lab);
    let good = folders.good();
    let spec = Spec { tls_creds: Some(good.clone()), ..lab.guest("random", "ws=16M period=50 pace=1000000") };
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let link = Link::to(&to);
    slow_down(&mut source, 20_000);
    begin(&mut source, link.address());
    lose_link(&mut source, &mut there, &link);
    link.mend();
    for flaw in FLAWS.into_iter().filter(|flaw| *flaw != Flaw::OtherName) {
        println!("{flaw:?} of the source");
        let (sees, shows) = flaw.said(Role::Source);
        let before = count(&there, sees);
        set(&mut source, json!({ "tls-creds": folders.flawed(flaw, Role::Source) }));
        does_not_join(&mut source, &mut there, link.address(), shows);
        until("the destination says why", || (count(&there, sees) > before).then_some(()));
    }
    set(&mut source, json!({ "tls-creds": "" }));
    does_not_join(&mut source, &mut there, link.address(), "this destination takes TLS lanes only");
    says(&there, "the source has no TLS");
    set(&mut source, json!({ "tls-creds": good }));
    for impostor in &mut impostors(&lab, &folders, &spec) {
        for (number, lane) in LANES.iter().enumerate() {
            println!("{} on the {lane}", impostor.what);
            let (near, far) = impostor.said;
            let before = count(&impostor.machine, far);
            link.divert(number, &impostor.address);
            does_not_join(&mut source, &mut there, link.address(), near);
            until("the impostor says why", || (count(&impostor.machine, far) > before).then_some(()));
        }
        impostor.machine.quit();
    }
    join_and_finish(&mut source, &mut there, link.address());
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

#[test]
fn a_ca_file_that_is_removed_or_replaced_takes_trust_away() {
    let lab = lab!("a_ca_file_that_is_removed_or_replaced_takes_trust_away");
    let folders = Folders::new(&lab);
    let good = folders.good();
    let (spec, mut source, mut journey) = source(&lab, &good);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let ca = good.join(CA_CERT);
    let kept = std::fs::read(&ca).unwrap();
    // The source reads its folder for each migration; the destination has read it.
    std::fs::remove_file(&ca).unwrap();
    set(&mut source, json!({ "tls-creds": good }));
    let refusal = source.refuses("migrate", json!({ "uri": to }));
    assert!(refusal.contains("cannot read") && refusal.contains(CA_CERT), "{refusal}");
    std::fs::copy(folders.flawed(Flaw::OtherTrust, Role::Source).join(CA_CERT), &ca).unwrap();
    let (sees, shows) = Flaw::OtherTrust.said(Role::Source);
    fails(&mut source, &mut there, &to, shows, sees);
    std::fs::write(&ca, kept).unwrap();
    migrate(&mut source, &mut there, &to);
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}
