//! What the migration's own threads cost.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

/// CPU time, in user space and in the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CpuTime {
    /// In user space.
    pub user: Duration,
    /// In the kernel on its behalf.
    pub system: Duration,
}

/// Adds up the CPU time of threads as they end.
#[derive(Debug, Default)]
pub struct CpuMeter(Mutex<CpuTime>);

impl CpuMeter {
    /// Counts what another meter has counted.
    pub fn add(&self, more: CpuTime) {
        let mut sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sum.user += more.user;
        sum.system += more.system;
    }

    /// Runs `work` on this thread and counts what it cost.
    pub fn measure<T>(&self, work: impl FnOnce() -> T) -> T {
        let before = this_thread();
        let result = work();
        let after = this_thread();
        let mut sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sum.user += after.user.saturating_sub(before.user);
        sum.system += after.system.saturating_sub(before.system);
        result
    }

    /// The sum over the threads that have ended.
    #[must_use]
    pub fn total(&self) -> CpuTime {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn this_thread() -> CpuTime {
    getrusage(UsageWho::RUSAGE_THREAD).map_or_else(
        |_| CpuTime::default(),
        |usage| {
            let span = |time: nix::sys::time::TimeVal| {
                Duration::from_micros(u64::try_from(time.num_microseconds()).unwrap_or(0))
            };
            CpuTime { user: span(usage.user_time()), system: span(usage.system_time()) }
        },
    )
}

/// How much less than others a thread that yields gets of a processor that both want: about a tenth (sched(7), "nice value").
const NICENESS: libc::c_int = 10;

/// This thread takes a processor from others only for a small share of the time. Where that is refused, it does not.
pub fn yield_to_others() {
    // SAFETY: two system calls with plain numbers; on Linux the priority is the calling thread's own.
    let done = unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::gettid().cast_unsigned(), NICENESS) };
    if done != 0 {
        tracing::debug!("a thread could not be made to yield to others");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_costs_time() {
        let meter = CpuMeter::default();
        let sum = meter.measure(|| (0..50_000_000_u64).fold(0, |sum, n| std::hint::black_box(sum ^ n)));
        std::hint::black_box(sum);
        let total = meter.total();
        assert!(total.user + total.system > Duration::ZERO);
    }
}
