//! Connected stream sockets, and how they come to be.

mod listener;

use std::ffi::OsString;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, connect,
    getpeername, recv, setsockopt, shutdown, socket, sockopt,
};
use nix::sys::time::TimeVal;
use thiserror::Error;

pub use self::listener::Listener;
use crate::address::Address;
use crate::counters::LaneCounters;
use crate::tls::Tls;
use crate::types::LaneRole;

/// Buffer asked for on each end of a bulk lane over a unix socket, whose default (208 KiB) holds three 64 KiB
/// chunks' worth of pages: too little for both sides to work at once. The kernel gives what
/// `net.core.{r,w}mem_max` allows.
const UNIX_BULK_BUFFER: usize = 4 << 20;

/// Measured on loopback, 256 MiB drained beside a busy vCPU on two cores, four runs each, interleaved: cubic 8.1 to
/// 12.7 Gbit/s, BBR 6.2 to 8.9.
const CONGESTION_CONTROL: &str = "cubic";

/// Seconds of silence before TCP asks whether the other side is still there, seconds between its questions, and how many
/// may stay unanswered: a dead host is noticed within some 15 s.
const KEEPALIVE_IDLE_S: u32 = 5;
const KEEPALIVE_INTERVAL_S: u32 = 2;
const KEEPALIVE_PROBES: u32 = 5;
/// How long what was sent may stay unacknowledged, or unread by the other side, in milliseconds.
const UNACKNOWLEDGED_MS: u32 = 15_000;

/// What can go wrong with a socket before it is a lane.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The name of a host could not be turned into an address.
    #[error("cannot look up the host of {address}: {source}; is its name right?")]
    Resolve {
        /// What was to be connected to or listened at.
        address: Address,
        /// The resolver's answer.
        source: io::Error,
    },
    /// Nobody answered.
    #[error("cannot connect to {address}: {source}; is a destination listening there (`--incoming`)?")]
    Connect {
        /// What was to be connected to.
        address: Address,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The address cannot be listened at.
    #[error("cannot listen at {address}: {source}; is it this host's, and free?")]
    Listen {
        /// What was to be listened at.
        address: Address,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Somebody listens at this unix socket, or the file is no socket.
    #[error("cannot listen at {address}: {reason}")]
    Occupied {
        /// What was to be listened at.
        address: Address,
        /// What is there.
        reason: &'static str,
    },
    /// No further connection can be accepted.
    #[error("cannot accept connections at {address}: {source}")]
    Accept {
        /// What was listened at.
        address: Address,
        /// The kernel's answer.
        source: io::Error,
    },
    /// An option could not be set.
    #[error("cannot set {option} on the connection with {peer}: {source}")]
    Option {
        /// The option.
        option: &'static str,
        /// The other side.
        peer: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A connected stream socket. It is closed when the last owner drops it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    peer: String,
    family: Family,
    counters: Arc<LaneCounters>,
    /// Once its handshake is over, where there is one.
    tls: OnceLock<Tls>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Family {
    Tcp,
    Unix,
}

impl Socket {
    /// Connects to a listening destination. A name with several addresses has them tried in turn, all within
    /// `timeout` (the resolver's own time is not bounded by it).
    ///
    /// # Errors
    /// When the host is unknown, nobody listens, or the time is up.
    pub fn connect(address: &Address, timeout: Duration) -> Result<Self, SocketError> {
        match address {
            Address::Tcp { host, port } => connect_tcp(address, host, *port, timeout),
            Address::Unix(path) => connect_unix(path, timeout)
                .map(|fd| Self::new(fd, address.to_string(), Family::Unix))
                .map_err(|source| SocketError::Connect { address: address.clone(), source }),
        }
    }

    /// Two sockets connected to each other, for tests and for lanes within one host.
    ///
    /// # Errors
    /// When this process has no file descriptor left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = std::os::unix::net::UnixStream::pair()?;
        let wrap = |fd: OwnedFd| Self::new(fd, "unix:(pair)".to_owned(), Family::Unix);
        Ok((wrap(a.into()), wrap(b.into())))
    }

    /// The other side, as text for messages.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether it reaches no farther than this host: a unix socket, or one to a loopback address.
    #[must_use]
    pub fn is_within_host(&self) -> bool {
        let Ok(peer) = getpeername::<SockaddrStorage>(self.fd.as_raw_fd()) else { return false };
        match (peer.as_sockaddr_in(), peer.as_sockaddr_in6()) {
            (Some(peer), _) => peer.ip().is_loopback(),
            // A listener on every interface has its IPv4 peers as mapped addresses.
            (None, Some(peer)) => peer.ip().to_canonical().is_loopback(),
            (None, None) => peer.family() == Some(AddressFamily::Unix),
        }
    }

    /// The bytes that crossed it so far. Handshake and control messages are counted by themselves; whoever
    /// transfers on the descriptor adds their own.
    #[must_use]
    pub fn counters(&self) -> &Arc<LaneCounters> {
        &self.counters
    }

    /// What the bytes are sealed with; `None` where they go as they are.
    pub fn tls(&self) -> Option<&Tls> {
        self.tls.get()
    }

    /// From now on its bytes are sealed. `false` where they are already.
    pub(crate) fn secure(&self, tls: Tls) -> bool {
        self.tls.set(tls).is_ok()
    }

    /// Small pieces go at once, from now on: a handshake has several, and each would wait for the other side's acknowledgement of the
    /// last, which takes 40 ms where that side has nothing to say.
    pub(crate) fn send_at_once(&self) -> Result<(), SocketError> {
        match self.family {
            Family::Tcp => self.set("TCP_NODELAY", sockopt::TcpNoDelay, &true),
            Family::Unix => Ok(()),
        }
    }

    /// Ends what this side sends: the other reads all of it, and then the end.
    pub(crate) fn say_no_more(&self) {
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Write);
    }

    /// Ends the connection in both directions: whoever waits on it, in any thread, is woken with the end of the
    /// stream or an error. The descriptor stays open, so it cannot be reused under somebody's feet. May be called
    /// any number of times.
    pub fn shutdown(&self) {
        // It fails only where there is no connection any more, which is what is wanted.
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Both);
    }

    /// Sets what a lane of this role needs.
    ///
    /// # Errors
    /// When the kernel refuses an option, which says that the socket is broken.
    pub fn tune(&self, role: LaneRole) -> Result<(), SocketError> {
        match self.family {
            // Requests, pages and messages must go at once. On a bulk lane Nagle's algorithm would hold back the last
            // piece of the last frame for a round trip, and the drain with it. TCP's buffers are left alone: a size
            // that is set turns the kernel's own sizing off, and that goes higher (`net.ipv4.tcp_{r,w}mem`).
            Family::Tcp => {
                self.set("TCP_NODELAY", sockopt::TcpNoDelay, &true)?;
                self.choose_congestion_control();
                self.keep_alive()
            }
            Family::Unix if role == LaneRole::Bulk => {
                self.set("SO_SNDBUF", sockopt::SndBuf, &UNIX_BULK_BUFFER)?;
                self.set("SO_RCVBUF", sockopt::RcvBuf, &UNIX_BULK_BUFFER)
            }
            Family::Unix => Ok(()),
        }
    }

    /// Bounds how long one blocking read may wait; `None` for ever. io_uring does not heed it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> Result<(), SocketError> {
        self.set("SO_RCVTIMEO", sockopt::ReceiveTimeout, &timeval(timeout))
    }

    /// Lanes are short-lived and fast: BBR, which many hosts default to, has not learned the bandwidth by the time that a
    /// guest has moved, and paces what it sends meanwhile. A host without the one preferred goes on with its own.
    fn choose_congestion_control(&self) {
        let preferred = OsString::from(CONGESTION_CONTROL);
        if let Err(errno) = setsockopt(&self.fd, sockopt::TcpCongestion, &preferred) {
            tracing::debug!(peer = self.peer, %errno, "{CONGESTION_CONTROL} is not to be had; the host's default stays");
        }
    }

    /// A host that is gone without a word, or a middlebox that forgot an idle lane, is noticed by probes: a lane can be
    /// idle for as long as its guest is not handed off.
    fn keep_alive(&self) -> Result<(), SocketError> {
        self.set("SO_KEEPALIVE", sockopt::KeepAlive, &true)?;
        self.set("TCP_KEEPIDLE", sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
        self.set("TCP_KEEPINTVL", sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
        self.set("TCP_KEEPCNT", sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
        // Probes are not sent while data waits to be acknowledged. Without this one a lane whose route alone is gone, beside
        // others that live, would be retried for a quarter of an hour.
        self.set("TCP_USER_TIMEOUT", sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MS)
    }

    /// Whether the other side still holds its end, as far as this host's kernel knows. Bytes that wait do not count
    /// against it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let mut byte = [0];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.fd.as_raw_fd(), &mut byte, flags) {
            Ok(bytes) => bytes > 0,
            Err(errno) => errno == Errno::EAGAIN,
        }
    }

    fn new(fd: OwnedFd, peer: String, family: Family) -> Self {
        Self { fd, peer, family, counters: Arc::default(), tls: OnceLock::new() }
    }

    fn set<O: nix::sys::socket::SetSockOpt>(
        &self,
        option: &'static str,
        kind: O,
        value: &O::Val,
    ) -> Result<(), SocketError> {
        setsockopt(&self.fd, kind, value).map_err(|errno| SocketError::Option {
            option,
            peer: self.peer.clone(),
            source: errno.into(),
        })
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn connect_tcp(address: &Address, host: &str, port: u16, timeout: Duration) -> Result<Socket, SocketError> {
    let deadline = Instant::now() + timeout;
    let failed = |source| SocketError::Connect { address: address.clone(), source };
    if host.is_empty() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it names no host")));
    }
    if port == 0 {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "port 0 can only be listened at")));
    }
    let candidates =
        (host, port).to_socket_addrs().map_err(|source| SocketError::Resolve { address: address.clone(), source })?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for candidate in candidates {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            last = io::ErrorKind::TimedOut.into();
            break;
        }
        match TcpStream::connect_timeout(&candidate, left) {
            Ok(stream) => {
                return Ok(Socket::new(stream.into(), format!("tcp:{candidate}"), Family::Tcp));
            }
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

/// A connection to a unix socket waits when the listener's queue is full, for as long as the socket's send timeout.
fn connect_unix(path: &Path, timeout: Duration) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::SendTimeout, &timeval(Some(timeout)))?;
    let address = UnixAddr::new(path)?;
    let deadline = Instant::now() + timeout;
    loop {
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(nix::errno::Errno::EINTR) if Instant::now() < deadline => {}
            Err(nix::errno::Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(errno) => return Err(errno.into()),
        }
    }
    setsockopt(&fd, sockopt::SendTimeout, &timeval(None))?;
    Ok(fd)
}

/// Zero would mean "for ever" to the kernel, so the shortest timeout is a microsecond.
fn timeval(timeout: Option<Duration>) -> TimeVal {
    let Some(timeout) = timeout else { return TimeVal::new(0, 0) };
    let seconds = i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX);
    let micros = i64::from(timeout.subsec_micros());
    TimeVal::new(seconds, if seconds == 0 { micros.max(1) } else { micros })
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    fn tcp_pair() -> (Socket, Socket) {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let near = Socket::connect(&listener.address(), Duration::from_secs(5)).unwrap();
        (near, listener.accept().unwrap().unwrap())
    }

    #[test]
    fn a_lane_whose_other_end_is_gone_is_not_open() {
        let (ours, theirs) = Socket::pair().unwrap();
        assert!(ours.is_open());
        theirs.shutdown();
        assert!(!ours.is_open());
    }

    #[test]
    fn a_shut_down_socket_wakes_its_reader() {
        let (near, far) = tcp_pair();
        let reader = std::thread::spawn(move || {
            let mut stream = TcpStream::from(far.fd);
            stream.read(&mut [0; 16]).unwrap()
        });
        near.shutdown();
        near.shutdown();
        assert_eq!(reader.join().unwrap(), 0);
    }

    #[test]
    fn lanes_are_tuned_by_role_and_family() {
        let (tcp, _far) = tcp_pair();
        let (unix, _other) = Socket::pair().unwrap();
        let before = nix::sys::socket::getsockopt(&unix, sockopt::SndBuf).unwrap();
        for role in [LaneRole::Control, LaneRole::Fault, LaneRole::Bulk] {
            tcp.tune(role).unwrap();
            unix.tune(role).unwrap();
        }
        assert!(nix::sys::socket::getsockopt(&tcp, sockopt::TcpNoDelay).unwrap());
        assert!(nix::sys::socket::getsockopt(&unix, sockopt::SndBuf).unwrap() >= before);
    }

    #[test]
    fn a_read_timeout_ends_a_read() {
        let (near, _far) = tcp_pair();
        near.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        let mut stream = TcpStream::from(near.fd);
        let error = stream.read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn nobody_listening_is_said_so() {
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let address: Address = format!("tcp:{closed}").parse().unwrap();
        let error = Socket::connect(&address, Duration::from_secs(5)).unwrap_err();
        assert!(matches!(error, SocketError::Connect { .. }), "{error}");
        assert!(error.to_string().contains("is a destination listening there"), "{error}");

        let folder = tempfile::tempdir().unwrap();
        let missing = Address::Unix(folder.path().join("none"));
        assert!(matches!(Socket::connect(&missing, Duration::from_secs(5)), Err(SocketError::Connect { .. })));
        for nowhere in ["tcp::4444", "tcp:127.0.0.1:0"] {
            let nowhere = nowhere.parse().unwrap();
            assert!(matches!(Socket::connect(&nowhere, Duration::from_secs(5)), Err(SocketError::Connect { .. })));
        }
    }

    #[test]
    fn a_full_queue_of_a_unix_socket_times_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("full");
        let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        nix::sys::socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
        let mut held = Vec::new();
        let error = loop {
            match connect_unix(&path, Duration::from_millis(20)) {
                Ok(fd) => held.push(fd),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(held.len() <= 4);
    }
}
