//! Whole memories moved between two pagers, over real sockets and a real userfaultfd, while a guest (a thread here)
//! works on the destination.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::thread;
use std::time::Duration;

use common::{events, guest_read, guest_write, lane_pair, userfaultfd_or_skip};
use switchover_pager::destination::DestinationPager;
use switchover_pager::lane::PagerEvent;
use switchover_pager::ram::Ram;
use switchover_pager::source::{Rest, SourcePager};
use switchover_wire::types::{LaneRole, PageCount, PageIndex};

const PAGES: u64 = 5003;
const PATIENCE: Duration = Duration::from_secs(60);

/// Every third page stays untouched, every seventh is written with zeros, the others carry their number.
fn content(page: u64) -> u64 {
    if page.is_multiple_of(3) || page.is_multiple_of(7) { 0 } else { page * 0x9e37_79b9 + 1 }
}

fn filled() -> Ram {
    let ram = Ram::new(PageCount(PAGES)).unwrap();
    for page in (0..PAGES).filter(|page| !page.is_multiple_of(3)) {
        guest_write(&ram, PageIndex(page), 511, content(page));
    }
    ram
}

fn move_memory(test: &str, fault_lanes: u8, bulk_lanes: u8, lazy: bool, bandwidth: u64) {
    if !userfaultfd_or_skip(test) {
        return;
    }
    let (from, to) = (filled(), Ram::new(PageCount(PAGES)).unwrap());
    let bulk = (0..bulk_lanes).map(|index| (LaneRole::Bulk, index));
    let roles = (0..fault_lanes).map(|index| (LaneRole::Fault, index)).chain(bulk);
    let (source_lanes, destination_lanes): (Vec<_>, Vec<_>) = roles.map(|(role, index)| lane_pair(role, index)).unzip();
    let (source_notify, source_events) = events();
    let (notify, destination_events) = events();

    let asked = source_lanes[..usize::from(fault_lanes)].to_vec();
    let mut source = SourcePager::start(from, source_lanes, bandwidth, &source_notify).unwrap();
    let mut destination = DestinationPager::start(to.clone(), destination_lanes, lazy, &notify).unwrap();
    let all = vec![u64::MAX; usize::try_from(PAGES.div_ceil(64)).unwrap()];
    destination.hand_over(&all).unwrap();
    let rest = Rest { missing: all, ..Rest::default() };
    source.start_serving(&[PageIndex(4000), PageIndex(1), PageIndex(4000)], rest);
    source.start_sweep();

    // A guest that reads every page, in an order that the sweep does not have, and writes each: nothing that arrives
    // later may undo it.
    let guest = {
        let ram = to.clone();
        thread::spawn(move || {
            for step in 0..PAGES {
                let page = PageIndex(step * 2311 % PAGES);
                assert_eq!(guest_read(&ram, page, 511), content(page.0), "{page}");
                assert_eq!(guest_read(&ram, page, 0), 0);
                guest_write(&ram, page, 0, page.0 + 1);
            }
        })
    };
    assert_eq!(destination_events.recv_timeout(PATIENCE), Ok(PagerEvent::Complete));
    assert_eq!(source_events.recv_timeout(PATIENCE), Ok(PagerEvent::AllPushed));
    guest.join().unwrap();
    assert!(destination_events.is_empty() && source_events.is_empty(), "nothing failed on the way");
    destination.finish().unwrap();
    source.stop();

    let (seen, stats) = (destination.progress(), destination.fault_stats());
    assert_eq!(seen.missing, 0);
    assert_eq!(seen.zero + seen.pushed + seen.requested, PAGES, "{seen:?}");
    assert!(seen.zero >= PAGES / 3, "{seen:?}");
    assert_eq!(stats.remote + stats.raced, seen.requests, "every request is either answered or raced");
    if bandwidth > 0 {
        // The guest outruns the push, all over its memory.
        assert!(asked.iter().all(|lane| lane.socket.counters().received() > 0), "a fault lane stood idle");
    }
    assert_eq!(source.progress().remaining, PageCount(0));
    for page in 0..PAGES {
        assert_eq!(guest_read(&to, PageIndex(page), 0), page + 1, "page {page} lost the guest's write");
        assert_eq!(guest_read(&to, PageIndex(page), 511), content(page), "page {page}");
    }
}

#[test]
fn one_bulk_lane() {
    move_memory("one_bulk_lane", 1, 1, false, 0);
}

#[test]
fn three_bulk_lanes() {
    move_memory("three_bulk_lanes", 1, 3, false, 0);
}

#[test]
fn lazy_memory() {
    move_memory("lazy_memory", 1, 1, true, 0);
}

#[test]
fn a_slow_push_is_overtaken_by_faults() {
    move_memory("a_slow_push_is_overtaken_by_faults", 1, 1, false, 20_000_000);
}

#[test]
fn three_fault_lanes_and_two_bulk_lanes() {
    move_memory("three_fault_lanes_and_two_bulk_lanes", 3, 2, false, 0);
}

#[test]
fn two_fault_lanes_and_lazy_memory() {
    move_memory("two_fault_lanes_and_lazy_memory", 2, 1, true, 0);
}

#[test]
fn sixteen_fault_lanes_overtake_a_slow_push() {
    move_memory("sixteen_fault_lanes_overtake_a_slow_push", 16, 1, false, 20_000_000);
}

#[test]
fn no_fault_lane_and_too_many_are_refused() {
    if !userfaultfd_or_skip("no_fault_lane_and_too_many_are_refused") {
        return;
    }
    let (notify, _events) = events();
    for fault_lanes in [0, 17] {
        let lanes = (0..fault_lanes).map(|index| lane_pair(LaneRole::Fault, index).1).collect();
        let ram = Ram::new(PageCount(64)).unwrap();
        let error = DestinationPager::start(ram, lanes, false, &notify).err().unwrap();
        assert!(error.to_string().contains(&format!("{fault_lanes} fault lanes")), "{error}");
    }
}

#[test]
fn an_incomplete_memory_cannot_be_finished() {
    if !userfaultfd_or_skip("an_incomplete_memory_cannot_be_finished") {
        return;
    }
    let (_source_fault, fault) = lane_pair(LaneRole::Fault, 0);
    let (notify, _events) = events();
    let ram = Ram::new(PageCount(8)).unwrap();
    let mut pager = DestinationPager::start(ram, vec![fault], false, &notify).unwrap();
    assert!(pager.finish().is_err(), "unregistering now would hand out zeros");
    pager.abandon();
}

#[test]
fn a_request_before_the_handoff_is_refused() {
    if !userfaultfd_or_skip("a_request_before_the_handoff_is_refused") {
        return;
    }
    let (source_lane, destination_lane) = lane_pair(LaneRole::Fault, 0);
    let (source_notify, source_events) = events();
    let (notify, destination_events) = events();
    let mut source = SourcePager::start(filled(), vec![source_lane], 0, &source_notify).unwrap();
    let to = Ram::new(PageCount(PAGES)).unwrap();
    let pager = DestinationPager::start(to.clone(), vec![destination_lane], false, &notify).unwrap();
    let guest = thread::spawn(move || guest_read(&to, PageIndex(5), 511));
    let Ok(PagerEvent::LaneFailed { reason, .. }) = source_events.recv_timeout(PATIENCE) else {
        panic!("the source must not serve a running guest's memory");
    };
    assert!(reason.contains("before the handoff"), "{reason}");
    source.stop();
    let Ok(PagerEvent::LaneFailed { .. }) = destination_events.recv_timeout(PATIENCE) else {
        panic!("the destination must notice");
    };
    assert!(!guest.is_finished(), "a failed lane must not feed zeros to whoever waits");
    pager.abandon();
    guest.join().unwrap();
}
