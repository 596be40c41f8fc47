//! A guest's state moves from one machine to another on real KVM, and the guest goes on.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking; its helpers are tests too")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use common::{COUNTER, COUNTING, Guest, SECOND_COUNTER, kvm, starting_another, until, word};
use switchover_hybrid::machine::Machine;
use switchover_runtime::run_state::RunState;
use switchover_runtime::vm::Vm;
use switchover_wire::clock::Nanos;
use switchover_wire::types::PageIndex;

/// Copies all of RAM, as a pager would: into the alias.
fn copy_memory(from: &Vm, to: &Vm) {
    let (from, to) = (from.ram(), to.ram());
    assert_eq!(from.len_bytes(), to.len_bytes());
    // SAFETY: two live mappings of that length; the source is paused and the destination has not run.
    unsafe { std::ptr::copy_nonoverlapping(from.guest_base(), to.alias_base(), from.len_bytes()) };
}

fn refusal<T: std::fmt::Debug>(result: Result<T, impl std::error::Error + 'static>) -> String {
    let error = result.unwrap_err();
    let source = error.source().map(ToString::to_string).unwrap_or_default();
    format!("{error} {source}")
}

fn move_on(source: &Arc<Vm>, guest: &Guest, vcpus: u8, spans: &mut Vec<[u64; 3]>) -> Arc<Vm> {
    let destination = Vm::incoming(&guest.config(vcpus)).unwrap();
    assert_eq!(destination.describe(), source.describe());
    assert_eq!(destination.run_state(), RunState::Inmigrate);
    let start = Nanos::now();
    source.pause().unwrap();
    let paused = Nanos::now();
    let state = source.save_state().unwrap();
    let saved = Nanos::now();
    let pages = source.first_pages();
    let code = source.ram().pages();
    assert!(pages.contains(&PageIndex(0x100)), "the code's page: {pages:?}");
    assert!(pages.iter().all(|page| page.0 < code.0));
    copy_memory(source, &destination);
    let loading = Nanos::now();
    destination.load_state(&state).unwrap();
    spans.push([paused.since(start), saved.since(paused), Nanos::now().since(loading)]);

    source.surrender_right_to_run();
    assert!(refusal(source.resume()).contains("moved to another host"));
    assert!(refusal(source.cont()).contains("moved to another host"));
    assert!(refusal(destination.resume()).contains("not arrived"));
    assert!(refusal(destination.cont()).contains("not arrived"));
    assert_eq!(destination.first_entry(), None);
    destination.take_right_to_run();
    let then = word(&destination, COUNTER);
    destination.resume().unwrap();
    until("the guest goes on", || word(&destination, COUNTER) != then);
    assert_eq!(word(source, COUNTER), then, "the source's guest ran on");
    assert_eq!(source.run_state(), RunState::Postmigrate);
    assert_eq!(destination.run_state(), RunState::Running);
    destination
}

fn move_often(code: &[u8], vcpus: u8, counters: &[u32], times: u32) {
    let guest = Guest::new(code);
    let mut vm = guest.boot(vcpus);
    vm.cont().unwrap();
    until("all vCPUs count", || counters.iter().all(|counter| word(&vm, *counter) > 0));
    let mut spans = Vec::new();
    for _ in 0..times {
        let before: Vec<_> = counters.iter().map(|counter| word(&vm, *counter)).collect();
        vm = move_on(&vm, &guest, vcpus, &mut spans);
        until("all vCPUs go on", || counters.iter().zip(&before).all(|(counter, then)| word(&vm, *counter) > *then));
    }
    for (at, what) in ["pause", "save", "load"].into_iter().enumerate() {
        let mut of: Vec<_> = spans.iter().map(|span| span[at]).collect();
        of.sort_unstable();
        println!("{vcpus} vCPUs, {what}: median {} ns, worst {} ns", of[of.len() / 2], of[of.len() - 1]);
    }
    assert_eq!(vm.run_state(), RunState::Running, "{:?}", vm.status_reason());
}

#[test]
fn a_counting_guest_moves_on_and_on() {
    if !kvm("a_counting_guest_moves_on_and_on") {
        return;
    }
    move_often(COUNTING, 1, &[COUNTER], 100);
}

#[test]
fn two_vcpus_move_together() {
    if !kvm("two_vcpus_move_together") {
        return;
    }
    move_often(&starting_another(), 2, &[COUNTER, SECOND_COUNTER], 50);
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_the_machine_still_waits() {
    if !kvm("a_state_that_does_not_fit_is_refused_and_the_machine_still_waits") {
        return;
    }
    let guest = Guest::new(COUNTING);
    let source = guest.boot(1);
    source.cont().unwrap();
    assert!(refusal(source.save_state()).contains("paused"));
    assert!(source.first_pages().is_empty());
    source.pause().unwrap();
    let state = source.save_state().unwrap();
    assert!(refusal(source.load_state(&state)).contains("only a machine that waits"));

    let other = Vm::incoming(&guest.config(2)).unwrap();
    assert!(refusal(other.load_state(&state)).contains("lacks section vCPU 1"));
    let destination = Vm::incoming(&guest.config(1)).unwrap();
    assert!(refusal(destination.load_state(&state[..state.len() - 9])).contains("ends after"));
    let mut damaged = state.clone();
    damaged[600] ^= 1;
    assert!(refusal(destination.load_state(&damaged)).contains("CRC"));
    assert!(refusal(destination.load_state(b"")).contains("ends after 0 bytes"));
    // Without a state there is no right to run.
    destination.take_right_to_run();
    assert!(refusal(destination.resume()).contains("not arrived"));
    assert_eq!(destination.run_state(), RunState::Inmigrate);

    // The source runs on, and its guest has seen nothing.
    source.resume().unwrap();
    let then = word(&source, COUNTER);
    until("the guest goes on", || word(&source, COUNTER) != then);
}

#[test]
fn a_guest_that_was_paused_arrives_paused_and_starts_when_told() {
    if !kvm("a_guest_that_was_paused_arrives_paused_and_starts_when_told") {
        return;
    }
    let guest = Guest::new(COUNTING);
    let source = guest.boot(1);
    source.cont().unwrap();
    until("the guest counts", || word(&source, COUNTER) > 0);
    source.stop().unwrap();
    assert!(!source.pause().unwrap().was_running);
    let state = source.save_state().unwrap();
    let destination = Vm::incoming(&guest.config(1)).unwrap();
    copy_memory(&source, &destination);
    destination.load_state(&state).unwrap();
    source.surrender_right_to_run();
    destination.take_right_to_run();
    assert_eq!(destination.run_state(), RunState::Paused);
    let then = word(&destination, COUNTER);
    destination.cont().unwrap();
    until("the guest goes on", || word(&destination, COUNTER) != then);
}

#[test]
fn an_incoming_machine_leaves_its_memory_alone() {
    if !kvm("an_incoming_machine_leaves_its_memory_alone") {
        return;
    }
    let guest = Guest::new(COUNTING);
    let source = guest.boot(1);
    source.cont().unwrap();
    until("the guest counts", || word(&source, COUNTER) > 0);
    source.pause().unwrap();
    let state = source.save_state().unwrap();
    let mut config = guest.config(1);
    config.lazy_memory = true;
    let destination = Vm::incoming(&config).unwrap();
    destination.load_state(&state).unwrap();
    assert_eq!(destination.ram().file().metadata().unwrap().blocks(), 0, "something touched guest RAM");
    config.lazy_memory = false;
    let populated = Vm::incoming(&config).unwrap().ram();
    assert_eq!(populated.file().metadata().unwrap().blocks() * 512, populated.pages().bytes());
}
