//! The `switchover` binary, and what tests and benchmarks share with it.
//!
//! ```text
//!  switchover run      a machine, its QMP socket, and a migration into it or out of it     (switchover-runtime)
//!  switchover migrate  a QMP client that moves the guest of a running machine
//!  switchover bench    moves real guests, checks them, and writes a report
//!  switchover simulate plays traces through the convergence monitor, beside an oracle
//!  switchover save     a QMP client that saves the guest of a running machine to a file
//!  switchover image    what is in a saved guest, and whether it is whole
//!  switchover audit    checks the audit log of a machine
//!  switchover floor    what this host can do at best
//!  switchover check    what this host lacks
//!  switchover certs    certificates to try TLS with
//! ```
//!
//! Commands promise: exit status 0 when what was asked for is done, 1 when it failed, 2 when it made no sense; errors on
//! stderr, each with what was tried, on what, and what to do next; nothing left behind, neither a process nor a
//! socket's file nor a changed terminal.

mod allocator;
pub mod audit;
pub mod bench;
mod calendar;
pub mod certs;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod confine;
pub mod failure;
pub mod floor;
pub mod guests;
pub mod image;
pub mod migrate;
mod paths;
pub mod qmp_client;
pub mod rng;
pub mod rollback;
pub mod run;
pub mod save;
pub mod signals;
pub mod simulate;
pub mod size;
