//! What a handshake's texts are wrapped in: magic (8 bytes), length (4, little-endian), CRC-32 (4), body.
//!
//! Plain system calls: a handshake happens once, before there is a ring.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};

use super::HandshakeError;
use crate::socket::Socket;

/// What a text of the handshake begins with. The first byte is in no text of another protocol, and the last ones change
/// where something on the way takes the stream for text. The two directions differ: a source that is connected to an echo
/// must not take its own words for an answer.
type Magic = [u8; 8];

/// What a source's text begins with.
pub const HELLO: Magic = *b"\x93SWOVR\r\n";

/// What a destination's begins with.
pub const ANSWER: Magic = *b"\x93SWOVA\r\n";

/// The longest body, in bytes. A description of 1000 MSRs and 200 CPUID leaves has less than 10 KiB.
pub const MAX_BODY: usize = 64 << 10;

const REST_OF_HEADER: usize = 8;

/// How much of a strange greeting is shown.
const SHOWN: usize = 48;

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

/// Sends `body` in its wrapping.
pub fn write(socket: &Socket, magic: Magic, body: &[u8], deadline: &Deadline) -> Result<(), HandshakeError> {
    let length = u32::try_from(body.len()).ok().filter(|_| body.len() <= MAX_BODY);
    let Some(length) = length else {
        return Err(HandshakeError::TooLong { peer: socket.peer().to_owned(), length: body.len() });
    };
    let bytes = [&magic, &length.to_le_bytes()[..], &crc32fast::hash(body).to_le_bytes(), body].concat();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        deadline.wait(socket, PollFlags::POLLOUT)?;
        match send(socket.as_fd().as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(count) => {
                socket.counters().add_sent(count as u64);
                rest = &rest[count..];
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // The other side may have said why before it closed: reading will tell.
            Err(Errno::EPIPE | Errno::ECONNRESET) => break,
            Err(errno) => return Err(failed(socket, errno)),
        }
    }
    Ok(())
}

/// Receives a body.
pub fn read(socket: &Socket, magic: Magic, deadline: &Deadline) -> Result<Vec<u8>, HandshakeError> {
    read_magic(socket, magic, deadline)?;
    let mut header = [0; REST_OF_HEADER];
    fill(socket, &mut header, deadline)?;
    let [l0, l1, l2, l3, c0, c1, c2, c3] = header;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > MAX_BODY {
        return Err(HandshakeError::TooLong { peer: socket.peer().to_owned(), length });
    }
    let mut body = vec![0; length];
    fill(socket, &mut body, deadline)?;
    if crc32fast::hash(&body) != u32::from_le_bytes([c0, c1, c2, c3]) {
        return Err(HandshakeError::Checksum { peer: socket.peer().to_owned() });
    }
    Ok(body)
}

/// The magic, compared as it comes: what speaks otherwise is not waited for.
fn read_magic(socket: &Socket, magic: Magic, deadline: &Deadline) -> Result<(), HandshakeError> {
    let mut seen = [0; SHOWN];
    let mut got = 0;
    while got < magic.len() {
        got += some(socket, &mut seen[got..magic.len()], deadline)?;
        if !magic.starts_with(&seen[..got]) {
            // What is there already makes the message clearer.
            got += recv(socket.as_fd().as_raw_fd(), &mut seen[got..], MsgFlags::MSG_DONTWAIT).unwrap_or(0);
            let first = seen[..got].escape_ascii().to_string();
            return Err(HandshakeError::NotSwitchover { peer: socket.peer().to_owned(), first });
        }
    }
    Ok(())
}

fn fill(socket: &Socket, buffer: &mut [u8], deadline: &Deadline) -> Result<(), HandshakeError> {
    let mut got = 0;
    while got < buffer.len() {
        got += some(socket, &mut buffer[got..], deadline)?;
    }
    Ok(())
}

/// At least one byte.
fn some(socket: &Socket, buffer: &mut [u8], deadline: &Deadline) -> Result<usize, HandshakeError> {
    loop {
        deadline.wait(socket, PollFlags::POLLIN)?;
        match recv(socket.as_fd().as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::ECONNRESET) => {
                return Err(HandshakeError::Closed { peer: socket.peer().to_owned() });
            }
            Ok(count) => {
                socket.counters().add_received(count as u64);
                return Ok(count);
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(failed(socket, errno)),
        }
    }
}

fn failed(socket: &Socket, errno: Errno) -> HandshakeError {
    HandshakeError::Io { peer: socket.peer().to_owned(), source: io::Error::from(errno) }
}
