//! The system calls that a machine's process makes after start-up, each with who needs it and why.
//!
//! What is not here ends the process (see [`violation`](super::violation)). Where a call could do much more than what it is needed
//! for, its arguments are looked at too: the kernel compares numbers, so what a call takes by a pointer (a path, `struct clone_args`)
//! cannot be. Numbers and flags are Linux's on x86-64.

use std::iter::once;

use libc::{AF_INET, AF_INET6, AF_NETLINK, AF_UNIX, SOCK_DGRAM, SOCK_STREAM, c_int, c_long};

/// A system call, and with what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Call {
    /// Its number.
    pub number: c_long,
    /// Each is enough by itself; where there is none, the arguments do not matter.
    pub alternatives: Vec<Arguments>,
}

/// Conditions that must all hold.
pub type Arguments = Vec<Condition>;

/// An argument, seen through a mask, is a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Condition {
    /// Which argument, from 0.
    pub argument: u8,
    /// The bits that are looked at, of the lower 32.
    pub mask: u32,
    /// What they have to be.
    pub value: u32,
}

/// Calls that are needed for the same reason.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Group {
    /// By whom, and what for.
    pub why: &'static str,
    /// Which.
    pub calls: Vec<Call>,
}

/// How the C library starts a thread: it shares everything with its process. A new process would share less.
const THREAD: c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

/// `IORING_REGISTER_ENABLE_RINGS` of linux/io_uring.h.
const ENABLE_RINGS: u32 = 12;
/// `IORING_REGISTER_RESTRICTIONS` of linux/io_uring.h.
const RESTRICTIONS: u32 = 11;

/// `type` and number of an ioctl are its lower 16 bits (asm-generic/ioctl.h); above them are the size and the direction of what it
/// moves, which the kernel compares itself.
const IOCTL_NUMBER: u32 = 0xffff;
const KVM: u32 = 0xae00;
const UFFD: u32 = 0xaa00;

/// What is asked of KVM's and userfaultfd's descriptors, and of terminals and sockets. The first are looked at first: they are on the
/// way of every fault and every exit of a vCPU.
const IOCTLS: &[u32] = &[
    UFFD | 0x07, // UFFDIO_CONTINUE: a page has come
    KVM | 0x80,  // KVM_RUN
    UFFD | 0x02, // UFFDIO_WAKE
    UFFD | 0x04, // UFFDIO_ZEROPAGE: a page that is zero
    UFFD | 0x06, // UFFDIO_WRITEPROTECT: a guest is saved while it runs
    KVM | 0x61,  // KVM_IRQ_LINE: the serial port's interrupt
    KVM | 0xc7,  // KVM_RESET_DIRTY_RINGS
    KVM | 0xc0,  // KVM_CLEAR_DIRTY_LOG
    KVM | 0x42,  // KVM_GET_DIRTY_LOG
    KVM | 0x46,  // KVM_SET_USER_MEMORY_REGION: the dirty log is begun and ended
    UFFD,        // USERFAULTFD_IOC_NEW, UFFDIO_REGISTER: a destination begins
    UFFD | 0x3f, // UFFDIO_API
    UFFD | 0x01, // UFFDIO_UNREGISTER: every page has come
    // The state of vCPUs, interrupt controllers, timers and clocks, saved at the source and loaded at the destination.
    KVM | 0x81, // KVM_GET_REGS
    KVM | 0x82, // KVM_SET_REGS
    KVM | 0x83, // KVM_GET_SREGS
    KVM | 0x84, // KVM_SET_SREGS
    KVM | 0x88, // KVM_GET_MSRS
    KVM | 0x89, // KVM_SET_MSRS
    KVM | 0x8e, // KVM_GET_LAPIC
    KVM | 0x8f, // KVM_SET_LAPIC
    KVM | 0x90, // KVM_SET_CPUID2
    KVM | 0x98, // KVM_GET_MP_STATE
    KVM | 0x99, // KVM_SET_MP_STATE
    KVM | 0x9f, // KVM_GET_VCPU_EVENTS, KVM_GET_PIT2
    KVM | 0xa0, // KVM_SET_VCPU_EVENTS, KVM_SET_PIT2
    KVM | 0xa1, // KVM_GET_DEBUGREGS
    KVM | 0xa2, // KVM_SET_DEBUGREGS, KVM_SET_TSC_KHZ
    KVM | 0xa3, // KVM_GET_TSC_KHZ
    KVM | 0xcf, // KVM_GET_XSAVE2
    KVM | 0xa5, // KVM_SET_XSAVE
    KVM | 0xa6, // KVM_GET_XCRS
    KVM | 0xa7, // KVM_SET_XCRS
    KVM | 0xad, // KVM_KVMCLOCK_CTRL
    KVM | 0xe1, // KVM_SET_DEVICE_ATTR: a vCPU's TSC offset
    KVM | 0xe2, // KVM_GET_DEVICE_ATTR
    KVM | 0xe3, // KVM_HAS_DEVICE_ATTR
    KVM | 0x62, // KVM_GET_IRQCHIP
    KVM | 0x63, // KVM_SET_IRQCHIP
    KVM | 0x7b, // KVM_SET_CLOCK
    KVM | 0x7c, // KVM_GET_CLOCK
    0x5401,     // TCGETS: is standard error a terminal
    0x540f,     // TIOCGPGRP: is this process the one that is typed to
    0x541b,     // FIONREAD: how much of an answer to a name look-up has come
    0x5421,     // FIONBIO: sockets that are not waited for
];

fn plain(number: c_long) -> Call {
    Call { number, alternatives: Vec::new() }
}

fn with(number: c_long, alternatives: impl IntoIterator<Item = Arguments>) -> Call {
    Call { number, alternatives: alternatives.into_iter().collect() }
}

fn is(argument: u8, value: impl Into<i64>) -> Condition {
    Condition { argument, mask: u32::MAX, value: bits(value) }
}

fn lacks(argument: u8, value: impl Into<i64>) -> Condition {
    Condition { argument, mask: bits(value), value: 0 }
}

/// The lower half, which is what the kernel looks at of an argument that is an `int`.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is the lower half that is wanted")]
fn bits(value: impl Into<i64>) -> u32 {
    value.into() as u32
}

fn group<const N: usize>(why: &'static str, numbers: [c_long; N]) -> Group {
    Group { why, calls: numbers.map(plain).into() }
}

fn guarded<const N: usize>(why: &'static str, calls: [Call; N]) -> Group {
    Group { why, calls: calls.into() }
}

/// All that a machine's process may do after start-up. `pid` is its own.
#[must_use]
pub fn of_a_machine(pid: u32) -> Vec<Group> {
    [files(), memory(), sockets(), rings(), threads(pid), time()].concat()
}

fn files() -> Vec<Group> {
    vec![
        group(
            "the serial port, QMP and eventfds; messages on standard error; faults from a userfaultfd",
            [libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev, libc::SYS_close],
        ),
        group(
            "images of machines at rest, the audit log, credentials, the host's name service: opened and looked at",
            [
                libc::SYS_open,
                libc::SYS_openat,
                libc::SYS_stat,
                libc::SYS_fstat,
                libc::SYS_lstat,
                libc::SYS_newfstatat,
                libc::SYS_statx,
                libc::SYS_fstatfs,
                libc::SYS_access,
                libc::SYS_faccessat,
                libc::SYS_faccessat2,
                libc::SYS_getdents64,
                libc::SYS_readlink,
                libc::SYS_readlinkat,
                libc::SYS_getcwd,
            ],
        ),
        group("files of the host that the guest opens, under one directory and nowhere else", [libc::SYS_openat2]),
        group(
            "images of machines at rest, the audit log, credentials: read and written",
            [
                libc::SYS_pread64,
                libc::SYS_pwrite64,
                libc::SYS_preadv,
                libc::SYS_pwritev,
                libc::SYS_lseek,
                libc::SYS_fsync,
                libc::SYS_fdatasync,
                libc::SYS_sync_file_range,
                libc::SYS_fadvise64,
                libc::SYS_ftruncate,
                libc::SYS_fallocate,
                libc::SYS_copy_file_range,
                libc::SYS_flock,
            ],
        ),
        group(
            "an image takes its name when it is whole; sockets' files go with their sockets",
            [
                libc::SYS_rename,
                libc::SYS_renameat,
                libc::SYS_renameat2,
                libc::SYS_link,
                libc::SYS_linkat,
                libc::SYS_unlink,
                libc::SYS_unlinkat,
                libc::SYS_fchmod,
            ],
        ),
        group(
            "descriptors are duplicated, and told not to wait; threads are woken",
            [libc::SYS_fcntl, libc::SYS_dup, libc::SYS_eventfd2],
        ),
        group("whoever has several descriptors to wait for", [libc::SYS_poll, libc::SYS_ppoll]),
        guarded(
            "vCPUs, the pager, the dirty log, the state of a machine",
            [with(
                libc::SYS_ioctl,
                IOCTLS.iter().map(|number| vec![Condition { argument: 1, mask: IOCTL_NUMBER, value: *number }]),
            )],
        ),
    ]
}

fn memory() -> Vec<Group> {
    vec![
        guarded(
            "the allocator, threads' stacks, rings: never code. What maps code is refused (see `refused`)",
            [plain(libc::SYS_mmap), with(libc::SYS_mprotect, [vec![lacks(2, libc::PROT_EXEC)]])],
        ),
        group(
            "the allocator; guest memory that goes; pages that are unmapped, collapsed or handed back",
            [libc::SYS_munmap, libc::SYS_mremap, libc::SYS_brk, libc::SYS_madvise],
        ),
        group(
            "a pager, where this host has no /dev/userfaultfd; how much of the guest is in memory",
            [libc::SYS_userfaultfd, SYS_CACHESTAT],
        ),
    ]
}

/// Of Linux 6.5; the C library's bindings do not have it.
const SYS_CACHESTAT: c_long = 451;

fn sockets() -> Vec<Group> {
    let families = [AF_UNIX, AF_INET, AF_INET6];
    let kinds = [SOCK_STREAM, SOCK_DGRAM].map(|kind| Condition { argument: 1, mask: 0xf, value: bits(kind) });
    let made = families.into_iter().flat_map(|family| kinds.map(|kind| vec![is(0, family), kind]));
    vec![
        guarded(
            "lanes, QMP, name look-ups (over UDP; the last is refused, see `refused`). No raw and no packet sockets",
            [
                with(libc::SYS_socket, made.chain(once(vec![is(0, AF_NETLINK)]))),
                with(libc::SYS_socketpair, [vec![is(0, AF_UNIX)]]),
            ],
        ),
        group(
            "lanes and QMP: listening, connecting, and what they ask of a socket",
            [
                libc::SYS_bind,
                libc::SYS_listen,
                libc::SYS_accept4,
                libc::SYS_connect,
                libc::SYS_shutdown,
                libc::SYS_getsockname,
                libc::SYS_getpeername,
                libc::SYS_setsockopt,
                libc::SYS_getsockopt,
            ],
        ),
        group(
            "TLS handshakes, QMP, name look-ups, the process that makes rings",
            [libc::SYS_sendto, libc::SYS_recvfrom, libc::SYS_sendmsg, libc::SYS_recvmsg, libc::SYS_sendmmsg],
        ),
        group("TLS handshakes, sessions' names, hash tables", [libc::SYS_getrandom]),
    ]
}

fn rings() -> Vec<Group> {
    vec![guarded(
        "lanes. Rings come from the process that makes them, restricted to what lanes do; here they are enabled and used",
        [plain(libc::SYS_io_uring_enter), with(libc::SYS_io_uring_register, [vec![is(1, ENABLE_RINGS)]])],
    )]
}

fn threads(pid: u32) -> Vec<Group> {
    vec![
        guarded(
            "every migration starts threads: they share everything with this process. What the kernel cannot look into is refused \
             (see `refused`)",
            [with(libc::SYS_clone, [vec![is(0, THREAD)]]), plain(libc::SYS_clone3)],
        ),
        group(
            "threads begin, wait for each other and end",
            [
                libc::SYS_futex,
                libc::SYS_set_robust_list,
                libc::SYS_set_tid_address,
                libc::SYS_rseq,
                libc::SYS_sigaltstack,
                libc::SYS_gettid,
                libc::SYS_getpid,
                libc::SYS_exit,
                libc::SYS_exit_group,
                libc::SYS_restart_syscall,
            ],
        ),
        guarded(
            "threads and what they allocate have names; nothing else of a process is changed",
            [with(libc::SYS_prctl, [vec![is(0, libc::PR_SET_NAME)], vec![is(0, libc::PR_SET_VMA)]])],
        ),
        group(
            "who yields and who is prompt among the threads, and how many processors there are",
            [
                libc::SYS_sched_yield,
                libc::SYS_sched_getattr,
                libc::SYS_sched_setattr,
                libc::SYS_sched_getaffinity,
                libc::SYS_getcpu,
                libc::SYS_getrusage,
            ],
        ),
        group(
            "vCPUs are kicked out of the guest; Ctrl-C is waited for; a fatal error ends the process",
            [libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_rt_sigtimedwait],
        ),
        guarded(
            "signals to threads of this process, and to no other; its child is waited for at the end",
            [with(libc::SYS_tgkill, [vec![is(0, pid)]]), with(libc::SYS_wait4, [vec![is(2, libc::__WALL)]])],
        ),
        group(
            "the allocator and the name service ask what this process and its host are",
            [
                libc::SYS_getuid,
                libc::SYS_geteuid,
                libc::SYS_getgid,
                libc::SYS_getegid,
                libc::SYS_getpgrp,
                libc::SYS_uname,
                libc::SYS_sysinfo,
            ],
        ),
        guarded("limits are looked at, never changed", [with(libc::SYS_prlimit64, [vec![is(0, 0), is(2, 0)]])]),
    ]
}

fn time() -> Vec<Group> {
    vec![group(
        "clocks and pauses",
        [
            libc::SYS_clock_gettime,
            libc::SYS_clock_getres,
            libc::SYS_clock_nanosleep,
            libc::SYS_nanosleep,
            libc::SYS_gettimeofday,
        ],
    )]
}

/// What the process that makes rings may do: answer this one.
#[must_use]
pub fn of_the_ring_maker(parent: u32) -> Vec<Group> {
    vec![
        group(
            "requests and answers, through a socket",
            [libc::SYS_recvfrom, libc::SYS_sendto, libc::SYS_restart_syscall],
        ),
        guarded(
            "a ring is made, and restricted before it is told of; what could not be restricted is closed",
            [
                plain(libc::SYS_io_uring_setup),
                with(libc::SYS_io_uring_register, [vec![is(1, RESTRICTIONS)]]),
                plain(libc::SYS_close),
            ],
        ),
        guarded(
            "Rust looks whether a descriptor is one before it closes it, in builds that check themselves",
            [with(libc::SYS_fcntl, [vec![is(1, libc::F_GETFD)]])],
        ),
        guarded(
            "a parent that did not wait for that is ended",
            [with(libc::SYS_kill, [vec![is(0, parent), is(1, libc::SIGKILL)]])],
        ),
        group("its end", [libc::SYS_exit_group]),
    ]
}

/// Calls that are answered with an error and do not end the process: libraries try them, and do without.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// Why nothing is lost, or what is.
    pub why: &'static str,
    /// The error number.
    pub errno: c_int,
    /// Which.
    pub calls: Vec<Call>,
}

/// What a machine's process is refused after start-up.
#[must_use]
pub fn refused() -> Vec<Refusal> {
    let code = Condition { argument: 2, mask: bits(libc::PROT_EXEC), value: bits(libc::PROT_EXEC) };
    vec![
        Refusal {
            why: "the flags of `clone3` are in memory, where no filter sees them: the C library takes `clone` then",
            errno: libc::ENOSYS,
            calls: vec![plain(libc::SYS_clone3)],
        },
        Refusal {
            why: "no code is mapped. A name look-up tries to where /etc/nsswitch.conf names a plug-in, and goes on with the next \
                  source; it asks for this host's addresses too, to put answers in order, and does without",
            errno: libc::EPERM,
            calls: vec![with(libc::SYS_mmap, [vec![code]]), with(libc::SYS_socket, [vec![is(0, AF_NETLINK)]])],
        },
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// What lets a process become another, look into others, or change its host.
    const NEVER: [c_long; 26] = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_getfd,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_io_uring_setup,
        libc::SYS_setuid,
        libc::SYS_setresuid,
        libc::SYS_capset,
        libc::SYS_seccomp,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_chroot,
        libc::SYS_keyctl,
        libc::SYS_init_module,
        libc::SYS_kexec_load,
        libc::SYS_personality,
        libc::SYS_open_by_handle_at,
    ];

    fn numbers(groups: &[Group]) -> Vec<c_long> {
        groups.iter().flat_map(|group| &group.calls).map(|call| call.number).collect()
    }

    #[test]
    fn no_call_is_listed_twice_and_none_that_nobody_should_make() {
        let listed = numbers(&of_a_machine(1));
        let different: HashSet<_> = listed.iter().collect();
        assert_eq!(different.len(), listed.len());
        let dangerous: Vec<_> = NEVER.iter().filter(|number| different.contains(number)).collect();
        assert!(dangerous.is_empty(), "{dangerous:?}");
    }

    #[test]
    fn what_could_do_more_is_looked_into() {
        let groups = of_a_machine(1);
        for number in
            [libc::SYS_ioctl, libc::SYS_socket, libc::SYS_clone, libc::SYS_prctl, libc::SYS_mprotect, libc::SYS_tgkill]
        {
            let call = groups.iter().flat_map(|group| &group.calls).find(|call| call.number == number).unwrap();
            assert!(!call.alternatives.is_empty(), "{number}");
        }
        let refusals = refused();
        let refused = |number| refusals.iter().flat_map(|refusal| &refusal.calls).any(|call| call.number == number);
        assert!(refused(libc::SYS_clone3) && refused(libc::SYS_mmap));
    }
}
