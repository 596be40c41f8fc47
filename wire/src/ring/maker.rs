//! A process that makes rings, so that this one may be denied to.
//!
//! seccomp does not see what an io_uring does, so a process that is confined by it must not be able to make a ring that does
//! everything. Rings cannot all be made before: each belongs to the thread that enables it, and a lost link is joined again with
//! new threads, without end. So a child is split off while this process has a single thread and nothing to lose. All that it
//! can do is make rings, [restricted](super::restrict) and disabled, and hand them over through a socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use io_uring::{IoUring, Parameters};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, setsockopt,
    socketpair, sockopt,
};
use nix::sys::time::TimeVal;

/// How long the child may take for a ring: it takes some ten microseconds, and more only where the host has no processor for it.
const PATIENCE_S: i64 = 5;

/// The size of what the kernel says of a ring (`struct io_uring_params`).
const PARAMETERS: usize = size_of::<Parameters>();

/// A request: its number, and how many entries the ring shall have.
const REQUEST: usize = 8;

/// An answer: the request's number, an error number or 0, and what the kernel says of the ring, which comes along.
const ANSWER: usize = 8 + PARAMETERS;

static MAKER: OnceLock<Mutex<Maker>> = OnceLock::new();

struct Maker {
    socket: OwnedFd,
    last: u32,
}

/// Splits off the child that makes all further rings of this process, until that ends. In the child `confine` is called once;
/// what it needs is to receive and send messages, to make, map and register rings, and to end. Where `confine` fails the child
/// ends, and no ring can be made.
///
/// # Errors
/// When the kernel refuses, this process has another thread already, or the child was split off before.
pub fn split_off(confine: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("this process has several threads already"));
    }
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    setsockopt(&ours, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE_S, 0))?;
    let parent = std::process::id();
    // SAFETY: this process has one thread, so whatever that could be in the middle of is not under way elsewhere: no lock is held
    // that nobody will let go of.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(ours);
            let served = settle(&theirs, parent).and_then(|socket| confine().map(|()| serve(socket)));
            // SAFETY: ends this process, the child, and runs none of what its parent wanted to be run in the end.
            unsafe { libc::_exit(i32::from(served.is_err())) }
        }
        _ => MAKER
            .set(Mutex::new(Maker { socket: ours, last: 0 }))
            .map_err(|_| io::Error::other("there is a process that makes rings already")),
    }
}

/// Leaves the child nothing of its parent but the socket, whose number is returned; it ends with its parent.
fn settle(socket: &OwnedFd, parent: u32) -> io::Result<RawFd> {
    const KEPT: RawFd = 3;
    let done = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?.into_raw_fd();
    let number = socket.as_raw_fd();
    // SAFETY: plain system calls with numbers, on descriptors that nobody else in this process, the child, uses from here on.
    unsafe {
        done(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL).into())?;
        done(libc::prctl(libc::PR_SET_NAME, c"ring maker".as_ptr()).into())?;
        // Asked to end with its parent by a terminal: it goes when that has gone.
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigfillset(all.as_mut_ptr());
        done(libc::sigprocmask(libc::SIG_BLOCK, all.as_ptr(), std::ptr::null_mut()).into())?;
        for standard in 0..KEPT {
            done(libc::dup2(null, standard).into())?;
        }
        if number != KEPT {
            done(libc::dup2(number, KEPT).into())?;
        }
        done(libc::syscall(libc::SYS_close_range, KEPT + 1, libc::c_uint::MAX, 0))?;
    }
    if std::os::unix::process::parent_id() == parent { Ok(KEPT) } else { Err(Errno::ESRCH.into()) }
}

/// The child's work, until its parent is gone.
fn serve(socket: RawFd) {
    let mut request = [0; REQUEST];
    loop {
        let mut parts = [IoSliceMut::new(&mut request)];
        match recvmsg::<()>(socket, &mut parts, None, MsgFlags::empty()).map(|message| message.bytes) {
            Ok(REQUEST) => {}
            Err(Errno::EINTR) => continue,
            _ => return,
        }
        let [n0, n1, n2, n3, e0, e1, e2, e3] = request;
        let mut answer = [0; ANSWER];
        answer[..4].copy_from_slice(&[n0, n1, n2, n3]);
        let ring = super::make(u32::from_ne_bytes([e0, e1, e2, e3]));
        let sent = match &ring {
            Ok(ring) => {
                answer[8..].copy_from_slice(&bytes_of(ring.params()));
                let along = [ring.as_raw_fd()];
                let along = [ControlMessage::ScmRights(&along)];
                sendmsg::<()>(socket, &[IoSlice::new(&answer)], &along, MsgFlags::MSG_NOSIGNAL, None)
            }
            Err(error) => {
                answer[4..8].copy_from_slice(&error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes());
                sendmsg::<()>(socket, &[IoSlice::new(&answer)], &[], MsgFlags::MSG_NOSIGNAL, None)
            }
        };
        if sent.is_err() {
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
        let socket = self.socket.as_raw_fd();
        sendmsg::<()>(socket, &[IoSlice::new(&request)], &[], MsgFlags::MSG_NOSIGNAL, None).map_err(gone)?;
        loop {
            let mut answer = [0; ANSWER];
            let mut room = nix::cmsg_space!(RawFd);
            let mut parts = [IoSliceMut::new(&mut answer)];
            let message = match recvmsg::<()>(socket, &mut parts, Some(&mut room), MsgFlags::MSG_CMSG_CLOEXEC) {
                Err(Errno::EINTR) => continue,
                other => other.map_err(gone)?,
            };
            let length = message.bytes;
            let mut ring = None;
            for along in message.cmsgs().map_err(gone)? {
                if let ControlMessageOwned::ScmRights(numbers) = along {
                    // SAFETY: the kernel has just made these descriptors for this process, and nobody else knows of them.
                    numbers.iter().for_each(|number| ring = Some(unsafe { OwnedFd::from_raw_fd(*number) }));
                }
            }
            if length != ANSWER {
                return Err(gone(Errno::EPIPE));
            }
            let (head, parameters) = answer.split_at(8);
            if head[..4] != self.last.to_ne_bytes() {
                // To a request that was given up: its ring goes.
                continue;
            }
            let errno = i32::from_ne_bytes([head[4], head[5], head[6], head[7]]);
            let Some(ring) = ring.filter(|_| errno == 0) else {
                return Err(io::Error::from_raw_os_error(if errno == 0 { libc::EPROTO } else { errno }));
            };
            let mut said = [0; PARAMETERS];
            said.copy_from_slice(parameters);
            // SAFETY: the descriptor is owned and that of a ring, and these are the bytes that the kernel filled in when it was
            // made: the child, which has nothing else to do, sent both together.
            return unsafe { IoUring::from_fd(ring.into_raw_fd(), parameters_of(said)) };
        }
    }
}

fn bytes_of(parameters: &Parameters) -> [u8; PARAMETERS] {
    // SAFETY: `Parameters` is documented to be laid out as the kernel's structure, which is nothing but integers without padding,
    // and of this size.
    unsafe { std::mem::transmute_copy(parameters) }
}

/// # Safety
/// The bytes must be those of parameters that the kernel filled in.
unsafe fn parameters_of(bytes: [u8; PARAMETERS]) -> Parameters {
    // SAFETY: the caller's promise; `Parameters` may be created from its representation, as its documentation says.
    unsafe { std::mem::transmute(bytes) }
}
