//! The audit log: what happened to a machine and its migrations, in lines that cannot be changed without a trace.
//!
//! Whoever has something to say hands it to a thread and goes on: a disk that is slow, full or gone holds up neither a migration
//! nor a guest. It is said on standard error then, and in the log itself as soon as it takes lines again.

mod events;
pub mod record;
pub mod verify;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use crossbeam::channel::{Sender, bounded};
use serde_json::Value;

pub use self::writer::AuditError;
use self::writer::Writer;

/// What waits to be written while the disk is busy. Each takes some hundred bytes; what finds no room is counted.
const QUEUE: usize = 4096;

/// How long the end of the process waits for the disk.
const LAST_LINES: Duration = Duration::from_secs(2);

/// The most bytes of one text from outside that a line takes.
const TEXT_LIMIT: usize = 1024;

/// Where to note what happens. Clones note in the same log.
#[derive(Clone, Debug, Default)]
pub struct Audit {
    open: Option<Open>,
}

#[derive(Clone, Debug)]
struct Open {
    queue: Sender<Order>,
    /// What found no room in the queue.
    lost: Arc<AtomicU64>,
}

/// What the writing thread is to do.
enum Order {
    Note {
        at: SystemTime,
        event: &'static str,
        data: Value,
    },
    /// All before it has been written, or cannot be.
    Flush(Sender<()>),
}

impl Audit {
    /// One that notes nothing.
    #[must_use]
    pub const fn off() -> &'static Self {
        const OFF: &Audit = &Audit { open: None };
        OFF
    }

    /// Goes on with the log at `path`, or begins it.
    ///
    /// # Errors
    /// When the file cannot be had, another process writes to it, its end is not as it was written, or no thread can be started.
    pub fn append(path: &Path) -> Result<Self, AuditError> {
        let mut writer = Writer::open(path)?;
        let (queue, orders) = bounded(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let not_queued = Arc::clone(&lost);
        let write = move || {
            for order in orders {
                writer.lose(not_queued.swap(0, Ordering::Relaxed));
                match order {
                    Order::Note { at, event, data } => writer.note(at, event, &data),
                    Order::Flush(done) => {
                        writer.flush();
                        let _ = done.send(());
                    }
                }
            }
        };
        let failed = |source| AuditError::Thread { path: path.to_owned(), source };
        thread::Builder::new().name("audit".to_owned()).spawn(write).map_err(failed)?;
        Ok(Self { open: Some(Open { queue, lost }) })
    }

    /// Whether anything is noted at all.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.open.is_some()
    }

    /// Notes that something happened just now. Returns at once.
    pub fn note(&self, event: &'static str, data: Value) {
        let Some(open) = &self.open else { return };
        let order = Order::Note { at: SystemTime::now(), event, data };
        if open.queue.try_send(order).is_err() {
            open.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until all that was noted is written; not for long, where the disk does not take it.
    pub fn flush(&self) {
        let Some(open) = &self.open else { return };
        let (done, written) = bounded(1);
        if open.queue.send_timeout(Order::Flush(done), LAST_LINES).is_err() || written.recv_timeout(LAST_LINES).is_err()
        {
            tracing::error!("the last lines of the audit log could not be written in time");
        }
    }
}

/// A text from outside, no longer than a line should be.
#[must_use]
pub fn brief(text: &str) -> String {
    let end = (0..=TEXT_LIMIT.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.get(..end).unwrap_or_default().to_owned()
}
