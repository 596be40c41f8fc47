//! A destination's listening socket.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};

use super::{Family, Socket, SocketError};
use crate::address::Address;

/// How long to wait before accepting again after this process or host ran out of descriptors or memory. The
/// connection stays in the queue meanwhile.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(10);

/// A listening socket. [`accept`](Self::accept) and [`close`](Self::close) may be called by different threads.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
    address: Address,
    closed: AtomicBool,
    /// The unix socket's file, to be removed in the end.
    file: Mutex<Option<SocketFile>>,
}

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens at `address`. The file that a dead process left at a unix address is replaced.
    ///
    /// # Errors
    /// When the address is taken, or is not this host's.
    pub fn bind(address: &Address) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Listen { address: address.clone(), source };
        match address {
            Address::Tcp { host, port } => {
                let listener = bind_tcp(host, *port).map_err(failed)?;
                let port = listener.local_addr().map_err(failed)?.port();
                let address = Address::Tcp { host: host.clone(), port };
                Ok(Self { kind: Kind::Tcp(listener), address, closed: AtomicBool::new(false), file: Mutex::new(None) })
            }
            Address::Unix(path) => {
                clear_the_way(address, path)?;
                let listener = UnixListener::bind(path).map_err(failed)?;
                let file = SocketFile::of(path).map_err(failed)?;
                let kind = Kind::Unix(listener);
                Ok(Self {
                    kind,
                    address: address.clone(),
                    closed: AtomicBool::new(false),
                    file: Mutex::new(Some(file)),
                })
            }
        }
    }

    /// Where it listens, with the port that the kernel chose where 0 was asked for.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// Whether only this host can connect: a unix socket, or one at a loopback address.
    #[must_use]
    pub fn is_within_host(&self) -> bool {
        match &self.kind {
            Kind::Tcp(listener) => listener.local_addr().is_ok_and(|at| at.ip().to_canonical().is_loopback()),
            Kind::Unix(_) => true,
        }
    }

    /// Waits for the next connection; `None` once [`close`](Self::close) has been called.
    ///
    /// # Errors
    /// When no connection can ever be accepted again. A connection that broke in the queue, or a passing lack of
    /// descriptors, does not end it.
    pub fn accept(&self) -> Result<Option<Socket>, SocketError> {
        loop {
            let accepted = self.accept_once();
            // Looked at afterwards: connections may still be in the queue of a closed listener.
            if self.closed.load(Ordering::SeqCst) {
                return Ok(None);
            }
            match accepted {
                Ok(socket) => return Ok(Some(socket)),
                Err(error) if exhausted(&error) => thread::sleep(EXHAUSTED_PAUSE),
                Err(error) if transient(&error) => {}
                Err(source) => return Err(SocketError::Accept { address: self.address.clone(), source }),
            }
        }
    }

    /// Ends it: whoever waits in [`accept`](Self::accept) returns, new connections are refused, a unix socket's file is
    /// gone. May be called any number of times.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // Linux wakes a blocked accept with EINVAL, for TCP and unix sockets both; a later accept fails at once.
        let _ = shutdown(self.as_fd().as_raw_fd(), Shutdown::Both);
        drop(self.file.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    fn accept_once(&self) -> io::Result<Socket> {
        match &self.kind {
            Kind::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                Ok(Socket::new(OwnedFd::from(stream), format!("tcp:{peer}"), Family::Tcp))
            }
            Kind::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                Ok(Socket::new(OwnedFd::from(stream), self.address.to_string(), Family::Unix))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.kind {
            Kind::Tcp(listener) => listener.as_fd(),
            Kind::Unix(listener) => listener.as_fd(),
        }
    }
}

fn bind_tcp(host: &str, port: u16) -> io::Result<TcpListener> {
    if !host.is_empty() {
        return TcpListener::bind((host, port));
    }
    // Every interface: IPv6's wildcard takes IPv4 too, unless IPv6 is switched off.
    TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))
}

/// Removes the socket file of a listener that is gone.
fn clear_the_way(address: &Address, path: &Path) -> Result<(), SocketError> {
    let occupied = |reason| Err(SocketError::Occupied { address: address.clone(), reason });
    let Ok(there) = fs::symlink_metadata(path) else { return Ok(()) };
    if !there.file_type().is_socket() {
        return occupied("there is a file that is no socket; remove it or choose another path");
    }
    match UnixStream::connect(path) {
        Ok(_) => occupied("another process listens there already; choose another path"),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(SocketError::Listen { address: address.clone(), source })
            }
            _ => Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(SocketError::Listen { address: address.clone(), source }),
    }
}

/// The file of a unix socket, removed on drop unless somebody has put another in its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        // Absolute, because the process may change its directory before the end.
        let path = std::path::absolute(path)?;
        let identity = identity(&path)?;
        Ok(Self { path, identity })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

/// Errors of one connection in the queue, not of the listener (accept(2): "treat them like EAGAIN").
fn transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EINTR
                | libc::EAGAIN
                | libc::EPROTO
                | libc::EPERM
                | libc::ENETDOWN
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
        )
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};

    use super::*;

    fn closes_on_exec(fd: BorrowedFd<'_>) -> bool {
        FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).unwrap()).contains(FdFlag::FD_CLOEXEC)
    }

    #[test]
    fn a_listener_hands_out_connections() {
        let folder = tempfile::tempdir().unwrap();
        let unix = Address::Unix(folder.path().join("lane"));
        for address in ["tcp:127.0.0.1:0".parse().unwrap(), "tcp::0".parse().unwrap(), unix] {
            let listener = Listener::bind(&address).unwrap();
            let mut target = listener.address();
            if let Address::Tcp { host, port } = &mut target {
                assert_ne!(*port, 0);
                "127.0.0.1".clone_into(host);
            }
            let near = Socket::connect(&target, Duration::from_secs(5)).unwrap();
            let far = listener.accept().unwrap().unwrap();
            assert!(far.peer().starts_with(address.to_string().split(':').next().unwrap()));
            for fd in [near.as_fd(), far.as_fd(), listener.as_fd()] {
                assert!(closes_on_exec(fd));
            }
        }
    }

    #[test]
    fn closing_wakes_whoever_accepts() {
        let folder = tempfile::tempdir().unwrap();
        for address in ["tcp:127.0.0.1:0".parse().unwrap(), Address::Unix(folder.path().join("lane"))] {
            let listener = Arc::new(Listener::bind(&address).unwrap());
            let waiting = Arc::clone(&listener);
            let thread = thread::spawn(move || waiting.accept());
            listener.close();
            listener.close();
            assert!(thread.join().unwrap().unwrap().is_none());
            assert!(listener.accept().unwrap().is_none());
            assert!(Socket::connect(&listener.address(), Duration::from_secs(5)).is_err());
        }
    }

    #[test]
    fn what_waits_in_a_closed_queue_is_not_handed_out() {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::Unix(folder.path().join("lane"));
        let listener = Listener::bind(&address).unwrap();
        let _near = Socket::connect(&address, Duration::from_secs(5)).unwrap();
        listener.close();
        assert!(listener.accept().unwrap().is_none());
    }

    #[test]
    fn only_a_dead_socket_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lane");
        let address = Address::Unix(path.clone());
        // std's listener leaves its file behind, as a killed process does.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = Listener::bind(&address).unwrap();
        let error = Listener::bind(&address).unwrap_err();
        assert!(error.to_string().contains("another process listens"), "{error}");
        drop(listener);
        assert!(!path.exists(), "the file is removed in the end");

        fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&address).unwrap_err();
        assert!(error.to_string().contains("no socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_file_that_is_another_listeners_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lane");
        let address = Address::Unix(path.clone());
        let first = Listener::bind(&address).unwrap();
        fs::remove_file(&path).unwrap();
        let second = Listener::bind(&address).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn an_address_of_another_host_is_refused() {
        let error = Listener::bind(&"tcp:192.0.2.1:0".parse().unwrap()).unwrap_err();
        assert!(matches!(error, SocketError::Listen { .. }), "{error}");
    }
}
