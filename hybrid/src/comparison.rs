//! Whether guest memory came to the destination as it was left on the source.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use serde::{Deserialize, Serialize};
use switchover_pager::cpu;
use switchover_pager::digest::{DIGEST_LEN, MemoryDigest};
use switchover_pager::ram::Ram;
use switchover_wire::message::{ControlMessage, DIGEST_BYTES, RANGES_TOLD};
use switchover_wire::types::{PageCount, PageIndex, SessionId};

/// What came of comparing all of guest memory, as it was handed off, with what the destination gave the guest.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Comparison {
    /// Where it differs, to 64 pages; nowhere is what should be.
    pub differing: Vec<Stretch>,
    /// Why it could not be compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

/// Some pages of RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stretch {
    /// The first.
    pub first_page: u64,
    /// How many.
    pub pages: u64,
}

impl Comparison {
    /// As the source says it.
    #[must_use]
    pub fn of(differing: &[(PageIndex, PageCount)]) -> Self {
        let stretch = |(first, pages): &(PageIndex, PageCount)| Stretch { first_page: first.0, pages: pages.0 };
        Self { differing: differing.iter().map(stretch).collect(), failed: None }
    }

    /// Whether all of it is as it was.
    #[must_use]
    pub fn matches(&self) -> bool {
        self.differing.is_empty() && self.failed.is_none()
    }

    /// What is wrong, for a person; nothing where nothing is.
    #[must_use]
    pub fn sentence(&self) -> Option<String> {
        if let Some(reason) = &self.failed {
            return Some(format!("guest memory could not be compared: {reason}"));
        }
        let first = self.differing.first()?;
        let pages: u64 = self.differing.iter().map(|stretch| stretch.pages).sum();
        Some(format!(
            "guest memory did not arrive as it was left: somewhere in {pages} pages, the first of them {}; the guest runs at the \
             destination with what arrived, and what it was handed off with is still in the source's memory until that is ended",
            PageIndex(first.first_page)
        ))
    }
}

/// The source's half of a comparison.
#[derive(Debug, Default)]
pub struct Comparer {
    own: Mutex<Option<JoinHandle<Option<MemoryDigest>>>>,
    called_off: Arc<AtomicBool>,
    /// The destination's digests, as far as they have come.
    theirs: Mutex<Vec<u8>>,
}

impl Comparer {
    /// Begins to digest memory, which is paused, unless that was begun before.
    pub fn begin(&self, session: SessionId, ram: Ram) {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if own.is_some() {
            return;
        }
        let called_off = Arc::clone(&self.called_off);
        let digest = move || {
            cpu::yield_to_others();
            MemoryDigest::of(session, &ram, &called_off)
        };
        match thread::Builder::new().name("digest".to_owned()).spawn(digest) {
            Ok(thread) => *own = Some(thread),
            Err(error) => tracing::error!(%error, "no thread to digest guest memory"),
        }
    }

    /// Memory will be written again, or nobody asks any more.
    pub fn call_off(&self) {
        self.called_off.store(true, Ordering::Release);
    }

    /// Takes what the destination says of its memory, for a guest of `pages`.
    ///
    /// # Errors
    /// When it does not follow what came before, or is more than there can be.
    pub fn hear(&self, first: u64, digests: &[u8], pages: PageCount) -> Result<(), String> {
        let mut theirs = self.theirs.lock().unwrap_or_else(PoisonError::into_inner);
        // After a lost link it begins anew.
        if first == 0 {
            theirs.clear();
        }
        let all = pages.0.div_ceil(64).saturating_mul(DIGEST_LEN as u64);
        let due = (theirs.len() / DIGEST_LEN) as u64;
        if first != due || !digests.len().is_multiple_of(DIGEST_LEN) || (theirs.len() + digests.len()) as u64 > all {
            return Err(format!(
                "the destination sent {} bytes of digests from {first:#x}, where {due:#x} was due",
                digests.len()
            ));
        }
        theirs.extend_from_slice(digests);
        Ok(())
    }

    /// Waits for this side's digests, and compares.
    #[must_use]
    pub fn compare(&self) -> Comparison {
        let failed = |reason: &str| Comparison { failed: Some(reason.to_owned()), ..Comparison::default() };
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Ok(Some(own))) = own.map(JoinHandle::join) else {
            return failed("this side's memory was not digested");
        };
        let theirs = self.theirs.lock().unwrap_or_else(PoisonError::into_inner);
        if theirs.is_empty() {
            return failed("the destination never said what it has");
        }
        match own.differing(&theirs) {
            Ok(differing) => Comparison::of(&differing[..differing.len().min(RANGES_TOLD)]),
            Err(reason) => failed(&reason),
        }
    }
}

/// The destination's digests as messages.
pub fn tell_digests(digest: &MemoryDigest) -> Vec<ControlMessage> {
    let bytes = digest.to_bytes();
    let chunks = (0..).step_by(DIGEST_BYTES / DIGEST_LEN).zip(bytes.chunks(DIGEST_BYTES));
    chunks.map(|(first, digests)| ControlMessage::Digests { first, digests: digests.to_vec() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_heard_in_order_and_anew_after_a_lost_link() {
        let comparer = Comparer::default();
        let pages = PageCount(65);
        comparer.hear(0, &[1; 16], pages).unwrap();
        assert!(comparer.hear(2, &[1; 16], pages).is_err(), "a gap");
        assert!(comparer.hear(1, &[1; 15], pages).is_err(), "no whole digest");
        assert!(comparer.hear(1, &[1; 32], pages).is_err(), "more than there is");
        comparer.hear(1, &[1; 16], pages).unwrap();
        comparer.hear(0, &[1; 32], pages).unwrap();
        assert!(!comparer.compare().matches(), "nobody has digested this side");
    }

    #[test]
    fn memory_that_is_the_same_matches_and_what_differs_is_named() {
        let (one, other) = (Ram::new(PageCount(200)).unwrap(), Ram::new(PageCount(200)).unwrap());
        // SAFETY: the mapping is live and this test's own.
        unsafe { other.alias_of(PageIndex(130)).unwrap().write(1) };
        let session = SessionId([1; 16]);
        for (theirs, differing) in [(&one, vec![]), (&other, vec![Stretch { first_page: 128, pages: 64 }])] {
            let comparer = Comparer::default();
            comparer.begin(session, one.clone());
            comparer.begin(session, other.clone());
            let theirs = MemoryDigest::of(session, theirs, &AtomicBool::new(false)).unwrap();
            for message in tell_digests(&theirs) {
                let ControlMessage::Digests { first, digests } = message else { panic!("{}", message.name()) };
                comparer.hear(first, &digests, PageCount(200)).unwrap();
            }
            let comparison = comparer.compare();
            assert_eq!(comparison.matches(), differing.is_empty());
            assert_eq!(comparison.sentence().is_some(), !differing.is_empty());
            assert_eq!(comparison.differing, differing);
        }
    }
}
