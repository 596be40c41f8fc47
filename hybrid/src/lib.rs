//! A migration from beginning to end.
//!
//! Give [`outgoing::Outgoing::start`] a [`machine::Machine`] and an address, and [`incoming::Incoming::listen`] another
//! machine and the same address: the guest moves from the one to the other. Both return handles that tell progress,
//! take wishes (hand off, cancel) and give a report.
//!
//! ```text
//!   source                                            destination
//!   Setup      lanes, handshake ───────────────────▶  descriptions compared
//!              ◀───────────────────────── Prepared    RAM reserved, watched, served
//!   Active     rounds of pre-copy ─────────────────▶  versions of pages, mapped ahead where they stay cold
//!              (the guest runs; until the monitor, or the controller, says stop)
//!   Handoff    pause, Missing ─────────────────────▶  forget what must come again
//!              serve pages, State ─────────────────▶  load it (stop-and-copy: and wait for all pages)
//!              ◀───────────────────────── Restored
//!   Committed  give up the right to run, Commit ───▶  take the right to run, run
//!              ◀────────────────────────── Running
//!   Postcopy   pages, asked for and pushed ────────▶  faults
//!              ◀────────────────────────── Drained    every page is here
//!   done       DrainedAck ─────────────────────────▶  userfaultfd unregistered
//! ```
//!
//! What may happen when is decided by two pure state machines in [`session`]; [`outgoing`] and [`incoming`] carry out
//! their actions on threads and sockets. When to stop pre-copying is decided by the equally pure [`monitor`], which is shown
//! samples of the rounds.
//!
//! # What it promises
//! - *One runner.* The source gives up the right to run before the commit is submitted to its socket, and a destination
//!   runs only after it has it. Whatever fails before that, the guest goes on at the source.
//! - *No silent end.* A closed connection is never success; a source keeps every page until the destination has said that
//!   it has them all.
//! - *Mismatch fails first.* Two machines that do not match are told so before the guest is touched.
//!
//! # Example
//! A guest that is a thread, moved between two machines of one process (an embedder brings its own [`machine::Machine`]):
//!
//! ```no_run
//! use std::sync::Arc;
//! use switchover_hybrid::fake::FakeMachine;
//! use switchover_hybrid::incoming::Incoming;
//! use switchover_hybrid::machine::Machine;
//! use switchover_hybrid::outgoing::Outgoing;
//! use switchover_hybrid::settings::{Settings, no_observer};
//! use switchover_hybrid::status::MigrationStatus;
//! use switchover_wire::types::PageCount;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let here = FakeMachine::new(PageCount(1024))?;
//! let there = FakeMachine::incoming(PageCount(1024))?;
//! here.resume()?;
//!
//! let incoming = Incoming::listen(there.clone(), &"tcp:127.0.0.1:0".parse()?, Settings::default(), no_observer())?;
//! let outgoing = Outgoing::start(here, incoming.address(), Settings::default(), no_observer())?;
//! outgoing.start_postcopy()?;
//! assert_eq!(outgoing.wait(), MigrationStatus::Completed);
//! assert_eq!(incoming.wait(), MigrationStatus::Completed);
//! assert!(there.runs());
//! # Ok(())
//! # }
//! ```

pub mod capability;
pub mod error;
pub mod fake;
pub mod incoming;
mod lanes;
pub mod machine;
#[doc(hidden)]
pub mod missing;
pub mod monitor;
pub mod outgoing;
mod patience;
pub mod progress;
mod reception;
mod recorder;
pub mod report;
mod rounds;
pub mod session;
pub mod settings;
pub mod status;
pub mod trace;
mod watchdog;
