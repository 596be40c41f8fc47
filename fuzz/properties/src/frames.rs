use switchover_wire::frame::bulk::{BulkFrame, CHUNK_PAGES, PACKED_LIMIT, Taken};
use switchover_wire::frame::fault::{FaultReply, FaultRequest};
use switchover_wire::types::PageCount;

use crate::input::Input;

/// Headers of bulk and fault lanes. Eight bytes are the size of RAM; whatever decodes is within it, and has one form only. Each is
/// looked at as it is, and with a checksum that is right, which chance does not find.
pub fn frames(bytes: &[u8]) {
    let mut input = Input(bytes);
    let ram = PageCount(input.u64());
    let header: [u8; BulkFrame::LEN] = input.number();
    pushed(&header, ram);
    pushed(&sealed(header, BulkFrame::LEN - 4), ram);
    let header: &[u8; FaultRequest::LEN] = header.first_chunk().unwrap();
    asked(header, ram);
    asked(&sealed(*header, FaultRequest::LEN - 4), ram);
    let header: &[u8; Taken::LEN] = header.first_chunk().unwrap();
    for header in [*header, sealed(*header, 4)] {
        if let Ok(taken) = Taken::decode(&header) {
            assert_eq!(taken.encode(), header);
        }
    }
}

fn pushed(header: &[u8; BulkFrame::LEN], ram: PageCount) {
    let Ok((frame, flags, sum)) = BulkFrame::decode(header, ram) else { return };
    assert_eq!(&frame.encode(flags, sum), header);
    assert!(frame.payload() <= PACKED_LIMIT);
    match frame {
        BulkFrame::Chunk { first, data, zero } | BulkFrame::Packed { first, data, zero, .. } => {
            assert!(first.0.is_multiple_of(CHUNK_PAGES) && data & zero == 0);
            let last = u64::from((data | zero).checked_ilog2().unwrap());
            assert!(first.0.checked_add(last).unwrap() < ram.0);
        }
        BulkFrame::Zeros { first, count } => {
            assert!(count.0 > 0 && first.0.checked_add(count.0).unwrap() <= ram.0);
        }
        _ => {}
    }
}

fn asked(header: &[u8; FaultRequest::LEN], ram: PageCount) {
    if let Ok(request) = FaultRequest::decode(header, ram) {
        assert!(request.page.0 < ram.0);
        assert_eq!(&request.encode(), header);
    }
    if let Ok((reply, sum)) = FaultReply::decode(header, ram) {
        assert!(reply.page.0 < ram.0);
        assert_eq!(&reply.encode(sum), header);
    }
}

/// The header with the checksum at `at` that it must have.
fn sealed<const N: usize>(mut header: [u8; N], at: usize) -> [u8; N] {
    header[at..at + 4].fill(0);
    let sum = crc32fast::hash(&header);
    header[at..at + 4].copy_from_slice(&sum.to_le_bytes());
    header
}
