//! A destination's pager whose link is lost and joined again: nothing is forgotten, and nothing torn is kept.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
mod hand;

use std::thread::{self, JoinHandle};

use common::{guest_read, guest_write, userfaultfd_or_skip};
use hand::{Hand, chunk, filled, until};
use switchover_pager::ram::Ram;
use switchover_wire::checksum::Checksum;
use switchover_wire::encoding::{Encoding, PageEncoder, PayloadWriter};
use switchover_wire::frame::bulk::{BulkFrame, FrameFlags};
use switchover_wire::frame::fault::{FaultReply, ReplyContent};
use switchover_wire::types::{PAGE_SIZE, PageIndex};

const WORD: u64 = 0x5157_4954_4348_4f56;

fn guest_reads(ram: &Ram, page: u64) -> JoinHandle<u64> {
    let ram = ram.clone();
    thread::spawn(move || guest_read(&ram, PageIndex(page), 7))
}

fn handed_over(pages: u64, lanes: u8) -> Hand {
    let hand = Hand::new(pages, lanes, false);
    hand.pager().hand_over(&vec![u64::MAX; usize::try_from(pages.div_ceil(64)).unwrap()]).unwrap();
    hand
}

/// All of `data`, with `filled(WORD)` in each page.
fn push(hand: &mut Hand, lane: usize, first: u64, data: u64) {
    let bytes = filled(WORD).repeat(data.count_ones() as usize);
    hand.send(lane, &chunk(first, data, 0), FrameFlags::default(), &[&bytes]);
}

#[test]
fn what_was_waited_for_is_asked_for_again() {
    if !userfaultfd_or_skip("what_was_waited_for_is_asked_for_again") {
        return;
    }
    let mut hand = handed_over(256, 2);
    // One asked for and not answered; one whose answer breaks off in its page; a chunk that breaks off, for a page of which the
    // guest waits as well.
    let waiting: Vec<_> = [200, 201].into_iter().map(|page| guest_reads(&hand.ram, page)).collect();
    let mut asked = [hand.request(), hand.request()];
    asked.sort_by_key(|request| request.page.0);
    let half = FaultReply { page: asked[0].page, tag: asked[0].tag, content: ReplyContent::Raw }.encode(Checksum::NONE);
    // Answers come in the order of the requests.
    if asked[0].tag == 0 {
        hand.send_fault_bytes(&half);
        hand.send_fault_bytes(&filled(!WORD)[..1000]);
    }
    hand.send_bytes(0, &chunk(0, u64::MAX, 0).encode(FrameFlags::default(), Checksum::NONE));
    hand.send_bytes(0, &filled(!WORD).repeat(10));
    until("the chunk is landing", || hand.received(0) > 0);
    let third = guest_reads(&hand.ram, 5);
    // What is complete stays.
    push(&mut hand, 1, 64, u64::MAX);
    until("the second chunk is here", || hand.pager().progress().pushed == 64);

    hand.detach();
    let missing = hand.pager().missing();
    assert_eq!(missing, [u64::MAX, 0, u64::MAX, u64::MAX]);
    assert_eq!(guest_read(&hand.ram, PageIndex(70), 3), WORD, "what is here is served without a link");
    guest_write(&hand.ram, PageIndex(70), 3, 1);
    // Somebody begins to wait while there is nobody to ask.
    let fourth = guest_reads(&hand.ram, 130);

    hand.attach(1);
    let mut pages: Vec<u64> = Vec::new();
    while pages.len() < 4 {
        let request = hand.request();
        pages.push(request.page.0);
        hand.answer(request, ReplyContent::Raw, &filled(WORD));
    }
    pages.sort_unstable();
    pages.dedup();
    assert_eq!(pages, [5, 130, 200, 201]);
    for guest in waiting.into_iter().chain([third, fourth]) {
        assert_eq!(guest.join().unwrap(), WORD);
    }
    for first in [0, 128, 192] {
        push(&mut hand, 0, first, u64::MAX);
    }
    hand.send(0, &BulkFrame::End { pages: 192 }, FrameFlags::default(), &[]);
    hand.complete();
    assert!((0..256).filter(|page| *page != 70).all(|page| guest_read(&hand.ram, PageIndex(page), 3) == WORD));
    assert_eq!(guest_read(&hand.ram, PageIndex(70), 3), 1, "the guest's own write is kept");
    let stats = hand.pager().fault_stats();
    assert_eq!(stats.total.len(), stats.remote + stats.raced);
}

#[test]
fn a_page_that_came_in_part_is_zero_when_its_source_says_so() {
    if !userfaultfd_or_skip("a_page_that_came_in_part_is_zero_when_its_source_says_so") {
        return;
    }
    let mut hand = handed_over(64, 1);
    hand.send_bytes(0, &chunk(0, u64::MAX, 0).encode(FrameFlags::default(), Checksum::NONE));
    hand.send_bytes(0, &filled(WORD).repeat(3));
    until("the chunk is landing", || hand.received(0) > 0);
    until("bytes have landed", || hand::alias_read(&hand.ram, 2, 511) == WORD);
    hand.detach();
    hand.attach(1);
    hand.finish_with_zeros();
    assert!((0..64).all(|page| guest_read(&hand.ram, PageIndex(page), 511) == 0));
}

#[test]
fn a_difference_to_what_may_be_torn_is_refused() {
    if !userfaultfd_or_skip("a_difference_to_what_may_be_torn_is_refused") {
        return;
    }
    let mut hand = handed_over(64, 1);
    hand.detach();
    hand.attach(1);
    let (old, mut new) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    new[8] = 1;
    let mut writer = PayloadWriter::default();
    writer.begin(0, 1);
    assert!(PageEncoder::new(1).delta(&old, &new, PAGE_SIZE, writer.body()));
    writer.finish_page(Encoding::Delta);
    let bytes = writer.bytes().to_vec();
    let payload = u32::try_from(bytes.len()).unwrap();
    let frame = BulkFrame::Packed { first: PageIndex(0), data: 1, zero: 0, payload };
    hand.send(0, &frame, FrameFlags::default(), &[&bytes]);
    let reason = hand.lane_failed(0);
    assert!(reason.contains("torn"), "{reason}");
    hand.end();
}

#[test]
fn a_link_may_be_lost_at_every_byte_of_an_answer() {
    if !userfaultfd_or_skip("a_link_may_be_lost_at_every_byte_of_an_answer") {
        return;
    }
    let mut hand = handed_over(64, 1);
    let guest = guest_reads(&hand.ram, 9);
    for sent in [0, 1, FaultReply::LEN - 1, FaultReply::LEN, FaultReply::LEN + 1, FaultReply::LEN + PAGE_SIZE - 1] {
        let request = hand.request();
        assert_eq!(request.page, PageIndex(9));
        let reply =
            FaultReply { page: request.page, tag: request.tag, content: ReplyContent::Raw }.encode(Checksum::NONE);
        let whole = [&reply[..], &filled(!WORD)].concat();
        hand.send_fault_bytes(&whole[..sent]);
        hand.detach();
        assert!(!guest.is_finished() && hand.pager().missing() == [u64::MAX]);
        hand.attach(1);
    }
    let request = hand.request();
    hand.answer(request, ReplyContent::Raw, &filled(WORD));
    assert_eq!(guest.join().unwrap(), WORD);
    hand.finish_with_zeros();
}

#[test]
fn an_answer_that_broke_off_or_was_wrong_leaves_nothing_behind() {
    if !userfaultfd_or_skip("an_answer_that_broke_off_or_was_wrong_leaves_nothing_behind") {
        return;
    }
    let mut hand = handed_over(64, 1);
    let guest = guest_reads(&hand.ram, 9);
    // Half of the page.
    let request = hand.request();
    let reply = FaultReply { page: request.page, tag: request.tag, content: ReplyContent::Raw }.encode(Checksum::NONE);
    hand.send_fault_bytes(&[&reply[..], &filled(WORD)[..2048]].concat());
    hand.detach();
    assert_eq!(hand::alias_read(&hand.ram, 9, 255), 0, "only whole answers land");
    hand.attach(1);
    // An answer to something else.
    let request = hand.request();
    let wrong =
        FaultReply { page: PageIndex(10), tag: request.tag, content: ReplyContent::Zero }.encode(Checksum::NONE);
    hand.send_fault_bytes(&wrong);
    until("the lane has failed", || !hand.events.is_empty());
    hand.detach();
    hand.attach(1);
    let request = hand.request();
    assert_eq!(request.page, PageIndex(9));
    hand.answer(request, ReplyContent::Zero, &[]);
    assert_eq!(guest.join().unwrap(), 0);
    assert!((0..512).all(|word| guest_read(&hand.ram, PageIndex(9), word) == 0));
    hand.finish_with_zeros();
}

#[test]
fn a_hundred_links_leave_no_thread_and_no_descriptor() {
    if !userfaultfd_or_skip("a_hundred_links_leave_no_thread_and_no_descriptor") {
        return;
    }
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut hand = handed_over(64, 2);
    for _ in 0..100 {
        hand.detach();
        hand.attach(2);
    }
    // The threads of the last links may still be ending; one descriptor kept of each link would be a hundred.
    until("the old lanes are closed", || open() < 60);
    hand.finish_with_zeros();
}
