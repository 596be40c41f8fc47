//! A vCPU that waits for a page keeps nobody else waiting.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking; its helpers are tests too")]

mod common;

use std::time::{Duration, Instant};

use common::{BASE, COUNTER, COUNTING, Guest, kvm, until, word};
use switchover_hybrid::machine::Machine;
use switchover_runtime::run_state::RunState;
use switchover_runtime::vm::Vm;
use switchover_wire::types::PAGE_SIZE;
use userfaultfd::{Event, FeatureFlags, Uffd, UffdBuilder};

/// A machine that has arrived without the page that its guest's code is in, and what watches its memory.
fn arrived_without_its_code(guest: &Guest, source: &Vm) -> Option<(std::sync::Arc<Vm>, Uffd)> {
    let builder = UffdBuilder::new()
        .non_blocking(true)
        .user_mode_only(false)
        .require_features(FeatureFlags::MISSING_SHMEM)
        .create();
    let Ok(uffd) = builder else {
        println!("SKIP: userfaultfd cannot be opened");
        return None;
    };
    let mut config = guest.config(1);
    config.lazy_memory = true;
    let destination = Vm::incoming(&config).unwrap();
    let (from, to) = (source.ram(), destination.ram());
    let code = usize::try_from(BASE).unwrap() / PAGE_SIZE;
    for page in (0..from.len_bytes() / PAGE_SIZE).filter(|page| *page != code) {
        let at = page * PAGE_SIZE;
        // SAFETY: a page of each of two live mappings of the same length; neither guest runs.
        unsafe { std::ptr::copy_nonoverlapping(from.guest_base().add(at), to.alias_base().add(at), PAGE_SIZE) };
    }
    uffd.register(to.guest_base().cast(), to.len_bytes()).unwrap();
    destination.load_state(&source.save_state().unwrap()).unwrap();
    source.surrender_right_to_run();
    destination.take_right_to_run();
    Some((destination, uffd))
}

/// Waits for a fault. Answers its address.
fn fault(uffd: &Uffd) -> *mut std::ffi::c_void {
    let mut event = None;
    until("a vCPU waits for a page", || {
        event = uffd.read_event().unwrap();
        event.is_some()
    });
    match event {
        Some(Event::Pagefault { addr, .. }) => addr,
        other => panic!("{other:?}"),
    }
}

#[test]
fn stop_and_cont_return_at_once_and_the_guest_goes_on_when_its_page_is_here() {
    let name = "stop_and_cont_return_at_once_and_the_guest_goes_on_when_its_page_is_here";
    if !kvm(name) {
        return;
    }
    let guest = Guest::new(COUNTING);
    let source = guest.boot(1);
    source.cont().unwrap();
    until("the guest counts", || word(&source, COUNTER) > 0);
    source.pause().unwrap();
    let Some((destination, uffd)) = arrived_without_its_code(&guest, &source) else { return };
    let then = word(&source, COUNTER);
    destination.resume().unwrap();
    let addr = fault(&uffd);
    let base = destination.ram().guest_base();
    assert_eq!(addr as usize - base as usize, usize::try_from(BASE).unwrap());

    let start = Instant::now();
    for _ in 0..3 {
        destination.stop().unwrap();
        assert_eq!(destination.run_state(), RunState::Paused);
        destination.cont().unwrap();
        assert_eq!(destination.run_state(), RunState::Running);
    }
    destination.stop().unwrap();
    assert!(start.elapsed() < Duration::from_millis(500), "stop or cont waited for the vCPU");

    // The page comes: the vCPU stops, as it was asked, and goes on when it is let.
    let from = source.ram().guest_base().wrapping_add(usize::try_from(BASE).unwrap());
    // SAFETY: a page of the paused source's RAM, to the page that the fault was on.
    unsafe { uffd.copy(from.cast(), addr, PAGE_SIZE, true) }.unwrap();
    assert!(!destination.pause().unwrap().was_running);
    let arrived = word(&destination, COUNTER);
    destination.resume().unwrap();
    destination.cont().unwrap();
    until("the guest goes on", || word(&destination, COUNTER) > arrived.max(then));
    assert_eq!(destination.run_state(), RunState::Running);
}

#[test]
fn a_machine_whose_page_never_comes_can_be_stopped_for_good() {
    if !kvm("a_machine_whose_page_never_comes_can_be_stopped_for_good") {
        return;
    }
    let guest = Guest::new(COUNTING);
    let source = guest.boot(1);
    source.cont().unwrap();
    until("the guest counts", || word(&source, COUNTER) > 0);
    source.pause().unwrap();
    let Some((destination, uffd)) = arrived_without_its_code(&guest, &source) else { return };
    destination.resume().unwrap();
    let addr = fault(&uffd);
    let start = Instant::now();
    destination.stop_for_good("the link is lost");
    assert!(start.elapsed() < Duration::from_millis(500));
    assert_eq!(destination.run_state(), RunState::InternalError);
    // A late page does not bring it back.
    let from = source.ram().guest_base().wrapping_add(usize::try_from(BASE).unwrap());
    // SAFETY: as above.
    unsafe { uffd.copy(from.cast(), addr, PAGE_SIZE, true) }.unwrap();
    let then = word(&destination, COUNTER);
    drop(destination.events());
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(word(&destination, COUNTER), then);
    assert!(destination.cont().is_err());
}
