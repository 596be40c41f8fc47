//! What crosses fault and bulk lanes: fixed little-endian headers, each followed by whole pages or nothing.
//!
//! A header begins with its kind and a mark, and its reserved bytes are zero, so that a stream that is out of step
//! is noticed before a page is claimed. It carries a [checksum](crate::checksum) of its own, so that a damaged one is as well.
//! Decoding checks every number against the size of RAM.

pub mod bulk;
pub mod fault;

use std::fmt;

use thiserror::Error;

use crate::checksum::Checksum;
use crate::types::{PageCount, PageIndex};

/// The second byte of every header.
const MARK: u8 = 0x5C;

/// A header that cannot be: the stream is out of step, damaged, or of another program. The lane is lost.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("a {frame} frame is wrong: {field} is {got}, where {allowed} is allowed")]
pub struct FrameError {
    /// Which frame.
    pub frame: &'static str,
    /// Which of its fields.
    pub field: &'static str,
    /// What was read.
    pub got: String,
    /// What could have been.
    pub allowed: String,
}

impl FrameError {
    pub(crate) fn new(
        frame: &'static str,
        field: &'static str,
        got: &impl fmt::Display,
        allowed: impl Into<String>,
    ) -> Self {
        Self { frame, field, got: got.to_string(), allowed: allowed.into() }
    }
}

/// The eight bytes from `at`. Headers are longer than every `at` that is used.
fn u64_at<const N: usize>(header: &[u8; N], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&header[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn u32_at<const N: usize>(header: &[u8; N], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&header[at..at + 4]);
    u32::from_le_bytes(bytes)
}

/// The four bytes from `at`, as a checksum.
fn checksum_at<const N: usize>(header: &[u8; N], at: usize) -> Checksum {
    Checksum::from_bytes(u32_at(header, at).to_le_bytes())
}

/// Writes the checksum of all other bytes of a header over the four from `at`, which are zero.
fn seal<const N: usize>(header: &mut [u8; N], at: usize) {
    let sum = Checksum::of([&header[..]]);
    header[at..at + Checksum::LEN].copy_from_slice(&sum.to_bytes());
}

/// Whether a header is as it was [sealed](seal).
fn check_seal<const N: usize>(frame: &'static str, header: &[u8; N], at: usize) -> Result<(), FrameError> {
    let mut plain = *header;
    plain[at..at + Checksum::LEN].fill(0);
    let (said, actual) = (checksum_at(header, at), Checksum::of([&plain[..]]));
    if said == actual {
        return Ok(());
    }
    Err(FrameError::new(frame, "the CRC-32 of the header", &actual, format!("{said}, which it says itself,")))
}

fn check_mark(frame: &'static str, mark: u8) -> Result<(), FrameError> {
    if mark == MARK { Ok(()) } else { Err(FrameError::new(frame, "mark", &format_args!("{mark:#04x}"), "0x5c")) }
}

fn check_zero(frame: &'static str, field: &'static str, bytes: &[u8]) -> Result<(), FrameError> {
    if bytes.iter().all(|&byte| byte == 0) {
        Ok(())
    } else {
        Err(FrameError::new(frame, field, &format_args!("{bytes:02x?}"), "only zero"))
    }
}

fn check_page(frame: &'static str, field: &'static str, page: u64, ram: PageCount) -> Result<PageIndex, FrameError> {
    if page < ram.0 {
        Ok(PageIndex(page))
    } else {
        Err(FrameError::new(frame, field, &format_args!("{page:#x}"), format!("a page below {:#x}", ram.0)))
    }
}
