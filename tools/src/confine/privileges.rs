//! What a machine's process gives up of what it was started with.
//!
//! While it has a single thread: capabilities are a thread's own, and a thread takes over those of the one that starts it.
//!
//! Unsafe, for some of the system calls have no wrapper; they take nothing but numbers, and two structures of the kernel's layout.

use std::fs;
use std::io;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use thiserror::Error;

use super::user::RunAs;

/// `CAP_SYS_PTRACE` of linux/capability.h.
const CAP_SYS_PTRACE: u32 = 19;

/// `_LINUX_CAPABILITY_VERSION_3`: sets of 64 bits.
const VERSION_3: u32 = 0x2008_0522;

/// Something that was to be given up is still there.
#[derive(Debug, Error)]
pub enum PrivilegeError {
    /// The kernel refuses.
    #[error("cannot {attempted}: {source}; the machine would run with more rights than it was to have")]
    Refused {
        /// What was tried.
        attempted: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
    /// Only root may become another user.
    #[error(
        "cannot run as user {user}, group {group}: {source}; --user needs to be started as root (CAP_SETUID and CAP_SETGID)"
    )]
    User {
        /// The user.
        user: Uid,
        /// The group.
        group: Gid,
        /// The kernel's answer.
        source: Errno,
    },
    /// There is more than one thread.
    #[error("cannot give up privileges: this process has {0} threads already, and each has its own")]
    Threads(usize),
    /// The process cannot look at itself.
    #[error("cannot count the threads of this process: {0}; is /proc mounted?")]
    Count(#[source] io::Error),
}

/// What is kept of all capabilities.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Kept {
    /// `CAP_SYS_PTRACE`, without which a host that has no `/dev/userfaultfd` gives no userfaultfd that KVM's faults come from.
    pub sys_ptrace: bool,
}

impl Kept {
    fn bits(self) -> u64 {
        u64::from(self.sys_ptrace) << CAP_SYS_PTRACE
    }
}

/// Becomes `user`, where one is given, without further groups; gives up every capability but what is `kept`, in every set, for
/// good; allows itself no new privileges; and lets nobody dump it or look into it.
///
/// # Errors
/// When there are other threads, or the kernel refuses.
pub fn give_up(user: Option<RunAs>, kept: Kept) -> Result<(), PrivilegeError> {
    let threads = fs::read_dir("/proc/self/task").map_err(PrivilegeError::Count)?.count();
    if threads != 1 {
        return Err(PrivilegeError::Threads(threads));
    }
    let refused = |attempted| move |source| PrivilegeError::Refused { attempted, source };
    let kept = kept.bits() & permitted().map_err(refused("look at this process's capabilities"))?;
    drop_bounds(kept).map_err(refused("bound the capabilities of this process"))?;
    if let Some(RunAs { user, group }) = user {
        let become_it = || {
            // What is kept outlives the change; all else goes with it, or below.
            prctl::set_keepcaps(true)?;
            setgroups(&[])?;
            setresgid(group, group, group)?;
            setresuid(user, user, user)
        };
        become_it().map_err(|source| PrivilegeError::User { user, group, source })?;
    }
    drop_ambient().map_err(refused("drop ambient capabilities"))?;
    set_capabilities(kept).map_err(refused("drop the capabilities of this process"))?;
    prctl::set_no_new_privs().map_err(refused("forbid itself new privileges"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(refused("forbid itself core dumps"))?;
    // The last: from here on files of this process under /proc are root's.
    prctl::set_dumpable(false).map_err(refused("forbid others to look into it"))
}

/// The kernel's `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    thread: i32,
}

/// The kernel's `struct __user_cap_data_struct`, of which there are two: the lower 32 capabilities, and the upper.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn permitted() -> Result<u64, Errno> {
    let mut header = Header { version: VERSION_3, thread: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: the kernel reads one live structure, may write to it, and writes the two others.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, &raw mut sets) })?;
    let [low, high] = sets;
    Ok(u64::from(high.permitted) << 32 | u64::from(low.permitted))
}

fn set_capabilities(kept: u64) -> Result<(), Errno> {
    let mut header = Header { version: VERSION_3, thread: 0 };
    let half = |bits: u64| {
        let bits = u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0);
        Sets { effective: bits, permitted: bits, inheritable: 0 }
    };
    let sets = [half(kept), half(kept >> 32)];
    // SAFETY: the kernel reads live structures, and may write to the first.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, &raw const sets) }).map(drop)
}

/// Leaves no program that this process could start more than `kept`. Who may not change it can do without: he has no
/// capabilities to bound, and [`give_up`] allows him no new ones.
fn drop_bounds(kept: u64) -> Result<(), Errno> {
    for capability in (0..u64::BITS).filter(|capability| kept >> capability & 1 == 0) {
        // SAFETY: a number, and nothing else.
        match Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) }) {
            // Past the last that this kernel knows.
            Err(Errno::EINVAL) | Ok(_) => {}
            Err(Errno::EPERM) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn drop_ambient() -> Result<(), Errno> {
    let all = libc::PR_CAP_AMBIENT_CLEAR_ALL;
    // SAFETY: numbers, and nothing else.
    Errno::result(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, all, 0, 0, 0) }).map(drop)
}
