//! The handoff, with everything that can be under way when it comes: the source is played by hand, frame by frame, so that the
//! order of things is certain; the destination's pager, its sockets and its userfaultfd are real.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
mod hand;

use std::io::IoSliceMut;
use std::os::fd::AsFd;
use std::sync::mpsc::channel;
use std::thread;

use common::{events, guest_read, guest_write, lane_pair, userfaultfd_or_skip};
use hand::{Hand, PATIENCE, alias_read, chunk, filled, is_mapped, precopy, until, zeros};
use switchover_pager::destination::DestinationPagerError;
use switchover_pager::lane::{PageLane, PagerEvent};
use switchover_pager::ram::Ram;
use switchover_pager::sent::ChunkIndex;
use switchover_pager::source::{Rest, SourcePager, UnderWay};
use switchover_wire::checksum::Checksum;
use switchover_wire::encoding::{Encoding, Page, PageEncoder, PayloadWriter};
use switchover_wire::frame::bulk::{BulkFrame, FrameFlags};
use switchover_wire::frame::fault::ReplyContent;
use switchover_wire::ring::Ring;
use switchover_wire::types::{LaneRole, PAGE_SIZE, PageCount, PageIndex};

const OLD: u64 = 0x1111_1111_1111_1111;
const NEW: u64 = 0x2222_2222_2222_2222;

macro_rules! hand {
    ($name:literal, $pages:expr, $lanes:expr, $lazy:expr) => {{
        if !userfaultfd_or_skip($name) {
            return;
        }
        Hand::new($pages, $lanes, $lazy)
    }};
}

/// A guest that reads a word of `page`; what it read comes in the channel.
fn reader(ram: &Ram, page: u64) -> std::sync::mpsc::Receiver<u64> {
    let (tell, told) = channel();
    let ram = ram.clone();
    thread::spawn(move || tell.send(guest_read(&ram, PageIndex(page), 7)));
    told
}

#[test]
fn a_version_that_lands_across_the_handoff_counts_for_nothing() {
    let mut hand = hand!("a_version_that_lands_across_the_handoff_counts_for_nothing", 128, 2, false);
    // Page 4 was here before; page 3 never. Half of the frame comes before the handoff: it is claimed, and page 3 written.
    hand.send(0, &chunk(0, 1 << 4, 0), precopy(true), &[&filled(OLD)]);
    assert_eq!(hand.taken(0), 1);
    let pages = filled(OLD).repeat(2);
    hand.send_bytes(0, &chunk(0, 0b11 << 3, 0).encode(precopy(true), Checksum::of([&pages[..]])));
    hand.send_bytes(0, &filled(OLD));
    until("half of the frame has landed", || alias_read(&hand.ram, 3, 511) == OLD);
    hand.pager().hand_over(&[u64::MAX; 2]).unwrap();
    assert_eq!(hand.pager().progress().missing, 128);

    // A fault on a page that is landing waits for it, and asks nobody.
    let read = reader(&hand.ram, 4);
    until("the fault was seen", || hand.pager().fault_stats().local == 1);
    assert_eq!(hand.pager().progress().requests, 0);
    hand.send_bytes(0, &filled(OLD));
    // The frame counts for nothing in the end, so the page is asked for after all.
    let request = hand.request();
    assert_eq!(request.page, PageIndex(4));
    assert_eq!(hand.taken(0), 2);
    let seen = hand.pager().progress();
    assert_eq!((seen.missing, seen.precopied, seen.kept), (128, 1, 0), "what landed too late is not here");
    assert!(read.try_recv().is_err(), "the guest has read the old version");
    hand.answer(request, ReplyContent::Raw, &filled(NEW));
    assert_eq!(read.recv_timeout(PATIENCE), Ok(NEW));
    guest_write(&hand.ram, PageIndex(4), 9, OLD);

    // The other page's new version comes on another lane; the guest writes it; an old frame comes late.
    hand.send(1, &chunk(0, 1 << 3, 0), FrameFlags { precopy: false, acknowledge: true }, &[&filled(NEW)]);
    assert_eq!(hand.taken(1), 1);
    assert_eq!(guest_read(&hand.ram, PageIndex(3), 7), NEW);
    guest_write(&hand.ram, PageIndex(3), 9, OLD);
    hand.send(0, &chunk(0, 0b11 << 3, 1), precopy(true), &[&filled(OLD), &filled(OLD)]);
    assert_eq!(hand.taken(0), 3);
    for page in [3, 4] {
        assert_eq!((alias_read(&hand.ram, page, 7), alias_read(&hand.ram, page, 9)), (NEW, OLD), "page {page}");
    }
    let seen = hand.pager().progress();
    assert_eq!((seen.missing, seen.pushed, seen.requested, seen.zero), (126, 1, 1, 0), "{seen:?}");
    assert_eq!(seen.discarded, 2, "those of the frame that came after the handoff; {seen:?}");

    // Nobody else is disturbed: the rest comes as zero.
    hand.finish_with_zeros();
    assert_eq!(guest_read(&hand.ram, PageIndex(3), 7), NEW);
}

#[test]
fn a_packed_version_that_comes_too_late_counts_for_nothing() {
    let mut hand = hand!("a_packed_version_that_comes_too_late_counts_for_nothing", 64, 1, false);
    hand.version(0, &zeros(1, 63), &[]);
    hand.version(0, &chunk(0, 1, 0), &[&filled(OLD)]);
    let (frame, payload) = packed(0, 1, |_, body| lz4(OLD + 1, body));
    let before = hand.received(0);
    hand.send_bytes(0, &frame.encode(precopy(true), Checksum::of([&payload[..]])));
    // Whether the handoff comes before or after its claim: it counts for nothing.
    until("its header was read", || hand.received(0) == before + BulkFrame::LEN as u64);
    hand.pager().hand_over(&[1]).unwrap();
    hand.send_bytes(0, &payload);
    assert_eq!(hand.taken(0), 3);
    assert_eq!(hand.pager().progress().missing, 1);
    let read = reader(&hand.ram, 0);
    let request = hand.request();
    hand.answer(request, ReplyContent::Raw, &filled(NEW));
    assert_eq!(read.recv_timeout(PATIENCE), Ok(NEW));
    // And one that comes later still.
    hand.send(0, &frame, precopy(true), &[&payload]);
    assert_eq!(hand.taken(0), 4);
    assert_eq!(alias_read(&hand.ram, 0, 3), NEW);
    hand.complete();
}

#[test]
fn what_is_sent_after_the_handoff_waits_for_it() {
    let mut hand = hand!("what_is_sent_after_the_handoff_waits_for_it", 128, 3, false);
    hand.version(1, &zeros(0, 128), &[]);
    hand.version(1, &chunk(0, 0b11 << 5, 0), &[&filled(OLD), &filled(OLD)]);
    let after = FrameFlags { precopy: false, acknowledge: true };
    let before = [hand.received(0), hand.received(2)];
    // Data on one lane, zeros on another; they overtake the word of the handoff.
    hand.send(0, &chunk(0, 1 << 5, 0), after, &[&filled(NEW)]);
    hand.send(2, &chunk(0, 0, 1 << 6), after, &[]);
    let header = BulkFrame::LEN as u64;
    until("both headers were read", || {
        hand.received(0) >= before[0] + header && hand.received(2) >= before[1] + header
    });
    // Time enough to do the wrong thing.
    (0..50).for_each(|_| hand.version(1, &BulkFrame::Check, &[]));
    let seen = hand.pager().progress();
    assert_eq!((seen.missing, seen.pushed, seen.discarded), (0, 0, 0), "{seen:?}");
    assert!(!hand.receipt_is_here(0) && !hand.receipt_is_here(2));
    assert_eq!([5, 6].map(|page| alias_read(&hand.ram, page, 7)), [OLD, OLD]);

    hand.pager().hand_over(&[0b11 << 5, 0]).unwrap();
    assert_eq!((hand.taken(0), hand.taken(2)), (1, 1));
    hand.complete();
    assert_eq!([5, 6].map(|page| guest_read(&hand.ram, PageIndex(page), 7)), [NEW, 0]);
    let seen = hand.pager().progress();
    assert_eq!((seen.kept, seen.pushed, seen.zero, seen.discarded), (126, 1, 1, 0), "{seen:?}");
}

#[test]
fn what_was_mapped_ahead_and_must_come_again_is_unmapped() {
    for lazy in [false, true] {
        let mut hand = hand!("what_was_mapped_ahead_and_must_come_again_is_unmapped", 192, 1, lazy);
        hand.pager().begin_round(1);
        hand.version(0, &zeros(0, 192), &[]);
        hand.version(0, &chunk(64, 0b1111, 0), &[&filled(OLD)[..]; 4]);
        let mapped = |hand: &Hand| (0..192).filter(|page| is_mapped(&hand.ram, *page)).collect::<Vec<_>>();
        for round in 2..=4 {
            // Page 67 comes again and again: it is never cold.
            hand.pager().begin_round(round);
            hand.version(0, &chunk(64, 0b1000, 0), &[&filled(OLD)]);
        }
        // Where memory was not reserved, zero pages shall not take any before they are touched.
        let cold = |page: &u64| *page != 67 && (!lazy || (64..67).contains(page));
        until("the cold pages are mapped ahead", || mapped(&hand).len() == (0..192).filter(cold).count());
        assert!(!is_mapped(&hand.ram, 67), "a page that comes in every round is not cold");
        hand.pager().begin_round(5);
        // A page that is mapped already is replaced by a newer version, and must not come again: it is read as it is now.
        hand.version(0, &chunk(64, 1 << 2, 0), &[&filled(NEW)]);

        hand.pager().hand_over(&[1 << 63, 0b1011, 0]).unwrap();
        let expected: Vec<_> = (0..192).filter(cold).filter(|page| ![63, 64, 65].contains(page)).collect();
        assert_eq!(mapped(&hand), expected, "lazy: {lazy}");
        hand.pager().map_the_rest();
        let reads = [63, 64, 65].map(|page| (page, reader(&hand.ram, page)));
        for _ in &reads {
            let request = hand.request();
            hand.answer(request, ReplyContent::Raw, &filled(NEW ^ request.page.0));
        }
        for (page, read) in &reads {
            assert_eq!(read.recv_timeout(PATIENCE), Ok(NEW ^ page), "lazy: {lazy}");
        }
        hand.send(0, &chunk(64, 1 << 3, 0), FrameFlags::default(), &[&filled(NEW)]);
        hand.complete();
        assert_eq!(guest_read(&hand.ram, PageIndex(66), 7), NEW);
        assert_eq!(guest_read(&hand.ram, PageIndex(67), 7), NEW);
    }
}

#[test]
fn the_rest_is_mapped_when_the_guest_runs() {
    let mut hand = hand!("the_rest_is_mapped_when_the_guest_runs", 130, 1, false);
    hand.version(0, &zeros(0, 130), &[]);
    hand.version(0, &chunk(128, 0b11, 0), &[&filled(NEW)[..]; 2]);
    hand.pager().hand_over(&[0, 1, 0]).unwrap();
    assert!((0..130).all(|page| !is_mapped(&hand.ram, page)));
    hand.pager().map_the_rest();
    until("what is here is mapped", || (0..130).all(|page| is_mapped(&hand.ram, page) == (page != 64)));
    assert_eq!(guest_read(&hand.ram, PageIndex(129), 7), NEW);
    assert_eq!(hand.pager().fault_stats().local, 0);
    hand.finish_with_zeros();
}

#[test]
fn a_page_that_is_zero_in_the_end_reads_as_zero() {
    for lazy in [false, true] {
        let mut hand = hand!("a_page_that_is_zero_in_the_end_reads_as_zero", 256, 1, lazy);
        hand.version(0, &zeros(0, 256), &[]);
        for first in [0, 64, 128, 192] {
            hand.version(0, &chunk(first, u64::MAX, 0), &[&filled(OLD)[..]; 64]);
        }
        // In pre-copy already: by a mask, a run, and a packed frame's mask.
        hand.version(0, &chunk(0, 0, 0b11), &[]);
        hand.version(0, &zeros(2, 2), &[]);
        let (mut frame, payload) = packed(0, 1 << 6, |_, body| lz4(NEW, body));
        let BulkFrame::Packed { zero, .. } = &mut frame else { panic!("another frame") };
        *zero = 0b11 << 4;
        hand.version(0, &frame, &[&payload]);
        // Half of a frame before the handoff: page 64 is written once more, and then never arrives.
        let pages = filled(NEW).repeat(2);
        hand.send_bytes(0, &chunk(64, 0b11, 0).encode(precopy(true), Checksum::of([&pages[..]])));
        hand.send_bytes(0, &filled(NEW));
        until("half of the frame has landed", || alias_read(&hand.ram, 64, 511) == NEW);
        hand.pager().hand_over(&[0, u64::MAX, u64::MAX, 0b11]).unwrap();
        hand.send_bytes(0, &filled(NEW));
        hand.taken(0);

        let word_sum = |ram: &Ram, page: u64| (0..512).map(|word| guest_read(ram, PageIndex(page), word)).max();
        for page in 0..6 {
            assert_eq!(word_sum(&hand.ram, page), Some(0), "page {page}, lazy: {lazy}");
        }
        assert_eq!(guest_read(&hand.ram, PageIndex(6), 0), NEW);
        // After it: by a mask, by a run, and as an answer.
        let after = FrameFlags { precopy: false, acknowledge: true };
        hand.send(0, &chunk(64, 0, u64::MAX), after, &[]);
        hand.send(0, &zeros(128, 64), after, &[]);
        let reads = [192, 193].map(|page| reader(&hand.ram, page));
        for read in reads {
            let request = hand.request();
            hand.answer(request, ReplyContent::Zero, &[]);
            drop(read);
        }
        hand.complete();
        for page in 64..194 {
            assert_eq!(word_sum(&hand.ram, page), Some(0), "page {page}, lazy: {lazy}");
        }
        assert_eq!(guest_read(&hand.ram, PageIndex(194), 0), OLD);
        assert_eq!(hand.pager().progress().zero, 130);
    }
}

#[test]
fn a_handoff_that_forgets_a_page_is_refused() {
    let mut hand = hand!("a_handoff_that_forgets_a_page_is_refused", 100, 1, false);
    hand.version(0, &zeros(0, 99), &[]);
    let refused = hand.pager().hand_over(&[5, 0]);
    assert!(matches!(refused, Err(DestinationPagerError::Forgotten { missing: 2, absent: 3 })), "{refused:?}");
    hand.end();

    // Bits past the end name no page, and too few words name none either.
    let mut hand = Hand::new(100, 1, false);
    hand.version(0, &zeros(0, 99), &[]);
    let refused = hand.pager().hand_over(&[0, 1 << 36]);
    assert!(matches!(refused, Err(DestinationPagerError::Forgotten { missing: 0, absent: 1 })), "{refused:?}");
    hand.end();
    let mut hand = Hand::new(100, 1, false);
    hand.version(0, &zeros(0, 99), &[]);
    assert!(hand.pager().hand_over(&[u64::MAX]).is_err());
    hand.end();
}

/// Version upon version comes while the handoff is made: whatever it interrupts, the books are right.
#[test]
fn the_books_are_right_at_any_moment_of_a_version() {
    let flood = zeros(0, 64).encode(precopy(false), Checksum::NONE).repeat(400);
    for moment in 0..150 {
        let mut hand = hand!("the_books_are_right_at_any_moment_of_a_version", 64, 1, true);
        hand.version(0, &zeros(0, 64), &[]);
        let before = hand.received(0);
        hand.send_bytes(0, &flood);
        let frames = 1 + moment % 50;
        until("some of them have come", || hand.received(0) >= before + frames * BulkFrame::LEN as u64);
        // A little later each time.
        (0..moment % 40).for_each(|_| std::hint::spin_loop());
        let done = hand.pager().hand_over(&[u64::MAX]);
        assert!(done.is_ok(), "at moment {moment}: {done:?}");
        assert_eq!(hand.pager().progress().missing, 64);
        hand.finish_with_zeros();
    }
}

#[test]
fn a_second_handoff_is_refused() {
    let mut hand = hand!("a_second_handoff_is_refused", 64, 1, false);
    hand.version(0, &zeros(0, 64), &[]);
    hand.pager().hand_over(&[3]).unwrap();
    let refused = hand.pager().hand_over(&[u64::MAX]);
    assert!(matches!(refused, Err(DestinationPagerError::HandedOver)), "{refused:?}");
    assert_eq!(hand.pager().progress().missing, 2, "what is the guest's stays the guest's");
    hand.send(0, &zeros(0, 2), FrameFlags::default(), &[]);
    hand.complete();
    assert_eq!(hand.pager().progress().kept, 62);
}

#[test]
fn complete_memory_needs_no_pager() {
    for lazy in [false, true] {
        let mut hand = hand!("complete_memory_needs_no_pager", 100, 2, lazy);
        assert!(hand.pager().end_watch().is_err(), "nothing is here");
        hand.version(0, &zeros(0, 100), &[]);
        hand.version(1, &chunk(64, 1 << 35, 0), &[&filled(NEW)]);
        assert!(hand.pager().end_watch().is_err(), "the handoff has not come");
        assert!(hand.events.is_empty(), "before the handoff nothing is complete");
        hand.pager().hand_over(&[0, 0]).unwrap();
        assert_eq!(hand.events.try_recv(), Ok(PagerEvent::Complete), "at once");
        hand.pager().end_watch().unwrap();
        // Both lanes still carry what is under way.
        hand.send(0, &chunk(64, 1 << 35, 0), precopy(true), &[&filled(OLD)]);
        assert_eq!(hand.taken(0), 2);
        hand.end();
        assert_eq!(guest_read(&hand.ram, PageIndex(99), 511), NEW);
        guest_write(&hand.ram, PageIndex(0), 1, 8);
        assert_eq!((guest_read(&hand.ram, PageIndex(0), 1), guest_read(&hand.ram, PageIndex(0), 2)), (8, 0));
        assert!(hand.events.is_empty());
    }
}

#[test]
fn receipts_count_every_frame_since_the_lane_began() {
    let mut hand = hand!("receipts_count_every_frame_since_the_lane_began", 128, 2, false);
    let old = filled(OLD);
    hand.send(0, &zeros(0, 128), precopy(false), &[]);
    hand.send(0, &chunk(0, 3, 4), precopy(false), &[&old, &old]);
    hand.send(0, &BulkFrame::Check, precopy(true), &[]);
    assert_eq!(hand.taken(0), 3);
    let (frame, payload) = packed(64, 1, |_, body| lz4(OLD, body));
    hand.send(0, &frame, precopy(false), &[&payload]);
    hand.send(0, &frame, precopy(true), &[&payload]);
    assert_eq!(hand.taken(0), 5);
    hand.send(1, &chunk(0, 0, 1), precopy(true), &[]);
    assert_eq!(hand.taken(1), 1, "each lane counts its own");
    hand.pager().hand_over(&[1, 0]).unwrap();
    hand.send(0, &chunk(0, 2, 0), precopy(true), &[&old]);
    assert_eq!(hand.taken(0), 6, "what comes too late is taken too");
    hand.send(0, &chunk(0, 1, 0), FrameFlags { precopy: false, acknowledge: true }, &[&filled(NEW)]);
    assert_eq!(hand.taken(0), 7);
    hand.complete();
    assert!(!hand.receipt_is_here(0) && !hand.receipt_is_here(1), "a receipt that nobody asked for");
    let seen = hand.pager().progress();
    assert_eq!((seen.precopied, seen.precopied_zero), (4, 130), "{seen:?}");
}

#[test]
fn packed_pages_land_as_they_were() {
    let mut hand = hand!("packed_pages_land_as_they_were", 192, 1, false);
    hand.version(0, &zeros(0, 192), &[]);
    let mut encoder = PageEncoder::new(1);
    let old = page(|word| word * 3);
    hand.version(0, &chunk(64, 0b1_1000, 0), &[&old[..], &old[..]]);
    // A difference, each compression, one as it is, one the same as a page of an earlier frame; and a zero page.
    let changed = page(|word| if word == 100 { 7 } else { word * 3 });
    let (mut frame, payload) = packed(64, 0b11_0110_1000, |bit, body| match bit {
        3 => encoder.delta(&old, &changed, PAGE_SIZE, body).then_some(Encoding::Delta).unwrap(),
        5 => lz4(NEW, body),
        6 => encoder.zstd(&page_of(NEW + 1), PAGE_SIZE, body).then_some(Encoding::Zstd).unwrap(),
        8 => {
            body.extend_from_slice(&old[..]);
            Encoding::Raw
        }
        _ => {
            PageEncoder::same(PageIndex(68), &blake3::hash(&old[..]), body);
            Encoding::Same
        }
    });
    let BulkFrame::Packed { zero, .. } = &mut frame else { panic!("another frame") };
    *zero = 1;
    hand.version(0, &frame, &[&payload]);
    hand.pager().hand_over(&[0; 3]).unwrap();
    hand.complete();
    let read =
        |index: u64| -> Vec<u64> { (0..512).map(|word| guest_read(&hand.ram, PageIndex(index), word)).collect() };
    let words = |page: &Page| -> Vec<u64> { page.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect() };
    for (index, expected) in [
        (64, page(|_| 0)),
        (67, changed),
        (68, old),
        (69, page_of(NEW)),
        (70, page_of(NEW + 1)),
        (72, old),
        (73, old),
        (71, page(|_| 0)),
    ] {
        assert!(read(index) == words(&expected), "page {index}");
    }
    assert_eq!(hand.pager().progress().precopied, 7);
}

#[test]
fn a_packed_frame_that_cannot_be_ends_its_lane() {
    let old = page(|word| word * 3);
    let changed = page(|word| if word == 100 { 7 } else { word * 3 });
    // A name, the frame, and a word of the reason.
    type Broken = (&'static str, Box<dyn Fn() -> (BulkFrame, Vec<u8>)>, &'static str);
    let broken: [Broken; 5] = [
        ("a table that does not fit", Box::new(|| (packed(0, 1, |_, body| lz4(OLD, body)).0, vec![9; 1])), "table"),
        (
            "a body that is none",
            Box::new(|| {
                packed(0, 2, |_, body| {
                    body.extend_from_slice(&[0xff; 30]);
                    Encoding::Lz4
                })
            }),
            "LZ4",
        ),
        (
            "a difference to what never came",
            Box::new(move || {
                packed(0, 4, |_, body| {
                    assert!(PageEncoder::new(1).delta(&old, &changed, PAGE_SIZE, body));
                    Encoding::Delta
                })
            }),
            "never came",
        ),
        (
            "the same as a page that is not here",
            Box::new(|| {
                packed(0, 1, |_, body| {
                    PageEncoder::same(PageIndex(64), &blake3::hash(&[0; PAGE_SIZE]), body);
                    Encoding::Same
                })
            }),
            "not here",
        ),
        (
            "the same as a page that has another content",
            Box::new(|| {
                packed(0, 1, |_, body| {
                    PageEncoder::same(PageIndex(10), &blake3::hash(&[1; PAGE_SIZE]), body);
                    Encoding::Same
                })
            }),
            "another content",
        ),
    ];
    for (name, make, reason) in broken {
        let mut hand = hand!("a_packed_frame_that_cannot_be_ends_its_lane", 128, 2, false);
        hand.version(0, &chunk(0, 0b1011, 1 << 10), &[&filled(OLD)[..]; 3]);
        let (mut frame, bytes) = make();
        let BulkFrame::Packed { payload, .. } = &mut frame else { panic!("another frame") };
        *payload = u32::try_from(bytes.len()).unwrap();
        hand.send(0, &frame, precopy(true), &[&bytes]);
        let said = hand.lane_failed(0);
        assert!(said.contains(reason), "{name}: {said}");
        assert!(!hand.receipt_is_here(0), "{name}");
        // Nothing of it is here, and the books say so.
        let BulkFrame::Packed { data, .. } = frame else { panic!("another frame") };
        let here = (0b1011_u64 | 1 << 10) & !data;
        assert_eq!(hand.pager().progress().missing, 128 - u64::from(here.count_ones()), "{name}");
        hand.end();
    }
}

#[test]
fn after_the_handoff_pages_may_be_packed_but_not_refer_to_others() {
    let mut hand = hand!("after_the_handoff_pages_may_be_packed_but_not_refer_to_others", 64, 1, false);
    hand.version(0, &zeros(0, 64), &[]);
    hand.pager().hand_over(&[0b11]).unwrap();
    let (frame, payload) = packed(0, 1, |_, body| lz4(NEW, body));
    hand.send(0, &frame, FrameFlags::default(), &[&payload]);
    until("the page is here", || hand.pager().progress().missing == 1);
    assert_eq!(guest_read(&hand.ram, PageIndex(0), 7), NEW);
    let (frame, payload) = packed(0, 0b10, |_, body| {
        PageEncoder::same(PageIndex(5), &blake3::hash(&[0; PAGE_SIZE]), body);
        Encoding::Same
    });
    hand.send(0, &frame, FrameFlags::default(), &[&payload]);
    let said = hand.lane_failed(0);
    assert!(said.contains("reference to another page"), "{said}");
    assert_eq!(hand.pager().progress().missing, 1);
    hand.end();
}

#[test]
fn two_versions_at_once_end_the_lane() {
    for resident in [false, true] {
        let mut hand = hand!("two_versions_at_once_end_the_lane", 64, 3, false);
        if resident {
            hand.version(2, &chunk(0, 0b11, 0), &[&filled(OLD), &filled(OLD)]);
        }
        let pages = filled(OLD + 1).repeat(2);
        hand.send_bytes(0, &chunk(0, 0b11, 0).encode(precopy(true), Checksum::of([&pages[..]])));
        hand.send_bytes(0, &filled(OLD + 1));
        until("half of the frame has landed", || alias_read(&hand.ram, 0, 511) == OLD + 1);
        hand.send(1, &chunk(0, 0b110, 0), precopy(true), &[&filled(NEW), &filled(NEW)]);
        let said = hand.lane_failed(1);
        assert!(said.contains("second version") && said.contains(&PageIndex(1).to_string()), "{said}");
        // The first is not disturbed, and nothing of the second counts.
        hand.send_bytes(0, &filled(OLD + 1));
        assert_eq!(hand.taken(0), 1);
        assert_eq!([0, 1, 2].map(|page| alias_read(&hand.ram, page, 7)), [OLD + 1, OLD + 1, 0]);
        assert_eq!(hand.pager().progress().missing, 62);
        hand.end();
    }
}

#[test]
fn a_lane_that_dies_in_the_middle_of_a_version_leaves_its_pages_missing() {
    let mut hand = hand!("a_lane_that_dies_in_the_middle_of_a_version_leaves_its_pages_missing", 64, 2, false);
    hand.version(0, &zeros(0, 64), &[]);
    hand.version(1, &chunk(0, 0b11, 0), &[&filled(OLD), &filled(OLD)]);
    hand.send_bytes(1, &chunk(0, 0b11, 0).encode(precopy(true), Checksum::NONE));
    hand.send_bytes(1, &filled(NEW));
    until("half of the frame has landed", || alias_read(&hand.ram, 0, 511) == NEW);
    hand.cut(1);
    hand.lane_failed(1);
    assert_eq!(hand.pager().progress().missing, 2, "what is half here is not here");
    assert!(hand.pager().hand_over(&[0]).is_err());
    hand.end();
}

/// A page may be in a lane's stream in an old version: its new one must follow it there, and come nowhere else.
#[test]
fn what_a_lane_still_carries_is_sent_again_by_that_lane_only() {
    const PAGES: u64 = 1000;
    let ram = Ram::new(PageCount(PAGES)).unwrap();
    for page in (0..PAGES).filter(|page| page % 4 > 0) {
        guest_write(&ram, PageIndex(page), 5, page);
    }
    let (fault, _far_fault) = lane_pair(LaneRole::Fault, 0);
    let (near, far): (Vec<_>, Vec<_>) = (0..3).map(|index| lane_pair(LaneRole::Bulk, index)).unzip();
    let (notify, said) = events();
    let lanes = std::iter::once(fault).chain(near.iter().cloned()).collect();
    let mut source = SourcePager::start(ram, lanes, 0, &notify).unwrap();
    let readers: Vec<_> = far.into_iter().map(|lane| thread::spawn(move || pushed(&lane, PAGES))).collect();
    // Lane 1 carries some of the first chunk, and lane 2 others of it and all of the last, which is a short one.
    let carried = [(1, vec![(0, 0xff)]), (2, vec![(0, 0xff00), (15, u64::MAX), (3, 0)])];
    let under_way = carried.iter().map(|(lane, chunks)| UnderWay {
        lane: near[*lane].id,
        chunks: chunks.iter().map(|(chunk, mask)| (ChunkIndex(*chunk), *mask)).collect(),
    });
    // Half of chunk 7 is not missing.
    let mut missing = vec![u64::MAX; 16];
    missing[7] = u64::MAX >> 32;
    let first: Vec<_> = (0..20).chain(990..1000).map(PageIndex).collect();
    source.start_serving(&first, Rest { missing, under_way: under_way.collect(), ..Rest::default() });
    source.push_first(&[PageIndex(3), PageIndex(970)]);
    source.start_sweep();
    assert_eq!(said.recv_timeout(PATIENCE), Ok(PagerEvent::AllPushed));
    let came: Vec<Vec<u64>> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    source.stop();
    let by = |page: u64| came.iter().position(|lane| lane.contains(&page));
    assert!((0..8).all(|page| by(page) == Some(1)), "{came:?}");
    assert!((8..16).chain(960..1000).all(|page| by(page) == Some(2)), "{came:?}");
    let mut all: Vec<_> = came.concat();
    all.sort_unstable();
    let expected: Vec<_> = (0..PAGES).filter(|page| !(7 * 64 + 32..8 * 64).contains(page)).collect();
    assert_eq!(all, expected, "each of them once, and no others");
}

/// The pages that a source pushes on a lane, up to its end.
fn pushed(lane: &PageLane, ram: u64) -> Vec<u64> {
    let mut ring = Ring::new(2).unwrap();
    let mut pages = Vec::new();
    loop {
        let mut header = [0; BulkFrame::LEN];
        ring.recv_exact(lane.socket.as_fd(), &mut [IoSliceMut::new(&mut header)]).unwrap();
        let (frame, flags, checksum) = BulkFrame::decode(&header, PageCount(ram)).unwrap();
        assert!(!flags.precopy);
        let mut payload = vec![0; frame.payload()];
        ring.recv_exact(lane.socket.as_fd(), &mut [IoSliceMut::new(&mut payload)]).unwrap();
        checksum.check(frame.name(), [&payload[..]]).unwrap();
        match frame {
            BulkFrame::Chunk { first, data, zero } => {
                pages.extend((0..64).filter(|bit| (data | zero) >> bit & 1 == 1).map(|bit| first.0 + bit));
            }
            BulkFrame::Zeros { first, count } => pages.extend(first.0..first.0 + count.0),
            BulkFrame::End { .. } => return pages,
            other => panic!("{other:?} after the handoff"),
        }
    }
}

fn page(word: impl Fn(u64) -> u64) -> Page {
    let bytes: Vec<u8> = (0..512).flat_map(|index| word(index).to_le_bytes()).collect();
    bytes.try_into().unwrap()
}

fn page_of(word: u64) -> Page {
    page(|_| word)
}

fn lz4(word: u64, body: &mut Vec<u8>) -> Encoding {
    assert!(PageEncoder::new(1).lz4(&page_of(word), PAGE_SIZE, body));
    Encoding::Lz4
}

/// A packed frame of the pages of `data`, of which `body` appends each, and its payload.
fn packed(first: u64, data: u64, mut body: impl FnMut(u32, &mut Vec<u8>) -> Encoding) -> (BulkFrame, Vec<u8>) {
    let mut writer = PayloadWriter::default();
    writer.begin(0, data.count_ones() as usize);
    for bit in (0..64).filter(|bit| data >> bit & 1 == 1) {
        let encoding = body(bit, writer.body());
        writer.finish_page(encoding);
    }
    let bytes = writer.bytes().to_vec();
    let payload = u32::try_from(bytes.len()).unwrap();
    (BulkFrame::Packed { first: PageIndex(first), data, zero: 0, payload }, bytes)
}
