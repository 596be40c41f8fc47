//! The atomics and locks that the lock-free parts are written with: the real ones, or with the feature `loom` those of
//! the model checker, for the tests named `models` alone.

#[cfg(not(feature = "loom"))]
pub use std::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(feature = "loom"))]
pub use std::sync::{Mutex, MutexGuard};

#[cfg(feature = "loom")]
pub use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(feature = "loom")]
pub use loom::sync::{Mutex, MutexGuard};
