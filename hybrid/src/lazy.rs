//! A guest that runs before its memory is here: pages come from its image when they are touched, and all others behind that.
//!
//! ```text
//!   vCPU ──fault──▶ userfaultfd ──▶ fault thread ─┐                    ┌─ image: chunks, each compared with its hash
//!     ▲                                           ├─ claim, write ◀────┤
//!     └────────────── CONTINUE, WAKE ─────────────┤                    └─ recorded pages, each compared with its own hash
//!                                     pusher ─────┘   recorded pages first, then the chunks they are in, then all others
//! ```
//!
//! `memory.rs` brings pages, `faults.rs` serves faults, `window.rs` notes what was touched, `known.rs` is what was noted before.
//!
//! The rules are a destination's: a page is claimed before it is written, and written by nobody afterwards; what cannot be had is
//! never zero, but stops the guest. Bytes are written into the memfd itself, which is what the alias shows. `docs/lazy-restore.md`
//! tells how it is used and what it costs.

mod faults;
mod known;
mod memory;
mod window;

use std::io;

use switchover_image::error::ImageError;
use switchover_pager::uffd::WatchError;
use thiserror::Error;

pub(crate) use self::faults::FaultThread;
pub(crate) use self::memory::LazyMemory;

/// How a guest is restored lazily.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lazily {
    /// Use the working set that is kept beside the image, and keep one there.
    pub working_set: bool,
}

impl Default for Lazily {
    fn default() -> Self {
        Self { working_set: true }
    }
}

/// Memory cannot be completed.
#[derive(Debug, Error)]
pub enum LazyError {
    /// The image is damaged, or cannot be read; or there is no memory to write it to.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Userfaultfd failed.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// Faults cannot be waited for.
    #[error("cannot wait for faults of the guest: {0}")]
    Wait(#[source] io::Error),
    /// No thread.
    #[error("cannot start the thread that serves faults: {0}; is the number of threads limited (`ulimit -u`)?")]
    Thread(#[source] io::Error),
}
