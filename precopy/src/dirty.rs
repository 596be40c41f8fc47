//! Which pages the guest has written: what a machine must be able to tell for pre-copy.

use std::error::Error;

use switchover_wire::types::PageIndex;
use thiserror::Error;

use crate::bitmap::PageBitmap;

/// A machine could not tell what its guest wrote.
#[derive(Debug, Error)]
#[error("cannot {attempted}: {source}")]
pub struct DirtyLogError {
    /// What was asked, as an infinitive: "read the dirty log of slot 0".
    pub attempted: String,
    /// Why it failed.
    pub source: Box<dyn Error + Send + Sync>,
}

impl DirtyLogError {
    /// An error of attempting `attempted`.
    pub fn new(attempted: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { attempted: attempted.into(), source: source.into() }
    }
}

/// A machine's book of written pages.
///
/// A page is *noted* from its first write after it was armed until it is rearmed. Rearming comes before reading: a write
/// that the reader may have missed is always noted.
///
/// ```text
///   start: all pages are noted ──▶ peek ──▶ rearm a few ──▶ read and send those ──▶ … ──▶ peek
/// ```
///
/// Methods may be called from any thread at any time; whatever writes guest memory counts: vCPUs, KVM itself, and the
/// machine's own devices.
pub trait DirtyLog: Send + Sync {
    /// Begins to keep the book. Every page counts as noted, until it is first rearmed.
    ///
    /// # Errors
    /// When the host refuses; nothing is kept then.
    fn start(&self) -> Result<(), DirtyLogError>;

    /// Adds to `noted` all pages that are noted now. Changes nothing in the book.
    ///
    /// With the guest paused this is complete: no write of it is missing.
    ///
    /// # Errors
    /// When the host refuses; `noted` may have grown by a part.
    fn peek(&self, noted: &mut PageBitmap) -> Result<(), DirtyLogError>;

    /// Arms the pages with a bit in `words` again: bit `i` of word `w` is page `first + 64 w + i`. A write after this
    /// call returns is noted; one before it need not be.
    ///
    /// `first` is a multiple of 64. Pages without a bit stay as they are; bits past the end of RAM are ignored.
    ///
    /// # Errors
    /// When the host refuses; the pages may then be noted for ever, which costs time only.
    fn rearm(&self, first: PageIndex, words: &[u64]) -> Result<(), DirtyLogError>;

    /// Ends the book. Safe to repeat.
    fn stop(&self);
}
