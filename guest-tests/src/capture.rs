//! What a process prints, as it prints it.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::waiting::{PATIENCE, until};

/// A stream that a thread reads to its end.
#[derive(Debug, Default)]
pub struct Capture {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
    /// Where the bytes come from.
    stream: Option<OwnedFd>,
}

impl Capture {
    /// Reads `stream` from now on.
    ///
    /// # Panics
    /// When its descriptor cannot be duplicated.
    pub fn of(mut stream: impl Read + AsFd + Send + 'static) -> Arc<Self> {
        let capture = Arc::new(Self::default());
        capture.lock().stream = Some(stream.as_fd().try_clone_to_owned().unwrap());
        let fill = Arc::clone(&capture);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            loop {
                // Read under the lock, so that whoever holds it and finds nothing to read has all of it.
                let _ = poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
                let mut state = fill.lock();
                let count = stream.read(&mut bytes).unwrap_or(0);
                state.bytes.extend_from_slice(&bytes[..count]);
                state.ended = count == 0;
                fill.changed.notify_all();
                if state.ended {
                    state.stream = None;
                    return;
                }
            }
        });
        capture
    }

    /// What has come after the first `from` bytes, and whether that was all.
    pub fn after(&self, from: usize) -> (Vec<u8>, bool) {
        let state = self.lock();
        (state.bytes[from..].to_vec(), state.ended)
    }

    /// All that has come.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// How many bytes have come.
    pub fn len(&self) -> usize {
        self.lock().bytes.len()
    }

    /// How many bytes have come, once all that was written before this call has.
    ///
    /// # Panics
    /// When that takes too long.
    pub fn len_of_all(&self) -> usize {
        until("all that was written is read", || {
            let state = self.lock();
            let more = state.stream.as_ref().is_some_and(|stream| {
                poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO)
                    .is_ok_and(|ready| ready > 0)
            });
            (state.ended || !more).then_some(state.bytes.len())
        })
    }

    /// Whether nothing has come.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits until more than `seen` bytes have come, or the end, or `until`.
    pub fn wait_for_more(&self, seen: usize, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        let nothing_new = |state: &mut State| state.bytes.len() <= seen && !state.ended;
        drop(self.changed.wait_timeout_while(self.lock(), left, nothing_new));
    }

    /// Waits for the stream's end and returns all of it.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn to_end(&self) -> String {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), PATIENCE, |state| !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(state.ended, "the stream does not end");
        drop(state);
        self.text()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
