//! Pre-copy and the hybrid, on real guests: when they converge, when they do not, and what a controller does in between. The
//! guests themselves judge: whatever they print must be sound.

use serde_json::{Value, json};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, Way, begin_rounds, choose, destination, migrate_as, set, switch};
use switchover_guest_tests::waiting::until;

use crate::lab;

/// Faster than any crawl below.
const BUSY: &str = "ws=16M period=50";
/// Bytes a second: less than a busy guest writes.
const CRAWL: u64 = 16 << 20;

struct Trip {
    source: Machine,
    there: Machine,
    to: String,
    journey: Journey,
    spec: Spec,
}

/// A guest that works, and a machine that waits for it.
fn trip(lab: &Lab, guest: &str, append: &str, transport: Transport) -> Trip {
    let spec = lab.guest(guest, append);
    let source = Machine::start(lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (there, to) = destination(lab, &spec, transport);
    Trip { source, there, to, journey, spec }
}

impl Trip {
    /// The guest has moved: the source ends, and the guest works on at the destination, sound to its last word.
    fn ends_well(mut self, lab: Lab) {
        self.there.wait_migration("completed");
        assert_eq!((self.source.run_state().as_str(), self.there.run_state().as_str()), ("postmigrate", "running"));
        self.source.quit();
        self.journey.goes_to(&self.there);
        self.journey.works_on(2);
        self.there.quit();
        self.journey.log();
        lab.close();
    }

    /// The migration has come to nothing: the guest works on at the source, and another machine waits for it.
    fn stays(&mut self, lab: &Lab) {
        assert_eq!(self.source.run_state(), "running");
        assert_eq!(self.there.wait_end(), 1);
        assert!(self.there.serial().is_empty(), "a guest ran without a commit");
        self.journey.works_on(1);
        (self.there, self.to) = destination(lab, &self.spec, Transport::Tcp);
    }

    fn report(&mut self) -> Value {
        self.source.execute("x-switchover-report", json!({}))["precopy"].clone()
    }
}

fn last_choice(report: &Value) -> &str {
    let decisions = report["decisions"].as_array().expect("decisions");
    decisions.last().and_then(|decision| decision["choice"].as_str()).unwrap_or_default()
}

#[test]
fn an_idle_guest_converges_in_every_mode() {
    for (mode, channels) in [("precopy", 1), ("precopy", 2), ("hybrid", 2)] {
        let lab = lab!("an_idle_guest_converges_in_every_mode");
        let mut trip = trip(&lab, "idle", "ws=16M period=50", Transport::Tcp);
        // What decides here is the guest, not how busy the host is.
        set(&mut trip.source, json!({ "downtime-limit": 10_000, "x-switchover-blackout": 10_000 }));
        migrate_as(&mut trip.source, &mut trip.there, &trip.to, Way::new(mode, channels));
        let report = trip.report();
        let choice = last_choice(&report);
        // On a busy host the last pages may well be cheaper to fetch afterwards than another round.
        assert!(choice == "stop-and-copy" || (mode, choice) == ("hybrid", "postcopy"), "{mode}: {report:#}");
        let round = &report["rounds"][0];
        assert_eq!(round["pages"], json!((64 << 20) / 4096), "{round:#}");
        let sent = |class: &str| round[class].as_u64().expect("a count");
        // On a busy host a round that is under way may be cut short: the rest goes with the handoff.
        if sent("data_pages") + sent("zero_pages") == (64 << 20) / 4096 {
            assert!(sent("zero_pages") > 1000, "most of this machine's memory was never touched: {round:#}");
        }
        let took = trip.there.execute("x-switchover-report", json!({}));
        if choice == "stop-and-copy" {
            assert_eq!(took["faults"]["remote"], json!(0), "nothing is asked for: {took:#}");
        }
        let pages = &took["pages"];
        let sum: u64 =
            ["precopied", "zero", "pushed", "requested"].iter().filter_map(|class| pages[class].as_u64()).sum();
        assert_eq!(sum, (64 << 20) / 4096, "{pages:#}");
        trip.ends_well(lab);
    }
}

#[test]
fn a_busy_guest_moves_in_the_hybrid() {
    for (channels, transport) in [(2, Transport::Tcp), (4, Transport::Unix)] {
        let lab = lab!("a_busy_guest_moves_in_the_hybrid");
        let mut trip = trip(&lab, "random", BUSY, transport);
        migrate_as(&mut trip.source, &mut trip.there, &trip.to, Way::new("hybrid", channels));
        let report = trip.report();
        assert!(matches!(last_choice(&report), "postcopy" | "stop-and-copy"), "{report:#}");
        let lanes = trip.source.execute("x-switchover-report", json!({}))["lanes"].clone();
        let bulk = |lane: &&Value| lane["lane"].as_str().is_some_and(|name| name.contains("bulk"));
        // How they share the pages is theirs to settle: on few processors one may get none.
        let all = lanes.as_array().unwrap().iter().filter(bulk).count();
        assert_eq!(all, usize::from(channels), "{lanes:#}");
        trip.ends_well(lab);
    }
}

#[test]
fn a_guest_that_outruns_the_link_stays_and_then_moves_in_the_hybrid() {
    let lab = lab!("a_guest_that_outruns_the_link_stays_and_then_moves_in_the_hybrid");
    let mut trip = trip(&lab, "random", BUSY, Transport::Tcp);
    for budget in [json!({ "x-switchover-time-budget": 400 }), json!({ "x-switchover-max-rounds": 1 })] {
        choose(&mut trip.source, Way::new("precopy", 2));
        set(&mut trip.source, json!({ "max-bandwidth": CRAWL, "downtime-limit": 1 }));
        set(&mut trip.source, json!({ "x-switchover-time-budget": 120_000, "x-switchover-max-rounds": 100 }));
        set(&mut trip.source, budget);
        trip.source.execute("migrate", json!({ "uri": trip.to }));
        let error = trip.source.wait_migration("failed")["error-desc"].as_str().unwrap().to_owned();
        assert!(error.contains("budget") && error.contains("unharmed on the source"), "{error}");
        let report = trip.report();
        assert_eq!(last_choice(&report), "give-up", "{report:#}");
        trip.stays(&lab);
    }
    set(&mut trip.source, json!({ "x-switchover-max-rounds": 2 }));
    migrate_as(&mut trip.source, &mut trip.there, &trip.to, Way::new("hybrid", 2));
    assert_eq!(last_choice(&trip.report()), "postcopy");
    trip.ends_well(lab);
}

/// A migration in the middle of round `round`, which takes longer than the test.
fn in_a_round(trip: &mut Trip, way: Way, round: u64) {
    choose(&mut trip.source, way);
    let bandwidth = if round == 1 { 1 << 20 } else { 0 };
    set(&mut trip.source, json!({ "max-bandwidth": bandwidth, "downtime-limit": 0, "x-switchover-blackout": 0 }));
    set(&mut trip.source, json!({ "x-switchover-max-rounds": 1_000_000_000 }));
    begin_rounds(&mut trip.source, &trip.to, round);
}

#[test]
fn the_controller_hands_off_in_the_middle_of_the_rounds() {
    // In the first, when most of memory is not there, and in a later one; over one lane and over several.
    for (channels, round) in [(1, 1), (3, 1), (1, 5), (3, 20)] {
        let lab = lab!("the_controller_hands_off_in_the_middle_of_the_rounds");
        let mut trip = trip(&lab, "random", BUSY, Transport::Tcp);
        let way = Way::new("precopy", channels);
        in_a_round(&mut trip, way, round);
        let refusal = trip.source.refuses("migrate-start-postcopy", json!({}));
        assert!(refusal.contains("Enable postcopy"), "{refusal}");
        trip.source.execute("migrate_cancel", json!({}));
        trip.source.wait_migration("cancelled");
        trip.stays(&lab);
        choose(&mut trip.source, way);
        switch(&mut trip.source, "postcopy-ram", true);
        begin_rounds(&mut trip.source, &trip.to, round);
        trip.source.execute("migrate-start-postcopy", json!({}));
        let ended = trip.source.wait_migration("completed");
        assert!(ended["ram"]["dirty-sync-count"].as_u64() >= Some(round), "{ended:#}");
        trip.ends_well(lab);
    }
}

#[test]
fn a_migration_called_off_in_its_rounds_leaves_a_guest_that_can_be_moved() {
    let lab = lab!("a_migration_called_off_in_its_rounds_leaves_a_guest_that_can_be_moved");
    let mut trip = trip(&lab, "random", BUSY, Transport::Tcp);
    for (mode, channels, round) in [("precopy", 1, 1), ("hybrid", 3, 1), ("precopy", 2, 4)] {
        in_a_round(&mut trip, Way::new(mode, channels), round);
        trip.source.execute("migrate_cancel", json!({}));
        trip.source.wait_migration("cancelled");
        let said = trip.there.stderr();
        trip.stays(&lab);
        assert!(said.text().contains("cancelled on the source"), "{}", said.text());
    }
    set(&mut trip.source, json!({ "max-bandwidth": 0, "x-switchover-max-rounds": 3 }));
    migrate_as(&mut trip.source, &mut trip.there, &trip.to, Way::new("hybrid", 2));
    trip.ends_well(lab);
}

#[test]
fn a_guest_is_held_before_the_switchover() {
    for (mode, append) in [("precopy", "ws=4M period=50 pace=100000"), ("hybrid", BUSY)] {
        let lab = lab!("a_guest_is_held_before_the_switchover");
        let mut trip = trip(&lab, "random", append, Transport::Tcp);
        switch(&mut trip.source, "pause-before-switchover", true);
        // What decides here is the guest, not how busy the host is.
        set(&mut trip.source, json!({ "downtime-limit": 10_000, "x-switchover-time-budget": 5_000 }));
        choose(&mut trip.source, Way::new(mode, 2));
        trip.source.execute("migrate", json!({ "uri": trip.to }));
        trip.source.wait_migration("pre-switchover");
        assert_ne!(trip.source.run_state(), "running");
        assert!(trip.there.serial().is_empty(), "{mode}: nobody runs now");
        let printed = trip.source.serial().len();
        let refusal = trip.source.refuses("migrate-continue", json!({ "state": "device" }));
        assert!(refusal.contains("not in expected state"), "{refusal}");
        // Called back, it runs on, and is moved after all.
        trip.source.execute("migrate_cancel", json!({}));
        trip.source.wait_migration("cancelled");
        trip.stays(&lab);
        assert!(trip.source.serial().len() > printed);
        trip.source.execute("migrate", json!({ "uri": trip.to }));
        trip.source.wait_migration("pre-switchover");
        trip.source.execute("migrate-continue", json!({ "state": "pre-switchover" }));
        trip.source.wait_migration("completed");
        trip.ends_well(lab);
    }
}

#[test]
fn bandwidth_and_limits_are_changed_while_it_runs() {
    let lab = lab!("bandwidth_and_limits_are_changed_while_it_runs");
    let mut trip = trip(&lab, "random", "ws=16M period=50 pace=100000", Transport::Tcp);
    choose(&mut trip.source, Way::new("precopy", 2));
    // The first round alone would take longer than anyone waits.
    set(&mut trip.source, json!({ "max-bandwidth": 100_000, "downtime-limit": 0 }));
    begin_rounds(&mut trip.source, &trip.to, 1);
    let sent =
        |trip: &mut Trip| trip.source.execute("query-migrate", json!({}))["ram"]["precopy-bytes"].as_u64().unwrap();
    until("something was sent", || (sent(&mut trip) > 0).then_some(()));
    assert_eq!(trip.source.execute("query-migrate", json!({}))["ram"]["dirty-sync-count"], json!(1));
    let refusal = trip.source.refuses("migrate-set-parameters", json!({ "x-switchover-mode": "hybrid" }));
    assert!(refusal.contains("while a migration is under way"), "{refusal}");
    set(&mut trip.source, json!({ "max-bandwidth": 0 }));
    until("rounds go on at full speed", || {
        let look = trip.source.execute("query-migrate", json!({}));
        assert_eq!(look["status"], json!("active"), "{look:#}");
        (look["ram"]["dirty-sync-count"].as_u64() > Some(3)).then_some(())
    });
    // No round can end it by itself: the limit is none. With another one, the next does.
    set(&mut trip.source, json!({ "downtime-limit": 10_000 }));
    trip.source.wait_migration("completed");
    trip.ends_well(lab);
}
