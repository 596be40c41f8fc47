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
//! # For embedders
//! What runs the guest implements [`machine::Machine`]; a process that gives one away calls [`outgoing::Outgoing::start`], and one that
//! takes one in [`incoming::Incoming::listen`]. From then on:
//! - *observe* it by the [`settings::Observer`], or by [`outgoing::Outgoing::progress`];
//! - *hurry* it with [`outgoing::Outgoing::start_postcopy`], *call it off* with [`outgoing::Outgoing::cancel`] as long as the commit
//!   is not out;
//! - *recover* a link that is lost after that: [`outgoing::Outgoing::resume`], and [`incoming::Incoming::recover`] where the
//!   destination shall be reached at another address; as a last resort, with the destination fenced,
//!   [`outgoing::Outgoing::reclaim`];
//! - *act on failures* by their kind and by where the guest is ([`progress::Progress::failure`], [`failure`]), and show people the
//!   sentence in [`progress::Progress::error`];
//! - *save* a guest into an image with [`saving::Saving::start`], and *restore* it with [`restoring::Restoring::start`], or
//!   [`restoring::Restoring::start_lazily`];
//! - *read* what it cost in [`outgoing::Outgoing::report`] and [`incoming::Incoming::report`].
//!
//! # Example
//! A machine without KVM whose guest is a thread, moved between two machines of one process (`cargo run --example toy`):
//!
//! ```
#![doc = include_str!("../examples/toy.rs")]
//! ```

mod at_rest;
pub mod capability;
pub mod comparison;
mod control;
pub mod error;
pub mod failure;
pub mod fake;
pub mod happening;
mod heap;
pub mod incoming;
mod lanes;
pub mod lazy;
mod link;
pub mod machine;
#[doc(hidden)]
pub mod missing;
pub mod monitor;
pub mod outgoing;
mod patience;
pub mod progress;
mod pulse;
mod reception;
mod recorder;
pub mod report;
pub mod restoring;
mod rounds;
pub mod saving;
pub mod security;
pub mod session;
pub mod settings;
pub mod status;
pub mod trace;
mod watchdog;
