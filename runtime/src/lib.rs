//! The virtual machine on KVM.
//!
//! A [`vm::Vm`] is guest RAM, a chipset and vCPUs, each on a thread of its own, with a serial port and a way to end.
//! It boots a PVH kernel, or waits for a migration to bring a guest. It implements
//! [`Machine`](switchover_hybrid::machine::Machine), through which a migration sees it; its controller uses the methods of
//! [`vm::Vm`] itself.
//!
//! ```text
//!   controller ── cont · stop · quit ──┐             ┌── pause · resume · surrender · take ── migration
//!                                      ▼             ▼
//!                          control: one lock, run flags, who is where
//!                            │ exit byte + one signal      ▲ parked, since when
//!                            ▼                             │
//!            vCPU threads ── KVM_RUN ── exits ── ports ── serial ── output
//!                               │
//!                     guest mapping of RAM (never the alias)
//! ```
//!
//! What it promises:
//!
//! - **It runs only while it may.** The right to run, the user's wish, a migration's hold and the vCPUs' whereabouts change
//!   under one lock ([`control`]); which combinations mean "run" is decided in one pure place ([`run_state`]).
//! - **A paused guest is at rest.** Every vCPU is out of KVM_RUN, and every instruction that had left it half done is completed:
//!   no port is read twice or not at all because the guest moved. Nothing writes its memory.
//! - **Every write is noted** once the dirty log is started ([`dirty`]): the guest's, KVM's, and the machine's own. Where that
//!   cannot be kept, the log says so and gives no answers.
//! - **Slowing the guest down costs no blackout.** A vCPU that is kept out for a while is parked, and a pause finds it so.
//! - **Nobody waits for a vCPU that waits for a page**, save a source's [`pause`](switchover_hybrid::machine::Machine::pause),
//!   and that for two seconds at most.
//! - **Everything that a guest can see travels** ([`state`]), in sections that are checked down to the last byte before any of it
//!   is loaded. Time goes on while the guest stands still: its clocks are advanced by the blackout, never held to hide it
//!   (see `x86_64/clock.rs`).
//! - **An incoming machine leaves its memory alone** until it runs or its state is loaded: whoever watches the guest mapping sees no
//!   fault before.
//!
//! What depends on the CPU architecture is in [`arch`] alone.

pub mod audit;
mod bucket;
pub mod config;
pub mod control;
pub mod controller;
pub mod devices;
pub mod dirty;
pub mod dirty_rate;
pub mod error;
mod governor;
mod kick;
pub mod memory;
pub mod on_save;
pub mod qmp;
pub mod run_state;
pub mod state;
mod vcpu;
pub mod vm;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64 as arch;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex. What a panicking thread left behind is of no concern: the process was built to end on a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
