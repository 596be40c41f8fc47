//! `switchover migrate` and `run` on the command line: what they say and how they end.

use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::{Ended, Lab, switchover};
use switchover_guest_tests::machine::Machine;
use switchover_guest_tests::moving::{Transport, destination};

use crate::lab;

#[test]
fn the_command_moves_a_guest_and_sums_up() {
    let lab = lab!("the_command_moves_a_guest_and_sums_up");
    let spec = lab.guest("hotset", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let Ended { status, stdout, stderr } =
        switchover(&["migrate", "--qmp", &source.qmp_endpoint(), "--to", &to, "--mode", "postcopy"]);
    assert_eq!((status, stderr.as_str()), (Some(0), ""), "{stdout}");
    for line in ["moved in ", "blackout ", "on the wire ", "pages "] {
        assert!(stdout.lines().any(|found| found.starts_with(line)), "no line `{line}` in\n{stdout}");
    }
    assert_eq!(source.run_state(), "postmigrate");
    journey.ends_at(&mut source, &mut there, 2);
    lab.close();
}

#[test]
fn a_guest_that_writes_faster_than_the_link_stays_by_precopy_and_moves_by_hybrid() {
    let lab = lab!("a_guest_that_writes_faster_than_the_link_stays_by_precopy_and_moves_by_hybrid");
    let spec = lab.guest("random", "ws=16M period=50");
    let mut source = Machine::start(&lab, &spec);
    let (mut left, to) = destination(&lab, &spec, Transport::Tcp);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let qmp = source.qmp_endpoint();
    let slowly = ["--max-bandwidth", "8M", "--downtime-limit", "1", "--blackout", "1", "--time-budget", "2"];
    let migrate = |mode: &str, to: &str| {
        let arguments = [&["migrate", "--qmp", &qmp, "--to", to, "--mode", mode][..], &slowly].concat();
        switchover(&arguments)
    };
    let ended = migrate("precopy", &to);
    assert_eq!((ended.status, ended.stdout.as_str()), (Some(1), ""), "{}", ended.stderr);
    for part in ["give up in round", "the guest runs on where it was", "--mode hybrid"] {
        assert!(ended.stderr.contains(part), "`{part}` is not in {}", ended.stderr);
    }
    assert_eq!(source.run_state(), "running");
    assert_eq!(left.wait_end(), 1);
    journey.works_on(2);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let ended = migrate("hybrid", &to);
    assert_eq!((ended.status, ended.stderr.as_str()), (Some(0), ""), "{}", ended.stdout);
    for line in ["moved in ", "rounds ", "decision     post-copy in round ", "blackout "] {
        assert!(ended.stdout.lines().any(|found| found.starts_with(line)), "no line `{line}` in\n{}", ended.stdout);
    }
    journey.ends_at(&mut source, &mut there, 2);
    lab.close();
}

#[test]
fn a_guest_that_hardly_writes_moves_by_precopy_on_several_channels() {
    let lab = lab!("a_guest_that_hardly_writes_moves_by_precopy_on_several_channels");
    let spec = lab.guest("idle", "ws=16M period=50");
    let mut source = Machine::start(&lab, &spec);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let qmp = source.qmp_endpoint();
    let ended = switchover(&["migrate", "--qmp", &qmp, "--to", &to, "--mode", "precopy", "--channels", "3"]);
    assert_eq!((ended.status, ended.stderr.as_str()), (Some(0), ""), "{}", ended.stdout);
    assert!(ended.stdout.contains("decision     stop and copy in round "), "{}", ended.stdout);
    let report = source.execute("x-switchover-report", serde_json::json!({}));
    let bulk = |lane: &&serde_json::Value| lane["lane"].as_str().is_some_and(|name| name.starts_with("bulk"));
    assert_eq!(report["lanes"].as_array().unwrap().iter().filter(bulk).count(), 3);
    journey.ends_at(&mut source, &mut there, 2);
    lab.close();
}

#[test]
fn a_wrong_port_fails_with_a_next_step_and_the_guest_runs_on() {
    let lab = lab!("a_wrong_port_fails_with_a_next_step_and_the_guest_runs_on");
    let mut source = Machine::start(&lab, &lab.guest("random", "ws=8M period=50"));
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    // A port that was free a moment ago, and a socket that was never there.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for to in [format!("tcp:{free}"), format!("unix:{}", lab.path("nobody").display())] {
        let ended = switchover(&["migrate", "--qmp", &source.qmp_endpoint(), "--to", &to]);
        assert_eq!((ended.status, ended.stdout.as_str()), (Some(1), ""), "{}", ended.stderr);
        assert!(ended.stderr.contains(&to) && ended.stderr.contains("is "), "no next step: {}", ended.stderr);
        assert_eq!(source.run_state(), "running");
        assert_eq!(source.wait_migration("failed")["status"], "failed");
        journey.works_on(1);
    }
    // Nothing happened to it: it can be moved to where someone listens.
    let (mut there, to) = destination(&lab, &lab.guest("random", ""), Transport::Unix);
    let ended = switchover(&["migrate", "--qmp", &source.qmp_endpoint(), "--to", &to]);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    source.quit();
    journey.goes_to(&there);
    journey.works_on(1);
    there.quit();
    lab.close();
}

#[test]
fn without_a_machine_the_command_says_where_it_looked() {
    let lab = Lab::without_kvm();
    let qmp = format!("unix:{}", lab.path("nobody").display());
    let ended = switchover(&["migrate", "--qmp", &qmp, "--to", "tcp:127.0.0.1:1"]);
    assert_eq!(ended.status, Some(1));
    assert!(ended.stderr.contains("nobody") && ended.stderr.contains("--qmp"), "{}", ended.stderr);
}

#[test]
fn bad_usage_ends_with_2_and_says_why() {
    for (arguments, part) in [
        (&["migrate", "--qmp", "unix:/q", "--to", "tcp:h:1", "--mode", "magic"][..], "possible values"),
        (&["migrate", "--qmp", "unix:/q", "--to", "tcp:h:1", "--compression", "rar"], "possible values"),
        (&["migrate", "--qmp", "unix:/q", "--to", "tcp:h:1", "--max-bandwidth", "fast"], "write for example"),
        (&["migrate", "--qmp", "unix:/q", "--to", "tcp:h:1", "--channels", "0"], "--channels"),
        (&["migrate", "--qmp", "unix:/q", "--to", "tcp:h:1", "--time-budget", "0"], "--time-budget"),
        (&["migrate", "--qmp", "unix:/q", "--to", "tcp:h:1", "--faster"], "--faster"),
        (&["migrate", "--qmp", "unix:/q"], "--to"),
        (&["migrate", "--qmp", "unix:/q", "--to", "h:1"], "write for example"),
        (&["migrate", "--qmp", "unix:/q", "--to", "tcp:h:70000"], "write for example"),
        (&["migrate", "--qmp", "/q", "--to", "tcp:h:1"], "unix:"),
        (&["run", "--kernel", "g", "--memory", "512"], "512M"),
        (&["run", "--kernel", "g", "--memory", "5K"], "4K"),
        (&["run", "--kernel", "g", "--memory", "lots"], "512M"),
        (&["run", "--kernel", "g", "--vcpus", "0"], "vcpus"),
        (&["run", "--kernel", "g", "--serial", "tape"], "stdio"),
        (&["run", "--incoming", "somewhere"], "write for example"),
        (&["run", "--incoming", "defer"], "--qmp"),
        (&["run"], "--kernel"),
        (&["fly"], "fly"),
        (&[], "Usage"),
    ] {
        let ended = switchover(arguments);
        assert_eq!((ended.status, ended.stdout.as_str()), (Some(2), ""), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(part), "{arguments:?}: `{part}` is not in {}", ended.stderr);
    }
}

#[test]
fn check_says_what_this_host_can_do() {
    let ended = switchover(&["check"]);
    let fine = ended.status == Some(0);
    assert!(fine || ended.status == Some(1), "{ended:?}");
    for name in ["kvm", "userfaultfd", "io_uring"] {
        assert!(ended.stdout.contains(name), "{}", ended.stdout);
    }
    let missing = |line: &str| line.starts_with("missing");
    assert_eq!(fine, !ended.stdout.lines().any(missing), "{}", ended.stdout);
}
