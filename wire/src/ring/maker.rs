//! A process that makes rings, so that this one may be denied to.
//!
//! seccomp does not see what an io_uring does, so a process that is confined by it must not be able to make a ring that does
//! everything. Rings cannot all be made before: each belongs to the thread that enables it, and a lost link is joined again with
//! new threads, without end. So a child is split off while this process has a single thread and nothing to lose. All that it
//! can do is make rings, restricted (`setup.rs`) and disabled.
//!
//! No ring goes through a socket (Linux 6.7 and later refuse to send one). The child shares the *table of descriptors* with its
//! parent and nothing else, no memory: a ring that it makes is a descriptor of both, and a message says which. It follows that
//! - the child closes nothing of what it was born with, since that would be its parent's;
//! - descriptors stay open as long as either lives. The child goes with its parent, by the kernel's hand;
//! - for a moment the parent has a descriptor of a ring that is not restricted yet. A parent that enables it then, which none does
//!   that works as it should, is ended by its child, to which the kernel says so.
//!
//! What a ring does it does for whoever submits: with the parent's memory, on the thread that enabled it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use io_uring::IoUring;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, shutdown, socketpair};

use super::setup::{Made, PARAMETERS, SetupError, make};

/// How long the child may take for a ring, in milliseconds: it takes some ten microseconds, and more only where the host has no
/// processor for it.
const PATIENCE_MS: u16 = 5_000;

/// A request: its number, and how many entries the ring shall have.
const REQUEST: usize = 8;

/// An answer: the request's number, an error number or 0, the ring's descriptor, and what the kernel says of it.
const ANSWER: usize = 12 + PARAMETERS * 4;

static MAKER: OnceLock<Mutex<Maker>> = OnceLock::new();

struct Maker {
    socket: OwnedFd,
    /// Readable once the child has ended.
    child: OwnedFd,
    pid: libc::pid_t,
    last: u32,
}

/// Splits off the child that makes all further rings of this process, until that ends. In the child `confine` is called once;
/// what it needs is to receive and send messages, to make, restrict and close rings, to kill its parent, and to end. Where
/// `confine` fails the child ends, and no ring can be made.
///
/// # Errors
/// When the kernel refuses, this process has another thread already, or the child was split off before.
pub fn split_off(confine: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("this process has several threads already"));
    }
    if MAKER.get().is_some() {
        return Err(io::Error::other("there is a process that makes rings already"));
    }
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let parent = std::process::id();
    let mut child: RawFd = -1;
    // A copy of this process but for the table of descriptors, as of `fork`: no new stack, and no signal when it ends.
    let flags = libc::CLONE_FILES | libc::CLONE_PIDFD;
    let nothing = 0_usize;
    // SAFETY: this process has one thread, so whatever that could be in the middle of is not under way elsewhere: no lock is held
    // that nobody will let go of. Memory is copied, so the child goes on here, on its own stack. The kernel writes one descriptor.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, nothing, &raw mut child, nothing, nothing) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let served = settle(parent).and_then(|()| confine());
            if served.is_ok() {
                serve(theirs.as_fd(), parent);
            }
            // SAFETY: ends this process, the child, and runs none of what its parent wanted to be run in the end.
            unsafe { libc::_exit(i32::from(served.is_err())) }
        }
        pid => {
            // The child's end of the socket is a descriptor of this process too, and stays: who closed it here would close it there.
            std::mem::forget(theirs);
            // SAFETY: the kernel has just made this descriptor for this process, and nobody else knows of it.
            let child = unsafe { OwnedFd::from_raw_fd(child) };
            let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
            let maker = Maker { socket: ours, child, pid, last: 0 };
            MAKER.set(Mutex::new(maker)).map_err(|_| io::Error::other("there is a process that makes rings already"))
        }
    }
}

/// Ends the child, if there is one, and waits until it is gone. No ring can be made any more.
pub fn end() {
    let Some(maker) = MAKER.get() else { return };
    let maker = maker.lock().unwrap_or_else(PoisonError::into_inner);
    // It hears the end of the stream.
    let _ = shutdown(maker.socket.as_raw_fd(), Shutdown::Both);
    // SAFETY: waits for a child of this process, and asks for nothing to be written.
    while unsafe { libc::waitpid(maker.pid, std::ptr::null_mut(), libc::__WALL) } < 0 && Errno::last() == Errno::EINTR {
    }
}

/// Has the child end with its parent, and not before.
fn settle(parent: u32) -> io::Result<()> {
    let done = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: plain system calls with numbers, a constant text and a live set of signals, in a process with one thread.
    unsafe {
        done(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        done(libc::prctl(libc::PR_SET_NAME, c"ring maker".as_ptr()))?;
        // Asked to end with its parent by a terminal: it goes when that has gone.
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&raw mut all);
        done(libc::sigprocmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut()))?;
    }
    // It may have gone before the first of these.
    if std::os::unix::process::parent_id() == parent { Ok(()) } else { Err(Errno::ESRCH.into()) }
}

/// The child's work, until its parent is gone or wants no more.
fn serve(socket: BorrowedFd<'_>, parent: u32) {
    let mut request = [0; REQUEST];
    loop {
        match recv(socket.as_raw_fd(), &mut request, MsgFlags::empty()) {
            Ok(REQUEST) => {}
            Err(Errno::EINTR) => continue,
            _ => return,
        }
        let [n0, n1, n2, n3, e0, e1, e2, e3] = request;
        let mut answer = [0; ANSWER];
        answer[..4].copy_from_slice(&[n0, n1, n2, n3]);
        match make(u32::from_ne_bytes([e0, e1, e2, e3])) {
            Ok(Made { ring, parameters }) => {
                answer[8..12].copy_from_slice(&ring.as_raw_fd().to_ne_bytes());
                for (bytes, word) in answer[12..].chunks_exact_mut(4).zip(parameters) {
                    bytes.copy_from_slice(&word.to_ne_bytes());
                }
                // From here on it is the parent's.
                std::mem::forget(ring);
            }
            Err(SetupError::EnabledMeanwhile) => {
                // SAFETY: a signal to the process that started this one: where that has gone, this one has been killed.
                unsafe { libc::kill(parent.cast_signed(), libc::SIGKILL) };
                return;
            }
            Err(SetupError::Refused(errno)) => answer[4..8].copy_from_slice(&(errno as i32).to_ne_bytes()),
        }
        if send(socket.as_raw_fd(), &answer, MsgFlags::MSG_NOSIGNAL).is_err() {
            return;
        }
    }
}

/// A ring of the child's, if there is one: `None` where this process makes its own.
pub(super) fn ask(entries: u32) -> Option<io::Result<IoUring>> {
    let maker = MAKER.get()?;
    Some(maker.lock().unwrap_or_else(PoisonError::into_inner).ask(entries))
}

impl Maker {
    fn ask(&mut self, entries: u32) -> io::Result<IoUring> {
        let gone = |errno: Errno| {
            let error = io::Error::from(errno);
            io::Error::new(error.kind(), format!("the process that makes rings for this one does not answer: {error}"))
        };
        self.last = self.last.wrapping_add(1);
        let request = [self.last.to_ne_bytes(), entries.to_ne_bytes()].concat();
        // Without waiting: there is room for it, unless nobody reads any more.
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        send(self.socket.as_raw_fd(), &request, flags).map_err(gone)?;
        loop {
            self.wait().map_err(gone)?;
            let mut answer = [0; ANSWER];
            match recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT) {
                Ok(ANSWER) => {}
                Err(Errno::EINTR | Errno::EAGAIN) => continue,
                Ok(_) => return Err(gone(Errno::EPIPE)),
                Err(errno) => return Err(gone(errno)),
            }
            let mut words = answer.chunks_exact(4).map(|bytes| {
                let mut word = [0; 4];
                word.copy_from_slice(bytes);
                u32::from_ne_bytes(word)
            });
            let (Some(number), Some(errno), Some(descriptor)) = (words.next(), words.next(), words.next()) else {
                return Err(gone(Errno::EPROTO));
            };
            let mut parameters = [0; PARAMETERS];
            parameters.iter_mut().zip(words).for_each(|(to, word)| *to = word);
            if errno != 0 {
                if number == self.last {
                    return Err(io::Error::from_raw_os_error(errno.cast_signed()));
                }
                continue;
            }
            // SAFETY: the child, which has nothing else to do, has made this descriptor in the table of both, and forgotten it.
            let ring = unsafe { OwnedFd::from_raw_fd(descriptor.cast_signed()) };
            // To a request that was given up: its ring goes.
            if number != self.last {
                continue;
            }
            return Made { ring, parameters }.map();
        }
    }

    /// Waits for an answer.
    fn wait(&self) -> Result<(), Errno> {
        let mut both = [&self.socket, &self.child].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
        loop {
            match poll(&mut both, PollTimeout::from(PATIENCE_MS)) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
                Ok(0) => return Err(Errno::ETIMEDOUT),
                // What it said before its end counts.
                Ok(_) => return if both[0].any() == Some(true) { Ok(()) } else { Err(Errno::ESRCH) },
            }
        }
    }
}
