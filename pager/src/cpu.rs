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

/// This thread takes a processor from others only for a small share of the time, and never because it wakes. Where that is
/// refused, it does.
pub fn yield_to_others() {
    schedule(
        "made to yield to others",
        &SchedulingAttributes { nice: NICENESS, ..SchedulingAttributes::of(libc::SCHED_BATCH) },
    );
}

/// What a thread that somebody waits for asks to run at a time. The scheduler takes 0.1 ms for the least (sched_setattr(2), Linux
/// 6.12); a thread with a short slice takes the processor from one with a long one as soon as it wakes, and gets no more of it in
/// the long run.
const PROMPT_SLICE_NS: u64 = 100_000;

/// The kernel's `struct sched_attr`, first version (sched_setattr(2)).
#[repr(C)]
#[derive(Default)]
struct SchedulingAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// This thread runs briefly and often: it should not wait for the slice of one that moves bytes to be over. Where that is not to
/// be had, it does.
pub fn be_prompt() {
    let attributes = SchedulingAttributes { runtime: PROMPT_SLICE_NS, ..SchedulingAttributes::of(libc::SCHED_OTHER) };
    schedule("given a short time slice", &attributes);
}

impl SchedulingAttributes {
    fn of(policy: libc::c_int) -> Self {
        let size = u32::try_from(size_of::<Self>()).unwrap_or(0);
        Self { size, policy: policy.cast_unsigned(), ..Self::default() }
    }
}

/// Has the calling thread scheduled like that. `what` it would have been, for the log.
fn schedule(what: &str, attributes: &SchedulingAttributes) {
    // SAFETY: the kernel reads as many bytes of a live structure as that says it has; 0 is the calling thread.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(attributes), 0) };
    if done != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "a thread could not be {what}");
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
