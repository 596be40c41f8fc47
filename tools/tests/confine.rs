//! What a confined process can still do, and what ends it: by processes that confine themselves as `switchover run` does.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, reason = "a panic here is a test's failure")]

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use std::{io, process, ptr, thread};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Uid, fork, pipe};
use switchover_tools::confine::filter::Mode;
use switchover_tools::confine::privileges::{Kept, PrivilegeError, give_up};
use switchover_tools::confine::user::RunAs;
use switchover_tools::confine::{confine_all_threads, split_off_the_ring_maker};
use switchover_wire::ring::{EventRing, Ring, maker};
use switchover_wire::socket::Socket;

/// Runs `work` in a process of its own, which has one thread: how it ended, and what it said on standard error.
fn in_a_process(work: impl FnOnce()) -> (WaitStatus, String) {
    let (said, stderr) = pipe().unwrap();
    // SAFETY: the child's only thread goes on here. What other tests' threads may have been in the middle of is the allocator, which
    // the C library keeps usable, and nothing else that `work` uses.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            nix::unistd::dup2_stderr(stderr).unwrap();
            work();
            // SAFETY: ends the child, and runs nothing that the test's own process wanted to be run in the end.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(stderr);
            let mut text = String::new();
            File::from(said).read_to_string(&mut text).unwrap();
            (waitpid(child, None).unwrap(), text)
        }
    }
}

fn passes(what: &str, work: impl FnOnce()) {
    let (status, said) = in_a_process(work);
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{what}: {status:?}: {said}");
}

fn confined(work: impl FnOnce()) -> (WaitStatus, String) {
    in_a_process(|| {
        confine_all_threads(Mode::On).unwrap();
        work();
    })
}

/// A system call with numbers.
fn call(number: libc::c_long, arguments: [libc::c_long; 3]) -> nix::Result<libc::c_long> {
    let [first, second, third] = arguments;
    // SAFETY: what is called here takes numbers, or fails for addresses that are null; most of it is not even looked at.
    Errno::result(unsafe { libc::syscall(number, first, second, third, 0_usize, 0_usize, 0_usize) })
}

#[test]
fn a_call_that_no_machine_makes_ends_the_process_and_is_named() {
    const TCSETS: libc::c_long = 0x5402;
    const TIOCSTI: libc::c_long = 0x5412;
    const KVM_CREATE_DEVICE: libc::c_long = 0xc00c_aee0;
    const UFFDIO_COPY: libc::c_long = 0xc028_aa03;
    let inet = libc::c_long::from(libc::AF_INET);
    let forbidden: [(&str, libc::c_long, [libc::c_long; 3]); 32] = [
        ("execve", libc::SYS_execve, [0; 3]),
        ("execveat", libc::SYS_execveat, [0; 3]),
        ("fork", libc::SYS_fork, [0; 3]),
        ("vfork", libc::SYS_vfork, [0; 3]),
        ("clone", libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0]),
        ("clone", libc::SYS_clone, [libc::CLONE_NEWUSER.into(), 0, 0]),
        ("unshare", libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0; 3]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [1, 0, 0]),
        ("process_vm_writev", libc::SYS_process_vm_writev, [1, 0, 0]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [-1, 0, 0]),
        ("kill", libc::SYS_kill, [0; 3]),
        ("tgkill", libc::SYS_tgkill, [1, 1, 0]),
        ("bpf", libc::SYS_bpf, [0; 3]),
        ("perf_event_open", libc::SYS_perf_event_open, [0; 3]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [4, 0, 0]),
        ("io_uring_register", libc::SYS_io_uring_register, [-1, 0, 0]),
        ("setuid", libc::SYS_setuid, [0; 3]),
        ("capset", libc::SYS_capset, [0; 3]),
        ("seccomp", libc::SYS_seccomp, [0; 3]),
        ("mount", libc::SYS_mount, [0; 3]),
        ("chmod", libc::SYS_chmod, [0; 3]),
        ("keyctl", libc::SYS_keyctl, [0; 3]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, [-1, 0, 0]),
        ("socket", libc::SYS_socket, [libc::AF_PACKET.into(), libc::SOCK_DGRAM.into(), 0]),
        ("socket", libc::SYS_socket, [inet, libc::SOCK_RAW.into(), 0]),
        ("prctl", libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1, 0]),
        ("mprotect", libc::SYS_mprotect, [0, 4096, (libc::PROT_READ | libc::PROT_EXEC).into()]),
        ("ioctl", libc::SYS_ioctl, [0, TCSETS, 0]),
        ("ioctl", libc::SYS_ioctl, [0, TIOCSTI, 0]),
        ("ioctl", libc::SYS_ioctl, [0, KVM_CREATE_DEVICE, 0]),
        ("ioctl", libc::SYS_ioctl, [0, UFFDIO_COPY, 0]),
    ];
    for (name, number, arguments) in forbidden {
        let (status, said) = confined(|| _ = call(number, arguments));
        assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGABRT, _)), "{name} {arguments:?}: {status:?}");
        assert!(said.contains(&format!("the system call `{name}`")), "{name} {arguments:?}: {said}");
    }
}

#[test]
fn a_call_without_a_name_ends_the_process_by_its_number() {
    let (status, said) = confined(|| _ = call(1023, [0; 3]));
    assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGABRT, _)), "{status:?}");
    assert!(said.contains("the system call `1023`"), "{said}");
}

#[test]
fn a_thread_from_before_is_confined_too() {
    let (status, said) = in_a_process(|| {
        let (go, told) = channel::<()>();
        let early = thread::spawn(move || {
            told.recv().unwrap();
            let _ = call(libc::SYS_ptrace, [0; 3]);
        });
        confine_all_threads(Mode::On).unwrap();
        go.send(()).unwrap();
        early.join().unwrap();
    });
    assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGABRT, _)), "{status:?}");
    assert!(said.contains("`ptrace`"), "{said}");
}

#[test]
fn what_libraries_try_and_do_without_is_refused_and_nothing_more() {
    let (status, said) = confined(|| {
        assert_eq!(call(libc::SYS_clone3, [0; 3]), Err(Errno::ENOSYS));
        assert_eq!(call(libc::SYS_socket, [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0]), Err(Errno::EPERM));
        let (read, code) = (libc::PROT_READ, libc::PROT_READ | libc::PROT_EXEC);
        let map = |protection| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping, which nobody uses.
            unsafe { libc::mmap(ptr::null_mut(), 4096, protection, flags, -1, 0) }
        };
        assert_eq!((map(code), Errno::last()), (libc::MAP_FAILED, Errno::EPERM));
        assert_ne!(map(read), libc::MAP_FAILED);
        // By `clone`, as `clone3` is not to be had.
        assert_eq!(thread::spawn(|| 7).join().unwrap(), 7);
        // A name that is looked up in /etc/hosts, if nowhere else.
        let _ = std::net::ToSocketAddrs::to_socket_addrs("localhost:1").map(Iterator::count);
    });
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}: {said}");
}

#[test]
fn in_mode_log_calls_are_made() {
    passes("log", || {
        confine_all_threads(Mode::Log).unwrap();
        assert_eq!(call(libc::SYS_ptrace, [1 << 20, 0, 0]), Err(Errno::ESRCH));
        assert_eq!(seccomp_mode(), "2");
    });
    passes("off", || {
        confine_all_threads(Mode::Off).unwrap();
        assert_eq!(seccomp_mode(), "0");
    });
}

fn seccomp_mode() -> String {
    status("Seccomp:")
}

/// A line of what the kernel says of this thread.
fn status(name: &str) -> String {
    let text = fs::read_to_string("/proc/thread-self/status").unwrap();
    text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
}

/// Whether this host has rings at all; says so where not.
fn rings(test: &str) -> bool {
    match Ring::new(1) {
        Ok(_) => true,
        Err(error) => {
            println!("SKIP {test}: {error}");
            false
        }
    }
}

/// Sends some bytes from one end of a socket to the other, by rings of two threads.
fn transfer() {
    let (near, far) = Socket::pair().unwrap();
    let receiver = thread::spawn(move || {
        let mut bytes = [0; 6];
        Ring::new(1).unwrap().recv_exact(far.as_fd(), &mut [IoSliceMut::new(&mut bytes)]).unwrap();
        bytes
    });
    let mut ring = Ring::new(1).unwrap();
    assert_eq!(ring.send_all(near.as_fd(), &[IoSlice::new(b"abc"), IoSlice::new(b"def")]).unwrap(), 6);
    assert_eq!(&receiver.join().unwrap(), b"abcdef");
}

#[test]
fn rings_of_the_other_process_work_in_a_confined_one() {
    if !rings("rings_of_the_other_process_work_in_a_confined_one") {
        return;
    }
    passes("rings", || {
        split_off_the_ring_maker(Mode::On).unwrap();
        confine_all_threads(Mode::On).unwrap();
        let open = || fs::read_dir("/proc/self/fd").unwrap().count();
        transfer();
        let before = open();
        // Far more than a stock would hold.
        (0..200).for_each(|_| transfer());
        assert_eq!(open(), before, "rings that have gone are closed");

        // One that a thread has enabled is no other thread's: the kernel leaves out its locks for that.
        let (near, far) = Socket::pair().unwrap();
        let mut event = EventRing::new(4).unwrap();
        event.poll_multishot(near.as_fd(), 7).unwrap();
        event.submit().unwrap();
        let (event, refusal) = thread::scope(|scope| {
            let other = scope.spawn(move || {
                let refusal = event.submit().and_then(|()| event.submit_and_wait(0, None));
                (event, refusal)
            });
            other.join().unwrap()
        });
        assert_eq!(refusal.unwrap_err().raw_os_error(), Some(libc::EEXIST));
        drop((event, far));
        maker::end();
        assert!(Ring::new(1).is_err());
    });
}

#[test]
fn without_the_other_process_there_are_no_rings_and_it_is_said() {
    if !rings("without_the_other_process_there_are_no_rings_and_it_is_said") {
        return;
    }
    passes("no maker", || {
        split_off_the_ring_maker(Mode::On).unwrap();
        let children = fs::read_to_string(format!("/proc/self/task/{}/children", process::id())).unwrap();
        let maker: i32 = children.trim().parse().unwrap();
        assert_eq!(fs::read_to_string(format!("/proc/{maker}/comm")).unwrap().trim(), "ring maker");
        let of_maker = fs::read_to_string(format!("/proc/{maker}/status")).unwrap();
        assert!(of_maker.contains("Threads:\t1"), "{of_maker}");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(maker), Signal::SIGKILL).unwrap();
        confine_all_threads(Mode::On).unwrap();
        let error = match Ring::new(1) {
            Ok(_) => panic!("a ring from nowhere"),
            Err(error) => error.to_string(),
        };
        assert!(error.contains("the process that makes rings for this one does not answer"), "{error}");
        maker::end();
    });
}

#[test]
fn the_other_process_goes_when_its_parent_is_killed() {
    if !rings("the_other_process_goes_when_its_parent_is_killed") {
        return;
    }
    let (number, told) = pipe().unwrap();
    let (status, _) = in_a_process(|| {
        split_off_the_ring_maker(Mode::On).unwrap();
        let children = fs::read(format!("/proc/self/task/{}/children", process::id())).unwrap();
        nix::unistd::write(&told, &children).unwrap();
        nix::sys::signal::raise(Signal::SIGKILL).unwrap();
    });
    drop(told);
    assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "{status:?}");
    let mut maker = String::new();
    File::from(number).read_to_string(&mut maker).unwrap();
    let running = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", maker.trim()));
        // What follows its name: a letter, `Z` for one that nobody has waited for yet.
        stat.is_ok_and(|stat| stat.contains("(ring maker)") && !stat.contains(") Z"))
    };
    let end = Instant::now() + Duration::from_secs(60);
    while running() {
        assert!(Instant::now() < end, "process {maker} goes on without its parent");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_ring_that_is_enabled_before_it_is_restricted_costs_the_parent_its_life() {
    if !rings("a_ring_that_is_enabled_before_it_is_restricted_costs_the_parent_its_life") {
        return;
    }
    const ENABLE_RINGS: libc::c_long = 12;
    let (status, said) = in_a_process(|| {
        split_off_the_ring_maker(Mode::On).unwrap();
        let highest = io::stderr().as_raw_fd().max(fs::read_dir("/proc/self/fd").unwrap().count().try_into().unwrap());
        // A process that is not what it should be any more: it enables whatever it has, again and again.
        let guess = move || loop {
            for descriptor in 0..highest + 8 {
                let _ = call(libc::SYS_io_uring_register, [descriptor.into(), ENABLE_RINGS, 0]);
            }
        };
        for _ in 0..2 {
            thread::spawn(guess);
        }
        confine_all_threads(Mode::On).unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while Instant::now() < end {
            drop(Ring::new(1));
        }
    });
    assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "{status:?}: {said}");
}

#[test]
fn a_process_gives_up_what_it_was_started_with() {
    let root = Uid::effective().is_root();
    if !root {
        println!("SKIP a_process_gives_up_what_it_was_started_with: the part with --user, which needs root");
    }
    let nobody = RunAs { user: Uid::from_raw(65_534), group: Gid::from_raw(65_534) };
    for user in [None, Some(nobody)].into_iter().take(1 + usize::from(root)) {
        passes("privileges", || {
            give_up(user, Kept::default()).unwrap();
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(status(set).trim_start_matches('0'), "", "{set}");
            }
            if root {
                assert_eq!(status("CapBnd:").trim_start_matches('0'), "");
            }
            assert_eq!(status("NoNewPrivs:"), "1");
            // SAFETY: a question.
            assert_eq!(unsafe { libc::prctl(libc::PR_GET_DUMPABLE) }, 0);
            assert_eq!(nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_CORE), Ok((0, 0)));
            if user.is_some() {
                assert_eq!(status("Uid:"), "65534\t65534\t65534\t65534");
                assert_eq!(status("Gid:"), "65534\t65534\t65534\t65534");
                assert_eq!(status("Groups:"), "");
                assert!(nix::unistd::setuid(Uid::from_raw(0)).is_err(), "there is no way back");
                assert!(File::open("/etc/shadow").is_err());
            }
        });
    }
    if root {
        passes("what is kept", || {
            give_up(Some(nobody), Kept { sys_ptrace: true }).unwrap();
            assert_eq!(u64::from_str_radix(&status("CapEff:"), 16).unwrap(), 1 << 19);
            assert_eq!(u64::from_str_radix(&status("CapBnd:"), 16).unwrap(), 1 << 19);
        });
    }
}

#[test]
fn privileges_are_not_given_up_by_one_thread_of_several() {
    passes("threads", || {
        let (stay, told) = channel::<()>();
        let other = thread::spawn(move || told.recv());
        assert!(matches!(give_up(None, Kept::default()), Err(PrivilegeError::Threads(2))));
        drop(stay);
        let _ = other.join();
    });
}
