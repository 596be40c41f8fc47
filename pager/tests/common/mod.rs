//! What the pager's tests share.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::sync::Arc;

use crossbeam::channel::{Receiver, unbounded};
use switchover_pager::lane::{Notify, PageLane, PagerEvent};
use switchover_pager::ram::Ram;
use switchover_wire::socket::Socket;
use switchover_wire::types::{LaneId, LaneRole, PAGE_SIZE, PageIndex};

/// Whether this host has a userfaultfd for us; says so, with the test's name, where it has not.
pub fn userfaultfd_or_skip(test: &str) -> bool {
    let probe = Ram::new(switchover_wire::types::PageCount(1)).unwrap();
    match switchover_pager::uffd::Watch::register(probe) {
        Ok(watch) => {
            watch.unregister().unwrap();
            true
        }
        Err(error) => {
            println!("SKIP {test}: {error}");
            false
        }
    }
}

/// Both ends of a new lane.
pub fn lane_pair(role: LaneRole, index: u8) -> (PageLane, PageLane) {
    let (one, two) = Socket::pair().unwrap();
    let lane = |socket| PageLane { id: LaneId { role, index }, socket: Arc::new(socket), checksums: true };
    (lane(one), lane(two))
}

/// An observer, and what it observed.
pub fn events() -> (Notify, Receiver<PagerEvent>) {
    let (sender, receiver) = unbounded();
    (Arc::new(move |event| sender.send(event).unwrap_or(())), receiver)
}

/// Reads a word of the guest mapping, as a guest would.
pub fn guest_read(ram: &Ram, page: PageIndex, word: usize) -> u64 {
    // SAFETY: inside the guest mapping; volatile, because the pager fills it from another mapping.
    unsafe { guest_word(ram, page, word).read_volatile() }
}

/// Writes a word of the guest mapping, as a guest would.
pub fn guest_write(ram: &Ram, page: PageIndex, word: usize, value: u64) {
    // SAFETY: inside the guest mapping; only one thread of a test writes a given page.
    unsafe { guest_word(ram, page, word).write_volatile(value) };
}

fn guest_word(ram: &Ram, page: PageIndex, word: usize) -> *mut u64 {
    assert!(page.0 < ram.pages().0 && word < PAGE_SIZE / 8);
    ram.guest_base().wrapping_add(usize::try_from(page.offset()).unwrap() + word * 8).cast()
}
