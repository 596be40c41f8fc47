//! Many operations under way at once.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::process;
use std::thread::{self, ThreadId};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{IoUring, cqueue, opcode, types};

use super::spin::Spin;
use super::{RingError, build, outcome};

/// Marks the completion of a cancellation. Slots are counted from 0 and never reach it.
const CANCELLATION: u64 = u64::MAX;

/// An io_uring for a thread that waits for many things at once.
///
/// Operations are queued by [`poll_multishot`](Self::poll_multishot), [`recv`](Self::recv) and [`send`](Self::send),
/// handed to the kernel by [`submit`](Self::submit) or [`submit_and_wait`](Self::submit_and_wait), and come back from
/// [`next`](Self::next) with the token they were given. The first thread to submit owns the ring: only it may submit
/// from then on, and it must drop the ring.
pub struct EventRing {
    uring: IoUring,
    /// The thread that enabled `uring`.
    owner: Option<ThreadId>,
    /// Operations by the number that the kernel knows them by.
    slots: Vec<Slot>,
    /// Slots that are [`Slot::Free`], the next to use last.
    free: Vec<usize>,
    /// Queued or under way, and referring to memory.
    transfers: usize,
}

enum Slot {
    Free,
    Transfer {
        token: u64,
    },
    /// The duplicate is there to be polled again when the kernel ends the poll by itself.
    Poll {
        token: u64,
        fd: OwnedFd,
    },
}

/// The result of an operation, or one event of a poll.
#[derive(Debug)]
pub struct Completion {
    /// What the operation was given.
    pub token: u64,
    /// Bytes moved, or the poll's event mask.
    pub result: io::Result<u32>,
}

impl EventRing {
    /// A ring with room for `entries` operations between two submissions. More may be under way.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(entries: u32) -> Result<Self, RingError> {
        let uring = build(entries.max(1))?;
        // Room for all that is usual, so that the fault path does not allocate.
        let capacity = uring.params().cq_entries() as usize;
        let free = Vec::with_capacity(capacity);
        Ok(Self { uring, owner: None, slots: Vec::with_capacity(capacity), free, transfers: 0 })
    }

    /// Queues a poll that reports each time `fd` becomes readable, until the ring goes or the poll fails. It tells
    /// of changes: whoever is told must read until there is nothing left.
    ///
    /// # Errors
    /// When `fd` cannot be duplicated, or a full queue cannot be submitted.
    pub fn poll_multishot(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let fd = fd.try_clone_to_owned()?;
        let slot = self.take_slot(Slot::Poll { token, fd });
        self.arm(slot).inspect_err(|_| self.free_slot(slot))
    }

    /// Queues the reception of `len` bytes; fewer come only at the end of the stream, or with an error to follow.
    ///
    /// # Errors
    /// When a full queue cannot be submitted; nothing is queued then.
    ///
    /// # Safety
    /// The memory must be writable, with no Rust reference into it, until the completion has been returned by
    /// [`next`](Self::next) or the ring has been dropped.
    pub unsafe fn recv(&mut self, fd: BorrowedFd<'_>, ptr: *mut u8, len: usize, token: u64) -> io::Result<()> {
        let len = length(len)?;
        let entry = opcode::Recv::new(types::Fd(fd.as_raw_fd()), ptr, len).flags(libc::MSG_WAITALL).build();
        // SAFETY: the caller keeps the memory valid until the completion.
        unsafe { self.queue_transfer(entry, token) }
    }

    /// Queues the reception of what comes, at least a byte and at most `len`; none at the end of the stream.
    ///
    /// # Errors
    /// When a full queue cannot be submitted; nothing is queued then.
    ///
    /// # Safety
    /// As for [`recv`](Self::recv).
    pub unsafe fn recv_some(&mut self, fd: BorrowedFd<'_>, ptr: *mut u8, len: usize, token: u64) -> io::Result<()> {
        let entry = opcode::Recv::new(types::Fd(fd.as_raw_fd()), ptr, length(len)?).build();
        // SAFETY: the caller keeps the memory valid until the completion.
        unsafe { self.queue_transfer(entry, token) }
    }

    /// Queues the sending of `len` bytes; fewer go only with an error to follow. No signal is raised when the other
    /// side has gone.
    ///
    /// # Errors
    /// When a full queue cannot be submitted; nothing is queued then.
    ///
    /// # Safety
    /// The memory must be readable until the completion has been returned by [`next`](Self::next) or the ring has
    /// been dropped.
    pub unsafe fn send(&mut self, fd: BorrowedFd<'_>, ptr: *const u8, len: usize, token: u64) -> io::Result<()> {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let entry = opcode::Send::new(types::Fd(fd.as_raw_fd()), ptr, length(len)?).flags(flags).build();
        // SAFETY: the caller keeps the memory valid until the completion.
        unsafe { self.queue_transfer(entry, token) }
    }

    /// Hands what is queued to the kernel, and takes in completions that it holds back, without waiting. Costs no
    /// system call when there is neither, so it can be called in a spinning loop.
    ///
    /// # Errors
    /// When the kernel refuses, or another thread owns the ring (`EEXIST`).
    pub fn submit(&mut self) -> io::Result<()> {
        self.enable()?;
        let queue = self.uring.submission();
        if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(());
        }
        drop(queue);
        forgive(self.uring.submit())
    }

    /// Hands what is queued to the kernel and waits until at least `min` completions are there, a signal came, or
    /// `timeout` has passed; neither of the latter is an error.
    ///
    /// # Errors
    /// When the kernel refuses, or another thread owns the ring (`EEXIST`).
    pub fn submit_and_wait(&mut self, min: usize, timeout: Option<Duration>) -> io::Result<()> {
        if min == 0 {
            return self.submit();
        }
        self.enable()?;
        match timeout {
            None => forgive(self.uring.submit_and_wait(min)),
            Some(timeout) => {
                let time = types::Timespec::from(timeout);
                let args = types::SubmitArgs::new().timespec(&time);
                forgive(self.uring.submitter().submit_with_args(min, &args))
            }
        }
    }

    /// Hands what is queued to the kernel and asks again and again, for at most `most`, whether a completion is there. Says whether
    /// one is. For a thread that has a processor to itself and waits for microseconds.
    ///
    /// # Errors
    /// When the kernel refuses, or another thread owns the ring (`EEXIST`).
    pub fn submit_and_spin(&mut self, most: Duration) -> io::Result<bool> {
        let spin = Spin::new(most);
        loop {
            self.submit()?;
            if !self.uring.completion().is_empty() {
                return Ok(true);
            }
            if !spin.again() {
                return Ok(false);
            }
        }
    }

    /// The next completion that is there, if any. No system call, unless a poll has to be armed again while the
    /// queue is full.
    #[expect(clippy::should_implement_trait, reason = "not an iterator: None means none yet")]
    pub fn next(&mut self) -> Option<Completion> {
        loop {
            let entry = self.uring.completion().next()?;
            if entry.user_data() == CANCELLATION {
                continue;
            }
            let slot = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let result = outcome(entry.result());
            match self.slots.get(slot) {
                None | Some(Slot::Free) => {
                    tracing::error!(slot, "the kernel completed an io_uring operation that was never queued");
                }
                Some(&Slot::Transfer { token }) => {
                    self.free_slot(slot);
                    return Some(Completion { token, result });
                }
                Some(&Slot::Poll { token, .. }) => {
                    let more = cqueue::more(entry.flags());
                    // The kernel ends a multishot poll when it cannot post (a full completion queue).
                    let result =
                        if more || result.is_err() { result } else { result.and_then(|m| self.arm(slot).map(|()| m)) };
                    if result.is_err() && !more {
                        self.free_slot(slot);
                    }
                    return Some(Completion { token, result });
                }
            }
        }
    }

    /// # Safety
    /// What `entry` points at must stay valid until its completion.
    unsafe fn queue_transfer(&mut self, entry: Entry, token: u64) -> io::Result<()> {
        let slot = self.take_slot(Slot::Transfer { token });
        // SAFETY: the caller's promise.
        unsafe { self.push(&entry.user_data(slot as u64)) }.inspect_err(|_| self.free_slot(slot))
    }

    fn arm(&mut self, slot: usize) -> io::Result<()> {
        let Some(Slot::Poll { fd, .. }) = self.slots.get(slot) else { return Ok(()) };
        let events = u32::from(libc::POLLIN.cast_unsigned());
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events).multi(true).build();
        // SAFETY: a poll refers to no memory.
        unsafe { self.push(&entry.user_data(slot as u64)) }
    }

    /// # Safety
    /// What `entry` points at must stay valid until its completion.
    unsafe fn push(&mut self, entry: &Entry) -> io::Result<()> {
        if self.uring.submission().is_full() {
            self.submit()?;
        }
        // SAFETY: the caller's promise.
        unsafe { self.uring.submission().push(entry) }.map_err(io::Error::other)
    }

    fn enable(&mut self) -> io::Result<()> {
        if self.owner.is_none() {
            self.uring.submitter().register_enable_rings()?;
            self.owner = Some(thread::current().id());
        }
        Ok(())
    }

    fn take_slot(&mut self, slot: Slot) -> usize {
        if matches!(slot, Slot::Transfer { .. }) {
            self.transfers += 1;
        }
        if let Some(index) = self.free.pop() {
            self.slots[index] = slot;
            index
        } else {
            self.slots.push(slot);
            self.slots.len() - 1
        }
    }

    fn free_slot(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index) {
            if matches!(slot, Slot::Transfer { .. }) {
                self.transfers -= 1;
            }
            *slot = Slot::Free;
            self.free.push(index);
        }
    }

    /// Cancels everything and waits until the kernel is done with it.
    fn cancel_all(&mut self) -> io::Result<()> {
        let live = |slot: &Slot| !matches!(slot, Slot::Free);
        for index in 0..self.slots.len() {
            if live(&self.slots[index]) {
                let entry = opcode::AsyncCancel::new(index as u64).build().user_data(CANCELLATION);
                // SAFETY: a cancellation refers to no memory.
                unsafe { self.push(&entry) }?;
            }
        }
        // A poll that fires just now must not be armed again, so `next` is not used here.
        while self.slots.iter().any(live) {
            self.submit_and_wait(1, None)?;
            loop {
                // Bound first: a borrow in the loop's condition would last for its body.
                let next = self.uring.completion().next();
                let Some(entry) = next else { break };
                let ended = entry.user_data() != CANCELLATION && !cqueue::more(entry.flags());
                if let (true, Ok(index)) = (ended, usize::try_from(entry.user_data())) {
                    self.free_slot(index);
                }
            }
        }
        Ok(())
    }
}

impl Drop for EventRing {
    fn drop(&mut self) {
        // Never enabled: the kernel has taken nothing.
        if self.owner.is_none() {
            return;
        }
        if let Err(error) = self.cancel_all() {
            // Polls refer to no memory and end with the ring. A transfer does.
            if self.transfers > 0 {
                eprintln!(
                    "switchover: cannot cancel {} transfers under way: {error}; their memory is about to go, so this \
                     process ends here (an EventRing must be dropped by the thread that submitted to it)",
                    self.transfers
                );
                process::abort();
            }
        }
    }
}

fn length(len: usize) -> io::Result<u32> {
    // The kernel moves at most i32::MAX bytes at once; a result has no room for more.
    i32::try_from(len)
        .map(i32::cast_unsigned)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a transfer of 2 GiB or more"))
}

/// What is no failure of a submission: a signal, the end of the wait, a completion queue that must be read first.
fn forgive(entered: io::Result<usize>) -> io::Result<()> {
    match entered {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EBUSY)) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
