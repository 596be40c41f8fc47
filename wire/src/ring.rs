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
//! 4. *A file descriptor is borrowed for a call, or owned.* The kernel holds its own reference to the file of an
//!    operation under way; a poll that may have to be armed again owns a duplicate.

mod blocking;
mod event;
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

/// A disabled ring with the best flags that the kernel takes.
fn build(entries: u32) -> Result<IoUring, RingError> {
    // Completions may outnumber submissions (multishot polls), so their queue is larger.
    let completions = entries.saturating_mul(4);
    let attempts: [fn(&mut io_uring::Builder); 3] = [
        // Linux 6.1.
        |b| {
            b.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
        },
        // Linux 5.19.
        |b| {
            b.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
        },
        |_| {},
    ];
    let mut refusal = io::Error::from_raw_os_error(libc::EINVAL);
    for flags in attempts {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(completions).setup_r_disabled();
        flags(&mut builder);
        match builder.build(entries) {
            Ok(uring) => return Ok(uring),
            // EINVAL: a flag that this kernel does not know.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refusal = error,
            Err(source) => return Err(RingError::Setup { entries, source }),
        }
    }
    Err(RingError::Setup { entries, source: refusal })
}

/// A completion's result: a count, or an error number below zero.
fn outcome(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.wrapping_neg()))
}
