//! What the guest touches for some time after its start, in order.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use switchover_image::working_set::MOST_PAGES;
use switchover_wire::types::PageIndex;

/// For how long a guest without a working set is watched page by page. What it needs to be back at its work it touches within a
/// second or two; what it touches later a pusher has brought.
pub const LENGTH: Duration = Duration::from_secs(2);

/// The pages that were touched, and whether each is still to be mapped by itself, so that touching its neighbours is seen too.
#[derive(Debug)]
pub struct Window {
    noted: Option<Mutex<Vec<PageIndex>>>,
    open: AtomicBool,
}

impl Window {
    /// One in which touched pages are noted, if `noting`; and each of them, if `open`.
    pub fn new(noting: bool, open: bool) -> Self {
        Self { noted: noting.then(Mutex::default), open: AtomicBool::new(noting && open) }
    }

    /// `page` was touched.
    pub fn note(&self, page: PageIndex) {
        let Some(noted) = &self.noted else { return };
        let mut noted = locked(noted);
        if noted.len() < MOST_PAGES {
            noted.push(page);
        } else {
            self.close();
        }
    }

    /// Whether pages are to be mapped one by one.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// From now on whatever is here may be mapped.
    pub fn close(&self) {
        self.open.store(false, Ordering::Release);
    }

    /// What was touched, with repetitions; `None` where it is not noted.
    pub fn take(&self) -> Option<Vec<PageIndex>> {
        self.noted.as_ref().map(|noted| std::mem::take(&mut *locked(noted)))
    }
}

fn locked(noted: &Mutex<Vec<PageIndex>>) -> MutexGuard<'_, Vec<PageIndex>> {
    noted.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_bounded_and_closes_when_it_is_full() {
        let window = Window::new(true, true);
        (0..MOST_PAGES as u64).for_each(|page| window.note(PageIndex(page)));
        assert!(window.is_open());
        window.note(PageIndex(0));
        assert!(!window.is_open());
        assert_eq!(window.take().map(|noted| noted.len()), Some(MOST_PAGES));
    }

    #[test]
    fn one_that_notes_nothing_is_never_open() {
        let window = Window::new(false, true);
        window.note(PageIndex(1));
        assert!(!window.is_open() && window.take().is_none());
    }
}
