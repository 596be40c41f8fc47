//! Many migrations in a row: the destination of one is the source of the next.

use std::thread;
use std::time::{Duration, Instant};

use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::machine::{Holdings, Machine, Spec};
use switchover_guest_tests::moving::{Transport, begin, destination, migrate};
use switchover_guest_tests::waiting::PATIENCE;

use crate::lab;

/// Length of the chain, unless `SWITCHOVER_CHAIN` says otherwise.
const MIGRATIONS: usize = 6;

fn chain(test: &str, vcpus: u8, transport: Transport) {
    let Some(lab) = switchover_guest_tests::lab::Lab::open(test) else { return };
    let migrations = std::env::var("SWITCHOVER_CHAIN").map_or(MIGRATIONS, |text| text.parse().unwrap());
    let spec = Spec { vcpus, ..lab.guest("random", &format!("ws=16M period=50 vcpus={vcpus}")) };
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let mut first_generation = None;
    for number in 1..=migrations {
        let (mut there, to) = destination(&lab, &spec, transport);
        migrate(&mut source, &mut there, &to);
        source.quit();
        journey.goes_to(&there);
        let periods = journey.works_on(1);
        let now = settled(&there, first_generation);
        first_generation.get_or_insert(now);
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
