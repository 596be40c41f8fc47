//! Machines are confined as long as they run, whatever they are doing: seen from outside, in what the kernel says of their threads.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, chown};
use serde_json::json;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, begin, destination, migrate, slow_down};
use switchover_guest_tests::waiting::until;
use switchover_guest_tests::watching::Watching;

use crate::lab;

/// What the kernel has to say of every thread of a machine.
const CONFINED: [&str; 7] = [
    "Seccomp:\t2",
    "NoNewPrivs:\t1",
    "CapInh:\t0000000000000000",
    "CapPrm:\t0000000000000000",
    "CapEff:\t0000000000000000",
    "CapBnd:\t0000000000000000",
    "CapAmb:\t0000000000000000",
];

/// The statuses of the threads of a process. One that ends meanwhile has none.
fn statuses(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok()).collect()
}

/// Names of the threads that were seen; each was confined.
fn confined(pid: u32) -> BTreeSet<String> {
    let seen = statuses(pid);
    assert!(!seen.is_empty());
    // Bounds are no business of a user who has nothing to bound.
    let told = if Uid::effective().is_root() { &CONFINED[..] } else { &CONFINED[..5] };
    for status in &seen {
        for line in told {
            assert!(status.lines().any(|there| there == *line), "`{line}` is not in {status}");
        }
    }
    seen.iter().filter_map(|status| status.lines().next()?.strip_prefix("Name:\t").map(str::to_owned)).collect()
}

/// Looks again and again, for the names of all threads that are seen.
fn sampled(pid: u32) -> Watching<BTreeSet<String>> {
    Watching::from_now(confined(pid), Duration::from_millis(1), move |names| names.extend(confined(pid)))
}

/// Its child, which makes rings for it.
fn ring_maker(machine: &Machine) -> Pid {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", machine.pid())).unwrap();
    Pid::from_raw(children.trim().parse().unwrap())
}

#[test]
fn every_thread_is_confined_throughout_a_migration() {
    let lab = lab!("every_thread_is_confined_throughout_a_migration");
    let spec = lab.guest("random", "ws=16M period=50 pace=500000");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let samplers = [source.pid(), there.pid()].map(sampled);
    slow_down(&mut source, 8_000_000);
    begin(&mut source, &to);
    source.execute("migrate-start-postcopy", json!({}));
    there.wait_migration("postcopy-active");
    // Both while pages are missing: the threads that bring them are there.
    let during = [source.pid(), there.pid()].map(confined);
    slow_down(&mut source, 0);
    source.wait_migration("completed");
    there.wait_migration("completed");
    let [at_source, at_destination] = samplers.map(Watching::end);
    let [at_source, at_destination] =
        [(at_source, &during[0]), (at_destination, &during[1])].map(|(seen, during)| &seen | during);
    for names in [&at_source, &at_destination] {
        assert!(names.contains("vcpu0"), "{names:?}");
        assert!(names.len() > 4, "the threads of a migration are not among {names:?}");
    }
    for machine in [&source, &there] {
        let maker = fs::read_to_string(format!("/proc/{}/status", ring_maker(machine))).unwrap();
        assert!(maker.contains("Seccomp:\t2") && maker.contains("CapEff:\t0000000000000000"), "{maker}");
    }
    journey.ends_at(&mut source, &mut there, 2);
    lab.close();
}

#[test]
fn a_machine_without_a_filter_says_so_to_the_kernel() {
    let lab = lab!("a_machine_without_a_filter_says_so_to_the_kernel");
    let mut spec = lab.guest("sequential", "ws=8M period=50");
    spec.more = vec!["--seccomp".to_owned(), "off".to_owned()];
    let mut machine = Machine::start(&lab, &spec);
    for status in statuses(machine.pid()) {
        assert!(status.contains("Seccomp:\t0") && status.contains("NoNewPrivs:\t1"), "{status}");
    }
    machine.quit();
    lab.close();
}

#[test]
fn a_guest_moves_between_machines_of_a_user_who_may_nothing() {
    const NOBODY: u32 = 65_534;
    let lab = lab!("a_guest_moves_between_machines_of_a_user_who_may_nothing");
    if !Uid::effective().is_root() {
        println!("SKIP a_guest_moves_between_machines_of_a_user_who_may_nothing: --user needs root");
        return;
    }
    // The sockets' folder is that user's.
    chown(&lab.path(""), Some(Uid::from_raw(NOBODY)), Some(Gid::from_raw(NOBODY))).unwrap();
    let mut spec = lab.guest("random", "ws=16M period=50");
    spec.more = vec!["--user".to_owned(), format!("{NOBODY}:{NOBODY}")];
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (mut there, to) = destination(&lab, &spec, Transport::Unix);
    migrate(&mut source, &mut there, &to);
    for machine in [&source, &there] {
        assert!(statuses(machine.pid()).iter().all(|status| status.contains("Uid:\t65534\t65534\t65534\t65534")));
    }
    journey.ends_at(&mut source, &mut there, 2);
    lab.close();
}

#[test]
fn a_source_that_can_have_no_rings_keeps_its_guest() {
    let lab = lab!("a_source_that_can_have_no_rings_keeps_its_guest");
    let spec = lab.guest("sequential", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    kill(ring_maker(&source), Signal::SIGKILL).unwrap();
    source.execute("migrate", json!({ "uri": to }));
    let failed = source.wait_migration("failed");
    let reason = failed["error-desc"].as_str().unwrap();
    assert!(reason.contains("the process that makes rings for this one does not answer"), "{reason}");
    journey.works_on(2);
    source.quit();
    // Its first control lane was there, and has gone.
    assert_eq!(there.wait_end(), 1);
    lab.close();
}

#[test]
fn what_makes_rings_ends_with_its_machine() {
    let lab = lab!("what_makes_rings_ends_with_its_machine");
    let spec = lab.guest("sequential", "ws=8M period=50");
    let gone = |maker: Pid| {
        until("the process that makes rings is gone", || {
            let stat = fs::read_to_string(format!("/proc/{maker}/stat"));
            stat.map_or(true, |stat| !stat.contains("(ring maker)") || stat.contains(") Z")).then_some(())
        });
    };
    let mut quitted = Machine::start(&lab, &spec);
    let maker = ring_maker(&quitted);
    quitted.quit();
    gone(maker);
    let mut killed = Machine::start(&lab, &Spec { kernel: None, incoming: Some("defer".to_owned()), ..spec });
    let maker = ring_maker(&killed);
    killed.kill();
    gone(maker);
    let _ = fs::remove_file(killed.qmp_path());
    lab.close();
}
