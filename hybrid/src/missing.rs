//! Putting together which pages the other side says are missing.

use switchover_wire::bitmap;
use switchover_wire::message::{ControlMessage, MISSING_PAGES, MISSING_WORDS};
use switchover_wire::types::{PageCount, PageIndex};

/// The set of missing pages, stretch by stretch.
#[derive(Debug)]
pub struct MissingPages {
    words: Vec<u64>,
    /// Where the next stretch begins.
    next: u64,
    pages: PageCount,
}

impl MissingPages {
    /// Nothing known of a RAM of this size.
    pub fn new(pages: PageCount) -> Self {
        // Written now, which has the kernel give the memory: it is needed while the guest stands still.
        let mut words = vec![u64::MAX; usize::try_from(pages.0.div_ceil(64)).unwrap_or(0)];
        words.clear();
        Self { words, next: 0, pages }
    }

    /// Adds a stretch; gives the whole set, a bit a page, when that was the last.
    ///
    /// # Errors
    /// When it does not continue the one before, goes past the end of RAM, or is no set.
    pub fn add(&mut self, first: PageIndex, pages: PageCount, set: &[u8]) -> Result<Option<Vec<u64>>, String> {
        let left = self.pages.0 - self.next;
        let whole = pages.0 == left || pages.0.is_multiple_of(64);
        if first.0 != self.next || pages.0 == 0 || pages.0 > left.min(MISSING_PAGES) || !whole {
            return Err(format!(
                "the other side told which of {pages} from {first} on are missing, where {left} pages from {:#x} on were left to tell of",
                self.next
            ));
        }
        // At most MISSING_PAGES / 64 words, and no more than RAM has.
        let count = usize::try_from(pages.0.div_ceil(64)).map_err(|error| error.to_string())?;
        bitmap::decode_onto(&mut self.words, set, count).map_err(|error| error.to_string())?;
        self.next += pages.0;
        Ok((self.next == self.pages.0).then(|| std::mem::take(&mut self.words)))
    }
}

/// The messages that tell of `missing`, a bit a page of all `pages` of RAM.
pub fn tell_missing(missing: &[u64], pages: PageCount, complete_first: bool) -> impl Iterator<Item = ControlMessage> {
    // Stretches of whole words, so that each is a slice of them.
    (0..pages.0).step_by(MISSING_WORDS * 64).zip(missing.chunks(MISSING_WORDS)).map(move |(first, words)| {
        ControlMessage::Missing {
            first: PageIndex(first),
            pages: PageCount(MISSING_PAGES.min(pages.0 - first)),
            set: bitmap::encode(words),
            complete_first,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_put_together_in_their_order() {
        let mut missing = MissingPages::new(PageCount(130));
        assert_eq!(missing.add(PageIndex(0), PageCount(64), &bitmap::encode(&[5])), Ok(None));
        assert!(missing.add(PageIndex(0), PageCount(64), &bitmap::encode(&[5])).is_err());
        let rest = bitmap::encode(&[6, 7]);
        assert!(missing.add(PageIndex(64), PageCount(67), &rest).is_err());
        assert!(missing.add(PageIndex(64), PageCount(0), &[]).is_err());
        assert_eq!(missing.add(PageIndex(64), PageCount(66), &rest), Ok(Some(vec![5, 6, 7])));
        assert!(missing.add(PageIndex(130), PageCount(1), &bitmap::encode(&[1])).is_err());
    }

    #[test]
    fn a_stretch_that_is_no_set_is_refused() {
        assert!(MissingPages::new(PageCount(64)).add(PageIndex(0), PageCount(64), &[]).is_err());
        let mut short = MissingPages::new(PageCount(640));
        assert!(short.add(PageIndex(0), PageCount(65), &bitmap::encode(&[1, 1])).is_err());
    }
}
