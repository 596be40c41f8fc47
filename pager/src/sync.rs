//! The atomics that the lock-free parts are written with.
//!
//! The model checker's tests compile those parts a second time, with a `sync` module of loom's types in place of
//! this one (`tests/page_states.rs`).

pub use std::sync::atomic::{AtomicU8, Ordering};
