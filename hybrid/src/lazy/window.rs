//! What the guest touches for some time after its start, in order.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use switchover_image::working_set::MOST_PAGES;
use switchover_wire::types::PageIndex;

/// For how long at least a guest without a working set is watched page by page.
const LEAST: Duration = Duration::from_secs(2);
/// For how long at most after all of its memory has come. Until then it waited more than it worked, and came to little.
const MOST_BEHIND: Duration = Duration::from_secs(2);
/// Earlier, when it has touched fewer than [`FEW`] further pages in this time: what is left to be learnt is not worth a wait for more.
const CALM: Duration = Duration::from_millis(100);
const FEW: usize = 16;

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

    /// How many pages were noted, with repetitions.
    fn noted(&self) -> usize {
        self.noted.as_ref().map_or(0, |noted| locked(noted).len())
    }

    /// What was touched, with repetitions; `None` where it is not noted.
    pub fn take(&self) -> Option<Vec<PageIndex>> {
        self.noted.as_ref().map(|noted| std::mem::take(&mut *locked(noted)))
    }
}

/// Says when a window is to be closed, once all of memory is here.
#[derive(Debug)]
pub struct Closing {
    begun: Instant,
    here: Instant,
    looked: Instant,
    noted: usize,
}

impl Closing {
    /// Of one that was opened at `begun`, where memory is `here` since then.
    pub fn new(window: &Window, begun: Instant, here: Instant) -> Self {
        Self { begun, here, looked: here, noted: window.noted() }
    }

    /// Whether it is time.
    pub fn is_due(&mut self, window: &Window, now: Instant) -> bool {
        if now >= self.here + MOST_BEHIND {
            return true;
        }
        if now < self.looked + CALM {
            return false;
        }
        let before = std::mem::replace(&mut self.noted, window.noted());
        self.looked = now;
        self.noted - before < FEW && now >= self.begun + LEAST
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
    fn it_closes_when_the_guest_is_calm_and_at_the_latest_some_time_after_the_last_page() {
        let (window, begun) = (Window::new(true, true), Instant::now());
        let at = |ms| begun + Duration::from_millis(ms);
        let touch = |count| (0..count).for_each(|page| window.note(PageIndex(page)));
        // All came fast, and nothing is touched: not before the least time.
        let mut closing = Closing::new(&window, begun, at(300));
        assert_eq!(
            [301, 400, 1999, 2050, 2100].map(|ms| closing.is_due(&window, at(ms))),
            [false, false, false, false, true]
        );
        // All came late: it goes on for as long as much is touched.
        let mut closing = Closing::new(&window, begun, at(5000));
        for ms in [5100, 5200, 5300] {
            touch(FEW as u64);
            assert!(!closing.is_due(&window, at(ms)), "{ms}");
        }
        touch(FEW as u64 - 1);
        assert!(closing.is_due(&window, at(5400)));
        // But not for ever.
        let mut closing = Closing::new(&window, begun, at(5000));
        touch(1000);
        assert!(!closing.is_due(&window, at(6999)));
        touch(1000);
        assert!(closing.is_due(&window, at(7000)));
    }

    #[test]
    fn one_that_notes_nothing_is_never_open() {
        let window = Window::new(false, true);
        window.note(PageIndex(1));
        assert!(!window.is_open() && window.take().is_none());
    }
}
