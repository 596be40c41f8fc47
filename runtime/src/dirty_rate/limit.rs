//! A limit on what each vCPU newly writes, held while nobody migrates the guest.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use switchover_hybrid::machine::Machine;

use super::book::Book;
use super::{MeterError, Running, per_second};
use crate::lock;

/// How often written pages are armed again, so that writing them counts anew: QEMU's period.
const PERIOD: Duration = Duration::from_secs(1);

/// A limit that is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limit {
    /// What each vCPU may newly write, in bytes a second.
    pub bytes_per_second: u64,
    /// What all vCPUs together newly wrote over the last second. 0 in the first one.
    pub written_per_second: u64,
}

/// Holds vCPUs to a limit. Dropping it lifts the limit.
#[derive(Default)]
pub struct DirtyLimiter(Mutex<Option<Held>>);

struct Held {
    machine: Arc<dyn Machine>,
    bytes_per_second: u64,
    written: Arc<AtomicU64>,
    running: Running,
}

impl DirtyLimiter {
    /// Holds each vCPU of `machine` to so many newly written bytes a second, in place of the limit before.
    ///
    /// # Errors
    /// When the machine cannot; what was held before still is.
    pub fn hold(&self, machine: Arc<dyn Machine>, bytes_per_second: u64) -> Result<(), MeterError> {
        let mut held = lock(&self.0);
        if let Some(held) = &mut *held {
            machine.limit_dirty_rate(Some(bytes_per_second))?;
            held.bytes_per_second = bytes_per_second;
            return Ok(());
        }
        let book = Book::open(&*machine)?;
        machine.limit_dirty_rate(Some(bytes_per_second))?;
        let written = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&written);
        match Running::start("dirty-limit", move |ended| keep_armed(&book, &counted, ended)) {
            Ok(running) => *held = Some(Held { machine, bytes_per_second, written, running }),
            Err(error) => {
                let _ = machine.limit_dirty_rate(None);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Lifts the limit. When this returns the machine's book is closed. No limit to lift is no error.
    pub fn lift(&self) {
        let held = lock(&self.0).take();
        if let Some(Held { machine, running, .. }) = held {
            // Lifting never needs what a machine may lack.
            let _ = machine.limit_dirty_rate(None);
            running.end();
        }
    }

    /// The limit, if there is one.
    #[must_use]
    pub fn limit(&self) -> Option<Limit> {
        lock(&self.0).as_ref().map(|held| Limit {
            bytes_per_second: held.bytes_per_second,
            written_per_second: held.written.load(Ordering::Acquire),
        })
    }
}

impl Drop for DirtyLimiter {
    fn drop(&mut self) {
        self.lift();
    }
}

fn keep_armed(book: &Book, written: &AtomicU64, ended: &Receiver<()>) {
    loop {
        if let Err(error) = book.rearm() {
            tracing::warn!(%error, "written pages could not be armed again: the dirty limit counts too little");
        }
        let since = Instant::now();
        if ended.recv_timeout(PERIOD) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        if let Ok(pages) = book.noted() {
            written.store(per_second(pages, since.elapsed()), Ordering::Release);
        }
    }
}
