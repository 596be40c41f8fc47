//! The CPU time that a machine's process spends on moving a guest: all of it but the vCPUs' threads.
//!
//! The same for every VMM, and read from outside: `/proc` and the process' own CPU clock.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};

/// CPU time as it stood at one instant, in nanoseconds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CpuTime {
    /// Of all threads that the process has and has had.
    process_ns: u64,
    /// Of each vCPU's thread, by its id.
    vcpus_ns: BTreeMap<String, u64>,
}

impl CpuTime {
    /// Of the process `id`, whose vCPUs' threads are those whose names `is_vcpu` knows. `None` where the kernel does not
    /// say, or the process has gone.
    #[must_use]
    pub fn of(id: u32, is_vcpu: &dyn Fn(&str) -> bool) -> Option<Self> {
        let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(id).ok()?)).ok()?;
        let mut vcpus_ns = BTreeMap::new();
        for task in fs::read_dir(format!("/proc/{id}/task")).ok()?.flatten() {
            let Ok(stat) = fs::read_to_string(task.path().join("stat")) else { continue };
            let (name, ticks) = name_and_ticks(&stat)?;
            if is_vcpu(name) {
                let ns = run_time(&task.path()).or_else(|| ticks_as_ns(ticks))?;
                vcpus_ns.insert(task.file_name().to_string_lossy().into_owned(), ns);
            }
        }
        Some(Self { process_ns: nanoseconds(clock)?, vcpus_ns })
    }

    /// What the process has spent since `before` on anything but its vCPUs, in nanoseconds. `None` where a vCPU's thread has
    /// ended: nobody knows what it had spent.
    #[must_use]
    pub fn since(&self, before: &Self) -> Option<u64> {
        if before.vcpus_ns.keys().any(|thread| !self.vcpus_ns.contains_key(thread)) {
            return None;
        }
        let vcpus = |at: &Self| at.vcpus_ns.values().sum::<u64>();
        let all = self.process_ns.checked_sub(before.process_ns)?;
        // The clocks of a thread that runs are read a moment apart.
        Some(all.saturating_sub(vcpus(self).checked_sub(vcpus(before))?))
    }
}

/// A thread's name, and its user and system time in clock ticks, from its `stat`. A name may hold anything, brackets and
/// spaces too.
fn name_and_ticks(stat: &str) -> Option<(&str, u64)> {
    let (head, fields) = stat.rsplit_once(") ")?;
    let (_, name) = head.split_once('(')?;
    // `utime` and `stime` are the 14th and 15th of proc_pid_stat(5), whose 3rd comes first here.
    let mut fields = fields.split(' ').skip(11).map(str::parse::<u64>);
    Some((name, fields.next()?.ok()?.checked_add(fields.next()?.ok()?)?))
}

/// The scheduler's own account of a thread, exact to the microsecond, where this kernel shows it.
fn run_time(task: &Path) -> Option<u64> {
    sum_exec_runtime(&fs::read_to_string(task.join("sched")).ok()?)
}

/// `se.sum_exec_runtime : 12.345678` is in milliseconds, with six digits behind the point.
fn sum_exec_runtime(sched: &str) -> Option<u64> {
    let line = sched.lines().find(|line| line.starts_with("se.sum_exec_runtime"))?;
    let (_, value) = line.split_once(':')?;
    let (ms, fraction) = value.trim().split_once('.')?;
    if fraction.len() != 6 {
        return None;
    }
    ms.parse::<u64>().ok()?.checked_mul(1_000_000)?.checked_add(fraction.parse().ok()?)
}

/// A tick is 10 ms on most hosts.
fn ticks_as_ns(ticks: u64) -> Option<u64> {
    let per_second = u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??).ok()?;
    ticks.checked_mul(1_000_000_000 / per_second.max(1))
}

fn nanoseconds(clock: ClockId) -> Option<u64> {
    let time = clock_gettime(clock).ok()?;
    let whole = u64::try_from(time.tv_sec()).ok()?.checked_mul(1_000_000_000)?;
    whole.checked_add(u64::try_from(time.tv_nsec()).ok()?)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    /// Keeps a core busy until this thread has spent `ns`.
    fn spend(ns: u64) {
        let spent = || nanoseconds(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
        let from = spent();
        while spent() - from < ns {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn what_vcpus_spend_is_left_out() {
        const MS: u64 = 1_000_000;
        let here = || CpuTime::of(std::process::id(), &|name| name == "vcpu0").unwrap();
        let (go, wait) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let vcpu = thread::Builder::new().name("vcpu0".to_owned()).spawn(move || {
            tell.send(()).unwrap();
            wait.recv().unwrap();
            spend(200 * MS);
            tell.send(()).unwrap();
            let _ = wait.recv();
        });
        told.recv().unwrap();
        let before = here();
        assert_eq!(before.vcpus_ns.len(), 1);
        thread::spawn(|| spend(50 * MS)).join().unwrap();
        go.send(()).unwrap();
        told.recv().unwrap();
        let spent = here().since(&before).unwrap();
        // Other tests may share this process, and a tick may still be under way.
        assert!(spent >= 40 * MS, "a thread that has ended counts: {spent}");
        let all = here().process_ns - before.process_ns;
        assert!(all - spent >= 150 * MS, "the vCPU's 200 ms of {all} are out of {spent}");
        drop(go);
        vcpu.unwrap().join().unwrap();
        assert_eq!(here().since(&before), None, "a vCPU that is gone took its account with it");
    }

    #[test]
    fn a_thread_is_known_by_its_name_whatever_that_holds() {
        let stat = "25608 (CPU 0/KVM) S 1 25601 25601 0 -1 4194368 1 2 3 4 12 7 0 0 20 0 4 0 2422";
        assert_eq!(name_and_ticks(stat), Some(("CPU 0/KVM", 19)));
        assert_eq!(name_and_ticks("1 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12"), Some(("a) b", 23)));
        assert_eq!(name_and_ticks("1 (a) S 1 2"), None);
    }

    #[test]
    fn the_schedulers_account_is_read_in_nanoseconds() {
        assert_eq!(sum_exec_runtime("x : 1\nse.sum_exec_runtime   :   12.345678\n"), Some(12_345_678));
        assert_eq!(sum_exec_runtime("se.sum_exec_runtime : 12.3\n"), None);
        assert_eq!(sum_exec_runtime(""), None);
    }

    #[test]
    fn a_process_that_is_gone_has_no_account() {
        assert_eq!(CpuTime::of(u32::MAX, &|_| false), None);
    }
}
