//! Where the memory of two images differs.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

use crate::chunk::pages_of;
use crate::crew::{Tally, share_out, threads_for};
use crate::error::ImageError;
use crate::reader::{Image, ReadChunk};

/// Pages that differ.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Differences {
    /// Stretches of them, in order, none touching the next.
    pub ranges: Vec<(PageIndex, PageCount)>,
}

impl Differences {
    /// How many pages differ.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        PageCount(self.ranges.iter().map(|(_, count)| count.0).sum())
    }
}

/// Compares all of the memory of two images page by page, both as verified. Memory that one of them has more of differs where it
/// is not zero.
///
/// # Errors
/// When one of them is damaged or cannot be read.
pub fn differences(one: &Image, other: &Image, tally: &Tally) -> Result<Differences, ImageError> {
    let pages = one.pages().0.max(other.pages().0);
    let chunks = one.header().chunks().max(other.header().chunks());
    let found: Mutex<Vec<Range<u64>>> = Mutex::default();
    let tool = || Ok((one.reader()?, other.reader()?));
    share_out(threads_for(chunks), chunks, tally, tool, |(here, there), number| {
        let ((present, entry), (other_present, other_entry)) = (one.chunk(number), other.chunk(number));
        let same_bytes = one.base().is_none()
            && other.base().is_none()
            && entry.hash == other_entry.hash
            && entry.encoding == other_entry.encoding;
        // Both must be sound, though what is in them needs no comparison then.
        let (here, there) = (here.read(number)?, there.read(number)?);
        if same_bytes && present == other_present {
            return Ok(());
        }
        let range = pages_of(number, pages);
        let differs = |page: usize| {
            let (here, there) = (page_of(&here, page), page_of(&there, page));
            here != there
        };
        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
        for page in range.clone() {
            if differs(usize::try_from(page - range.start).unwrap_or(0)) {
                found.push(page..page + 1);
            }
        }
        Ok(())
    })?;
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_unstable_by_key(|range| range.start);
    let mut ranges: Vec<(PageIndex, PageCount)> = Vec::new();
    for range in found {
        match ranges.last_mut() {
            Some((first, count)) if first.0 + count.0 == range.start => count.0 += range.end - range.start,
            _ => ranges.push((PageIndex(range.start), PageCount(range.end - range.start))),
        }
    }
    Ok(Differences { ranges })
}

/// A page's bytes; `None` of one that is zero.
fn page_of<'a>(chunk: &ReadChunk<'a>, page: usize) -> Option<&'a [u8]> {
    chunk.present.contains(page).then(|| &chunk.bytes[page * PAGE_SIZE..][..PAGE_SIZE])
}
