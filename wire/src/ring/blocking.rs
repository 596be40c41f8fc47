//! One transfer at a time, waited for.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread::{self, ThreadId};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};

use super::spin::Spin;
use super::{RingError, build, outcome};

/// The most parts that one `sendmsg` or `recvmsg` takes (`UIO_MAXIOV` in the kernel).
const MAX_PARTS: usize = 1024;

/// The most bytes that one operation is asked for. Any bound below the kernel's `MAX_RW_COUNT` (just under 2 GiB)
/// will do: longer transfers go on.
const MAX_BYTES: u32 = 1 << 30;

/// An io_uring for a thread that does one transfer at a time and waits for it.
///
/// It may move between threads; each move costs a new ring, so do it before the first transfer.
pub struct Ring {
    /// `None` after an operation had to be thrown away with its ring.
    uring: Option<IoUring>,
    /// The thread that enabled `uring`.
    owner: Option<ThreadId>,
    entries: u32,
    /// How long to ask again and again before sleeping.
    spin: Duration,
    /// Working copy of the caller's parts; empty between calls.
    scratch: Vec<libc::iovec>,
}

// SAFETY: `IoUring` is `Send`; the raw pointers in `scratch` exist only during a call, which borrows the ring
// exclusively, and are cleared before it returns.
unsafe impl Send for Ring {}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Send,
    Receive,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Send => "send",
            Self::Receive => "receive",
        }
    }
}

impl Ring {
    /// A ring with room for `entries` operations (1 is enough: there is never more than one under way).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(entries: u32) -> Result<Self, RingError> {
        let entries = entries.max(1);
        Ok(Self { uring: Some(build(entries)?), owner: None, entries, spin: Duration::ZERO, scratch: Vec::new() })
    }

    /// Asks again and again, for at most `most`, whether an operation is over, and sleeps only then. For a thread that has a
    /// processor to itself and waits for microseconds; zero, as in the beginning, to sleep at once.
    pub const fn spin_for(&mut self, most: Duration) {
        self.spin = most;
    }

    /// Sends all bytes of all parts, in order, and returns how many they were. No signal is raised when the other
    /// side has gone.
    ///
    /// # Errors
    /// When the connection breaks; an unknown part of the bytes may have been sent then.
    pub fn send_all(&mut self, fd: BorrowedFd<'_>, parts: &[IoSlice<'_>]) -> Result<usize, RingError> {
        self.with_scratch(
            parts.iter().map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() }),
            // SAFETY: the parts are borrowed for the whole call, and the kernel only reads what is sent.
            |ring, parts| unsafe { ring.send_all_raw(fd, parts) },
        )
    }

    /// Fills all parts, in order.
    ///
    /// # Errors
    /// [`RingError::Closed`] when the stream ends before that; the parts then hold what had come.
    pub fn recv_exact(&mut self, fd: BorrowedFd<'_>, parts: &mut [IoSliceMut<'_>]) -> Result<(), RingError> {
        self.with_scratch(
            parts.iter_mut().map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() }),
            // SAFETY: the parts are exclusively borrowed for the whole call.
            |ring, parts| unsafe { ring.recv_exact_raw(fd, parts) },
        )
    }

    /// [`send_all`](Self::send_all) from memory that Rust does not know of, such as guest RAM. The parts are
    /// consumed: what they hold afterwards means nothing.
    ///
    /// # Errors
    /// As for [`send_all`](Self::send_all).
    ///
    /// # Safety
    /// Every part must be readable for the whole call. Other writers are allowed only where torn content is.
    pub unsafe fn send_all_raw(&mut self, fd: BorrowedFd<'_>, parts: &mut [libc::iovec]) -> Result<usize, RingError> {
        // SAFETY: the caller's promise is the callee's.
        unsafe { self.transfer(fd, parts, Direction::Send) }
    }

    /// [`recv_exact`](Self::recv_exact) into memory that Rust does not know of, such as guest RAM. The parts are
    /// consumed: what they hold afterwards means nothing.
    ///
    /// # Errors
    /// As for [`recv_exact`](Self::recv_exact).
    ///
    /// # Safety
    /// Every part must be writable for the whole call, with no Rust reference into it.
    pub unsafe fn recv_exact_raw(&mut self, fd: BorrowedFd<'_>, parts: &mut [libc::iovec]) -> Result<(), RingError> {
        // SAFETY: the caller's promise is the callee's.
        unsafe { self.transfer(fd, parts, Direction::Receive) }.map(drop)
    }

    fn with_scratch<T>(
        &mut self,
        parts: impl Iterator<Item = libc::iovec>,
        work: impl FnOnce(&mut Self, &mut [libc::iovec]) -> T,
    ) -> T {
        let mut scratch = mem::take(&mut self.scratch);
        scratch.extend(parts);
        let result = work(self, &mut scratch);
        scratch.clear();
        self.scratch = scratch;
        result
    }

    /// Moves all bytes of all parts, going on after short transfers.
    ///
    /// # Safety
    /// The parts must be readable (or writable, to receive) until this returns.
    unsafe fn transfer(
        &mut self,
        fd: BorrowedFd<'_>,
        parts: &mut [libc::iovec],
        direction: Direction,
    ) -> Result<usize, RingError> {
        let operation = direction.name();
        let wanted = parts.iter().fold(0_usize, |sum, part| sum.saturating_add(part.iov_len));
        let mut done = 0;
        let mut rest = skip(parts, 0);
        while !rest.is_empty() {
            // SAFETY: `rest` is what remains of the caller's parts.
            match unsafe { self.once(fd, rest, direction) }? {
                Ok(0) if direction == Direction::Receive => return Err(RingError::Closed { got: done, wanted }),
                Ok(0) => return Err(RingError::Io { operation, source: io::ErrorKind::WriteZero.into() }),
                Ok(count) => {
                    done += count;
                    rest = skip(rest, count);
                }
                // A socket in non-blocking mode makes no difference to io_uring: it waits unless the operation's own
                // flags say otherwise. So neither of these comes back at once, and again and again.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                Err(source) => return Err(RingError::Io { operation, source }),
            }
        }
        Ok(done)
    }

    /// One operation on the first parts. The outer error is the ring's, the inner one the socket's.
    ///
    /// # Safety
    /// As for [`transfer`](Self::transfer).
    unsafe fn once(
        &mut self,
        fd: BorrowedFd<'_>,
        parts: &mut [libc::iovec],
        direction: Direction,
    ) -> Result<io::Result<usize>, RingError> {
        // WAITALL: the kernel goes on after a short transfer by itself, which saves a system call each.
        let flags = match direction {
            Direction::Send => libc::MSG_NOSIGNAL | libc::MSG_WAITALL,
            Direction::Receive => libc::MSG_WAITALL,
        };
        let target = types::Fd(fd.as_raw_fd());
        // SAFETY: all zeros is a valid msghdr: no name, no parts, no control data.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        let entry = if let [part] = parts {
            let (base, length) = (part.iov_base.cast::<u8>(), u32::try_from(part.iov_len).unwrap_or(MAX_BYTES));
            let length = length.min(MAX_BYTES);
            match direction {
                Direction::Send => opcode::Send::new(target, base, length).flags(flags).build(),
                Direction::Receive => opcode::Recv::new(target, base, length).flags(flags).build(),
            }
        } else {
            message.msg_iov = parts.as_mut_ptr();
            message.msg_iovlen = parts.len().min(MAX_PARTS);
            let (header, flags) = (&raw mut message, flags.cast_unsigned());
            match direction {
                Direction::Send => opcode::SendMsg::new(target, header).flags(flags).build(),
                Direction::Receive => opcode::RecvMsg::new(target, header).flags(flags).build(),
            }
        };
        // SAFETY: parts and header outlive this call, and `run` does not return while the kernel may use them.
        let result = unsafe { self.run(&entry, direction.name()) }?;
        Ok(outcome(result).map(|count| count as usize))
    }

    /// Submits `entry` and waits for its result.
    ///
    /// # Safety
    /// What `entry` points at must stay valid until this returns.
    unsafe fn run(&mut self, entry: &Entry, operation: &'static str) -> Result<i32, RingError> {
        let spin = self.spin;
        let uring = self.ready(operation)?;
        // SAFETY: the caller keeps what `entry` points at valid, and every way out of this function is taken only
        // after the operation's completion, or after the ring that alone knew of it has gone.
        if let Err(error) = unsafe { uring.submission().push(entry) } {
            self.uring = None;
            return Err(RingError::Io { operation, source: io::Error::other(error) });
        }
        if !spin.is_zero()
            && let Some(result) = spun(uring, spin)
        {
            return Ok(result);
        }
        loop {
            let entered = uring.submit_and_wait(1);
            if let Some(completion) = uring.completion().next() {
                return Ok(completion.result());
            }
            let Err(error) = entered else { continue };
            if error.raw_os_error() == Some(libc::EINTR) {
                continue;
            }
            if !uring.submission().is_empty() {
                // The kernel never took it.
                self.uring = None;
                return Err(RingError::Io { operation, source: error });
            }
            // It is under way, so its memory must stay: there is nothing to do but to go on waiting.
            tracing::error!(%error, operation, "io_uring_enter fails while an operation is under way; waiting on");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// A ring that this thread may submit to.
    fn ready(&mut self, operation: &'static str) -> Result<&mut IoUring, RingError> {
        let me = thread::current().id();
        // No operation is under way here, so a ring of another thread can simply go.
        let kept = if self.owner.is_none_or(|owner| owner == me) { self.uring.take() } else { None };
        let enabled = self.owner == Some(me) && kept.is_some();
        let uring = match kept {
            Some(uring) => uring,
            None => build(self.entries)?,
        };
        if !enabled {
            uring.submitter().register_enable_rings().map_err(|source| RingError::Io { operation, source })?;
            self.owner = Some(me);
        }
        Ok(self.uring.insert(uring))
    }
}

/// Submits what is queued, and asks for its result for as long as that. Errors show again to whoever waits.
fn spun(uring: &mut IoUring, most: Duration) -> Option<i32> {
    let spin = Spin::new(most);
    loop {
        let queue = uring.submission();
        let to_do = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        if to_do && uring.submit().is_err() {
            return None;
        }
        if let Some(completion) = uring.completion().next() {
            return Some(completion.result());
        }
        if !spin.again() {
            return None;
        }
    }
}

/// What remains of `parts` after their first `count` bytes; it never begins with an empty part.
fn skip(parts: &mut [libc::iovec], mut count: usize) -> &mut [libc::iovec] {
    let whole = parts
        .iter()
        .take_while(|part| {
            let passed = part.iov_len <= count;
            if passed {
                count -= part.iov_len;
            }
            passed
        })
        .count();
    let rest = &mut parts[whole..];
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(count).cast();
        first.iov_len -= count;
    }
    rest
}

#[cfg(test)]
mod tests;
