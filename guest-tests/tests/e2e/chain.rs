//! Many migrations in a row: the destination of one is the source of the next.

use std::thread;
use std::time::{Duration, Instant};

use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::machine::{Holdings, Machine, Spec};
use switchover_guest_tests::moving::{Transport, Way, begin, destination, migrate_as, set};
use switchover_guest_tests::waiting::PATIENCE;

use crate::lab;

/// Length of the chain, unless `SWITCHOVER_CHAIN` says otherwise.
const MIGRATIONS: usize = 6;

/// Post-copy, and nothing else.
const POSTCOPY: [Way; 1] = [Way::new("postcopy", 1)];
/// Every mode with every number of lanes, and every mode behind every other.
const ALL_WAYS: [Way; 9] = [
    Way::new("hybrid", 2),
    Way::new("precopy", 1),
    Way::new("postcopy", 2),
    Way::new("hybrid", 3),
    Way::new("postcopy", 1),
    Way::new("precopy", 3),
    Way::new("hybrid", 1),
    Way::new("precopy", 2),
    Way::new("postcopy", 3),
];
/// Bytes that the guest works in, where it is to be slow enough for pre-copy to converge.
const CALM: &str = "ws=16M period=50 pace=100000";

fn chain(test: &str, vcpus: u8, transport: Transport) {
    chain_of(test, vcpus, transport, "ws=16M period=50", &POSTCOPY);
}

/// Each migration goes one of the `ways`, in turn.
fn chain_of(test: &str, vcpus: u8, transport: Transport, append: &str, ways: &[Way]) {
    let Some(lab) = switchover_guest_tests::lab::Lab::open(test) else { return };
    let migrations = std::env::var("SWITCHOVER_CHAIN").map_or(MIGRATIONS, |text| text.parse().unwrap());
    let spec = Spec { vcpus, ..lab.guest("random", &format!("{append} vcpus={vcpus}")) };
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let mut first_generation = None;
    for (number, way) in (1..=migrations).zip(ways.iter().cycle()) {
        let (mut there, to) = destination(&lab, &spec, transport);
        // A busy host must not make pre-copy give up.
        set(&mut source, serde_json::json!({ "downtime-limit": 10_000 }));
        migrate_as(&mut source, &mut there, &to, *way);
        source.quit();
        journey.goes_to(&there);
        let periods = journey.works_on(1);
        // The lanes' sockets stay for the report.
        let lanes = usize::from(way.channels);
        let limit = first_generation.map(|first: Holdings| Holdings { files: first.files + lanes, ..first });
        let now = settled(&there, limit);
        first_generation.get_or_insert(Holdings { files: now.files - lanes, ..now });
        if number.is_multiple_of(10) {
            println!("{number} migrations, {periods} periods, {now:?}");
        }
        source = there;
    }
    source.quit();
    journey.log();
    lab.close();
}

/// What a machine holds once what belonged to its migration has gone: no more than `limit`, where there is one.
fn settled(machine: &Machine, limit: Option<Holdings>) -> Holdings {
    let end = Instant::now() + PATIENCE;
    let mut last = machine.holdings();
    let mut same = 0;
    loop {
        let now = machine.holdings();
        // Threads may still be ending: without a limit, wait for a quiet quarter of a second.
        same = if now == last { same + 1 } else { 0 };
        last = now;
        match limit {
            Some(limit) if now.files <= limit.files && now.threads <= limit.threads => return now,
            None if same > 100 => return now,
            _ => {}
        }
        assert!(Instant::now() < end, "it holds {now:?}, more than {limit:?}; threads: {:?}", machine.thread_names());
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_chain_over_tcp() {
    chain("a_chain_over_tcp", 1, Transport::Tcp);
}

#[test]
fn a_chain_over_unix_sockets() {
    chain("a_chain_over_unix_sockets", 1, Transport::Unix);
}

#[test]
fn a_chain_with_two_vcpus_over_tcp() {
    chain("a_chain_with_two_vcpus_over_tcp", 2, Transport::Tcp);
}

#[test]
fn a_chain_with_two_vcpus_over_unix_sockets() {
    chain("a_chain_with_two_vcpus_over_unix_sockets", 2, Transport::Unix);
}

#[test]
fn a_chain_of_all_modes_over_tcp() {
    chain_of("a_chain_of_all_modes_over_tcp", 1, Transport::Tcp, CALM, &ALL_WAYS);
}

#[test]
fn a_chain_of_all_modes_with_two_vcpus_over_unix_sockets() {
    // From the other end, so that a short chain begins with the other half.
    let ways: Vec<_> = ALL_WAYS.into_iter().rev().collect();
    chain_of("a_chain_of_all_modes_with_two_vcpus_over_unix_sockets", 2, Transport::Unix, CALM, &ways);
}

#[test]
fn a_chain_of_hybrids_of_a_guest_that_never_rests() {
    let ways = [Way::new("hybrid", 1), Way::new("hybrid", 3), Way::new("hybrid", 2)];
    chain_of("a_chain_of_hybrids_of_a_guest_that_never_rests", 1, Transport::Tcp, "ws=16M period=50", &ways);
}

/// One process, many migrations that come to nothing: neither files nor threads gather in it.
#[test]
fn cancelling_again_and_again_leaves_nothing_behind() {
    let lab = lab!("cancelling_again_and_again_leaves_nothing_behind");
    let spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let mut after_the_first = None;
    for number in 0..8 {
        let (mut there, to) = destination(&lab, &spec, if number % 2 == 0 { Transport::Tcp } else { Transport::Unix });
        begin(&mut source, &to);
        source.execute("migrate_cancel", serde_json::json!({}));
        source.wait_migration("cancelled");
        assert_eq!(there.wait_end(), 1);
        // What the last one leaves for its report, and threads that serve all of them, are there once.
        let now = settled(&source, after_the_first);
        after_the_first.get_or_insert(now);
    }
    journey.works_on(1);
    source.quit();
    lab.close();
}
