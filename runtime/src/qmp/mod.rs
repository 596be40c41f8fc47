//! QMP: QEMU's control protocol on a unix socket, so that clients written for QEMU drive this machine unchanged.
//!
//! ```text
//!  bytes ──framing──► JSON values ──session──► commands ──► Controller (the machine and its migration)
//!    ▲                                │                         │
//!    └────────────── replies ◄────────┘      events ◄───────────┘
//! ```
//!
//! Names, types and units are QEMU's. What QEMU knows and this machine has not is refused with a sentence, never
//! accepted and ignored. What it says of its own is called `x-switchover-…`. Several clients may be connected at once;
//! capabilities and parameters are the machine's, as in QEMU, not a client's.

pub mod arguments;
pub mod capabilities;
pub mod channel;
pub mod commands;
pub mod controller;
pub mod dirty;
pub mod endpoint;
pub mod framing;
mod given;
pub mod parameters;
pub mod query;
pub mod refusal;
pub mod security;
pub mod server;
pub mod session;
pub mod settings;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
