//! The `switchover` binary, and what tests and benchmarks share with it.

pub mod guests;
pub mod qmp_client;
