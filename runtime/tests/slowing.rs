//! A guest on real KVM is slowed down for a migration, and never at the cost of a pause.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking; its helpers are tests too")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{COUNTER, COUNTING, Guest, SECOND_COUNTER, SWEEPING, SWEPT, kvm, starting_another, until, word};
use switchover_hybrid::machine::Machine;
use switchover_runtime::config::{DirtyTracking, VmConfig};
use switchover_runtime::error::VmError;
use switchover_runtime::run_state::RunState;
use switchover_runtime::vm::Vm;
use switchover_wire::clock::Nanos;
use switchover_wire::types::{PageCount, PageIndex};

fn counting(vcpus: u8) -> Arc<Vm> {
    let code = if vcpus == 1 { COUNTING.to_vec() } else { starting_another() };
    let vm = Guest::new(&code).boot(vcpus);
    vm.cont().unwrap();
    until("the guest counts", || word(&vm, COUNTER) > 0 && (vcpus == 1 || word(&vm, SECOND_COUNTER) > 0));
    vm
}

/// Waits until every vCPU has been kept out `more` times more.
fn until_held(vm: &Vm, more: u64) {
    let then = vm.holds();
    until("vCPUs are kept out", || vm.holds().iter().zip(&then).all(|(now, then)| now - then >= more));
}

#[test]
fn a_throttled_guest_goes_on_turn_by_turn_until_that_ends() {
    if !kvm("a_throttled_guest_goes_on_turn_by_turn_until_that_ends") {
        return;
    }
    let vm = counting(2);
    assert_eq!(vm.holds(), [0, 0]);
    vm.throttle(50);
    for _ in 0..5 {
        let then = [COUNTER, SECOND_COUNTER].map(|counter| word(&vm, counter));
        until_held(&vm, 2);
        until("both go on", || word(&vm, COUNTER) != then[0] && word(&vm, SECOND_COUNTER) != then[1]);
    }
    assert_eq!(vm.run_state(), RunState::Running);
    vm.throttle(0);
    let held = vm.holds();
    let then = word(&vm, COUNTER);
    until("it goes on", || word(&vm, COUNTER).wrapping_sub(then) > 20_000);
    assert_eq!(vm.holds(), held, "kept out after the throttle's end");
}

#[test]
fn a_throttle_takes_its_share() {
    if !kvm("a_throttle_takes_its_share") {
        return;
    }
    // Each by the guest's own progress in as many turns: whatever else runs on this host, it runs through both.
    let vm = counting(1);
    let progress = |percent: u8| {
        vm.throttle(percent);
        until_held(&vm, 1);
        let (start, then) = (Instant::now(), word(&vm, COUNTER));
        until_held(&vm, 10);
        f64::from(word(&vm, COUNTER).wrapping_sub(then)) / start.elapsed().as_secs_f64()
    };
    let (little, much) = (progress(5), progress(90));
    println!("{little:.0} counts a second at 5 %, {much:.0} at 90 %");
    assert!(much < little / 2.0, "a tenth of the time gave more than half the progress");
}

#[test]
fn a_pause_finds_a_throttled_guest_out_already_and_ends_the_throttle() {
    if !kvm("a_pause_finds_a_throttled_guest_out_already_and_ends_the_throttle") {
        return;
    }
    let vm = counting(1);
    let found_out = (0..5).any(|_| {
        // A rest of most of a second.
        vm.throttle(99);
        until_held(&vm, 1);
        let then = word(&vm, COUNTER);
        until("it has left", || {
            std::thread::sleep(Duration::from_millis(1));
            let now = word(&vm, COUNTER);
            std::thread::sleep(Duration::from_millis(1));
            now == word(&vm, COUNTER)
        });
        let before = Nanos::now();
        let paused = vm.pause().unwrap();
        assert!(paused.was_running);
        let then = word(&vm, COUNTER).max(then);
        let resumed = Instant::now();
        vm.resume().unwrap();
        until("it goes on", || word(&vm, COUNTER).wrapping_sub(then) > 1000);
        // Had the pause waited for the rest's end, the vCPU would have left the guest once more, later.
        paused.last_exit < before && resumed.elapsed() < Duration::from_millis(500)
    });
    assert!(found_out, "a pause waits for a rest to end, or the rest goes on after it");

    vm.throttle(50);
    until_held(&vm, 2);
    vm.pause().unwrap();
    vm.resume().unwrap();
    let (held, then) = (vm.holds(), word(&vm, COUNTER));
    until("it goes on for some slices", || word(&vm, COUNTER).wrapping_sub(then) > 20_000);
    assert_eq!(vm.holds(), held, "the throttle outlasts the pause");
}

#[test]
fn whatever_ends_a_throttle_ends_a_rest() {
    if !kvm("whatever_ends_a_throttle_ends_a_rest") {
        return;
    }
    let vm = counting(1);
    let ended_at_once = (0..5).any(|_| {
        vm.throttle(99);
        until_held(&vm, 1);
        vm.stop().unwrap();
        let (then, start) = (word(&vm, COUNTER), Instant::now());
        vm.cont().unwrap();
        until("it goes on", || word(&vm, COUNTER).wrapping_sub(then) > 100);
        vm.throttle(0);
        start.elapsed() < Duration::from_millis(500)
    });
    assert!(ended_at_once, "a rest of a second goes on after the guest was stopped");
    let ended_at_once = (0..5).any(|_| {
        vm.throttle(99);
        until_held(&vm, 1);
        let (then, start) = (word(&vm, COUNTER), Instant::now());
        vm.throttle(0);
        until("it goes on", || word(&vm, COUNTER).wrapping_sub(then) > 2000);
        start.elapsed() < Duration::from_millis(500)
    });
    assert!(ended_at_once, "a rest of a second goes on after the throttle's end");
    vm.throttle(99);
    until_held(&vm, 1);
    let start = Instant::now();
    vm.quit();
    drop(vm);
    println!("quit and dropped in {:?}", start.elapsed());
}

#[test]
fn without_rings_no_vcpu_can_be_limited() {
    if !kvm("without_rings_no_vcpu_can_be_limited") {
        return;
    }
    let guest = Guest::new(COUNTING);
    let vm = Vm::boot(&VmConfig { dirty_tracking: DirtyTracking::Log, ..guest.config(1) }).unwrap();
    let error = vm.limit_dirty_rate(Some(1 << 20)).unwrap_err();
    assert!(error.to_string().contains("--dirty-tracking ring"), "{error}");
    vm.limit_dirty_rate(None).unwrap();
    assert_eq!(vm.dirty_rates(), None);
}

#[test]
fn a_limited_vcpu_writes_no_more_than_it_may() {
    const TEST: &str = "a_limited_vcpu_writes_no_more_than_it_may";
    const RATE: u64 = 64 << 20;
    if !kvm(TEST) {
        return;
    }
    let guest = Guest::new(SWEEPING);
    let pages = PageCount(SWEPT.end);
    let vm = match Vm::boot(&VmConfig { memory: pages, dirty_tracking: DirtyTracking::Ring, ..guest.config(1) }) {
        Err(VmError::Lacking { what }) => return println!("SKIP {TEST}: this host's KVM lacks {what}"),
        vm => vm.unwrap(),
    };
    assert!(vm.limit_dirty_rate(Some(RATE)).is_err(), "the log has not been started");
    let log = vm.dirty_log();
    log.start().unwrap();
    log.rearm(PageIndex(0), &vec![u64::MAX; usize::try_from(pages.0 / 64).unwrap()]).unwrap();
    vm.cont().unwrap();
    until("it writes", || word(&vm, u32::try_from(SWEPT.start * 4096).unwrap()) > 0);
    let free = {
        until("there is a rate", || vm.dirty_rates().unwrap()[0] > 0);
        vm.dirty_rates().unwrap()[0]
    };

    // Each page that it reaches is new to the log: its place says what it wrote.
    let reached =
        || (SWEPT.start..SWEPT.end).take_while(|page| word(&vm, u32::try_from(page * 4096).unwrap()) > 0).count();
    vm.limit_dirty_rate(Some(RATE)).unwrap();
    until_held(&vm, 1);
    let (start, then) = (Instant::now(), reached());
    until_held(&vm, 5);
    // In this order: a test that is late gives the guest more time than it says, never less.
    let wrote = PageCount((reached() - then) as u64).bytes();
    let seconds = start.elapsed().as_secs_f64();
    println!("{free} bytes a second without limit; {wrote} in {seconds} s with {RATE}");
    // What a slice lets through before it is counted is made good for later: twice the rate leaves ample room.
    assert!((wrote as f64) < 2.0 * RATE as f64 * (seconds + 0.2), "the limit does not hold");

    vm.limit_dirty_rate(None).unwrap();
    let held = vm.holds();
    let last = u32::try_from((SWEPT.end - 1) * 4096).unwrap();
    until("it sweeps its memory", || word(&vm, last) > 0);
    assert_eq!(vm.holds(), held);
}
