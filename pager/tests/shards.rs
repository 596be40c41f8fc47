//! A destination's pager whose memory is divided among several userfaultfds: where shards meet, and when all of their lanes are
//! lost at once.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
mod hand;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use common::{events, guest_read, guest_write, lane_pair, userfaultfd_or_skip};
use crossbeam::channel::unbounded;
use hand::{Hand, PATIENCE, chunk, filled, until};
use switchover_pager::destination::DestinationPager;
use switchover_pager::lane::{Notify, PageLane, PagerEvent};
use switchover_pager::ram::Ram;
use switchover_pager::source::{Rest, SourcePager};
use switchover_pager::stripes::Stripes;
use switchover_wire::checksum::Checksum;
use switchover_wire::frame::bulk::FrameFlags;
use switchover_wire::frame::fault::{FaultReply, ReplyContent};
use switchover_wire::types::{LaneRole, PageCount, PageIndex};

const WORD: u64 = 0x5348_4152_4453_0001;

fn guest_reads(ram: &Ram, page: PageIndex) -> JoinHandle<u64> {
    let ram = ram.clone();
    thread::spawn(move || guest_read(&ram, page, 7))
}

fn all(pages: u64) -> Vec<u64> {
    vec![u64::MAX; usize::try_from(pages.div_ceil(64)).unwrap()]
}

/// After the handoff, with nothing here.
fn handed_over(pages: u64, fault_lanes: u8, lanes: u8) -> Hand {
    let hand = Hand::sharded(pages, fault_lanes, lanes, false);
    hand.pager().hand_over(&all(pages)).unwrap();
    hand
}

/// The last page of each stripe and the first of the next, and the two ends of RAM.
fn borders(pages: u64, shards: u8) -> Vec<PageIndex> {
    let stripes = Stripes::new(PageCount(pages), shards);
    let ends = |index| {
        let (first, count) = stripes.range(index);
        [first, PageIndex(first.0 + count.0 - 1)]
    };
    (0..stripes.count()).flat_map(ends).collect()
}

#[test]
fn pages_at_borders_are_asked_for_on_their_own_lanes() {
    if !userfaultfd_or_skip("pages_at_borders_are_asked_for_on_their_own_lanes") {
        return;
    }
    let (pages, shards) = (1000, 4);
    let mut hand = handed_over(pages, shards, 1);
    let border = borders(pages, shards);
    assert!(border.len() >= 8);
    // All at once, so that several lanes are at work.
    let guests: Vec<_> = border.iter().map(|page| guest_reads(&hand.ram, *page)).collect();
    let mut asked: Vec<_> = border.iter().map(|_| hand.request()).collect();
    for request in &asked {
        hand.answer(*request, ReplyContent::Raw, &filled(request.page.0 + 1));
    }
    for (guest, page) in guests.into_iter().zip(&border) {
        assert_eq!(guest.join().unwrap(), page.0 + 1);
    }
    asked.sort_by_key(|request| request.page);
    assert_eq!(asked.iter().map(|request| request.page).collect::<Vec<_>>(), border, "each once");
    hand.finish_with_zeros();
    let stats = hand.pager().fault_stats();
    assert_eq!((stats.remote, stats.total.len()), (border.len() as u64, border.len() as u64));
    assert_eq!(hand.pager().waits().faults, border.len() as u64);
}

#[test]
fn a_pushed_chunk_across_shards_wakes_who_waits_in_each() {
    if !userfaultfd_or_skip("a_pushed_chunk_across_shards_wakes_who_waits_in_each") {
        return;
    }
    // Stripes of 16 pages: a chunk lies in four of them.
    let mut hand = handed_over(64, 4, 1);
    let border = borders(64, 4);
    assert_eq!(border.len(), 8);
    let guests: Vec<_> = border.iter().map(|page| guest_reads(&hand.ram, *page)).collect();
    let asked: Vec<_> = border.iter().map(|_| hand.request()).collect();
    let bytes: Vec<u8> = (0..64).flat_map(|page| filled(WORD + page)).collect();
    hand.send(0, &chunk(0, u64::MAX, 0), FrameFlags::default(), &[&bytes]);
    for (guest, page) in guests.into_iter().zip(&border) {
        assert_eq!(guest.join().unwrap(), WORD + page.0);
    }
    assert_eq!(hand.events.recv_timeout(PATIENCE), Ok(PagerEvent::Complete));
    for request in asked {
        hand.answer(request, ReplyContent::Raw, &filled(!WORD));
    }
    until("the answers are thrown away", || hand.pager().progress().discarded == 8);
    assert!((0..64).all(|page| guest_read(&hand.ram, PageIndex(page), 0) == WORD + page));
    hand.end_complete();
    let stats = hand.pager().fault_stats();
    assert_eq!((stats.remote, stats.raced, stats.total.len()), (0, 8, 8), "every race's time is known to its shard");
}

#[test]
fn a_lost_link_is_lost_for_all_shards_and_joined_for_all() {
    if !userfaultfd_or_skip("a_lost_link_is_lost_for_all_shards_and_joined_for_all") {
        return;
    }
    // Stripes of 64 pages, a shard each.
    let mut hand = handed_over(192, 3, 2);
    let waiting: Vec<_> = [0, 64, 128].map(PageIndex).into_iter().map(|page| guest_reads(&hand.ram, page)).collect();
    let asked: Vec<_> = waiting.iter().map(|_| hand.request()).collect();
    // One answer breaks off in its page, one in its header, one never begins.
    for (request, sent) in asked.iter().zip([FaultReply::LEN + 1000, 5, 0]) {
        let reply =
            FaultReply { page: request.page, tag: request.tag, content: ReplyContent::Raw }.encode(Checksum::NONE);
        let whole = [&reply[..], &filled(!WORD)].concat();
        hand.send_fault_bytes_for(request.page, &whole[..sent]);
    }
    // A chunk breaks off for whose page, in the last shard, a guest begins to wait.
    hand.send_bytes(0, &chunk(128, u64::MAX << 1, 0).encode(FrameFlags::default(), Checksum::NONE));
    hand.send_bytes(0, &filled(!WORD).repeat(10));
    until("the chunk is landing", || hand.received(0) > 0);
    let late = guest_reads(&hand.ram, PageIndex(190));
    hand.detach();
    assert_eq!(hand.pager().missing(), [u64::MAX; 3]);
    // Who begins to wait meanwhile waits for the next link too.
    let later = guest_reads(&hand.ram, PageIndex(66));

    for wrong in [1, 2, 4] {
        let reason = hand.refused(wrong);
        assert!(reason.contains("in place of 3"), "{reason}");
    }
    hand.attach(1);
    let mut again: Vec<_> = (0..5).map(|_| hand.request()).collect();
    for request in &again {
        hand.answer(*request, ReplyContent::Raw, &filled(WORD));
    }
    for guest in waiting.into_iter().chain([late, later]) {
        assert_eq!(guest.join().unwrap(), WORD);
    }
    again.sort_by_key(|request| request.page);
    assert_eq!(again.iter().map(|request| request.page.0).collect::<Vec<_>>(), [0, 64, 66, 128, 190]);
    hand.finish_with_zeros();
    assert_eq!(guest_read(&hand.ram, PageIndex(130), 511), 0, "what landed in part was wiped out");
}

#[test]
fn what_every_lane_has_to_say_is_said_before_a_link_is_let_go_of() {
    if !userfaultfd_or_skip("what_every_lane_has_to_say_is_said_before_a_link_is_let_go_of") {
        return;
    }
    let said = Arc::new(AtomicU64::new(0));
    let notify: Notify = {
        let said = Arc::clone(&said);
        Arc::new(move |event| {
            if let PagerEvent::LaneFailed { lane, .. } = event {
                // Some take longer to say it.
                thread::sleep(Duration::from_millis(40 * u64::from(lane.index)));
                said.fetch_add(1, Ordering::AcqRel);
            }
        })
    };
    let (near, far): (Vec<_>, Vec<_>) = (0..3).map(|index| lane_pair(LaneRole::Fault, index)).unzip();
    let mut pager = DestinationPager::start(Ram::new(PageCount(192)).unwrap(), far, false, &notify).unwrap();
    near.iter().for_each(|lane| lane.socket.shutdown());
    pager.detach();
    assert_eq!(said.load(Ordering::Acquire), 3);
    // Without a lane nothing but its own bell wakes a fault thread to its end.
    pager.abandon();
}

/// A counter-based generator: the same moments in every run.
struct Steps(u64);

impl Steps {
    fn next(&mut self, below: u64) -> u64 {
        // The constants of Knuth's MMIX generator.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

#[test]
fn links_are_lost_again_and_again_while_guests_run_all_over_memory() {
    if !userfaultfd_or_skip("links_are_lost_again_and_again_while_guests_run_all_over_memory") {
        return;
    }
    for (shards, seed) in [(1, 1), (2, 2), (3, 3), (8, 4)] {
        lose_links(shards, seed);
    }
}

/// Real pagers at both ends. Each page is read and then written by one of four guests; nothing that comes later may undo that.
fn lose_links(shards: u8, seed: u64) {
    const PAGES: u64 = 3000;
    const GUESTS: u64 = 4;
    const LINKS: u64 = 6;
    let from = Ram::new(PageCount(PAGES)).unwrap();
    let content = |page: u64| if page.is_multiple_of(5) { 0 } else { page + WORD };
    for page in (0..PAGES).map(PageIndex) {
        guest_write(&from, page, 511, content(page.0));
    }
    let to = Ram::new(PageCount(PAGES)).unwrap();
    let lanes = || -> (Vec<PageLane>, Vec<PageLane>) {
        let roles =
            (0..shards).map(|index| (LaneRole::Fault, index)).chain((0..2).map(|index| (LaneRole::Bulk, index)));
        roles.map(|(role, index)| lane_pair(role, index)).unzip()
    };
    let (notify, seen) = events();
    let visited = Arc::new(AtomicU64::new(0));
    // One for each page that may be visited: each link shall have its share of the faults.
    let (permit, permits) = unbounded::<()>();
    let guests: Vec<_> = (0..GUESTS)
        .map(|guest| {
            let (to, visited, permits) = (to.clone(), Arc::clone(&visited), permits.clone());
            thread::spawn(move || {
                for step in 0..PAGES / GUESTS {
                    permits.recv().unwrap();
                    let page = PageIndex(((step * GUESTS + guest) * 1_009) % PAGES);
                    assert_eq!(guest_read(&to, page, 511), content(page.0), "{page}");
                    guest_write(&to, page, 0, page.0 + 1);
                    visited.fetch_add(1, Ordering::AcqRel);
                }
            })
        })
        .collect();

    let mut steps = Steps(seed);
    let mut begun: Option<DestinationPager> = None;
    for link in 0..LINKS {
        let last = link + 1 == LINKS;
        let (near, far) = lanes();
        let (source_notify, _source_events) = events();
        // So slow that faults bring most of it.
        let bandwidth = if last { 0 } else { 4 << 20 };
        let missing = begun.as_ref().map_or_else(|| all(PAGES), DestinationPager::missing);
        // It serves before anybody asks.
        let mut source = SourcePager::start(from.clone(), near.clone(), bandwidth, &source_notify).unwrap();
        source.start_serving(&[], Rest { missing, ..Rest::default() });
        source.start_sweep();
        let destination = match &mut begun {
            Some(destination) => {
                destination.attach(far).unwrap();
                destination
            }
            None => {
                let first = DestinationPager::start(to.clone(), far, false, &notify).unwrap();
                first.hand_over(&all(PAGES)).unwrap();
                begun.insert(first)
            }
        };
        (0..PAGES / LINKS).for_each(|_| permit.send(()).unwrap());
        if last {
            until("memory is complete", || seen.try_iter().any(|event| event == PagerEvent::Complete));
            guests.into_iter().for_each(|guest| guest.join().unwrap());
            destination.finish().unwrap();
            source.stop();
            break;
        }
        let enough = (link + 1) * (PAGES / LINKS) - 1 - steps.next(PAGES / LINKS * 4 / 5);
        until("the guests are on their way", || visited.load(Ordering::Acquire) >= enough);
        // Any lane may be the first to go.
        let first = usize::try_from(steps.next(near.len() as u64)).unwrap();
        near[first].socket.shutdown();
        destination.detach();
        source.stop();
    }
    let destination = begun.unwrap();
    for page in 0..PAGES {
        assert_eq!(guest_read(&to, PageIndex(page), 511), content(page), "page {page} of {shards} shards");
        assert_eq!(guest_read(&to, PageIndex(page), 0), page + 1, "page {page} lost the guest's write");
    }
    let (progress, stats) = (destination.progress(), destination.fault_stats());
    assert_eq!(progress.zero + progress.pushed + progress.requested, PAGES, "{progress:?}");
    assert_eq!(stats.total.len(), stats.remote + stats.raced);
}
