//! Slows the guest down for a migration that cannot keep up with it: for a share of the time, or to a rate of writing.
//!
//! A thread of its own, there only while something is governed, tells [`Control`](crate::control::Control) which vCPU to keep
//! out until when. A vCPU that is kept out is parked, so a pause is not longer for it, and whatever stops the guest ends it.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use switchover_wire::types::PageCount;

use crate::bucket::Bucket;
use crate::lock;
use crate::vcpu::Shared;

/// How long vCPUs run between two rests, and how often their writes are counted. A tick of a guest's clock at 100 Hz, as
/// QEMU has it: much shorter and the kicks cost more than they keep away; much longer and the guest stutters.
const SLICE: Duration = Duration::from_millis(10);
/// The most that vCPUs are kept out of the time, in percent.
const MOST: u8 = 99;

/// What is governed, and the thread that does.
pub struct Governor {
    shared: Arc<Shared>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// In percent.
    throttle: u8,
    limit: Option<Limit>,
    runs: bool,
    thread: Option<JoinHandle<()>>,
}

/// What the vCPUs may write.
struct Limit {
    buckets: Vec<Bucket>,
    /// Pages that each had written when they were last counted, and when that was.
    counted: Vec<PageCount>,
    at: Instant,
}

impl Governor {
    /// Of a machine's vCPUs; governs nothing yet.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self { shared, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Keeps all vCPUs out for so many percent of the time, at most 99; 0 ends it at once.
    ///
    /// # Errors
    /// When the host gives no thread; nothing is governed then.
    pub fn throttle(self: &Arc<Self>, percent: u8) -> io::Result<()> {
        self.change(|state| state.throttle = percent.min(MOST))
    }

    /// Holds each vCPU to so many newly written bytes a second; `None` ends it at once. Without dirty rings nothing is known
    /// of what a vCPU writes, and nothing is governed.
    ///
    /// # Errors
    /// When the host gives no thread; nothing is governed then.
    pub fn limit(self: &Arc<Self>, bytes_per_second: Option<u64>) -> io::Result<()> {
        let counted = self.written();
        let limit = bytes_per_second.map(|rate| Limit {
            buckets: vec![Bucket::new(rate); counted.len()],
            counted,
            at: Instant::now(),
        });
        self.change(|state| state.limit = limit)
    }

    /// Governs nothing any more.
    pub fn let_go(self: &Arc<Self>) {
        // Ends the thread, which needs no other.
        let _ = self.change(|state| (state.throttle, state.limit) = (0, None));
    }

    /// As [`Self::let_go`], and waits for the thread to be gone.
    pub fn end(self: &Arc<Self>) {
        self.let_go();
        let thread = lock(&self.state).thread.take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    fn change(self: &Arc<Self>, change: impl FnOnce(&mut State)) -> io::Result<()> {
        let mut state = lock(&self.state);
        change(&mut state);
        // Under the lock: the thread cannot hold anyone by what was before.
        self.shared.control.release();
        self.changed.notify_all();
        if state.governs() && !state.runs {
            let governor = Arc::clone(self);
            let started = std::thread::Builder::new().name("governor".to_owned()).spawn(move || governor.govern());
            match started {
                Ok(thread) => (state.runs, state.thread) = (true, Some(thread)),
                Err(error) => {
                    (state.throttle, state.limit) = (0, None);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn govern(&self) {
        let mut state = lock(&self.state);
        let mut next_rest = Instant::now();
        while state.governs() {
            let now = Instant::now();
            if let Some(limit) = &mut state.limit {
                self.hold_to(limit, now);
            }
            if state.throttle > 0 && next_rest <= now {
                let until = now + rest(state.throttle);
                self.shared.control.hold_all(until);
                next_rest = until + SLICE;
            }
            let next = match (state.throttle, &state.limit) {
                (0, _) | (_, Some(_)) => now + SLICE,
                (_, None) => next_rest,
            };
            let wait = next.saturating_duration_since(Instant::now());
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        state.runs = false;
    }

    fn hold_to(&self, limit: &mut Limit, now: Instant) {
        let passed = now.saturating_duration_since(limit.at);
        limit.at = now;
        let counts = self.written();
        let vcpus = limit.buckets.iter_mut().zip(&mut limit.counted).zip(&counts);
        for (vcpu, ((bucket, before), count)) in vcpus.enumerate() {
            let wait = bucket.take(passed, PageCount(count.0.saturating_sub(before.0)).bytes());
            *before = *count;
            if wait > Duration::ZERO {
                self.shared.control.hold(vcpu, now + wait);
            }
        }
    }

    fn written(&self) -> Vec<PageCount> {
        self.shared.ring.as_ref().map(|ring| ring.written()).unwrap_or_default()
    }
}

impl State {
    fn governs(&self) -> bool {
        self.throttle > 0 || self.limit.is_some()
    }
}

/// How long to rest after a slice, to rest for so many percent of the time.
fn rest(percent: u8) -> Duration {
    SLICE * u32::from(percent) / u32::from(100 - percent.min(MOST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_is_its_share_of_the_time() {
        assert_eq!(rest(0), Duration::ZERO);
        for percent in 1..=MOST {
            let share = rest(percent).as_secs_f64() / (SLICE + rest(percent)).as_secs_f64();
            assert!((share - f64::from(percent) / 100.0).abs() < 1e-6, "{percent} % gave {share}");
        }
    }
}
