//! The one module that hands memory to io_uring, and so the one unsafe module of this crate.
//!
//! Two rings for two ways of working. [`Ring`] is for a thread that does one transfer at a time and waits for it:
//! bulk lanes, control messages; lanes use it by way of [`Stream`], which seals what is sent where the lane is a TLS one. [`EventRing`] is for a thread that waits for many things at once: the fault thread.
//!
//! # Invariants
//!
//! 1. *Memory that the kernel may still use is never given back.* A `Ring` does not return from a call before its
//!    one operation has completed, whatever `io_uring_enter` says in between; an operation that the kernel did not
//!    take is thrown away together with the ring that held it. An `EventRing` counts its operations; dropping it
//!    cancels them and waits for every one, and where it cannot, the process ends.
//! 2. *One thread, one ring.* Rings are made disabled and enabled by the first thread that submits, which lets the
//!    kernel leave out its locks and run completions on that thread only (`IORING_SETUP_SINGLE_ISSUER`,
//!    `IORING_SETUP_DEFER_TASKRUN`, Linux 6.1). A `Ring` that moved to another thread between two calls makes itself
//!    anew; an `EventRing` cannot, and says so.
//! 3. *No registered buffers.* Registering guest RAM would pin it, and fault all of it in on a destination.
//! 4. *A ring does what it is for, and nothing else.* Before it is enabled it is restricted to the operations of this module;
//!    the kernel answers all others with EACCES, and so it does whatever could be registered with it.
//!    A process that may make no ring itself has a child [make them](maker).
//! 5. *A file descriptor is borrowed for a call, or owned.* The kernel holds its own reference to the file of an
//!    operation under way; a poll that may have to be armed again owns a duplicate.

mod blocking;
mod event;
pub mod maker;
mod setup;
mod spin;
mod stream;

use std::io;

use io_uring::IoUring;
use thiserror::Error;

pub use self::blocking::Ring;
pub use self::event::{Completion, EventRing};
pub use self::stream::Stream;
use crate::tls::TlsError;

/// What can go wrong with a ring.
#[derive(Debug, Error)]
pub enum RingError {
    /// The kernel gave no ring.
    #[error(
        "cannot set up an io_uring of {entries} entries: {source}; is io_uring allowed here \
         (`sysctl kernel.io_uring_disabled`, seccomp, `ulimit -l`)?"
    )]
    Setup {
        /// The size asked for.
        entries: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The other side closed the connection before all bytes had come, or this side shut it down.
    #[error("the connection was closed after {got} of {wanted} bytes")]
    Closed {
        /// Bytes received before the end.
        got: usize,
        /// Bytes asked for.
        wanted: usize,
    },
    /// The kernel reports an error of the socket or the ring.
    #[error("cannot {operation}: {source}")]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// What came is not what the other side sent, or it ended the lane.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A disabled, restricted ring: of the process that makes them for this one, or made here where there is none.
fn build(entries: u32) -> Result<IoUring, RingError> {
    let here = || setup::make(entries).map_err(io::Error::from).and_then(setup::Made::map);
    maker::ask(entries).unwrap_or_else(here).map_err(|source| RingError::Setup { entries, source })
}

/// A completion's result: a count, or an error number below zero.
fn outcome(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.wrapping_neg()))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use io_uring::{opcode, squeue, types};

    use super::*;

    fn answer(uring: &mut IoUring, entry: &squeue::Entry) -> i32 {
        // SAFETY: what these entries point at, if anything, lives until the end of the test.
        unsafe { uring.submission().push(entry) }.unwrap();
        uring.submit_and_wait(1).unwrap();
        uring.completion().next().unwrap().result()
    }

    #[test]
    fn an_operation_that_no_lane_needs_is_denied() {
        let (near, _far) = crate::socket::Socket::pair().unwrap();
        let fd = types::Fd(std::os::fd::AsFd::as_fd(&near).as_raw_fd());
        let mut uring = build(4).unwrap();
        uring.submitter().register_enable_rings().unwrap();
        let mut byte = [0_u8; 1];
        let path = c"/etc/passwd";
        for denied in [
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build(),
            opcode::Read::new(fd, byte.as_mut_ptr(), 1).build(),
            opcode::Write::new(fd, byte.as_ptr(), 1).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut()).build(),
            opcode::Close::new(fd).build(),
            opcode::Nop::new().build(),
            // Allowed, but not so.
            opcode::Send::new(fd, byte.as_ptr(), 1).build().flags(squeue::Flags::ASYNC),
        ] {
            assert_eq!(answer(&mut uring, &denied), -libc::EACCES, "{denied:?}");
        }
        assert_eq!(answer(&mut uring, &opcode::Send::new(fd, byte.as_ptr(), 1).build()), 1);
        let error = uring.submitter().register_files(&[0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
    }
}
