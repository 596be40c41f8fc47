//! The `switchover` binary.

pub mod guests;
