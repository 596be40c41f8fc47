//! Whole migrations of a machine without KVM, over real sockets and a real userfaultfd.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use switchover_hybrid::fake::FakeMachine;
use switchover_hybrid::incoming::Incoming;
use switchover_hybrid::machine::Machine;
use switchover_hybrid::outgoing::Outgoing;
use switchover_hybrid::security::Security;
use switchover_hybrid::settings::{Settings, no_observer};
use switchover_hybrid::status::MigrationStatus;
use switchover_pager::ram::Ram;
use switchover_pager::uffd::Watch;
use switchover_wire::address::Address;
use switchover_wire::types::PageCount;

const PAGES: PageCount = PageCount(8192);
const PATIENCE: Duration = Duration::from_secs(30);

fn userfaultfd_or_skip(test: &str) -> bool {
    match Watch::register(Ram::new(PageCount(1)).unwrap()) {
        Ok(watch) => watch.unregister().is_ok(),
        Err(error) => {
            println!("SKIP {test}: {error}");
            false
        }
    }
}

fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < deadline, "never came: {what}");
        thread::yield_now();
    }
}

fn loopback() -> Address {
    "tcp:127.0.0.1:0".parse().unwrap()
}

struct Pair {
    from: Arc<FakeMachine>,
    to: Arc<FakeMachine>,
    incoming: Incoming,
}

fn pair() -> Pair {
    let from = FakeMachine::new(PAGES).unwrap();
    let to = FakeMachine::incoming(PAGES).unwrap();
    from.resume().unwrap();
    until("the guest has worked", || from.visits() > 20_000);
    let incoming = listen(&to);
    Pair { from, to, incoming }
}

fn listen(to: &Arc<FakeMachine>) -> Incoming {
    let machine: Arc<dyn Machine> = Arc::clone(to) as _;
    Incoming::listen(machine, &loopback(), Settings::default(), Security::default(), no_observer()).unwrap()
}

fn start(from: &Arc<FakeMachine>, to: Address, bulk_lanes: u8) -> Outgoing {
    let settings = Settings { bulk_lanes, ..Settings::default() };
    let machine: Arc<dyn Machine> = Arc::clone(from) as _;
    Outgoing::start(machine, to, settings, Security::default(), no_observer()).unwrap()
}

fn both_complete(outgoing: &Outgoing, incoming: &Incoming) {
    assert_eq!(outgoing.wait(), MigrationStatus::Completed, "{:?}", outgoing.progress().error);
    assert_eq!(incoming.wait(), MigrationStatus::Completed, "{:?}", incoming.progress().error);
}

#[test]
fn a_guest_moves_and_goes_on() {
    if !userfaultfd_or_skip("a_guest_moves_and_goes_on") {
        return;
    }
    for bulk_lanes in [1, 2] {
        let Pair { from, to, incoming } = pair();
        let outgoing = start(&from, incoming.address(), bulk_lanes);
        until("active", || outgoing.progress().status == MigrationStatus::Active);
        let before = from.visits();
        until("the guest goes on in active", || from.visits() > before);
        outgoing.start_postcopy().unwrap();
        both_complete(&outgoing, &incoming);
        let moved = from.visits();
        until("the guest goes on at the destination", || to.visits() > moved + 50_000);
        assert_eq!((from.visits(), from.runs(), to.corrupt_visits()), (moved, false, 0));
        assert!(from.resume().is_err(), "the source may never run again");
        assert!(outgoing.cancel().is_err() && outgoing.start_postcopy().is_err());

        let (source, destination) = (outgoing.report(), incoming.report());
        assert_eq!(source.session, destination.session);
        let classes = destination.pages.unwrap();
        assert_eq!(classes.precopied, 0);
        assert_eq!(classes.zero + classes.pushed + classes.requested, PAGES.0);
        assert!(classes.zero >= PAGES.0 / 4);
        let blackout = destination.instants.first_entry_ns.unwrap() - source.instants.last_exit_ns.unwrap();
        assert!(blackout > 0);
        assert_eq!(Some(blackout), outgoing.progress().downtime_ns);
        let faults = destination.faults.unwrap();
        assert_eq!(faults.total.decode().unwrap().len(), faults.remote + faults.raced);
        let (sent, received) = (&source.lanes[1], &destination.lanes[1]);
        assert_eq!((sent.sent, &sent.lane), (received.received, &received.lane));
    }
}

#[test]
fn the_handoff_may_be_wished_for_before_the_destination_is_prepared() {
    if !userfaultfd_or_skip("the_handoff_may_be_wished_for_before_the_destination_is_prepared") {
        return;
    }
    let Pair { from, to, incoming } = pair();
    let outgoing = start(&from, incoming.address(), 1);
    outgoing.start_postcopy().unwrap();
    assert_eq!(outgoing.wait(), MigrationStatus::Completed);
    assert_eq!(incoming.wait(), MigrationStatus::Completed);
    assert_eq!(to.corrupt_visits(), 0);
}

#[test]
fn a_cancelled_migration_leaves_the_guest_running() {
    if !userfaultfd_or_skip("a_cancelled_migration_leaves_the_guest_running") {
        return;
    }
    let Pair { from, to, incoming } = pair();
    let outgoing = start(&from, incoming.address(), 1);
    until("active", || outgoing.progress().status == MigrationStatus::Active);
    outgoing.cancel().unwrap();
    assert_eq!(outgoing.wait(), MigrationStatus::Cancelled);
    assert_eq!(incoming.wait(), MigrationStatus::Failed);
    let error = incoming.progress().error.unwrap();
    assert!(error.contains("cancelled on the source"), "{error}");
    let before = from.visits();
    until("the guest goes on", || from.visits() > before);
    assert!(!to.runs() && to.resume().is_err());

    // And it can be moved afterwards.
    let again = FakeMachine::incoming(PAGES).unwrap();
    let incoming = listen(&again);
    let outgoing = start(&from, incoming.address(), 1);
    outgoing.start_postcopy().unwrap();
    assert_eq!(outgoing.wait(), MigrationStatus::Completed);
    assert_eq!((incoming.wait(), again.corrupt_visits()), (MigrationStatus::Completed, 0));
}

#[test]
fn a_paused_guest_arrives_paused() {
    if !userfaultfd_or_skip("a_paused_guest_arrives_paused") {
        return;
    }
    let Pair { from, to, incoming } = pair();
    from.pause().unwrap();
    let visits = from.visits();
    let outgoing = start(&from, incoming.address(), 1);
    outgoing.start_postcopy().unwrap();
    both_complete(&outgoing, &incoming);
    assert_eq!((to.visits(), to.runs()), (visits, false));
    to.resume().unwrap();
    until("the guest goes on", || to.visits() > visits + 10_000);
    assert_eq!(to.corrupt_visits(), 0);
}

#[test]
fn nobody_at_the_other_end_leaves_the_guest_running() {
    let from = FakeMachine::new(PAGES).unwrap();
    from.resume().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let outgoing = start(&from, format!("tcp:{free}").parse().unwrap(), 1);
    assert_eq!(outgoing.wait(), MigrationStatus::Failed);
    let error = outgoing.progress().error.unwrap();
    assert!(error.contains(&free.to_string()) && error.contains("unharmed on the source"), "{error}");
    let before = from.visits();
    until("the guest goes on", || from.visits() > before);
}

#[test]
fn a_machine_that_does_not_match_is_refused_before_the_guest_is_touched() {
    if !userfaultfd_or_skip("a_machine_that_does_not_match_is_refused_before_the_guest_is_touched") {
        return;
    }
    let from = FakeMachine::new(PAGES).unwrap();
    from.resume().unwrap();
    let larger = FakeMachine::incoming(PageCount(PAGES.0 * 2)).unwrap();
    let incoming = listen(&larger);
    let outgoing = start(&from, incoming.address(), 1);
    assert_eq!(outgoing.wait(), MigrationStatus::Failed);
    let error = outgoing.progress().error.unwrap();
    assert!(error.contains("RAM"), "{error}");
    assert!(from.runs() && outgoing.report().instants.last_exit_ns.is_none());

    // The destination still waits for the right one.
    let fitting = FakeMachine::new(PageCount(PAGES.0 * 2)).unwrap();
    let outgoing = start(&fitting, incoming.address(), 1);
    outgoing.start_postcopy().unwrap();
    both_complete(&outgoing, &incoming);
}

#[test]
fn garbage_and_a_second_source_do_not_disturb_a_migration() {
    if !userfaultfd_or_skip("garbage_and_a_second_source_do_not_disturb_a_migration") {
        return;
    }
    let Pair { from, to, incoming } = pair();
    let Address::Tcp { host, port } = incoming.address() else { panic!("listens on TCP") };
    let mut garbage: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect((host.as_str(), port)).unwrap()).collect();
    for stream in &mut garbage {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: switchover\r\n\r\n").unwrap();
    }
    let outgoing = start(&from, incoming.address(), 1);
    until("active", || outgoing.progress().status == MigrationStatus::Active);
    let second = FakeMachine::new(PAGES).unwrap();
    second.resume().unwrap();
    let refused = start(&second, incoming.address(), 1);
    assert_eq!(refused.wait(), MigrationStatus::Failed);
    assert!(refused.progress().error.unwrap().contains("already receives another guest"));
    assert!(second.runs());
    outgoing.start_postcopy().unwrap();
    both_complete(&outgoing, &incoming);
    assert_eq!(to.corrupt_visits(), 0);
    for mut stream in garbage {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
}
