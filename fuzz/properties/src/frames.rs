use switchover_wire::frame::bulk::{BulkFrame, CHUNK_PAGES, PACKED_LIMIT, Taken};
use switchover_wire::frame::fault::{FaultReply, FaultRequest};
use switchover_wire::types::PageCount;

use crate::input::Input;

/// Headers of bulk and fault lanes. Eight bytes are the size of RAM; whatever decodes is within it, and has one form only.
pub fn frames(bytes: &[u8]) {
    let mut input = Input(bytes);
    let ram = PageCount(input.u64());
    let header: [u8; BulkFrame::LEN] = input.number();
    if let Ok((frame, flags)) = BulkFrame::decode(&header, ram) {
        assert_eq!(frame.encode(flags), header);
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
    let header = header.first_chunk().unwrap();
    if let Ok(request) = FaultRequest::decode(header, ram) {
        assert!(request.page.0 < ram.0);
        assert_eq!(&request.encode(), header);
    }
    if let Ok(reply) = FaultReply::decode(header, ram) {
        assert!(reply.page.0 < ram.0);
        assert_eq!(&reply.encode(), header);
    }
    if let Ok(taken) = Taken::decode(header) {
        assert_eq!(&taken.encode(), header);
    }
}
