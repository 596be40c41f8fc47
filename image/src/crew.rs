//! Several threads that do one list of chunks.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::error::ImageError;

/// How far a piece of work has come, and whether it is called off. Read and written by any thread.
#[derive(Debug, Default)]
pub struct Tally {
    /// Pages done that are zero.
    pub zero: AtomicU64,
    /// Pages done that are not.
    pub data: AtomicU64,
    /// Bytes of the file written or read.
    pub bytes: AtomicU64,
    /// Set by whoever wants it to end; it then does so with [`ImageError::Cancelled`].
    pub called_off: AtomicBool,
}

impl Tally {
    pub(crate) fn note(&self, zero: usize, data: usize, bytes: usize) {
        for (counter, more) in [(&self.zero, zero), (&self.data, data), (&self.bytes, bytes)] {
            counter.fetch_add(more as u64, Ordering::Relaxed);
        }
    }

    pub(crate) fn check(&self) -> Result<(), ImageError> {
        if self.called_off.load(Ordering::Relaxed) { Err(ImageError::Cancelled) } else { Ok(()) }
    }
}

/// The most threads that are of use: of more, most would wait for the disk or for memory.
const MOST_THREADS: usize = 8;

/// How many threads to write or read an image with, on this host.
#[must_use]
pub fn threads_for(chunks: u64) -> usize {
    let processors = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    processors.min(MOST_THREADS).min(usize::try_from(chunks).unwrap_or(MOST_THREADS)).max(1)
}

/// Does `work` on each number below `count`, on so many threads, each with a tool of its own. After the first error none is begun;
/// that error is answered.
pub(crate) fn share_out<T>(
    threads: usize,
    count: u64,
    tally: &Tally,
    tool: impl Fn() -> Result<T, ImageError> + Sync,
    work: impl Fn(&mut T, u64) -> Result<(), ImageError> + Sync,
) -> Result<(), ImageError> {
    let (next, failed, first_error) = (AtomicU64::new(0), AtomicBool::new(false), Mutex::new(None));
    let one = || {
        let mut tool = tool()?;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count || failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            tally.check()?;
            work(&mut tool, number)?;
        }
    };
    let run = || {
        if let Err(error) = one() {
            failed.store(true, Ordering::Relaxed);
            first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    };
    thread::scope(|scope| {
        for number in 1..threads {
            // Where no thread can be had, the others do its share.
            let _ = thread::Builder::new().name(format!("image-{number}")).spawn_scoped(scope, run);
        }
        run();
    });
    first_error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_done_once_and_the_first_error_ends_it() {
        let (tally, sum) = (Tally::default(), AtomicU64::new(0));
        let add = |_: &mut (), number| {
            sum.fetch_add(number, Ordering::Relaxed);
            Ok(())
        };
        share_out(3, 101, &tally, || Ok(()), add).unwrap();
        assert_eq!(sum.load(Ordering::Relaxed), 5050);
        let fail =
            |_: &mut (), number| if number == 5 { Err(ImageError::Foreign { path: "f".into() }) } else { Ok(()) };
        assert!(matches!(share_out(1, u64::MAX, &tally, || Ok(()), fail), Err(ImageError::Foreign { .. })));
        tally.called_off.store(true, Ordering::Relaxed);
        assert!(matches!(share_out(2, 9, &tally, || Ok(()), add), Err(ImageError::Cancelled)));
        assert_eq!(sum.load(Ordering::Relaxed), 5050);
    }
}
