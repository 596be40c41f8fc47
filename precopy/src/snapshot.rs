//! Pages as they are at one moment, of a guest that runs on: copied when somebody is about to write them, and not before.
//!
//! ```text
//!   guest runs    protect what is written at the moment; who writes there is let go at once, and its page noted
//!   guest paused  the moment: protect the few that were let go ── from here on nothing of it is lost
//!   guest runs    a reader takes page after page out and lets it go; who writes to one before that waits until it is put aside
//! ```
//!
//! Protecting a page takes about as long as copying it does not: the pause is short because nearly all of it happens before, and
//! because a guest that has to wait at every first write makes little that has to be done again.
//!
//! # What keeps a page from being read half old and half new
//! All is decided under one lock. Before a page is let go, it is put aside, unless it was read already; and who reads pages looks
//! behind that, under the lock, for what was put aside meanwhile. What is put aside counts.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use switchover_pager::ram::Ram;
use switchover_pager::uffd::waiting::Alarm;
use switchover_pager::uffd::write::WriteWatch;
use switchover_pager::uffd::{FaultBuffer, WatchError};
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};
use thiserror::Error;

use crate::bitmap::PageBitmap;
use crate::dirty::{DirtyLog, DirtyLogError};

/// Pages that are protected by one call at most, as the lock is held meanwhile.
const MOST_AT_ONCE: u64 = 512;
/// Pages between two that are wanted which are protected with them: another call costs more than somebody's waiting in vain.
const GAP: u64 = 8;

/// A snapshot could not be made, or is lost. The guest runs on all the same.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// Userfaultfd could not do its part.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// Those who wait cannot be waited for.
    #[error("cannot wait for whoever writes to a protected page: {0}")]
    Wait(#[source] io::Error),
    /// No thread for it.
    #[error("cannot start a thread that keeps what the guest overwrites: {0}")]
    Thread(#[source] io::Error),
    /// Guest memory could not be read.
    #[error("cannot read guest memory from {0} on: {1}")]
    Read(PageIndex, #[source] io::Error),
    /// The machine cannot tell what its guest writes.
    #[error(transparent)]
    Log(#[from] DirtyLogError),
    /// The thread has ended, and let go of all pages.
    #[error("what the guest has overwritten is lost: {0}")]
    Lost(String),
}

/// A snapshot that is being made, or being read. Dropped, it lets go of all pages.
pub struct Snapshot {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    watch: WriteWatch,
    /// The end of it.
    alarm: Alarm,
    /// Where the guest's later writes are to be noted.
    log: Option<Arc<dyn DirtyLog>>,
    state: Mutex<State>,
}

struct State {
    /// Writes to these wait.
    protected: PageBitmap,
    /// Those of the moment which nobody has read or put aside. Empty before it.
    wanted: PageBitmap,
    aside: HashMap<PageIndex, Box<[u8; PAGE_SIZE]>>,
    /// How many were ever put aside.
    put_aside: u64,
    /// Why there is no snapshot any more.
    lost: Option<String>,
}

impl Snapshot {
    /// Begins one of `ram`, of which no page is protected yet. With a `log`, which has been started, what that notes of the pages of the
    /// moment is what was written after it: each is rearmed when it is read or put aside, and before anybody can write to it.
    ///
    /// # Errors
    /// When the host cannot protect guest memory, or gives no thread.
    pub fn begin(ram: &Ram, log: Option<Arc<dyn DirtyLog>>) -> Result<Self, SnapshotError> {
        let pages = ram.pages();
        let shared = Arc::new(Shared {
            watch: WriteWatch::register(ram.clone())?,
            alarm: Alarm::new().map_err(SnapshotError::Wait)?,
            log,
            state: Mutex::new(State {
                protected: PageBitmap::new(pages),
                wanted: PageBitmap::new(pages),
                aside: HashMap::new(),
                put_aside: 0,
                lost: None,
            }),
        });
        let its = Arc::clone(&shared);
        let thread = thread::Builder::new().name("copy-on-write".to_owned()).spawn(move || its.serve());
        Ok(Self { shared, thread: Some(thread.map_err(SnapshotError::Thread)?) })
    }

    /// Protects `which`, as far as they are not, while the guest runs and may undo it page by page. Says how many that were.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn protect(&self, which: &PageBitmap) -> Result<PageCount, SnapshotError> {
        let mut rest = which.clone();
        rest.subtract(&self.shared.lock().protected);
        let count = rest.count();
        for (first, pages) in stretches(&rest) {
            let mut state = self.shared.lock();
            self.shared.protect(&mut state, first, pages)?;
        }
        Ok(count)
    }

    /// This is the moment, as far as the pages `which` go: with everybody paused who writes to them. What they hold now is what
    /// [`read`](Self::read) gives, whatever is written when this is back. Says how many had still to be protected.
    ///
    /// # Errors
    /// When the host refuses; it is no snapshot then.
    pub fn take(&self, which: &PageBitmap) -> Result<PageCount, SnapshotError> {
        let mut state = self.shared.lock();
        let mut rest = which.clone();
        rest.subtract(&state.protected);
        for (first, pages) in stretches(&rest) {
            self.shared.protect(&mut state, first, pages)?;
        }
        state.wanted = which.clone();
        state.check()?;
        Ok(rest.count())
    }

    /// Reads pages of the moment into `bytes`, from `first` on, and lets them go. Each can be read once, and by one thread.
    ///
    /// # Errors
    /// When memory cannot be read, or what was overwritten is lost.
    pub fn read(&self, first: PageIndex, bytes: &mut [u8]) -> Result<(), SnapshotError> {
        let file = self.shared.watch.ram().file();
        file.read_exact_at(bytes, first.offset()).map_err(|source| SnapshotError::Read(first, source))?;
        let mut held = false;
        {
            let mut state = self.shared.lock();
            state.check()?;
            // From the word on that the first page is in.
            let start = first.0 / 64;
            let mut captured = vec![0_u64; bytes.len() / PAGE_SIZE / 64 + 2];
            for (page, bytes) in (first.0..).map(PageIndex).zip(bytes.chunks_exact_mut(PAGE_SIZE)) {
                if let Some(aside) = state.aside.remove(&page) {
                    bytes.copy_from_slice(&aside[..]);
                }
                if state.wanted.remove(page) {
                    captured[usize::try_from(page.0 / 64 - start).unwrap_or(0)] |= 1 << (page.0 % 64);
                }
                held |= state.protected.remove(page);
            }
            self.shared.rearm(start, &captured)?;
        }
        if held {
            // From here on who comes to write waits for nothing but this call.
            self.shared.watch.release(first, PageCount((bytes.len() / PAGE_SIZE) as u64))?;
        }
        Ok(())
    }

    /// How many pages were overwritten before they were read.
    #[must_use]
    pub fn put_aside(&self) -> PageCount {
        PageCount(self.shared.lock().put_aside)
    }

    /// Ends it, some pages at a time, so that nobody waits long. Dropping it does so at once.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn end(self) -> Result<(), SnapshotError> {
        Ok(self.shared.watch.unregister()?)
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        self.shared.alarm.ring();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps what the guest overwrites has panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn protect(&self, state: &mut State, first: PageIndex, count: PageCount) -> Result<(), SnapshotError> {
        self.watch.protect(first, count)?;
        for page in first.0..first.0 + count.0 {
            state.protected.insert(PageIndex(page));
        }
        Ok(())
    }

    /// From now on writes to these pages are noted anew, by words of 64 pages. They are protected: there is none in between.
    fn rearm(&self, first_word: u64, captured: &[u64]) -> Result<(), SnapshotError> {
        match &self.log {
            Some(log) if captured.iter().any(|word| *word != 0) => Ok(log.rearm(PageIndex(first_word * 64), captured)?),
            _ => Ok(()),
        }
    }

    /// Answers whoever waits, until it is told to stop. When that cannot be done any more, everybody is let go, and the snapshot is
    /// lost: a guest that stands still for ever would be worse.
    fn serve(&self) {
        if let Err(error) = self.serve_until_the_end() {
            tracing::error!(%error, "cannot keep what the guest overwrites");
            self.lock().lost = Some(error.to_string());
            if let Err(error) = self.watch.unregister() {
                tracing::error!(%error, "the guest may stand still");
            }
        }
    }

    fn serve_until_the_end(&self) -> Result<(), SnapshotError> {
        let (mut buffer, mut faults) = (FaultBuffer::default(), Vec::new());
        while self.alarm.wait(self.watch.fd()).map_err(SnapshotError::Wait)? {
            self.watch.take_faults(&mut buffer, &mut faults)?;
            faults.drain(..).try_for_each(|page| self.let_go(page))?;
        }
        Ok(())
    }

    /// Lets the writers of a page go on, and keeps what they are about to overwrite.
    fn let_go(&self, page: PageIndex) -> Result<(), SnapshotError> {
        let mut state = self.lock();
        if state.wanted.remove(page) {
            let mut bytes = Box::new([0; PAGE_SIZE]);
            let file = self.watch.ram().file();
            file.read_exact_at(&mut bytes[..], page.offset()).map_err(|source| SnapshotError::Read(page, source))?;
            state.aside.insert(page, bytes);
            state.put_aside += 1;
            self.rearm(page.0 / 64, &[1 << (page.0 % 64)])?;
        }
        state.protected.remove(page);
        Ok(self.watch.release(page, PageCount(1))?)
    }
}

impl State {
    fn check(&self) -> Result<(), SnapshotError> {
        self.lost.as_ref().map_or(Ok(()), |why| Err(SnapshotError::Lost(why.clone())))
    }
}

/// The runs of `which`, joined where little lies between them, in pieces.
fn stretches(which: &PageBitmap) -> Vec<(PageIndex, PageCount)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (first, count) in which.runs() {
        match joined.last_mut() {
            Some((_, end)) if first.0 - *end <= GAP => *end = first.0 + count.0,
            _ => joined.push((first.0, first.0 + count.0)),
        }
    }
    let pieces = |(first, end): (u64, u64)| {
        (first..end)
            .step_by(usize::try_from(MOST_AT_ONCE).unwrap_or(usize::MAX))
            .map(move |start| (PageIndex(start), PageCount(MOST_AT_ONCE.min(end - start))))
    };
    joined.into_iter().flat_map(pieces).collect()
}

#[cfg(test)]
mod tests;
