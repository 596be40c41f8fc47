//! Plain system calls with a deadline, for what happens before there is a ring.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};

use super::HandshakeError;
use crate::socket::Socket;

/// The end of one side's patience.
pub struct Deadline {
    end: Instant,
    limit: Duration,
}

impl Deadline {
    /// From now on.
    pub fn after(limit: Duration) -> Self {
        Self { end: Instant::now() + limit, limit }
    }

    /// Waits until the socket is ready for `events`.
    fn wait(&self, socket: &Socket, events: PollFlags) -> Result<(), HandshakeError> {
        loop {
            let left = self.end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(HandshakeError::Timeout { peer: socket.peer().to_owned(), limit: self.limit });
            }
            // Rounded up, so that the last millisecond is not spent spinning.
            let millis = left.as_millis().saturating_add(1);
            let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(socket.as_fd(), events)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(failed(socket, errno)),
            }
        }
    }
}

/// Sends all of `bytes`, or what the other side takes of it before it closes: it may have said why, and reading will tell.
pub fn send_all(socket: &Socket, bytes: &[u8], deadline: &Deadline) -> Result<(), HandshakeError> {
    let mut rest = bytes;
    while !rest.is_empty() {
        deadline.wait(socket, PollFlags::POLLOUT)?;
        match send(socket.as_fd().as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(count) => {
                socket.counters().add_sent(count as u64);
                rest = &rest[count..];
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(Errno::EPIPE | Errno::ECONNRESET) => break,
            Err(errno) => return Err(failed(socket, errno)),
        }
    }
    Ok(())
}

/// Receives at least one byte.
pub fn receive_some(socket: &Socket, buffer: &mut [u8], deadline: &Deadline) -> Result<usize, HandshakeError> {
    receive(socket, buffer, MsgFlags::empty(), deadline).inspect(|count| socket.counters().add_received(*count as u64))
}

/// The next byte, which stays where it is.
pub fn look_ahead(socket: &Socket, deadline: &Deadline) -> Result<u8, HandshakeError> {
    let mut byte = [0];
    receive(socket, &mut byte, MsgFlags::MSG_PEEK, deadline).map(|_| byte[0])
}

/// What is there already, as much as fits; nothing where that is nothing.
pub fn receive_at_once(socket: &Socket, buffer: &mut [u8]) -> usize {
    recv(socket.as_fd().as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT).unwrap_or(0)
}

/// The last words have been sent: waits until the other side has closed, so that it reads them, and throws away what it still
/// sends, up to `most` bytes. A connection that is closed with bytes unread takes back what it said last.
pub fn linger(socket: &Socket, most: usize, deadline: &Deadline) {
    socket.say_no_more();
    let mut buffer = [0; 4096];
    let mut discarded = 0;
    while discarded < most
        && let Ok(count) = receive_some(socket, &mut buffer, deadline)
    {
        discarded += count;
    }
}

fn receive(socket: &Socket, buffer: &mut [u8], how: MsgFlags, deadline: &Deadline) -> Result<usize, HandshakeError> {
    loop {
        deadline.wait(socket, PollFlags::POLLIN)?;
        match recv(socket.as_fd().as_raw_fd(), buffer, how | MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::ECONNRESET) => return Err(HandshakeError::Closed { peer: socket.peer().to_owned() }),
            Ok(count) => return Ok(count),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(failed(socket, errno)),
        }
    }
}

fn failed(socket: &Socket, errno: Errno) -> HandshakeError {
    HandshakeError::Io { peer: socket.peer().to_owned(), source: io::Error::from(errno) }
}
