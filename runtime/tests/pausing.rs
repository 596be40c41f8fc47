//! A guest is paused and resumed on real KVM without losing or repeating anything.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking; its helpers are tests too")]

mod common;

use std::time::{Duration, Instant};

use common::{COUNTER, COUNTING, Guest, SECOND_COUNTER, kvm, starting_another, until, word};
use switchover_hybrid::machine::Machine;
use switchover_runtime::control::VmEvent;
use switchover_runtime::run_state::{ExitReason, RunState};
use switchover_runtime::vm::Vm;
use switchover_wire::clock::Nanos;

fn median(mut spans: Vec<u64>) -> (u64, u64) {
    spans.sort_unstable();
    (spans[spans.len() / 2], spans[spans.len() - 1])
}

/// Pauses and resumes `times`; every so often waits until all counters have moved.
fn pause_often(vm: &Vm, counters: &[u32], times: u32) {
    let (mut pauses, mut entries) = (Vec::new(), Vec::new());
    let mut last_exit = Nanos(0);
    for round in 0..times {
        let start = Nanos::now();
        let paused = vm.pause().unwrap();
        pauses.push(Nanos::now().since(start));
        assert!(paused.was_running);
        // Earlier than the request where the vCPU had not entered again since the pause before.
        assert!(paused.last_exit >= last_exit && paused.last_exit <= Nanos::now());
        last_exit = paused.last_exit;
        assert_eq!(vm.run_state(), RunState::FinishMigrate);
        let before: Vec<u32> = counters.iter().map(|counter| word(vm, *counter)).collect();
        if round % 100 == 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(
            before,
            counters.iter().map(|counter| word(vm, *counter)).collect::<Vec<_>>(),
            "a paused guest wrote"
        );
        let resumed = Nanos::now();
        vm.resume().unwrap();
        // Most pauses find the guest running, at all sorts of instructions; some find a vCPU that has not entered yet.
        if round % 10 != 0 {
            until("a vCPU enters", || vm.first_entry().is_some());
            let entry = vm.first_entry().unwrap();
            assert!(entry >= resumed && entry <= Nanos::now());
            entries.push(entry.since(resumed));
        }
        if round % 10 == 1 {
            until("all vCPUs go on", || {
                counters.iter().zip(&before).all(|(counter, then)| word(vm, *counter) != *then)
            });
        }
    }
    let (pause, worst_pause) = median(pauses);
    let (entry, worst_entry) = median(entries);
    println!("{} vCPUs, {times} pauses: median {pause} ns, worst {worst_pause} ns", counters.len());
    println!("resume to first entry: median {entry} ns, worst {worst_entry} ns");
}

#[test]
fn no_port_access_is_lost_or_repeated_by_a_pause() {
    if !kvm("no_port_access_is_lost_or_repeated_by_a_pause") {
        return;
    }
    let vm = Guest::new(COUNTING).boot(1);
    vm.cont().unwrap();
    until("the guest counts", || word(&vm, COUNTER) > 0);
    pause_often(&vm, &[COUNTER], 5000);
    assert_eq!(vm.run_state(), RunState::Running);
}

#[test]
fn two_vcpus_pause_together() {
    if !kvm("two_vcpus_pause_together") {
        return;
    }
    let vm = Guest::new(&starting_another()).boot(2);
    vm.cont().unwrap();
    until("both vCPUs count", || word(&vm, COUNTER) > 0 && word(&vm, SECOND_COUNTER) > 0);
    pause_often(&vm, &[COUNTER, SECOND_COUNTER], 2000);
    assert_eq!(vm.run_state(), RunState::Running);
}

#[test]
fn a_vcpu_that_waits_for_an_interrupt_pauses_too() {
    if !kvm("a_vcpu_that_waits_for_an_interrupt_pauses_too") {
        return;
    }
    // hlt
    let vm = Guest::new(&[0xf4]).boot(1);
    vm.cont().unwrap();
    for _ in 0..200 {
        vm.pause().unwrap();
        vm.resume().unwrap();
    }
    assert_eq!(vm.run_state(), RunState::Running);
}

#[test]
fn the_user_stops_and_starts_and_is_told() {
    if !kvm("the_user_stops_and_starts_and_is_told") {
        return;
    }
    let vm = Guest::new(COUNTING).boot(1);
    let events = vm.events();
    vm.cont().unwrap();
    until("the guest counts", || word(&vm, COUNTER) > 0);
    for _ in 0..100 {
        vm.stop().unwrap();
        vm.stop().unwrap();
        assert_eq!(vm.run_state(), RunState::Paused);
        // A migration's pause finds it paused, and its resume leaves it so.
        assert!(!vm.pause().unwrap().was_running);
        let then = word(&vm, COUNTER);
        assert!(vm.cont().is_err() && vm.stop().is_err(), "during a handoff");
        vm.resume().unwrap();
        assert_eq!(vm.run_state(), RunState::Paused);
        assert_eq!(word(&vm, COUNTER), then);
        vm.cont().unwrap();
        until("the guest goes on", || word(&vm, COUNTER) != then);
    }
    let told: Vec<_> = events.try_iter().collect();
    let expected: Vec<_> = [VmEvent::Resume, VmEvent::Stop].into_iter().cycle().take(201).collect();
    assert_eq!(told, expected);
}

#[test]
fn stop_and_cont_in_quick_succession_leave_it_running() {
    if !kvm("stop_and_cont_in_quick_succession_leave_it_running") {
        return;
    }
    let vm = Guest::new(&starting_another()).boot(2);
    vm.cont().unwrap();
    for _ in 0..5000 {
        vm.stop().unwrap();
        vm.cont().unwrap();
    }
    let then = word(&vm, COUNTER);
    until("the guest goes on", || word(&vm, COUNTER) > then && word(&vm, SECOND_COUNTER) > 0);
}

#[test]
fn what_ends_a_machine_is_told_once_and_lasts() {
    if !kvm("what_ends_a_machine_is_told_once_and_lasts") {
        return;
    }
    let vm = Guest::new(COUNTING).boot(1);
    vm.cont().unwrap();
    vm.stop_for_good("the memory is incomplete");
    assert_eq!(vm.run_state(), RunState::InternalError);
    assert_eq!(vm.status_reason().as_deref(), Some("the memory is incomplete"));
    assert!(vm.cont().unwrap_err().to_string().contains("the memory is incomplete"));
    assert!(vm.pause().is_err());
    vm.quit();
    vm.fail("too late".to_owned());
    assert_eq!(vm.wait_exit(), ExitReason::Quit);

    let vm = Guest::new(COUNTING).boot(1);
    vm.fail("no guest came".to_owned());
    assert_eq!(vm.wait_exit(), ExitReason::Failed("no guest came".to_owned()));
}

#[test]
fn an_instruction_that_cannot_be_emulated_stops_the_guest_with_its_address() {
    if !kvm("an_instruction_that_cannot_be_emulated_stops_the_guest_with_its_address") {
        return;
    }
    // Jumps to where there is no memory: mov eax, 0xd0000000; jmp eax.
    let vm = Guest::new(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]).boot(1);
    vm.cont().unwrap();
    let start = Instant::now();
    until("it stops", || vm.run_state() == RunState::InternalError || start.elapsed() > Duration::from_secs(5));
    let reason = vm.status_reason().unwrap();
    println!("{reason}");
    assert!(reason.contains("vCPU 0") && reason.contains("RIP 0xd0000000"), "{reason}");
}

/// Threads and file descriptors of this process.
fn belongings() -> (usize, usize) {
    let count = |of: &str| std::fs::read_dir(of).unwrap().count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

#[test]
fn a_dropped_machine_leaves_nothing_behind() {
    if !kvm("a_dropped_machine_leaves_nothing_behind") {
        return;
    }
    let guest = Guest::new(&starting_another());
    let once = || {
        let vm = guest.boot(2);
        vm.cont().unwrap();
        until("the guest counts", || word(&vm, COUNTER) > 0);
        drop(vm);
        drop(Vm::incoming(&guest.config(2)).unwrap());
    };
    // The first one has the process load and install what stays.
    once();
    let before = belongings();
    for _ in 0..25 {
        once();
    }
    assert_eq!(belongings(), before);
}
