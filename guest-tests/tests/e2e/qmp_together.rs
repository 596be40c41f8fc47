//! Several controllers at once, each of whom wants something else: one of them has its way, the others are told so.

use std::sync::Barrier;
use std::thread;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::machine::Machine;
use switchover_guest_tests::moving::{Transport, allow_postcopy, begin, destination, slow_down};
use switchover_guest_tests::waiting::until;
use switchover_tools::qmp_client::QmpError;

use crate::lab;

/// A guest whose memory takes long to follow where it is held back, since it asks for few pages.
const SLOW: &str = "ws=32M period=50 pace=2000000";
/// Bytes a second: the working set takes more than a minute.
const CRAWL: u64 = 400_000;

/// What became of commands that were sent at one moment, each by a client of its own, in their order: the refusals' reasons.
fn at_once(machine: &Machine, commands: &[(&str, Value)]) -> Vec<Result<Value, String>> {
    let barrier = &Barrier::new(commands.len());
    thread::scope(|scope| {
        let send = |(name, arguments): &(&str, Value)| {
            let (mut client, name, arguments) = (machine.client(), (*name).to_owned(), arguments.clone());
            scope.spawn(move || {
                barrier.wait();
                match client.execute(&name, arguments) {
                    Ok(value) => Ok(value),
                    Err(QmpError::Refused { desc, .. }) => Err(desc),
                    Err(other) => panic!("{name}: {other}"),
                }
            })
        };
        let sent: Vec<_> = commands.iter().map(send).collect();
        sent.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The one that was carried out, and why the others were not.
fn only_winner(answers: Vec<Result<Value, String>>) -> (usize, Vec<String>) {
    let won: Vec<_> = answers.iter().enumerate().filter(|(_, answer)| answer.is_ok()).map(|(index, _)| index).collect();
    assert_eq!(won.len(), 1, "{answers:?}");
    (won[0], answers.into_iter().filter_map(Result::err).collect())
}

/// Two machines in the middle of a post-copy that does not end soon, its link lost.
fn paused(lab: &Lab) -> (Machine, Machine, Journey, String) {
    let spec = lab.guest("random", SLOW);
    let mut source = Machine::start(lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (mut there, to) = destination(lab, &spec, Transport::Tcp);
    slow_down(&mut source, CRAWL);
    begin(&mut source, &to);
    source.execute("migrate-start-postcopy", json!({}));
    source.wait_migration("postcopy-active");
    there.wait_migration("postcopy-active");
    source.execute("migrate-pause", json!({}));
    source.wait_migration("postcopy-paused");
    there.wait_migration("postcopy-paused");
    (source, there, journey, to)
}

#[test]
fn of_many_who_migrate_one_does() {
    let lab = lab!("of_many_who_migrate_one_does");
    let spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let mut destinations: Vec<_> = (0..3).map(|_| destination(&lab, &spec, Transport::Tcp)).collect();
    allow_postcopy(&mut source);
    let commands: Vec<_> =
        destinations.iter().map(|(_, to)| ("migrate", json!({ "uri": to }))).cycle().take(8).collect();
    let (won, lost) = only_winner(at_once(&source, &commands));
    assert!(lost.iter().all(|reason| reason == "There's a migration process in progress"), "{lost:?}");
    source.execute("migrate-start-postcopy", json!({}));
    source.wait_migration("completed");
    let (mut there, _) = destinations.swap_remove(won % 3);
    there.wait_migration("completed");
    journey.ends_at(&mut source, &mut there, 1);
    // Nobody has come to the others.
    for (mut other, _) in destinations {
        assert_eq!(other.execute("query-migrate", json!({}))["status"], "setup");
        other.quit();
    }
    lab.close();
}

#[test]
fn a_cancel_and_a_handoff_at_once_leave_one_guest() {
    let lab = lab!("a_cancel_and_a_handoff_at_once_leave_one_guest");
    for round in 0..4 {
        let spec = lab.guest("random", "ws=8M period=50");
        let mut source = Machine::start(&lab, &spec);
        let mut journey = Journey::from(&source);
        journey.works_on(1);
        let (mut there, to) = destination(&lab, &spec, Transport::Unix);
        begin(&mut source, &to);
        let commands = [("migrate_cancel", json!({})), ("migrate-start-postcopy", json!({}))];
        let answers = at_once(&source, &commands);
        let status = until("the migration is over", || {
            let status = source.execute("query-migrate", json!({}))["status"].as_str().unwrap().to_owned();
            matches!(&*status, "completed" | "failed" | "cancelled").then_some(status)
        });
        println!("round {round}: {status} after {answers:?}");
        match &*status {
            "cancelled" => {
                assert!(answers[0].is_ok(), "{answers:?}");
                assert_eq!((&*source.run_state(), there.wait_end()), ("running", 1));
                journey.works_on(1);
                source.quit();
                assert!(there.serial().to_end().is_empty(), "the guest has run on both sides");
            }
            "completed" => {
                assert!(answers[1].is_ok(), "{answers:?}");
                there.wait_migration("completed");
                assert_eq!(source.run_state(), "postmigrate");
                source.quit();
                journey.goes_to(&there);
                journey.works_on(1);
                there.quit();
            }
            other => panic!("{other}"),
        }
        journey.log();
    }
    lab.close();
}

#[test]
fn of_many_who_resume_one_does() {
    let lab = lab!("of_many_who_resume_one_does");
    let (mut source, mut there, mut journey, to) = paused(&lab);
    source.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 }));
    let resume = ("migrate", json!({ "uri": to, "resume": true }));
    let (_, lost) = only_winner(at_once(&source, &vec![resume; 6]));
    for reason in lost {
        let told = ["Cannot resume if there is no paused migration", "another controller has it resumed"];
        assert!(told.iter().any(|part| reason.contains(part)), "{reason}");
    }
    source.wait_migration("completed");
    there.wait_migration("completed");
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

#[test]
fn a_guest_is_reclaimed_or_joined_again_and_never_both() {
    let lab = lab!("a_guest_is_reclaimed_or_joined_again_and_never_both");
    let (mut source, mut there, _, to) = paused(&lab);
    // It runs nowhere else from here on, and whoever tries to join it waits for an answer.
    there.signal(Signal::SIGSTOP);
    let commands = [("x-switchover-reclaim", json!({})), ("migrate", json!({ "uri": to, "resume": true }))];
    let (won, _) = only_winner(at_once(&source, &commands));
    there.kill();
    if won == 1 {
        // Nobody is there who could be joined: it is where it was, and can be reclaimed.
        source.wait_migration("postcopy-paused");
        source.execute("x-switchover-reclaim", json!({}));
    }
    source.wait_migration("failed");
    source.wait_run_state("running");
    assert!(source.refuses("x-switchover-reclaim", json!({})).contains("no guest to reclaim"));
    source.quit();
}

#[test]
fn who_asks_while_another_quits_is_answered_or_hung_up_on() {
    let lab = lab!("who_asks_while_another_quits_is_answered_or_hung_up_on");
    let mut machine = Machine::start(&lab, &lab.guest("idle", "ws=4M period=50"));
    let asked = Barrier::new(5);
    thread::scope(|scope| {
        for command in ["query-migrate", "query-status", "query-migrate-parameters", "stop"] {
            let (mut client, asked) = (machine.client(), &asked);
            scope.spawn(move || {
                client.execute(command, json!({})).unwrap();
                asked.wait();
                let end = loop {
                    match client.execute(command, json!({})) {
                        Ok(_) => {}
                        Err(end) => break end,
                    }
                };
                assert!(matches!(end, QmpError::Closed { .. }), "{command}: {end}");
            });
        }
        let mut client = machine.client();
        asked.wait();
        client.execute("quit", json!({})).unwrap();
    });
    assert_eq!(machine.wait_end(), 0);
    lab.close();
}
