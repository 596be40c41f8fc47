//! How fast a guest writes, measured while nobody migrates it, and the limit that can be set on it.
//!
//! ```text
//!   measure ──▶ thread: arm all pages ── calc-time, or interrupted ──▶ count what is noted ──▶ look
//! ```
//!
//! Both need the machine's book of written pages to themselves ([`book`]); a migration needs it too, and goes first: it
//! interrupts a measurement. Sampling needs no book, and slows no guest down.

pub mod book;
pub mod limit;
mod sampling;

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use switchover_hybrid::machine::{Machine, MachineError};
use switchover_precopy::dirty::DirtyLogError;
use switchover_wire::types::PageCount;
use thiserror::Error;

use crate::lock;
use book::Book;
use sampling::Samples;

/// How written pages are found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Method {
    /// Some pages are compared with what they were. Misses what was written and written back.
    #[default]
    Sampling,
    /// The machine's book of written pages is asked.
    Book,
}

/// A measurement to be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// How long the guest is watched.
    pub time: Duration,
    /// How.
    pub method: Method,
    /// For sampling: pages per GiB of RAM.
    pub samples_per_gib: u64,
}

/// Where a measurement stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It was interrupted, or failed: it has no result.
    Interrupted,
    /// The guest is being watched.
    Measuring,
    /// Done: so many bytes a second were newly written.
    Measured {
        /// Distinct pages written over the time they were watched for, as bytes a second.
        bytes_per_second: u64,
    },
}

/// The last measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Measurement {
    /// What was asked for.
    pub plan: Plan,
    /// When it began.
    pub started: SystemTime,
    /// Where it stands.
    pub standing: Standing,
}

/// A measurement or a limit could not be begun.
#[derive(Debug, Error)]
pub enum MeterError {
    /// One at a time.
    #[error("the dirty rate is already being measured.")]
    Measuring,
    /// The limit needs the book.
    #[error(
        "a dirty page rate limit is set, and needs the machine's book of written pages: lift it with \
         cancel-vcpu-dirty-limit, or measure by page-sampling"
    )]
    Limited,
    /// The machine keeps no book.
    #[error(transparent)]
    Log(#[from] DirtyLogError),
    /// The machine holds its vCPUs to no limit.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// No thread.
    #[error("cannot start a thread to watch the guest: {0}; is the number of threads limited (`ulimit -u`)?")]
    Thread(#[source] io::Error),
}

/// Measures how fast a guest writes. Dropping it interrupts it.
#[derive(Debug, Default)]
pub struct DirtyMeter {
    last: Arc<Mutex<Option<Measurement>>>,
    running: Mutex<Option<Running>>,
}

/// A thread that ends when its sender is dropped.
#[derive(Debug)]
struct Running {
    ends: Sender<()>,
    thread: JoinHandle<()>,
}

impl Running {
    fn start(name: &str, work: impl FnOnce(&Receiver<()>) + Send + 'static) -> Result<Self, MeterError> {
        let (ends, ended) = bounded(0);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || work(&ended));
        Ok(Self { ends, thread: thread.map_err(MeterError::Thread)? })
    }

    fn end(self) {
        drop(self.ends);
        // A thread that panicked has ended the process already.
        let _ = self.thread.join();
    }
}

impl DirtyMeter {
    /// Begins to measure, and returns at once.
    ///
    /// # Errors
    /// When a measurement is under way, or the machine cannot tell what is written.
    pub fn measure(&self, machine: &dyn Machine, plan: Plan) -> Result<(), MeterError> {
        let mut running = lock(&self.running);
        if self.is_measuring() {
            return Err(MeterError::Measuring);
        }
        if let Some(done) = running.take() {
            done.end();
        }
        let watch = Watch::begin(machine, &plan)?;
        let measurement = Measurement { plan, started: SystemTime::now(), standing: Standing::Measuring };
        *lock(&self.last) = Some(measurement);
        let last = Arc::clone(&self.last);
        let started = Running::start("dirty-rate", move |ended| {
            let standing = watch.carry_out(plan.time, ended);
            *lock(&last) = Some(Measurement { standing, ..measurement });
        });
        match started {
            Ok(thread) => *running = Some(thread),
            Err(error) => {
                *lock(&self.last) = Some(Measurement { standing: Standing::Interrupted, ..measurement });
                return Err(error);
            }
        }
        Ok(())
    }

    /// The last measurement, if there was one.
    #[must_use]
    pub fn last(&self) -> Option<Measurement> {
        *lock(&self.last)
    }

    /// Whether one is under way.
    #[must_use]
    pub fn is_measuring(&self) -> bool {
        self.last().is_some_and(|last| last.standing == Standing::Measuring)
    }

    /// Ends the measurement that is under way, if there is one. When this returns the machine's book is closed.
    pub fn interrupt(&self) {
        let running = lock(&self.running).take();
        if let Some(running) = running {
            running.end();
        }
    }
}

impl Drop for DirtyMeter {
    fn drop(&mut self) {
        self.interrupt();
    }
}

/// A guest that is being watched.
enum Watch {
    Samples(Samples),
    Book(Book),
}

impl Watch {
    fn begin(machine: &dyn Machine, plan: &Plan) -> Result<Self, MeterError> {
        Ok(match plan.method {
            Method::Sampling => Self::Samples(Samples::of(&machine.ram(), plan.samples_per_gib)),
            Method::Book => Self::Book(Book::open(machine)?),
        })
    }

    fn carry_out(mut self, time: Duration, ended: &Receiver<()>) -> Standing {
        match self.count(time, ended) {
            Ok(Some((pages, elapsed))) => Standing::Measured { bytes_per_second: per_second(pages, elapsed) },
            Ok(None) => Standing::Interrupted,
            Err(error) => {
                tracing::warn!(%error, "the dirty rate could not be measured");
                Standing::Interrupted
            }
        }
    }

    /// The distinct pages written and the time they had for it; `None` where it was interrupted.
    fn count(
        &mut self,
        time: Duration,
        ended: &Receiver<()>,
    ) -> Result<Option<(PageCount, Duration)>, Box<dyn std::error::Error + Send + Sync>> {
        match self {
            Self::Samples(samples) => samples.take()?,
            Self::Book(book) => book.rearm()?,
        }
        let since = Instant::now();
        if ended.recv_timeout(time) != Err(RecvTimeoutError::Timeout) {
            return Ok(None);
        }
        let elapsed = since.elapsed();
        let pages = match self {
            Self::Samples(samples) => samples.changed()?,
            Self::Book(book) => book.noted()?,
        };
        Ok(Some((pages, elapsed)))
    }
}

fn per_second(pages: PageCount, elapsed: Duration) -> u64 {
    let bytes = u128::from(pages.bytes()) * 1_000_000_000 / elapsed.as_nanos().max(1);
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
