//! A set of pages as bytes: which pages the destination must still fetch, told inside the blackout.

use thiserror::Error;

/// Bytes that are no set of pages.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("a set of pages cannot be read: {0}")]
pub struct BitmapError(pub String);

/// The words of a bitmap, in few bytes where it has long stretches of zeros or ones.
#[must_use]
pub fn encode(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The words that [`encode`] was given, which were `count`.
///
/// # Errors
/// When the bytes are no bitmap of that many words.
pub fn decode(bytes: &[u8], count: usize) -> Result<Vec<u64>, BitmapError> {
    if bytes.len() != count * 8 {
        return Err(BitmapError(format!("{} bytes for {count} words", bytes.len())));
    }
    Ok(bytes.chunks_exact(8).map(|word| word.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))).collect())
}
