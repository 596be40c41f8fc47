//! Looking at something again and again while a test goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A thread that looks. Dropping it ends that.
#[derive(Debug)]
pub struct Watching<T> {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<T>>,
}

impl<T: Send + 'static> Watching<T> {
    /// From now on, adds to `seen` what `look` finds, with such pauses.
    pub fn from_now(mut seen: T, pause: Duration, look: impl Fn(&mut T) + Send + 'static) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&ended);
        let looking = move || {
            while !end.load(Ordering::Acquire) {
                look(&mut seen);
                thread::sleep(pause);
            }
            seen
        };
        Self { ended, thread: Some(thread::spawn(looking)) }
    }

    /// All that was seen.
    ///
    /// # Panics
    /// When looking did.
    #[must_use]
    pub fn end(mut self) -> T {
        self.ended.store(true, Ordering::Release);
        self.thread.take().expect("it is taken once").join().unwrap()
    }
}

impl<T> Drop for Watching<T> {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
    }
}
