//! A page that is pushed and requested at once, with the guest writing it between the two arrivals.
//!
//! The test plays the source by hand, so that the order of the two copies is certain: the pushed one first, then the
//! guest's write, then the answer with the old bytes.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

use common::{events, guest_read, guest_write, lane_pair, userfaultfd_or_skip};
use switchover_pager::destination::DestinationPager;
use switchover_pager::lane::PagerEvent;
use switchover_pager::ram::Ram;
use switchover_pager::stripes::Stripes;
use switchover_wire::checksum::Checksum;
use switchover_wire::frame::bulk::{BulkFrame, CHUNK_PAGES, FrameFlags};
use switchover_wire::frame::fault::{FaultReply, FaultRequest, ReplyContent};
use switchover_wire::ring::Ring;
use switchover_wire::types::{LaneRole, PAGE_SIZE, PageCount, PageIndex};

const PAGES: u64 = 4096;
const OLD: u64 = 0x1111_1111_1111_1111;
const NEW: u64 = 0x2222_2222_2222_2222;

fn old_page() -> Vec<u8> {
    OLD.to_le_bytes().repeat(PAGE_SIZE / 8)
}

#[test]
fn the_guests_write_survives_the_copy_that_comes_too_late() {
    the_guests_write_survives("the_guests_write_survives_the_copy_that_comes_too_late", 1);
}

#[test]
fn the_guests_write_survives_whichever_lane_is_late() {
    the_guests_write_survives("the_guests_write_survives_whichever_lane_is_late", 3);
}

fn the_guests_write_survives(test: &str, fault_lanes: u8) {
    if !userfaultfd_or_skip(test) {
        return;
    }
    let lanes = (0..fault_lanes).map(|index| lane_pair(LaneRole::Fault, index));
    let (faults, mut lanes): (Vec<_>, Vec<_>) = lanes.unzip();
    let stripes = Stripes::new(PageCount(PAGES), fault_lanes);
    let (bulk, destination_bulk) = lane_pair(LaneRole::Bulk, 0);
    let (notify, pager_events) = events();
    let ram = Ram::new(PageCount(PAGES)).unwrap();
    lanes.push(destination_bulk);
    let mut pager = DestinationPager::start(ram.clone(), lanes, false, &notify).unwrap();
    pager.hand_over(&vec![u64::MAX; usize::try_from(ram.pages().0.div_ceil(64)).unwrap()]).unwrap();

    let (written, was_written) = sync_channel::<PageIndex>(0);
    let guest = {
        let ram = ram.clone();
        thread::spawn(move || {
            for page in (0..PAGES).map(PageIndex) {
                assert_eq!(guest_read(&ram, page, 7), OLD, "{page} as it was pushed");
                guest_write(&ram, page, 7, NEW);
                written.send(page).unwrap();
            }
        })
    };
    let mut ring = Ring::new(2).unwrap();
    let old = old_page();
    for page in (0..PAGES).map(PageIndex) {
        // On the lane of the page that the guest waits for.
        let fault = &faults[stripes.shard_of(page)];
        let mut request = [0; FaultRequest::LEN];
        ring.recv_exact(fault.socket.as_fd(), &mut [IoSliceMut::new(&mut request)]).unwrap();
        let request = FaultRequest::decode(&request, PageCount(PAGES)).unwrap();
        assert_eq!(request.page, page);

        let first = PageIndex(page.0 / CHUNK_PAGES * CHUNK_PAGES);
        let frame = BulkFrame::Chunk { first, data: 1 << (page.0 % CHUNK_PAGES), zero: 0 }
            .encode(FrameFlags::default(), Checksum::of([&old[..]]));
        ring.send_all(bulk.socket.as_fd(), &[IoSlice::new(&frame), IoSlice::new(&old)]).unwrap();
        assert_eq!(was_written.recv_timeout(Duration::from_secs(30)), Ok(page));

        let reply = FaultReply { page, tag: request.tag, content: ReplyContent::Raw }.encode(Checksum::of([&old[..]]));
        ring.send_all(fault.socket.as_fd(), &[IoSlice::new(&reply), IoSlice::new(&old)]).unwrap();
    }
    guest.join().unwrap();
    assert_eq!(pager_events.recv_timeout(Duration::from_secs(30)), Ok(PagerEvent::Complete));
    while pager.progress().discarded < PAGES {
        assert!(pager_events.is_empty(), "{:?}", pager_events.try_recv());
        thread::yield_now();
    }
    for page in (0..PAGES).map(PageIndex) {
        assert_eq!(guest_read(&ram, page, 7), NEW, "{page} lost the guest's write");
        assert_eq!(guest_read(&ram, page, 8), OLD, "{page}");
    }
    pager.finish().unwrap();
    let stats = pager.fault_stats();
    assert_eq!((stats.remote, stats.raced), (0, PAGES));
    assert_eq!(stats.total.len(), PAGES, "every race's time is known");
}

#[test]
fn the_pushed_copy_that_comes_too_late_is_thrown_away() {
    if !userfaultfd_or_skip("the_pushed_copy_that_comes_too_late_is_thrown_away") {
        return;
    }
    let (fault, destination_fault) = lane_pair(LaneRole::Fault, 0);
    let (bulk, destination_bulk) = lane_pair(LaneRole::Bulk, 0);
    let (notify, pager_events) = events();
    let ram = Ram::new(PageCount(CHUNK_PAGES)).unwrap();
    let lanes = vec![destination_fault, destination_bulk];
    let mut pager = DestinationPager::start(ram.clone(), lanes, false, &notify).unwrap();
    pager.hand_over(&vec![u64::MAX; usize::try_from(ram.pages().0.div_ceil(64)).unwrap()]).unwrap();
    let guest = {
        let ram = ram.clone();
        thread::spawn(move || {
            assert_eq!(guest_read(&ram, PageIndex(9), 7), OLD);
            guest_write(&ram, PageIndex(9), 7, NEW);
        })
    };
    let mut ring = Ring::new(2).unwrap();
    let old = old_page();
    let mut request = [0; FaultRequest::LEN];
    ring.recv_exact(fault.socket.as_fd(), &mut [IoSliceMut::new(&mut request)]).unwrap();
    let request = FaultRequest::decode(&request, PageCount(CHUNK_PAGES)).unwrap();
    let reply = FaultReply { page: request.page, tag: request.tag, content: ReplyContent::Raw }
        .encode(Checksum::of([&old[..]]));
    ring.send_all(fault.socket.as_fd(), &[IoSlice::new(&reply), IoSlice::new(&old)]).unwrap();
    guest.join().unwrap();

    // The whole chunk is pushed, the page that was answered in its middle.
    let pages = old.repeat(64);
    let frame = BulkFrame::Chunk { first: PageIndex(0), data: u64::MAX, zero: 0 };
    let frame = frame.encode(FrameFlags::default(), Checksum::of([&pages[..]]));
    ring.send_all(bulk.socket.as_fd(), &[IoSlice::new(&frame), IoSlice::new(&pages)]).unwrap();
    let end = BulkFrame::End { pages: CHUNK_PAGES }.encode(FrameFlags::default(), Checksum::NONE);
    ring.send_all(bulk.socket.as_fd(), &[IoSlice::new(&end)]).unwrap();
    assert_eq!(pager_events.recv_timeout(Duration::from_secs(30)), Ok(PagerEvent::Complete));
    pager.finish().unwrap();
    assert_eq!(guest_read(&ram, PageIndex(9), 7), NEW, "the late copy overwrote the guest's write");
    assert!((0..64).filter(|page| *page != 9).all(|page| guest_read(&ram, PageIndex(page), 7) == OLD));
    let seen = pager.progress();
    assert_eq!((seen.pushed, seen.requested, seen.discarded), (63, 1, 1));
}
