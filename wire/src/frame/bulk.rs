//! Frames of a bulk lane: pages that the source pushes, and, the other way, what the destination has taken of them.
//!
//! All headers of the source have 40 bytes: kind, mark, flags, a reserved byte, the length of a packed payload (4),
//! three numbers of 8 bytes each, the checksum of what follows (4; 0 where nothing does) and that of the header (4):
//!
//! | kind | payload length | first number | second | third |
//! |---|---|---|---|---|
//! | chunk | 0 | first page | data mask | zero mask |
//! | zeros | 0 | first page | count | 0 |
//! | end | 0 | data pages sent | 0 | 0 |
//! | packed | bytes | first page | data mask | zero mask |
//! | check | 0 | 0 | 0 | 0 |
//!
//! The destination's have 16: kind, mark, two reserved, checksum of the header (4), frames taken since the lane began (8).

use super::{FrameError, MARK, check_mark, check_page, check_seal, check_zero, checksum_at, seal, u32_at, u64_at};
use crate::checksum::Checksum;
use crate::types::{PAGE_SIZE, PageCount, PageIndex};

/// Pages that one [`BulkFrame::Chunk`] can cover: one for each bit of its masks.
pub const CHUNK_PAGES: u64 = 64;

const CHUNK: u8 = 0xB1;
const ZEROS: u8 = 0xB2;
const END: u8 = 0xB3;
const PACKED: u8 = 0xB4;
const CHECK: u8 = 0xB5;
const TAKEN: u8 = 0xBA;

const CHUNK_NAME: &str = "chunk";
const ZEROS_NAME: &str = "zeros";
const END_NAME: &str = "end";
const PACKED_NAME: &str = "packed chunk";
const CHECK_NAME: &str = "check";
const TAKEN_NAME: &str = "taken";

/// Where the checksum of a source's payload is, and that of the header.
const PAYLOAD_SUM: usize = 32;
const SUM: usize = 36;
/// Where that of a [`Taken`] is.
const TAKEN_SUM: usize = 4;

/// The longest payload of a packed chunk: every page as it is, and room for what each entry of its table may take.
pub const PACKED_LIMIT: usize = u64::BITS as usize * (PAGE_SIZE + 64);

/// What holds for a frame besides its content.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FrameFlags {
    /// Sent while the guest still ran on the source: it counts for nothing once the handoff's set of missing pages is known.
    pub precopy: bool,
    /// The destination answers with [`Taken`] when it has taken this frame.
    pub acknowledge: bool,
}

impl FrameFlags {
    const PRECOPY: u8 = 1;
    const ACKNOWLEDGE: u8 = 2;

    /// As the header's byte.
    #[must_use]
    pub const fn bits(self) -> u8 {
        (if self.precopy { Self::PRECOPY } else { 0 }) | (if self.acknowledge { Self::ACKNOWLEDGE } else { 0 })
    }

    fn from_bits(frame: &'static str, bits: u8) -> Result<Self, FrameError> {
        if bits & !(Self::PRECOPY | Self::ACKNOWLEDGE) != 0 {
            return Err(FrameError::new(frame, "flags", &format_args!("{bits:#04x}"), "a sum of 1 and 2"));
        }
        Ok(Self { precopy: bits & Self::PRECOPY != 0, acknowledge: bits & Self::ACKNOWLEDGE != 0 })
    }
}

/// A header on a bulk lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BulkFrame {
    /// Pages among the [`CHUNK_PAGES`] from `first`. Those with a bit in `data` follow the header, in order.
    Chunk {
        /// A multiple of [`CHUNK_PAGES`].
        first: PageIndex,
        /// Bit i: page `first + i` follows.
        data: u64,
        /// Bit i: page `first + i` is zero.
        zero: u64,
    },
    /// A run of zero pages.
    Zeros {
        /// The run's first page.
        first: PageIndex,
        /// Its length, at least 1.
        count: PageCount,
    },
    /// As [`BulkFrame::Chunk`], but the pages are encoded: a payload of `payload` bytes follows, in the format of
    /// [`crate::encoding`].
    Packed {
        /// A multiple of [`CHUNK_PAGES`].
        first: PageIndex,
        /// Bit i: page `first + i` is in the payload.
        data: u64,
        /// Bit i: page `first + i` is zero.
        zero: u64,
        /// Bytes that follow, at most [`PACKED_LIMIT`].
        payload: u32,
    },
    /// Nothing: asks for a receipt where no more pages are to be sent for now.
    Check,
    /// The source has pushed everything that this lane will carry.
    End {
        /// Data pages sent on this lane, to be compared with those received; never used as a size.
        pages: u64,
    },
}

impl BulkFrame {
    /// Bytes of the header on the wire.
    pub const LEN: usize = 40;

    /// What it is called in messages.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Chunk { .. } => CHUNK_NAME,
            Self::Zeros { .. } => ZEROS_NAME,
            Self::Packed { .. } => PACKED_NAME,
            Self::Check => CHECK_NAME,
            Self::End { .. } => END_NAME,
        }
    }

    /// Bytes that follow the header.
    #[must_use]
    pub const fn payload(&self) -> usize {
        match self {
            Self::Chunk { data, .. } => data.count_ones() as usize * PAGE_SIZE,
            Self::Packed { payload, .. } => *payload as usize,
            Self::Zeros { .. } | Self::Check | Self::End { .. } => 0,
        }
    }

    /// The header as bytes. `payload` is the checksum of what follows.
    #[must_use]
    pub fn encode(&self, flags: FrameFlags, payload: Checksum) -> [u8; Self::LEN] {
        let (kind, length, numbers) = match *self {
            Self::Chunk { first, data, zero } => (CHUNK, 0, [first.0, data, zero]),
            Self::Zeros { first, count } => (ZEROS, 0, [first.0, count.0, 0]),
            Self::End { pages } => (END, 0, [pages, 0, 0]),
            Self::Check => (CHECK, 0, [0; 3]),
            Self::Packed { first, data, zero, payload } => (PACKED, payload, [first.0, data, zero]),
        };
        let mut bytes = [0; Self::LEN];
        bytes[0] = kind;
        bytes[1] = MARK;
        bytes[2] = flags.bits();
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        for (field, number) in bytes[8..PAYLOAD_SUM].chunks_exact_mut(8).zip(numbers) {
            field.copy_from_slice(&number.to_le_bytes());
        }
        bytes[PAYLOAD_SUM..SUM].copy_from_slice(&payload.to_bytes());
        seal(&mut bytes, SUM);
        bytes
    }

    /// The header from bytes, for a machine with `ram` pages, and what it says of what follows.
    ///
    /// # Errors
    /// When they are no such frame.
    pub fn decode(bytes: &[u8; Self::LEN], ram: PageCount) -> Result<(Self, FrameFlags, Checksum), FrameError> {
        let name = match bytes[0] {
            CHUNK => CHUNK_NAME,
            ZEROS => ZEROS_NAME,
            END => END_NAME,
            PACKED => PACKED_NAME,
            CHECK => CHECK_NAME,
            kind => {
                return Err(FrameError::new("bulk", "kind", &format_args!("{kind:#04x}"), "0xb1 to 0xb5"));
            }
        };
        check_mark(name, bytes[1])?;
        check_seal(name, bytes, SUM)?;
        let flags = FrameFlags::from_bits(name, bytes[2])?;
        check_zero(name, "reserved", &bytes[3..4])?;
        let length = u32_at(bytes, 4);
        if bytes[0] != PACKED {
            check_zero(name, "payload length", &bytes[4..8])?;
        }
        let numbers = [u64_at(bytes, 8), u64_at(bytes, 16), u64_at(bytes, 24)];
        let frame = match bytes[0] {
            CHUNK => {
                let (first, data, zero) = chunk(CHUNK_NAME, numbers, ram)?;
                Ok(Self::Chunk { first, data, zero })
            }
            PACKED => {
                let (first, data, zero) = chunk(PACKED_NAME, numbers, ram)?;
                // No pages, no payload; and no page without a byte of it.
                let pages = data.count_ones();
                if length as usize > PACKED_LIMIT || length < pages || (pages == 0 && length > 0) {
                    let allowed = format!("{pages} to {PACKED_LIMIT} bytes for {pages} pages");
                    return Err(FrameError::new(name, "payload length", &length, allowed));
                }
                Ok(Self::Packed { first, data, zero, payload: length })
            }
            CHECK => {
                check_zero(name, "reserved", &bytes[8..PAYLOAD_SUM])?;
                Ok(Self::Check)
            }
            ZEROS => {
                check_zero(name, "reserved", &bytes[24..PAYLOAD_SUM])?;
                zeros(numbers[0], numbers[1], ram)
            }
            _ => {
                check_zero(name, "reserved", &bytes[16..PAYLOAD_SUM])?;
                Ok(Self::End { pages: numbers[0] })
            }
        }?;
        if frame.payload() == 0 {
            check_zero(name, "checksum", &bytes[PAYLOAD_SUM..SUM])?;
        }
        Ok((frame, flags, checksum_at(bytes, PAYLOAD_SUM)))
    }
}

/// What the destination has taken of a bulk lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    /// Frames since the lane began, all kinds and phases.
    pub frames: u64,
}

impl Taken {
    /// Bytes on the wire.
    pub const LEN: usize = 16;

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[0] = TAKEN;
        bytes[1] = MARK;
        bytes[8..].copy_from_slice(&self.frames.to_le_bytes());
        seal(&mut bytes, TAKEN_SUM);
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// When they are no such frame.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, FrameError> {
        if bytes[0] != TAKEN {
            return Err(FrameError::new(TAKEN_NAME, "kind", &format_args!("{:#04x}", bytes[0]), "0xba"));
        }
        check_mark(TAKEN_NAME, bytes[1])?;
        check_seal(TAKEN_NAME, bytes, TAKEN_SUM)?;
        check_zero(TAKEN_NAME, "reserved", &bytes[2..TAKEN_SUM])?;
        Ok(Self { frames: u64_at(bytes, 8) })
    }
}

fn chunk(
    name: &'static str,
    [first, data, zero]: [u64; 3],
    ram: PageCount,
) -> Result<(PageIndex, u64, u64), FrameError> {
    let wrong =
        |field, got: u64, allowed: String| Err(FrameError::new(name, field, &format_args!("{got:#x}"), allowed));
    let page = check_page(name, "first page", first, ram)?;
    if !first.is_multiple_of(CHUNK_PAGES) {
        return wrong("first page", first, format!("a multiple of {CHUNK_PAGES}"));
    }
    // The bits of pages that exist.
    let left = ram.0 - first;
    let within = if left >= CHUNK_PAGES { u64::MAX } else { (1 << left) - 1 };
    if data & !within != 0 {
        return wrong("data mask", data, format!("a subset of {within:#x}"));
    }
    if zero & !within != 0 {
        return wrong("zero mask", zero, format!("a subset of {within:#x}"));
    }
    if data & zero != 0 {
        return wrong("zero mask", zero, format!("no bit of the data mask {data:#x}"));
    }
    if data | zero == 0 {
        return wrong("data mask", data, "at least one bit in one of the masks".to_owned());
    }
    Ok((page, data, zero))
}

fn zeros(first: u64, count: u64, ram: PageCount) -> Result<BulkFrame, FrameError> {
    let page = check_page(ZEROS_NAME, "first page", first, ram)?;
    let left = ram.0 - first;
    if count == 0 || count > left {
        let allowed = format!("1 to {left:#x} pages from {first:#x}");
        return Err(FrameError::new(ZEROS_NAME, "count", &format_args!("{count:#x}"), allowed));
    }
    Ok(BulkFrame::Zeros { first: page, count: PageCount(count) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Not a multiple of [`CHUNK_PAGES`]: the last chunk is a short one of 40 pages.
    const RAM: PageCount = PageCount(1000);

    fn valid() -> impl Strategy<Value = BulkFrame> {
        let chunk = (0..16_u64, any::<u64>(), any::<u64>()).prop_filter_map("empty", |(index, data, zero)| {
            let within = if index == 15 { (1 << 40) - 1 } else { u64::MAX };
            let (data, zero) = (data & within, zero & within & !data);
            (data | zero != 0).then_some(BulkFrame::Chunk { first: PageIndex(index * CHUNK_PAGES), data, zero })
        });
        let zeros = (0..1000_u64).prop_flat_map(|first| {
            (1..=1000 - first)
                .prop_map(move |count| BulkFrame::Zeros { first: PageIndex(first), count: PageCount(count) })
        });
        let packed = (0..15_u64, 1..u64::MAX, any::<u64>(), 64..u32::try_from(PACKED_LIMIT).unwrap()).prop_map(
            |(index, data, zero, payload)| BulkFrame::Packed {
                first: PageIndex(index * CHUNK_PAGES),
                data,
                zero: zero & !data,
                payload,
            },
        );
        prop_oneof![
            chunk,
            zeros,
            packed,
            Just(BulkFrame::Check),
            any::<u64>().prop_map(|pages| BulkFrame::End { pages })
        ]
    }

    fn flags() -> impl Strategy<Value = FrameFlags> {
        (any::<bool>(), any::<bool>()).prop_map(|(precopy, acknowledge)| FrameFlags { precopy, acknowledge })
    }

    proptest! {
        #[test]
        fn frames_survive_the_wire(frame in valid(), flags in flags(), sum: [u8; 4]) {
            let sum = if frame.payload() == 0 { Checksum::NONE } else { Checksum::from_bytes(sum) };
            prop_assert_eq!(BulkFrame::decode(&frame.encode(flags, sum), RAM).unwrap(), (frame, flags, sum));
        }

        #[test]
        fn what_was_taken_survives_the_wire(frames: u64, at in 0..16_usize, change in 1..=255_u8) {
            let mut bytes = Taken { frames }.encode();
            prop_assert_eq!(Taken::decode(&bytes).unwrap(), Taken { frames });
            bytes[at] ^= change;
            prop_assert!(Taken::decode(&bytes).is_err());
        }

        #[test]
        fn one_changed_byte_is_no_frame(frame in valid(), at in 0..BulkFrame::LEN, change in 1..=255_u8) {
            let mut bytes = frame.encode(FrameFlags::default(), Checksum::NONE);
            bytes[at] ^= change;
            prop_assert!(BulkFrame::decode(&bytes, RAM).is_err());
            // One that somebody has sealed again is another frame or none.
            bytes[SUM..].fill(0);
            seal(&mut bytes, SUM);
            if let Ok((other, flags, sum)) = BulkFrame::decode(&bytes, RAM) {
                prop_assert_eq!(other.encode(flags, sum), bytes);
                prop_assert!(at != 1 && at != 3, "mark and reserved byte are checked");
            }
        }

        #[test]
        fn whatever_decodes_is_within_ram(
            kind in CHUNK..=CHECK,
            length in prop_oneof![Just(0_u32), 0..300_000_u32, any::<u32>()],
            numbers in prop::array::uniform3(prop_oneof![0..1100_u64, any::<u64>(), Just(0), Just(u64::MAX)]),
            ram in prop_oneof![0..1100_u64, any::<u64>()],
        ) {
            let mut bytes = [0; BulkFrame::LEN];
            bytes[0] = kind;
            bytes[1] = MARK;
            for (field, number) in bytes[8..PAYLOAD_SUM].chunks_exact_mut(8).zip(numbers) {
                field.copy_from_slice(&number.to_le_bytes());
            }
            bytes[4..8].copy_from_slice(&length.to_le_bytes());
            seal(&mut bytes, SUM);
            match BulkFrame::decode(&bytes, PageCount(ram)).map(|(frame, ..)| frame) {
                Ok(frame @ (BulkFrame::Chunk { first, data, zero } | BulkFrame::Packed { first, data, zero, .. })) => {
                    prop_assert!(frame.payload() <= PACKED_LIMIT);
                    let last = 63 - u64::from((data | zero).leading_zeros());
                    prop_assert!(first.0 % CHUNK_PAGES == 0 && data & zero == 0 && data | zero != 0);
                    prop_assert!(u128::from(first.0) + u128::from(last) < u128::from(ram));
                }
                Ok(BulkFrame::Zeros { first, count }) => {
                    prop_assert!(count.0 > 0);
                    prop_assert!(u128::from(first.0) + u128::from(count.0) <= u128::from(ram));
                }
                Ok(BulkFrame::Check | BulkFrame::End { .. }) | Err(_) => {}
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(kind in CHUNK..=TAKEN, rest: [u8; 32], ram: u64, sealed: bool) {
            let mut bytes = [0; BulkFrame::LEN];
            (bytes[0], bytes[1]) = (kind, MARK);
            bytes[2..34].copy_from_slice(&rest);
            if sealed {
                bytes[SUM..].fill(0);
                seal(&mut bytes, SUM);
            }
            let _ = BulkFrame::decode(&bytes, PageCount(ram));
        }
    }

    #[test]
    fn each_rule_has_its_refusal() {
        let chunk = |first, data, zero| BulkFrame::Chunk { first: PageIndex(first), data, zero };
        let zeros = |first, count| BulkFrame::Zeros { first: PageIndex(first), count: PageCount(count) };
        for (frame, field, allowed) in [
            (chunk(1024, 1, 0), "first page", "below"),
            (chunk(u64::MAX, 1, 0), "first page", "below"),
            (chunk(32, 1, 0), "first page", "multiple of 64"),
            (chunk(960, 1 << 40, 0), "data mask", "subset"),
            (chunk(960, 1, 1 << 63), "zero mask", "subset"),
            (chunk(0, 3, 2), "zero mask", "no bit of the data mask"),
            (chunk(0, 0, 0), "data mask", "at least one bit"),
            (zeros(1000, 1), "first page", "below"),
            (zeros(0, 0), "count", "1 to"),
            (zeros(999, 2), "count", "1 to"),
            (zeros(1, u64::MAX), "count", "1 to"),
        ] {
            let error = BulkFrame::decode(&frame.encode(FrameFlags::default(), Checksum::NONE), RAM).unwrap_err();
            assert_eq!(error.field, field, "{frame:?}: {error}");
            assert!(error.allowed.contains(allowed), "{frame:?}: {error}");
        }
        let encode = |frame: BulkFrame| frame.encode(FrameFlags::default(), Checksum::NONE);
        let refused = |mut bytes: [u8; BulkFrame::LEN], at: usize, byte| {
            bytes[at] = byte;
            bytes[SUM..].fill(0);
            seal(&mut bytes, SUM);
            BulkFrame::decode(&bytes, RAM).unwrap_err().field
        };
        assert_eq!(refused(encode(BulkFrame::End { pages: 5 }), 20, 1), "reserved");
        assert_eq!(refused(encode(BulkFrame::Check), 31, 1), "reserved");
        assert_eq!(refused(encode(zeros(0, 1)), 31, 1), "reserved");
        assert_eq!(refused(encode(zeros(0, 1)), PAYLOAD_SUM, 1), "checksum");
        assert_eq!(refused(encode(chunk(0, 1, 0)), 0, 0xB6), "kind");
        assert_eq!(refused(encode(chunk(0, 1, 0)), 2, 4), "flags");
        let mut damaged = encode(chunk(0, 1, 0));
        damaged[16] ^= 2;
        assert_eq!(BulkFrame::decode(&damaged, RAM).unwrap_err().field, "the CRC-32 of the header");
        for (data, payload) in [(0, 1), (3, 1), (1, u32::try_from(PACKED_LIMIT).unwrap() + 1)] {
            let packed = encode(BulkFrame::Packed { first: PageIndex(0), data, zero: 4, payload });
            assert_eq!(BulkFrame::decode(&packed, RAM).unwrap_err().field, "payload length");
        }
    }

    #[test]
    fn the_payload_is_the_data_pages() {
        assert_eq!(BulkFrame::Chunk { first: PageIndex(0), data: 0b1011, zero: 0b100 }.payload(), 3 * PAGE_SIZE);
        assert_eq!(BulkFrame::Chunk { first: PageIndex(0), data: u64::MAX, zero: 0 }.payload(), 64 * PAGE_SIZE);
        assert_eq!(BulkFrame::End { pages: 9 }.payload(), 0);
    }
}
