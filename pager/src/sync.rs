//! The atomics, locks and queues that the lock-free parts are written with: the real ones, or with the feature `loom`
//! those of the model checker, for the tests named `models` alone.

#[cfg(not(feature = "loom"))]
pub use self::real::*;

#[cfg(feature = "loom")]
pub use self::model::*;

#[cfg(not(feature = "loom"))]
mod real {
    pub use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
    pub use std::sync::{Condvar, Mutex, MutexGuard};

    pub use crossbeam::queue::ArrayQueue;
}

/// Loom's types, and on top of them what it lacks.
#[cfg(feature = "loom")]
mod model {
    use std::collections::VecDeque;
    use std::sync::{LockResult, PoisonError};
    use std::time::Duration;

    pub use loom::sync::atomic::{AtomicU8, AtomicU64, Ordering};
    pub use loom::sync::{Mutex, MutexGuard};

    #[derive(Debug, Default)]
    pub struct Condvar(loom::sync::Condvar);

    impl Condvar {
        pub fn new() -> Self {
            Self::default()
        }

        pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
            self.0.wait(guard)
        }

        pub fn wait_while<'a, T>(
            &self,
            mut guard: MutexGuard<'a, T>,
            mut condition: impl FnMut(&mut T) -> bool,
        ) -> LockResult<MutexGuard<'a, T>> {
            while condition(&mut guard) {
                guard = self.0.wait(guard)?;
            }
            Ok(guard)
        }

        /// Time does not pass in a model: a wait that only time would end is reported as a deadlock.
        pub fn wait_timeout_while<'a, T>(
            &self,
            guard: MutexGuard<'a, T>,
            _: Duration,
            condition: impl FnMut(&mut T) -> bool,
        ) -> LockResult<(MutexGuard<'a, T>, ())> {
            self.wait_while(guard, condition)
                .map(|guard| (guard, ()))
                .map_err(|error| PoisonError::new((error.into_inner(), ())))
        }

        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    /// Crossbeam's queue is taken to be right: each operation is one step.
    #[derive(Debug)]
    pub struct ArrayQueue<T>(Mutex<VecDeque<T>>, usize);

    impl<T> ArrayQueue<T> {
        pub fn new(capacity: usize) -> Self {
            Self(Mutex::new(VecDeque::new()), capacity)
        }

        pub fn force_push(&self, value: T) -> Option<T> {
            let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let oldest = if queue.len() == self.1 { queue.pop_front() } else { None };
            queue.push_back(value);
            oldest
        }

        pub fn pop(&self) -> Option<T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
        }
    }

    /// Explores `body`'s interleavings with at most this many preemptions, or `LOOM_MAX_PREEMPTIONS` where that is set.
    #[cfg(test)]
    pub fn explore(preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(preemptions);
        builder.check(body);
    }
}
