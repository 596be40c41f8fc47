//! What was damaged on the way is noticed before anybody sees it, and comes again.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;
#[path = "hand/mod.rs"]
mod hand;

use std::thread;

use common::{guest_read, guest_write, userfaultfd_or_skip};
use hand::{Hand, chunk, filled, precopy, until};
use switchover_pager::lane::PagerEvent;
use switchover_wire::checksum::Checksum;
use switchover_wire::encoding::{Encoding, PayloadWriter};
use switchover_wire::frame::bulk::{BulkFrame, FrameFlags};
use switchover_wire::frame::fault::{FaultReply, ReplyContent};
use switchover_wire::types::{LaneRole, PAGE_SIZE, PageIndex};

const WORD: u64 = 0x5EED_5EED;
const WRITTEN: u64 = 3;

/// A whole frame with one bit flipped, counted from the first of its header.
fn flipped(header: &[u8], payload: &[u8], bit: usize) -> Vec<u8> {
    let mut bytes = [header, payload].concat();
    bytes[bit / 8] ^= 1 << (bit % 8);
    bytes
}

/// Bits at the edges of each of a frame's pages and fields, and some within.
fn bits_of(header: usize, payload: usize) -> Vec<usize> {
    let inside = (0..payload).step_by(PAGE_SIZE).flat_map(|page| [page, page + 1717, page + PAGE_SIZE - 1]);
    let inside = inside.filter(|byte| *byte < payload).map(|byte| (header + byte) * 8 + byte % 8);
    (0..header * 8).step_by(3).chain(inside).collect()
}

#[test]
fn a_pushed_frame_with_a_flipped_bit_ends_its_lane_and_comes_again() {
    if !userfaultfd_or_skip("a_pushed_frame_with_a_flipped_bit_ends_its_lane_and_comes_again") {
        return;
    }
    let mut hand = Hand::new(128, 1, false);
    hand.pager().hand_over(&[u64::MAX; 2]).unwrap();
    // Page 2 is here, and written: the frames that follow lose its claim.
    hand.send(0, &chunk(0, 0b100, 0), FrameFlags::default(), &[&filled(WORD)]);
    until("the page is here", || hand.pager().progress().missing == 127);
    guest_write(&hand.ram, PageIndex(2), 7, WRITTEN);
    // Somebody waits for one of its pages.
    let ram = hand.ram.clone();
    let guest = thread::spawn(move || guest_read(&ram, PageIndex(3), 511));

    let pages = filled(WORD).repeat(3);
    let header = chunk(0, 0b1110, 0b1).encode(FrameFlags::default(), Checksum::of([&pages[..]]));
    for bit in bits_of(header.len(), pages.len()) {
        hand.request();
        hand.send_bytes(0, &flipped(&header, &pages, bit));
        let reason = hand.lane_failed(0);
        if bit >= header.len() * 8 {
            assert!(reason.contains("a chunk frame is wrong: the CRC-32 of the payload"), "{reason}");
            // The zero mask is in the header, which was sound.
            assert_eq!(hand.pager().missing(), [!0b101, u64::MAX]);
        } else {
            assert!(reason.contains("frame is wrong"), "bit {bit}: {reason}");
        }
        assert_eq!(guest_read(&hand.ram, PageIndex(2), 7), WRITTEN, "bit {bit}");
        hand.detach();
        hand.attach(1);
        assert!(!guest.is_finished(), "bit {bit}: the guest has seen what was damaged");
    }
    hand.request();
    hand.send_bytes(0, &[&header[..], &pages].concat());
    assert_eq!(guest.join().unwrap(), WORD);
    assert_eq!(guest_read(&hand.ram, PageIndex(1), 0), WORD);
    hand.finish_with_zeros();
}

#[test]
fn a_packed_frame_with_a_flipped_bit_ends_its_lane() {
    if !userfaultfd_or_skip("a_packed_frame_with_a_flipped_bit_ends_its_lane") {
        return;
    }
    let mut writer = PayloadWriter::default();
    writer.begin(0, 1);
    // As it is: of an encoded page most damage would be found in the decoder.
    writer.body().extend(filled(WORD));
    writer.finish_page(Encoding::Raw);
    let bytes = writer.bytes().to_vec();
    let payload = u32::try_from(bytes.len()).unwrap();
    let frame = BulkFrame::Packed { first: PageIndex(0), data: 1, zero: 0, payload };
    for flags in [precopy(true), FrameFlags::default()] {
        let header = frame.encode(flags, Checksum::of([&bytes[..]]));
        for bit in bits_of(0, bytes.len()) {
            let mut hand = Hand::new(64, 1, false);
            if !flags.precopy {
                hand.pager().hand_over(&[u64::MAX]).unwrap();
            }
            hand.send_bytes(0, &flipped(&header, &bytes, header.len() * 8 + bit));
            let reason = hand.lane_failed(0);
            assert!(reason.contains("a packed chunk frame is wrong: the CRC-32 of the payload"), "bit {bit}: {reason}");
            assert_eq!(hand.pager().missing(), [u64::MAX]);
            hand.end();
        }
    }
}

#[test]
fn a_version_with_a_flipped_bit_is_not_here() {
    if !userfaultfd_or_skip("a_version_with_a_flipped_bit_is_not_here") {
        return;
    }
    let pages = filled(WORD).repeat(2);
    let header = chunk(0, 0b11, 0).encode(precopy(true), Checksum::of([&pages[..]]));
    for bit in bits_of(header.len(), pages.len()) {
        let mut hand = Hand::new(64, 2, false);
        hand.version(1, &chunk(0, 0b11, 0), &[&filled(WRITTEN), &filled(WRITTEN)]);
        hand.send_bytes(0, &flipped(&header, &pages, bit));
        let reason = hand.lane_failed(0);
        assert!(reason.contains("frame is wrong"), "bit {bit}: {reason}");
        assert!(!hand.receipt_is_here(0), "bit {bit}");
        let here = hand.pager().progress().missing == 62;
        assert_eq!(here, bit < header.len() * 8, "bit {bit}: whether the version before is still there");
        hand.end();
    }
}

#[test]
fn an_answer_with_a_flipped_bit_ends_its_lane_and_is_asked_for_again() {
    if !userfaultfd_or_skip("an_answer_with_a_flipped_bit_ends_its_lane_and_is_asked_for_again") {
        return;
    }
    let mut hand = Hand::new(64, 1, false);
    hand.pager().hand_over(&[u64::MAX]).unwrap();
    let ram = hand.ram.clone();
    let guest = thread::spawn(move || guest_read(&ram, PageIndex(9), 511));
    let page = filled(WORD);
    for bit in bits_of(FaultReply::LEN, PAGE_SIZE) {
        let request = hand.request();
        let reply = FaultReply { page: request.page, tag: request.tag, content: ReplyContent::Raw };
        hand.send_fault_bytes(&flipped(&reply.encode(Checksum::of([&page[..]])), &page, bit));
        match hand.events.recv_timeout(hand::PATIENCE) {
            Ok(PagerEvent::LaneFailed { lane, reason }) => {
                assert_eq!(lane.role, LaneRole::Fault);
                assert!(reason.contains("a fault reply frame is wrong"), "bit {bit}: {reason}");
            }
            other => panic!("bit {bit}: {other:?}"),
        }
        assert!(!guest.is_finished(), "bit {bit}: the guest has seen what was damaged");
        assert_eq!(hand.pager().missing(), [u64::MAX], "bit {bit}");
        hand.detach();
        hand.attach(1);
    }
    // What has landed of it leaves nothing behind.
    let request = hand.request();
    hand.answer(request, ReplyContent::Zero, &[]);
    assert_eq!(guest.join().unwrap(), 0);
    assert!((0..512).all(|word| guest_read(&hand.ram, PageIndex(9), word) == 0));
    hand.finish_with_zeros();
}
