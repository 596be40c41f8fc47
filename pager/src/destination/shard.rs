//! One of the parts that faults are divided into: what a fault thread shares with the session and with the bulk lanes.
//!
//! A page's faults, requests and answers are all of one shard ([`crate::stripes`]), so that nothing of the fault path is between
//! two fault threads but the map of page states, in which each touches its own pages only.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crossbeam::queue::{ArrayQueue, SegQueue};
use nix::sys::eventfd::{EfdFlags, EventFd};
use switchover_wire::clock::Nanos;
use switchover_wire::types::PageIndex;

use super::DestinationPagerError;
use super::seat::Seat;
use crate::stats::FaultStats;

/// Wake-ups of raced faults that the bulk lanes report and the fault thread has not looked at yet. More than there
/// can be faults under way; what does not fit is counted without its time.
const RACED_WAKES: usize = 4096;

/// What surrounds one fault thread.
pub struct Shard {
    /// Its number among the watch's shards.
    pub index: usize,
    pub seat: Seat,
    /// Pages that a fault waits for and that nobody brings any more: the fault thread asks for them.
    orphans: SegQueue<PageIndex>,
    raced_wakes: ArrayQueue<(PageIndex, Nanos)>,
    faults: Mutex<FaultStats>,
    wake: EventFd,
}

impl Shard {
    pub fn new(index: usize) -> Result<Self, DestinationPagerError> {
        Ok(Self {
            index,
            seat: Seat::default(),
            orphans: SegQueue::new(),
            raced_wakes: ArrayQueue::new(RACED_WAKES),
            faults: Mutex::new(FaultStats::new()),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|errno| DestinationPagerError::EventFd(errno.into()))?,
        })
    }

    /// A fault waits for `page`, whose lane does not bring it after all.
    pub fn ask_anew(&self, page: PageIndex) {
        self.orphans.push(page);
        self.wake();
    }

    /// The next page that the fault thread is to ask for.
    pub fn next_orphan(&self) -> Option<PageIndex> {
        self.orphans.pop()
    }

    /// A bulk lane has woken the faults on `page`, which was asked for too.
    pub fn report_raced(&self, page: PageIndex, woken: Nanos) {
        self.raced_wakes.force_push((page, woken));
    }

    /// The next such report.
    pub fn next_raced(&self) -> Option<(PageIndex, Nanos)> {
        self.raced_wakes.pop()
    }

    /// What its faults cost. Not held across a system call.
    pub fn stats(&self) -> MutexGuard<'_, FaultStats> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the fault thread look around.
    pub fn wake(&self) {
        if let Err(errno) = self.wake.write(1) {
            tracing::error!(%errno, "cannot wake the fault thread");
        }
    }

    /// What becomes readable by [`wake`](Self::wake).
    pub fn woken_fd(&self) -> io::Result<OwnedFd> {
        self.wake.as_fd().try_clone_to_owned()
    }

    /// The fault thread has heard.
    pub fn heard(&self) {
        // Nothing to read: another look than the one that was asked for has seen it all.
        let _ = self.wake.read();
    }
}
