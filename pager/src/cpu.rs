//! What the migration's own threads cost.

use std::io;
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
const NICENESS: i32 = 10;
/// The least that the scheduler gives anybody.
const NICEST: i32 = 19;

/// What a thread that somebody waits for asks to run at a time. The scheduler takes 0.1 ms for the least (sched_setattr(2), Linux
/// 6.12); a thread with a short slice takes the processor from one with a long one as soon as it wakes, and gets no more of it in
/// the long run.
const PROMPT_SLICE_NS: u64 = 100_000;

/// The kernel's `struct sched_attr`, first version (sched_setattr(2)).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Scheduling {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// This thread takes a processor from others only for a small share of the time, and never because it wakes. Where that is
/// refused, it does.
pub fn yield_to_others() {
    reschedule("made to yield to others", |now| Scheduling {
        policy: libc::SCHED_BATCH.cast_unsigned(),
        nice: now.nice.max(NICENESS),
        ..now
    });
}

/// This thread yields to those that [yield](yield_to_others) too: for work that may as well never be done. Not `SCHED_IDLE`: a
/// thread that never gets a processor keeps what it holds in the kernel.
pub fn yield_to_all() {
    reschedule("made to yield to all others", |now| Scheduling {
        policy: libc::SCHED_BATCH.cast_unsigned(),
        nice: NICEST,
        ..now
    });
}

/// Lets whoever waits for this thread's processor have it, between two pieces of a long work. On a kernel that preempts at ticks
/// only, whoever was not let in at once waits for up to four milliseconds, however nice the thread.
pub fn let_others_run() {
    std::thread::yield_now();
}

/// This thread runs briefly and often: it should not wait for the slice of one that moves bytes to be over. Where that is not to
/// be had, it does.
pub fn be_prompt() {
    reschedule("given a short time slice", |now| Scheduling { runtime: PROMPT_SLICE_NS, ..now });
}

/// Has the calling thread scheduled as `change` says, unless whoever started this process chose a policy of its own for it.
/// `what` it would have been, for the log.
fn reschedule(what: &str, change: impl FnOnce(Scheduling) -> Scheduling) {
    let done = Scheduling::of_this_thread().and_then(|now| match i32::try_from(now.policy) {
        // The second is what yielding has made of it.
        Ok(libc::SCHED_OTHER | libc::SCHED_BATCH) => change(now).set(),
        _ => Ok(()),
    });
    if let Err(error) = done {
        tracing::debug!(%error, "a thread could not be {what}");
    }
}

impl Scheduling {
    const SIZE: u32 = {
        assert!(size_of::<Self>() == 48, "SCHED_ATTR_SIZE_VER0");
        48
    };

    fn of_this_thread() -> io::Result<Self> {
        let mut now = Self::default();
        // SAFETY: the kernel writes at most as many bytes of a live structure as it is told; 0 is the calling thread.
        match unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut now, Self::SIZE, 0) } {
            0 => Ok(now),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn set(mut self) -> io::Result<()> {
        self.size = Self::SIZE;
        // SAFETY: the kernel reads as many bytes of a live structure as that says it has; 0 is the calling thread.
        match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const self, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a thread of its own: what is changed stays.
    fn scheduled(before: impl FnOnce() + Send + 'static, change: fn()) -> Scheduling {
        let change = move || {
            before();
            change();
            Scheduling::of_this_thread().unwrap()
        };
        std::thread::spawn(change).join().unwrap()
    }

    #[test]
    fn who_yields_is_nicer_and_waits_for_its_turn() {
        let yielding = scheduled(|| {}, yield_to_others);
        assert_eq!((yielding.policy, yielding.nice), (libc::SCHED_BATCH.cast_unsigned(), NICENESS));
        let nicer = scheduled(|| Scheduling { nice: 15, ..Scheduling::default() }.set().unwrap(), yield_to_others);
        assert_eq!(nicer.nice, 15, "nobody becomes less nice");
    }

    #[test]
    fn who_is_prompt_keeps_its_share() {
        let prompt = scheduled(|| Scheduling { nice: 3, ..Scheduling::default() }.set().unwrap(), be_prompt);
        assert_eq!((prompt.policy, prompt.nice), (libc::SCHED_OTHER.cast_unsigned(), 3));
        let batch = Scheduling { policy: libc::SCHED_BATCH.cast_unsigned(), ..Scheduling::default() };
        let left = scheduled(move || batch.set().unwrap(), be_prompt);
        assert_eq!(left.policy, libc::SCHED_BATCH.cast_unsigned(), "a policy that was chosen stays");
    }

    #[test]
    fn who_yields_may_yield_more() {
        let last = scheduled(yield_to_others, yield_to_all);
        assert_eq!((last.policy, last.nice), (libc::SCHED_BATCH.cast_unsigned(), NICEST));
        let chosen = Scheduling { policy: libc::SCHED_RR.cast_unsigned(), priority: 1, ..Scheduling::default() };
        let left = scheduled(
            move || _ = chosen.set(),
            || {
                yield_to_all();
                be_prompt();
            },
        );
        // Where the test may not have it, the policy was never chosen.
        if left.policy == libc::SCHED_RR.cast_unsigned() {
            assert_eq!(left.priority, 1, "a policy that was chosen stays");
        }
    }

    #[test]
    fn work_costs_time() {
        let meter = CpuMeter::default();
        let sum = meter.measure(|| (0..50_000_000_u64).fold(0, |sum, n| std::hint::black_box(sum ^ n)));
        std::hint::black_box(sum);
        let total = meter.total();
        assert!(total.user + total.system > Duration::ZERO);
    }
}
