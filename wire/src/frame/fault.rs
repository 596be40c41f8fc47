//! Frames of a fault lane: a request one way, a reply with its page the other.
//!
//! Both headers have 24 bytes: kind, mark, two reserved, tag (4), page (8), checksum of the page that follows (4; 0 where none
//! does), checksum of the header (4).

use super::{FrameError, MARK, check_mark, check_page, check_seal, check_zero, checksum_at, seal, u32_at, u64_at};
use crate::checksum::Checksum;
use crate::types::{PAGE_SIZE, PageCount, PageIndex};

const REQUEST: u8 = 0xF1;
const REPLY_ZERO: u8 = 0xF2;
const REPLY_RAW: u8 = 0xF3;

const HEADER: usize = 24;
/// Where the page's checksum is, and the header's.
const PAYLOAD_SUM: usize = 16;
const SUM: usize = 20;

const REQUEST_NAME: &str = "fault request";
const REPLY_NAME: &str = "fault reply";

/// The destination wants a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FaultRequest {
    /// Which.
    pub page: PageIndex,
    /// Chosen by the destination; the reply repeats it.
    pub tag: u32,
}

impl FaultRequest {
    /// Bytes on the wire.
    pub const LEN: usize = HEADER;

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        header(REQUEST, self.tag, self.page, Checksum::NONE)
    }

    /// From bytes, for a machine with `ram` pages.
    ///
    /// # Errors
    /// When they are no such frame.
    pub fn decode(bytes: &[u8; Self::LEN], ram: PageCount) -> Result<Self, FrameError> {
        if bytes[0] != REQUEST {
            return Err(FrameError::new(REQUEST_NAME, "kind", &format_args!("{:#04x}", bytes[0]), "0xf1"));
        }
        let (tag, page) = fields(REQUEST_NAME, bytes, ram)?;
        check_zero(REQUEST_NAME, "reserved", &bytes[PAYLOAD_SUM..SUM])?;
        Ok(Self { page, tag })
    }
}

/// What follows a reply's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyContent {
    /// Nothing: the page is zero.
    Zero,
    /// The page's bytes.
    Raw,
}

/// The source's answer to a [`FaultRequest`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FaultReply {
    /// The page asked for.
    pub page: PageIndex,
    /// The request's.
    pub tag: u32,
    /// What follows.
    pub content: ReplyContent,
}

impl FaultReply {
    /// Bytes of the header on the wire.
    pub const LEN: usize = HEADER;

    /// Bytes that follow the header.
    #[must_use]
    pub const fn payload(&self) -> usize {
        match self.content {
            ReplyContent::Zero => 0,
            ReplyContent::Raw => PAGE_SIZE,
        }
    }

    /// The header as bytes. `payload` is the checksum of the page that follows.
    #[must_use]
    pub fn encode(&self, payload: Checksum) -> [u8; Self::LEN] {
        let kind = match self.content {
            ReplyContent::Zero => REPLY_ZERO,
            ReplyContent::Raw => REPLY_RAW,
        };
        header(kind, self.tag, self.page, payload)
    }

    /// The header from bytes, for a machine with `ram` pages, and what it says of the page that follows.
    ///
    /// # Errors
    /// When they are no such frame.
    pub fn decode(bytes: &[u8; Self::LEN], ram: PageCount) -> Result<(Self, Checksum), FrameError> {
        let content = match bytes[0] {
            REPLY_ZERO => ReplyContent::Zero,
            REPLY_RAW => ReplyContent::Raw,
            kind => return Err(FrameError::new(REPLY_NAME, "kind", &format_args!("{kind:#04x}"), "0xf2 or 0xf3")),
        };
        let (tag, page) = fields(REPLY_NAME, bytes, ram)?;
        if content == ReplyContent::Zero {
            check_zero(REPLY_NAME, "checksum", &bytes[PAYLOAD_SUM..SUM])?;
        }
        Ok((Self { page, tag, content }, checksum_at(bytes, PAYLOAD_SUM)))
    }
}

fn header(kind: u8, tag: u32, page: PageIndex, payload: Checksum) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[0] = kind;
    bytes[1] = MARK;
    bytes[4..8].copy_from_slice(&tag.to_le_bytes());
    bytes[8..16].copy_from_slice(&page.0.to_le_bytes());
    bytes[PAYLOAD_SUM..SUM].copy_from_slice(&payload.to_bytes());
    seal(&mut bytes, SUM);
    bytes
}

fn fields(frame: &'static str, bytes: &[u8; HEADER], ram: PageCount) -> Result<(u32, PageIndex), FrameError> {
    check_mark(frame, bytes[1])?;
    check_seal(frame, bytes, SUM)?;
    check_zero(frame, "reserved", &bytes[2..4])?;
    Ok((u32_at(bytes, 4), check_page(frame, "page", u64_at(bytes, 8), ram)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RAM: PageCount = PageCount(1000);

    proptest! {
        #[test]
        fn requests_and_replies_survive_the_wire(page in 0..1000_u64, tag: u32, raw: bool) {
            let page = PageIndex(page);
            let request = FaultRequest { page, tag };
            prop_assert_eq!(FaultRequest::decode(&request.encode(), RAM).unwrap(), request);
            let content = if raw { ReplyContent::Raw } else { ReplyContent::Zero };
            let reply = FaultReply { page, tag, content };
            let sum = Checksum::of(raw.then_some(&tag.to_le_bytes()[..]));
            prop_assert_eq!(FaultReply::decode(&reply.encode(sum), RAM).unwrap(), (reply, sum));
        }

        #[test]
        fn a_changed_byte_is_no_frame(page in 0..1000_u64, tag: u32, raw: bool, at in 0..HEADER, change in 1..=255_u8) {
            let page = PageIndex(page);
            let mut bytes = FaultRequest { page, tag }.encode();
            bytes[at] ^= change;
            prop_assert!(FaultRequest::decode(&bytes, RAM).is_err());
            let (content, sum) = if raw {
                (ReplyContent::Raw, Checksum::of([&b"a page"[..]]))
            } else {
                (ReplyContent::Zero, Checksum::NONE)
            };
            let mut bytes = FaultReply { page, tag, content }.encode(sum);
            bytes[at] ^= change;
            prop_assert!(FaultReply::decode(&bytes, RAM).is_err());
        }

        #[test]
        fn whatever_decodes_is_within_ram_and_the_same_bytes(
            kind in prop_oneof![Just(REQUEST), Just(REPLY_ZERO), Just(REPLY_RAW), any::<u8>()],
            mark in prop_oneof![Just(MARK), any::<u8>()],
            reserved in prop_oneof![Just([0; 2]), any::<[u8; 2]>()],
            tag: [u8; 4],
            page in prop_oneof![0..2000_u64, any::<u64>()],
            sum in prop_oneof![Just([0; 4]), any::<[u8; 4]>()],
            sealed in prop::bool::weighted(0.8),
        ) {
            let mut bytes = [0; HEADER];
            bytes[0] = kind;
            bytes[1] = mark;
            bytes[2..4].copy_from_slice(&reserved);
            bytes[4..8].copy_from_slice(&tag);
            bytes[8..16].copy_from_slice(&page.to_le_bytes());
            bytes[PAYLOAD_SUM..SUM].copy_from_slice(&sum);
            if sealed {
                seal(&mut bytes, SUM);
            }
            let well_formed = sealed && mark == MARK && reserved == [0; 2] && page < RAM.0;
            let without = sum == [0; 4];
            let request = FaultRequest::decode(&bytes, RAM);
            prop_assert_eq!(request.is_ok(), well_formed && kind == REQUEST && without);
            if let Ok(request) = request {
                prop_assert_eq!(request.encode(), bytes);
            }
            let reply = FaultReply::decode(&bytes, RAM);
            prop_assert_eq!(reply.is_ok(), well_formed && (kind == REPLY_ZERO && without || kind == REPLY_RAW));
            if let Ok((reply, sum)) = reply {
                prop_assert_eq!(reply.encode(sum), bytes);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: [u8; HEADER], ram: u64) {
            let _ = FaultRequest::decode(&bytes, PageCount(ram));
            let _ = FaultReply::decode(&bytes, PageCount(ram));
        }
    }

    #[test]
    fn an_error_names_frame_field_and_bound() {
        let bytes = FaultRequest { page: PageIndex(1000), tag: 7 }.encode();
        assert_eq!(
            FaultRequest::decode(&bytes, RAM).unwrap_err().to_string(),
            "a fault request frame is wrong: page is 0x3e8, where a page below 0x3e8 is allowed"
        );
        let bytes = FaultReply { page: PageIndex(1), tag: 7, content: ReplyContent::Raw }.encode(Checksum::NONE);
        let error = FaultRequest::decode(&bytes, RAM).unwrap_err();
        assert_eq!((error.field, error.got.as_str()), ("kind", "0xf3"));
    }

    #[test]
    fn only_a_raw_reply_is_followed_by_a_page() {
        let reply = |content| FaultReply { page: PageIndex(1), tag: 0, content };
        assert_eq!(reply(ReplyContent::Zero).payload(), 0);
        assert_eq!(reply(ReplyContent::Raw).payload(), PAGE_SIZE);
    }
}
