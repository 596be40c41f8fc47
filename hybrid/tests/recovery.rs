//! Links that are lost after the commit, and joined again: a machine without KVM, real sockets, a real userfaultfd.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{until, until_or, userfaultfd_or_skip};
use switchover_hybrid::error::MigrationError;
use switchover_hybrid::fake::FakeMachine;
use switchover_hybrid::incoming::Incoming;
use switchover_hybrid::machine::Machine;
use switchover_hybrid::monitor::{Limits, Mode};
use switchover_hybrid::outgoing::Outgoing;
use switchover_hybrid::security::Security;
use switchover_hybrid::settings::{Bandwidth, Settings, no_observer};
use switchover_hybrid::status::MigrationStatus;
use switchover_wire::address::Address;
use switchover_wire::types::PageCount;

const PAGES: PageCount = PageCount(8192);
/// 24 MiB are never zero: more than a second at this rate.
const SLOW: u64 = 16 << 20;

struct Pair {
    from: Arc<FakeMachine>,
    to: Arc<FakeMachine>,
    incoming: Incoming,
    outgoing: Outgoing,
}

fn settings(postcopy_rate: u64, mode: Mode) -> Settings {
    Settings {
        bulk_lanes: 2,
        bandwidth: Bandwidth { precopy: 0, postcopy: postcopy_rate },
        limits: Limits { mode, ..Limits::default() },
        ..Settings::default()
    }
}

/// A guest that has been handed off over a link on which its memory takes a second.
fn in_postcopy(mode: Mode) -> Pair {
    let from = FakeMachine::new(PAGES).unwrap();
    let to = FakeMachine::incoming(PAGES).unwrap();
    // Otherwise it would fetch its memory by faults, before anything could be cut.
    to.throttle(99);
    from.resume().unwrap();
    until("the guest has worked", || from.visits() > 20_000);
    let machine: Arc<dyn Machine> = Arc::clone(&to) as _;
    let incoming =
        Incoming::listen(machine, &loopback(), Settings::default(), Security::default(), no_observer()).unwrap();
    let machine: Arc<dyn Machine> = Arc::clone(&from) as _;
    let outgoing =
        Outgoing::start(machine, incoming.address(), settings(SLOW, mode), Security::default(), no_observer()).unwrap();
    outgoing.start_postcopy().unwrap();
    let running = |status| status == MigrationStatus::PostcopyActive;
    until("post-copy", || running(outgoing.progress().status) && running(incoming.progress().status));
    Pair { from, to, incoming, outgoing }
}

fn loopback() -> Address {
    "tcp:127.0.0.1:0".parse().unwrap()
}

impl Pair {
    fn statuses(&self) -> (MigrationStatus, MigrationStatus) {
        (self.outgoing.progress().status, self.incoming.progress().status)
    }

    /// Cuts the link on the source, as soon as that has heard that the guest runs.
    fn cut(&self) {
        until("the source may pause", || self.outgoing.pause().is_ok());
    }

    fn until_paused(&self) {
        let paused = (MigrationStatus::PostcopyPaused, MigrationStatus::PostcopyPaused);
        until_or(
            "both sides are paused",
            || self.statuses() == paused,
            || {
                format!(
                    "{:?} {:?} {:?}",
                    self.statuses(),
                    self.outgoing.progress().error,
                    self.incoming.progress().error
                )
            },
        );
    }

    fn until_complete(&self) {
        let complete = (MigrationStatus::Completed, MigrationStatus::Completed);
        until("both sides are complete", || self.statuses() == complete);
    }

    /// The guest is one, whole, and goes on where it was moved to.
    fn check(&self) {
        self.to.throttle(0);
        let seen = self.to.visits();
        until("the guest goes on", || self.to.visits() > seen + 20_000);
        assert_eq!((self.to.corrupt_visits(), self.to.stopped()), (0, None));
        assert!(!self.from.runs() && self.from.resume().is_err(), "the source may never run again");
    }
}

#[test]
fn a_lost_link_is_joined_again_and_the_guest_completed() {
    if !userfaultfd_or_skip("a_lost_link_is_joined_again_and_the_guest_completed") {
        return;
    }
    for mode in [Mode::Postcopy, Mode::Hybrid] {
        let pair = in_postcopy(mode);
        pair.cut();
        pair.until_paused();
        assert!(pair.to.runs() && pair.to.stopped().is_none(), "it runs on with what it has");
        assert!(pair.outgoing.progress().error.unwrap().contains("paused"));
        // Over another address, with other lanes.
        let recovered = pair.incoming.recover(&loopback()).unwrap();
        assert_ne!(recovered, pair.incoming.address());
        pair.outgoing.resume(recovered, Settings { bulk_lanes: 3, ..settings(0, mode) }, Security::default()).unwrap();
        pair.until_complete();
        pair.check();
        let (source, destination) = (pair.outgoing.report(), pair.incoming.report());
        for report in [&source, &destination] {
            let [once] = &report.interruptions[..] else { panic!("{:?}", report.interruptions) };
            assert!(once.joined_ns.unwrap() > once.lost_ns);
            assert_eq!(report.error, None);
        }
        let faults = destination.faults.unwrap();
        assert_eq!(faults.total.decode().unwrap().len(), faults.remote + faults.raced);
    }
}

#[test]
fn a_link_may_be_lost_again_and_again_from_either_side() {
    if !userfaultfd_or_skip("a_link_may_be_lost_again_and_again_from_either_side") {
        return;
    }
    let pair = in_postcopy(Mode::Postcopy);
    let mut cuts = 0;
    while pair.statuses() != (MigrationStatus::Completed, MigrationStatus::Completed) && cuts < 60 {
        let cut = if cuts % 2 == 0 { pair.outgoing.pause() } else { pair.incoming.pause() };
        if cut.is_err() {
            // It is not in post-copy: just complete, or not yet again.
            thread::yield_now();
            continue;
        }
        cuts += 1;
        // The side that did not cut may not have noticed when the other comes again.
        until("the source is paused", || pair.statuses().0 != MigrationStatus::PostcopyActive);
        if pair
            .outgoing
            .resume(pair.incoming.address(), settings(SLOW / 2, Mode::Postcopy), Security::default())
            .is_err()
        {
            continue;
        }
        until("an end of the attempt", || {
            !matches!(pair.statuses().0, MigrationStatus::PostcopyRecover | MigrationStatus::PostcopyPaused)
        });
        thread::sleep(Duration::from_millis(15));
    }
    pair.until_complete();
    assert!(cuts > 20, "only {cuts} cuts");
    pair.check();
}

#[test]
fn an_attempt_that_fails_can_be_repeated() {
    if !userfaultfd_or_skip("an_attempt_that_fails_can_be_repeated") {
        return;
    }
    let pair = in_postcopy(Mode::Postcopy);
    assert!(matches!(
        pair.outgoing.resume(loopback(), settings(0, Mode::Postcopy), Security::default()),
        Err(MigrationError::NotLost { .. })
    ));
    assert!(matches!(pair.incoming.recover(&loopback()), Err(MigrationError::NotLost { .. })));
    assert!(matches!(pair.outgoing.reclaim(), Err(MigrationError::NotLost { .. })));
    pair.incoming.pause().unwrap();
    pair.until_paused();
    // Nobody listens; a stranger listens, which knows nothing of this guest.
    let nobody: Address = "tcp:127.0.0.1:1".parse().unwrap();
    let stranger = FakeMachine::incoming(PAGES).unwrap();
    let machine: Arc<dyn Machine> = Arc::clone(&stranger) as _;
    let strange =
        Incoming::listen(machine, &loopback(), Settings::default(), Security::default(), no_observer()).unwrap();
    for (to, why) in [(nobody, "refused"), (strange.address(), "is unknown here")] {
        pair.outgoing.resume(to, settings(0, Mode::Postcopy), Security::default()).unwrap();
        until("the attempt has failed", || {
            let progress = pair.outgoing.progress();
            progress.status == MigrationStatus::PostcopyPaused
                && progress.error.is_some_and(|error| error.contains(why))
        });
        assert!(!pair.from.runs() && pair.from.resume().is_err(), "no answer of a stranger brings the guest back");
    }
    strange.close();
    pair.outgoing.resume(pair.incoming.address(), settings(0, Mode::Postcopy), Security::default()).unwrap();
    pair.until_complete();
    assert_eq!(pair.outgoing.report().interruptions[0].attempts, 2);
    pair.check();
}

#[test]
fn a_guest_is_reclaimed_only_by_its_controllers_word() {
    if !userfaultfd_or_skip("a_guest_is_reclaimed_only_by_its_controllers_word") {
        return;
    }
    let pair = in_postcopy(Mode::Postcopy);
    pair.cut();
    pair.until_paused();
    // The destination is fenced.
    pair.to.stop_for_good("fenced");
    pair.incoming.close();
    pair.outgoing.reclaim().unwrap();
    assert_eq!(pair.outgoing.wait(), MigrationStatus::Failed);
    let seen = pair.from.visits();
    until("the guest goes on here", || pair.from.visits() > seen + 20_000);
    assert_eq!(pair.from.corrupt_visits(), 0);
    assert!(pair.outgoing.resume(pair.incoming.address(), settings(0, Mode::Postcopy), Security::default()).is_err());
}
