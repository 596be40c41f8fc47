//! What a handshake's texts are wrapped in: magic (8 bytes), length (4, little-endian), CRC-32 (4), body. On a TLS connection, in
//! its records.

use super::HandshakeError;
use super::patient::{self, Deadline};
use crate::socket::Socket;
use crate::tls::record::{MAX_PLAINTEXT, Sealed};
use crate::tls::{Tls, TlsError};

/// What a text of the handshake begins with. The first byte is in no text of another protocol, and the last ones change
/// where something on the way takes the stream for text. The two directions differ: a source that is connected to an echo
/// must not take its own words for an answer.
type Magic = [u8; 8];

/// What a source's text begins with.
pub const HELLO: Magic = *b"\x93SWOVR\r\n";

/// What a destination's begins with.
pub const ANSWER: Magic = *b"\x93SWOVA\r\n";

/// What a source's answer to a challenge begins with.
pub const RESPONSE: Magic = *b"\x93SWOVC\r\n";

/// The longest body, in bytes. A description of 1000 MSRs and 200 CPUID leaves has less than 10 KiB.
pub const MAX_BODY: usize = 64 << 10;

const REST_OF_HEADER: usize = 8;

/// How much of a strange greeting is shown.
const SHOWN: usize = 48;

/// Sends `body` in its wrapping.
pub fn write(socket: &Socket, magic: Magic, body: &[u8], deadline: &Deadline) -> Result<(), HandshakeError> {
    let length = u32::try_from(body.len()).ok().filter(|_| body.len() <= MAX_BODY);
    let Some(length) = length else {
        return Err(HandshakeError::TooLong { peer: socket.peer().to_owned(), length: body.len() });
    };
    let bytes = [&magic, &length.to_le_bytes()[..], &crc32fast::hash(body).to_le_bytes(), body].concat();
    let Some(tls) = socket.tls() else { return patient::send_all(socket, &bytes, deadline) };
    let mut sealed = Sealed::with_room_for(bytes.len());
    // Held until it is sent: records go in the order in which they were sealed.
    let mut sealer = tls.sealer();
    for piece in bytes.chunks(MAX_PLAINTEXT) {
        let filled = sealer.seal(&mut sealed, piece.len(), |room| room.copy_from_slice(piece));
        filled.map_err(|error| broken(socket, &error))?;
    }
    patient::send_all(socket, sealed.bytes(), deadline)
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
            if socket.tls().is_none() {
                got += patient::receive_at_once(socket, &mut seen[got..]);
            }
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
    match socket.tls() {
        None => patient::receive_some(socket, buffer, deadline),
        Some(tls) => some_of_records(socket, tls, buffer, deadline),
    }
}

fn some_of_records(
    socket: &Socket,
    tls: &Tls,
    buffer: &mut [u8],
    deadline: &Deadline,
) -> Result<usize, HandshakeError> {
    let mut opener = tls.take_opener().map_err(|error| broken(socket, &error))?;
    let result = loop {
        match opener.plaintext() {
            Ok([]) => {
                let (space, _) = opener.space(buffer.len());
                match patient::receive_some(socket, space, deadline) {
                    Ok(count) => opener.received(count),
                    Err(error) => break Err(error),
                }
            }
            Ok(plain) => {
                let count = plain.len().min(buffer.len());
                buffer[..count].copy_from_slice(&plain[..count]);
                opener.take(count);
                break Ok(count);
            }
            Err(TlsError::Closed) => break Err(HandshakeError::Closed { peer: socket.peer().to_owned() }),
            Err(error) => break Err(broken(socket, &error)),
        }
    };
    tls.give_back(opener);
    result
}

/// A side that does not take the other's certificate says so in an alert, which may come only after the other's handshake is over.
fn broken(socket: &Socket, error: &TlsError) -> HandshakeError {
    HandshakeError::Tls { peer: socket.peer().to_owned(), reason: error.explain() }
}
