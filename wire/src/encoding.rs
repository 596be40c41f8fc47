//! Pages in fewer bytes: the payload of [`BulkFrame::Packed`](crate::frame::bulk::BulkFrame::Packed).
//!
//! A payload is a table with one entry of four bytes for each page of the frame's data mask, in order, then the pages'
//! bodies in the same order, without gaps:
//!
//! | bytes | of an entry |
//! |---|---|
//! | 1 | the [`Encoding`] |
//! | 1 | 0 |
//! | 2 | length of the body, little-endian |
//!
//! What a body is:
//!
//! | encoding | number | length | body |
//! |---|---|---|---|
//! | raw | 1 | 4096 | the page |
//! | LZ4 | 2 | 1 to 4095 | one LZ4 block, without a length before it |
//! | zstd | 3 | 11 to 4095 | one zstd frame of one block, which says that it holds 4096 bytes |
//! | delta | 4 | 0 to 4095 | runs of what changed since the version that the destination holds |
//! | same | 5 | 40 | the number of a page with the same content (8 bytes), and the content's BLAKE3 hash (32) |
//!
//! A run of a delta is two numbers, the bytes that did not change since the run before and those that did (at least 1),
//! and then the latter as they are now. So the runs are those of the exclusive or of both versions, but a delta that is
//! applied twice does no harm. A number takes a byte below 128; above, its low seven bits with the top bit set, then
//! the others. What follows the last run did not change.
//!
//! Encoding and decoding work in memory that is allocated once. A decoder looks at the lengths first: what it is given
//! decides neither how much memory it takes, nor how long it runs beyond what one page takes.

mod decoder;
mod delta;
mod encoder;
mod payload;
mod zstd_frame;

#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::RangeInclusive;

use thiserror::Error;

pub use decoder::PageDecoder;
pub use encoder::PageEncoder;
pub use payload::{Entries, Entry, Payload, PayloadWriter};

use crate::types::{PAGE_SIZE, PageIndex};

/// A page's content.
pub type Page = [u8; PAGE_SIZE];

/// Bytes of a table's entry.
pub const ENTRY_LEN: usize = 4;

/// Bytes of a body of [`Encoding::Same`].
pub const SAME_LEN: usize = 8 + blake3::OUT_LEN;

/// How a page is written down.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Encoding {
    /// As it is.
    Raw,
    /// As an LZ4 block.
    Lz4,
    /// As a zstd frame.
    Zstd,
    /// As what changed since the version that the destination holds.
    Delta,
    /// As the number of another page with the same content.
    Same,
}

impl Encoding {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Raw, Self::Lz4, Self::Zstd, Self::Delta, Self::Same];

    /// Its number in a table. No encoding has 0, so that a table of zeros is none.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Raw => 1,
            Self::Lz4 => 2,
            Self::Zstd => 3,
            Self::Delta => 4,
            Self::Same => 5,
        }
    }

    /// The encoding with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|encoding| encoding.number() == number)
    }

    /// The lengths that a body can have.
    #[must_use]
    pub const fn lengths(self) -> RangeInclusive<usize> {
        match self {
            Self::Raw => PAGE_SIZE..=PAGE_SIZE,
            Self::Lz4 => 1..=PAGE_SIZE - 1,
            Self::Zstd => zstd_frame::SHORTEST..=PAGE_SIZE - 1,
            Self::Delta => 0..=PAGE_SIZE - 1,
            Self::Same => SAME_LEN..=SAME_LEN,
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Lz4 => "LZ4",
            Self::Zstd => "zstd",
            Self::Delta => "delta",
            Self::Same => "same",
        })
    }
}

/// A payload that cannot be: the stream is damaged, or the two sides disagree about what the destination holds. The
/// session is lost.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum EncodingError {
    /// The table and the payload do not fit.
    #[error("a packed chunk's table is wrong: {field} is {got}, where {allowed} is allowed")]
    Table {
        /// What of it.
        field: &'static str,
        /// What was read.
        got: u64,
        /// What could have been.
        allowed: String,
    },
    /// A page's body is not what its entry says.
    #[error("{page} cannot be decoded as {encoding}: {reason}")]
    Body {
        /// The page.
        page: PageIndex,
        /// How it should be decoded.
        encoding: Encoding,
        /// What is wrong.
        reason: String,
    },
}
