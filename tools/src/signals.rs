//! Ctrl-C and `kill`, as something a thread waits for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

use crate::failure::Failure;

/// Counts the requests to end this process: SIGINT, SIGTERM and SIGHUP.
///
/// The signals are blocked in every thread that is started afterwards and taken by one of its own, so that no code
/// ever runs in a signal handler. Programs started by such a thread must unblock them again.
#[derive(Clone, Debug)]
pub struct EndRequests {
    count: Arc<AtomicU32>,
}

impl EndRequests {
    /// Takes the signals from now on. Call it before any other thread is started. `tell` is called at each request,
    /// with its number, from 1.
    ///
    /// # Errors
    /// When they cannot be blocked, or no thread can be started.
    pub fn take(tell: impl Fn(u32) + Send + 'static) -> Result<Self, Failure> {
        let failed = |error: io::Error| Failure::failed(format_args!("cannot take signals: {error}"));
        let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        signals.thread_block().map_err(|errno| failed(errno.into()))?;
        let count = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&count);
        let take = move || {
            while signals.wait().is_ok() {
                tell(counted.fetch_add(1, Ordering::SeqCst) + 1);
            }
        };
        thread::Builder::new().name("signals".to_owned()).spawn(take).map_err(failed)?;
        Ok(Self { count })
    }

    /// How many there have been.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count.load(Ordering::SeqCst)
    }
}
