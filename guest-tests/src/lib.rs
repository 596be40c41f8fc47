//! End-to-end tests: they start the `switchover` binary as a user does, with real guests on real KVM, and judge it by
//! what comes out of it: QMP replies, exit statuses, and what the guests print about every page and every gap.
//!
//! This library is their harness; the tests are in `tests/e2e`, the guests in `guests` (a package of its own).
//!
//! ```text
//!   Lab ──── temporary files, addresses; SKIP where the host cannot do it       lab.rs
//!    └ Machine ──── one `switchover run` process, its QMP client, its end       machine.rs
//!        └ Capture ──── what it printed, as it prints it                        capture.rs
//!            └ Journey ──── one guest's words across all machines it ran on     journey.rs
//!                └ GuestLog ──── its periods, and all that is wrong with them   guest_log.rs
//!   Link ──── what two machines say to each other, held, cut or stalled          link.rs
//!   Heard ──── strangers at a destination's port, and what that costs it          crowd.rs, cost.rs
//! ```
//!
//! A guest prints byte by byte and does not notice that it moves: what the source printed, followed by what the
//! destination printed, is one text without a seam. So a [`Journey`](journey::Journey) reads the machines' output one
//! after the other, and every byte that is lost, repeated or invented makes a line that cannot be read.
//!
//! The harness promises: every process it starts has ended when its test ends, however that ends; files and sockets are
//! in a directory that goes too, and that only holds what the test put there; no port is fixed; nothing sleeps in
//! place of waiting for a state.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "it is all test code: a panic here is a test's failure")]

pub mod capture;
pub mod certificates;
pub mod cost;
pub mod crowd;
pub mod foreign;
pub mod guest_log;
pub mod journey;
pub mod lab;
pub mod link;
pub mod machine;
pub mod moving;
pub mod waiting;
pub mod watching;
