//! Every write of a guest on real KVM, and of its machine, is noted, and nothing else is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking; its helpers are tests too")]

mod common;

use std::sync::Arc;

use common::{Guest, SCATTERED, SCATTERING, SWEEPING, SWEEPING_BLINDLY, SWEPT, kvm, until, word};
use switchover_hybrid::machine::Machine;
use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::dirty::DirtyLog;
use switchover_runtime::config::{DirtyTracking, VmConfig};
use switchover_runtime::error::VmError;
use switchover_runtime::vm::Vm;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};
use vm_memory::{Bytes, GuestAddress};

/// All pages of a small RAM.
fn contents(vm: &Vm) -> Vec<u8> {
    let ram = vm.ram();
    let mut bytes = vec![0; ram.len_bytes()];
    // SAFETY: all of the guest mapping, which `ram` keeps. A guest that writes meanwhile gives old or new bytes.
    unsafe { std::ptr::copy_nonoverlapping(ram.guest_base(), bytes.as_mut_ptr(), bytes.len()) };
    bytes
}

fn changed(before: &[u8], after: &[u8]) -> Vec<PageIndex> {
    let pages = before.chunks(PAGE_SIZE).zip(after.chunks(PAGE_SIZE));
    (0..).zip(pages).filter(|(_, (before, after))| before != after).map(|(page, _)| PageIndex(page)).collect()
}

fn noted(log: &dyn DirtyLog, pages: PageCount) -> PageBitmap {
    let mut noted = PageBitmap::new(pages);
    log.peek(&mut noted).unwrap();
    noted
}

fn rearm_all(log: &dyn DirtyLog, pages: PageCount) {
    log.rearm(PageIndex(0), &vec![u64::MAX; usize::try_from(pages.0.div_ceil(64)).unwrap()]).unwrap();
}

/// A machine with its log and the size of its RAM; `None` where this host cannot have it, which it says.
fn machine(
    test: &str,
    code: &[u8],
    pages: PageCount,
    tracking: DirtyTracking,
) -> Option<(Arc<Vm>, Arc<dyn DirtyLog>, PageCount)> {
    if !kvm(test) {
        return None;
    }
    let guest = Guest::new(code);
    let vm = match Vm::boot(&VmConfig { memory: pages, dirty_tracking: tracking, ..guest.config(1) }) {
        Err(VmError::Lacking { what }) => {
            println!("SKIP {test}: this host's KVM lacks {what}");
            return None;
        }
        vm => vm.unwrap(),
    };
    let log = vm.dirty_log();
    Some((vm, log, pages))
}

const SMALL: PageCount = PageCount(1024);

/// Waits until the guest has written, whatever the log says.
fn until_it_writes(vm: &Vm) {
    let then = contents(vm);
    until("the guest writes some pages", || changed(&then, &contents(vm)).len() > 20);
}

fn what_a_guest_writes_is_noted_and_nothing_else(tracking: DirtyTracking) {
    let Some((vm, log, pages)) = machine("what_a_guest_writes_is_noted_and_nothing_else", SCATTERING, SMALL, tracking)
    else {
        return;
    };
    vm.cont().unwrap();
    until_it_writes(&vm);
    for _ in 0..3 {
        log.start().unwrap();
        assert_eq!(noted(&*log, pages).count(), pages, "all pages are noted at the start");
        rearm_all(&*log, pages);
        for round in 0..20_u64 {
            let before = contents(&vm);
            until_it_writes(&vm);
            vm.pause().unwrap();
            let noted_now = noted(&*log, pages);
            let written = changed(&before, &contents(&vm));
            assert!(written.len() > 20);
            for page in &written {
                assert!(noted_now.contains(*page), "{page} was written and is not noted");
            }
            assert!(noted_now.iter().all(|page| SCATTERED.contains(&page.0)), "a page is noted that nothing wrote");
            // Some pages while it stands still, the rest while it runs.
            let words: Vec<u64> =
                (0..pages.0 / 64).map(|word| word.wrapping_mul(round.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
            log.rearm(PageIndex(0), &words).unwrap();
            let mut expected = noted_now.clone();
            PageBitmap::from_words(&words, pages).iter().for_each(|page| {
                expected.remove(page);
            });
            assert_eq!(noted(&*log, pages), expected, "exactly the pages that were named are rearmed");
            vm.resume().unwrap();
            rearm_all(&*log, pages);
        }
        vm.pause().unwrap();
        // What lies in a ring is noted only once it was looked at.
        noted(&*log, pages);
        rearm_all(&*log, pages);
        assert_eq!(noted(&*log, pages).count(), PageCount(0), "a guest that stands still writes nothing");
        assert_eq!(noted(&*log, pages).count(), PageCount(0));
        vm.resume().unwrap();
        log.stop();
        log.stop();
        assert!(log.peek(&mut PageBitmap::new(pages)).is_err(), "no book is kept");
    }
}

fn peeking_changes_nothing(tracking: DirtyTracking) {
    let Some((vm, log, pages)) = machine("peeking_changes_nothing", SCATTERING, SMALL, tracking) else { return };
    log.start().unwrap();
    rearm_all(&*log, pages);
    vm.cont().unwrap();
    until("pages are noted", || noted(&*log, pages).count().0 > 20);
    let mut before = noted(&*log, pages);
    for _ in 0..50 {
        let now = noted(&*log, pages);
        assert!(before.iter().all(|page| now.contains(page)), "a noted page is forgotten");
        before = now;
    }
}

fn what_the_machine_writes_is_noted_on_both_sides_of_the_hole(tracking: DirtyTracking) {
    let low = 3 << 18;
    // The second slot ends within a word.
    let pages = PageCount(low + 100);
    let Some((vm, log, pages)) =
        machine("what_the_machine_writes_is_noted_on_both_sides_of_the_hole", SCATTERING, pages, tracking)
    else {
        return;
    };
    log.start().unwrap();
    assert_eq!(noted(&*log, pages).count(), pages);
    rearm_all(&*log, pages);
    assert_eq!(noted(&*log, pages).count(), PageCount(0));

    let last = 0xc000_0000 - 1;
    vm.memory().mapped().write_slice(&[1], GuestAddress(last)).unwrap();
    vm.memory().mapped().write_slice(&[1; 2], GuestAddress((1 << 32) + 99 * 4096 - 1)).unwrap();
    let expected = [low - 1, low + 98, low + 99].map(PageIndex);
    assert!(noted(&*log, pages).iter().eq(expected));
    log.rearm(PageIndex(low), &[u64::MAX, 1 << 34]).unwrap();
    assert!(noted(&*log, pages).iter().eq([low - 1, low + 99].map(PageIndex)));
    rearm_all(&*log, pages);
    assert_eq!(noted(&*log, pages).count(), PageCount(0));
}

fn nothing_is_lost_while_nobody_looks(tracking: DirtyTracking) {
    let Some((vm, log, pages)) =
        machine("nothing_is_lost_while_nobody_looks", SWEEPING, PageCount(SWEPT.end), tracking)
    else {
        return;
    };
    log.start().unwrap();
    rearm_all(&*log, pages);
    let before = contents(&vm);
    vm.cont().unwrap();
    let last = u32::try_from((SWEPT.end - 1) * 4096).unwrap();
    until("the guest has swept its memory", || word(&vm, last) >= 2);
    vm.pause().unwrap();
    let noted = noted(&*log, pages);
    let written = changed(&before, &contents(&vm));
    assert!(written.len() as u64 >= SWEPT.end - SWEPT.start);
    assert!(written.iter().all(|page| noted.contains(*page)), "a write is lost");
}

#[test]
fn a_ring_that_overruns_is_noticed_and_the_guest_runs_on() {
    const TEST: &str = "a_ring_that_overruns_is_noticed_and_the_guest_runs_on";
    let pages = PageCount(SWEPT.end);
    let Some((vm, log, pages)) = machine(TEST, SWEEPING_BLINDLY, pages, DirtyTracking::Ring) else { return };
    log.start().unwrap();
    rearm_all(&*log, pages);
    let before = contents(&vm);
    vm.cont().unwrap();
    let last = u32::try_from((SWEPT.end - 1) * 4096).unwrap();
    until("the guest has swept its memory often", || word(&vm, last) >= 5);
    vm.pause().unwrap();
    let mut noted = PageBitmap::new(pages);
    match log.peek(&mut noted) {
        Ok(()) => {
            println!("no overrun on this host");
            assert!(changed(&before, &contents(&vm)).iter().all(|page| noted.contains(*page)), "a write is lost");
        }
        Err(error) => {
            println!("{error}");
            assert!(error.to_string().contains("--dirty-tracking log"));
            assert!(log.rearm(PageIndex(0), &[1]).is_err() && log.start().is_err(), "it is relied on again");
        }
    }
}

macro_rules! by_each {
    ($($test:ident),+ $(,)?) => {
        mod by_bitmaps {
            $(#[test] fn $test() { super::$test(super::DirtyTracking::Log); })+
        }
        mod by_rings {
            $(#[test] fn $test() { super::$test(super::DirtyTracking::Ring); })+
        }
    };
}

by_each! {
    what_a_guest_writes_is_noted_and_nothing_else,
    peeking_changes_nothing,
    what_the_machine_writes_is_noted_on_both_sides_of_the_hole,
    nothing_is_lost_while_nobody_looks,
}
