//! The payload as a whole: its table, checked against it.

use super::{ENTRY_LEN, Encoding, EncodingError, SAME_LEN};
use crate::frame::bulk::{CHUNK_PAGES, PACKED_LIMIT};
use crate::types::{PageCount, PageIndex};

/// A payload whose table fits.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    first: PageIndex,
    data: u64,
    table: &'a [[u8; ENTRY_LEN]],
    bodies: &'a [u8],
}

impl<'a> Payload<'a> {
    /// The payload in `bytes`, of a frame with these fields, for a machine with `ram` pages.
    ///
    /// Every length is then one that the encoding can have, together they are what follows the table, and every page
    /// that another is the same as is one of RAM and not in this very frame. The bodies have not been looked at.
    ///
    /// # Errors
    /// Where that does not hold.
    pub fn parse(
        first: PageIndex,
        data: u64,
        zero: u64,
        bytes: &'a [u8],
        ram: PageCount,
    ) -> Result<Self, EncodingError> {
        let pages = data.count_ones() as usize;
        let Some((table, bodies)) = bytes.split_at_checked(pages * ENTRY_LEN) else {
            return wrong("payload length", bytes.len(), format!("a table of {pages} entries and more"));
        };
        let payload = Self { first, data, table: table.as_chunks().0, bodies };
        let mut sum = 0;
        for &[encoding, reserved, low, high] in payload.table {
            let Some(encoding) = Encoding::from_number(encoding) else {
                return wrong("an encoding", usize::from(encoding), "1 to 5".to_owned());
            };
            if reserved != 0 {
                return wrong("a reserved byte", usize::from(reserved), "only 0".to_owned());
            }
            let length = usize::from(u16::from_le_bytes([low, high]));
            let lengths = encoding.lengths();
            if !lengths.contains(&length) {
                let allowed = format!("{} to {} bytes of {encoding}", lengths.start(), lengths.end());
                return wrong("a body's length", length, allowed);
            }
            sum += length;
        }
        if sum != bodies.len() {
            return wrong("the bodies' length", sum, format!("the {} bytes that follow the table", bodies.len()));
        }
        for other in payload.entries().filter_map(|entry| entry.same_as()).map(|(other, _)| other) {
            if other >= PageIndex(ram.0) {
                let allowed = format!("a page below {:#x}", ram.0);
                return Err(EncodingError::Table { field: "a page of the same content", got: other.0, allowed });
            }
            let within = other.0.checked_sub(first.0).filter(|&bit| bit < CHUNK_PAGES);
            if within.is_some_and(|bit| (data | zero) >> bit & 1 == 1) {
                let allowed = "a page that this frame does not send".to_owned();
                return Err(EncodingError::Table { field: "a page of the same content", got: other.0, allowed });
            }
        }
        Ok(payload)
    }

    /// The pages, in order.
    #[must_use]
    pub fn entries(&self) -> Entries<'a> {
        Entries { rest: *self }
    }
}

fn wrong<T>(field: &'static str, got: usize, allowed: String) -> Result<T, EncodingError> {
    Err(EncodingError::Table { field, got: u64::try_from(got).unwrap_or(u64::MAX), allowed })
}

/// The pages of a [`Payload`].
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    rest: Payload<'a>,
}

impl<'a> Iterator for Entries<'a> {
    type Item = Entry<'a>;

    fn next(&mut self) -> Option<Entry<'a>> {
        let rest = &mut self.rest;
        let &[encoding, _, low, high] = rest.table.split_off_first()?;
        let bit = rest.data.trailing_zeros();
        rest.data &= rest.data.wrapping_sub(1);
        let body = rest.bodies.split_off(..usize::from(u16::from_le_bytes([low, high])))?;
        let page = PageIndex(rest.first.0.checked_add(u64::from(bit))?);
        Some(Entry { page, encoding: Encoding::from_number(encoding)?, body })
    }
}

/// A page of a [`Payload`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry<'a> {
    page: PageIndex,
    encoding: Encoding,
    body: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Which page.
    #[must_use]
    pub const fn page(&self) -> PageIndex {
        self.page
    }

    /// How it is encoded.
    #[must_use]
    pub const fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The encoded page, as long as its encoding allows.
    #[must_use]
    pub const fn body(&self) -> &'a [u8] {
        self.body
    }

    /// The page that it has the same content as, and the content's hash; `None` for other encodings.
    #[must_use]
    pub fn same_as(&self) -> Option<(PageIndex, blake3::Hash)> {
        let body: &[u8; SAME_LEN] = self.body.try_into().ok().filter(|_| self.encoding == Encoding::Same)?;
        let (page, hash) = body.split_first_chunk()?;
        Some((PageIndex(u64::from_le_bytes(*page)), blake3::Hash::from_slice(hash).ok()?))
    }
}

/// Writes a payload, page by page.
#[derive(Debug)]
pub struct PayloadWriter {
    bytes: Vec<u8>,
    /// Where the next entry of the table goes.
    entry: usize,
    /// Where the table ends.
    table_end: usize,
    /// Where the body that is being written begins.
    body: usize,
}

impl Default for PayloadWriter {
    fn default() -> Self {
        Self { bytes: Vec::with_capacity(PACKED_LIMIT), entry: 0, table_end: 0, body: 0 }
    }
}

impl PayloadWriter {
    /// Begins a payload of `pages` pages behind `room` bytes, which are left for a header.
    pub fn begin(&mut self, room: usize, pages: usize) {
        self.entry = room;
        self.table_end = room + pages * ENTRY_LEN;
        self.body = self.table_end;
        self.bytes.clear();
        self.bytes.resize(self.table_end, 0);
    }

    /// Where the next page's body is to be appended.
    pub fn body(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Bytes of bodies so far.
    #[must_use]
    pub fn bodies(&self) -> usize {
        self.body - self.table_end
    }

    /// What was appended since the last call is the next page's body. Returns its length.
    ///
    /// # Panics
    /// Where the payload was begun with fewer pages, or the body has a length that no body of this encoding has: a
    /// mistake of the caller that must not reach the wire.
    pub fn finish_page(&mut self, encoding: Encoding) -> usize {
        let length = self.bytes.len() - self.body;
        assert!(self.entry < self.table_end, "more pages than the payload was begun with");
        assert!(encoding.lengths().contains(&length), "{length} bytes of {encoding}");
        let [low, high, ..] = length.to_le_bytes();
        self.bytes[self.entry..self.entry + ENTRY_LEN].copy_from_slice(&[encoding.number(), 0, low, high]);
        self.entry += ENTRY_LEN;
        self.body = self.bytes.len();
        length
    }

    /// The room for the header and the payload.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}
