//! What the process that holds a machine may still do once it listens to a network and to a guest.
//!
//! ```text
//!  privileges   before anything is opened but two devices: another user, no capability, no new privileges, no core dump
//!  ring maker   a child that makes rings for this process, split off while that has one thread (`wire::ring::maker`)
//!  …            memory, vCPUs, sockets, threads: start-up
//!  filter       on every thread, before the first byte of a network, a client or the guest is looked at
//! ```
//!
//! - [`calls`] is the list of system calls, with who needs each of them and why.
//! - [`filter`] makes programs for the kernel of it and applies them.
//! - [`violation`] says the name of a call that is not on the list, and ends the process.
//! - [`privileges`] gives up what the process was started with, and [`user`] says to whom.
//!
//! Unsafety is in [`violation`] (a signal handler) and [`privileges`] (system calls that no crate wraps).

pub mod calls;
pub mod filter;
mod names;
pub mod privileges;
pub mod user;
pub mod violation;

use std::io;

use switchover_wire::ring::maker;
use thiserror::Error;

use self::filter::{FilterError, Mode};

/// The process could not be confined.
#[derive(Debug, Error)]
pub enum ConfineError {
    /// The kernel does not take the filter.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// There is no child that makes rings.
    #[error(
        "cannot split off the process that makes io_uring rings for this one: {0}; --seccomp off does without it, and without a filter"
    )]
    Maker(#[source] io::Error),
}

/// Splits off the process that makes rings for this one, which must have a single thread still. Nothing in mode `off`.
///
/// # Errors
/// When the kernel refuses.
pub fn split_off_the_ring_maker(mode: Mode) -> Result<(), ConfineError> {
    if mode == Mode::Off {
        return Ok(());
    }
    let program = filter::ring_maker(mode)?;
    maker::split_off(move || program.apply().map_err(io::Error::other)).map_err(ConfineError::Maker)
}

/// Confines all threads of this process, those that are there and those that come. Nothing in mode `off`.
///
/// # Errors
/// When the kernel refuses.
pub fn confine_all_threads(mode: Mode) -> Result<(), ConfineError> {
    if mode == Mode::Off {
        return Ok(());
    }
    violation::name_calls_and_end().map_err(FilterError::Handler)?;
    for program in filter::machine(mode)? {
        program.apply_to_all_threads()?;
    }
    Ok(())
}
