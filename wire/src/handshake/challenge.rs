//! That a source speaks now, and is no recording.
//!
//! On a lane without TLS whatever crosses can be recorded by those on the way, and sent again on a connection of their own. So a
//! destination takes nothing that it is told before the source has answered a number that was never used before: with a hash of what
//! it said first, keyed by that number. A recording has the answer to another one.
//!
//! That is all that it shows. There is no secret in it: whoever can read and follow the protocol can answer too, and against those
//! nothing but TLS helps. There the lane's keys are of its own connection already, and nobody is asked.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::envelope;
use super::patient::Deadline;
use super::{Answer, HandshakeError, Hello, TIME_LIMIT, answer, refuse};
use crate::socket::Socket;

/// A number that is used once.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nonce([u8; 32]);

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nonce(…)")
    }
}

impl Nonce {
    fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// What a source that has said `hello`, as it went over the wire, responds.
    pub fn response(&self, hello: &[u8]) -> blake3::Hash {
        blake3::keyed_hash(&self.0, hello)
    }
}

/// What somebody has said first on a connection. It makes sense, but may be a recording until it is [proven](Self::proven).
#[derive(Debug)]
pub struct Introduction {
    hello: Hello,
    /// As it came.
    body: Vec<u8>,
}

impl Introduction {
    pub(super) fn new(hello: Hello, body: Vec<u8>) -> Self {
        Self { hello, body }
    }

    /// What was said, by whomever.
    #[must_use]
    pub const fn unproven(&self) -> &Hello {
        &self.hello
    }

    /// Has the source show that it speaks on this connection, where that is not certain already, and returns what it has said. A
    /// recording has been refused when this returns.
    ///
    /// # Errors
    /// When it does not show that, or not in time.
    pub fn proven(self, socket: &Socket) -> Result<Hello, HandshakeError> {
        if socket.tls().is_some() {
            return Ok(self.hello);
        }
        self.proven_by(socket, &Deadline::after(TIME_LIMIT))
    }

    pub(super) fn proven_by(self, socket: &Socket, deadline: &Deadline) -> Result<Hello, HandshakeError> {
        let peer = || socket.peer().to_owned();
        let nonce = Nonce::random().map_err(|source| HandshakeError::NoChallenge { peer: peer(), source })?;
        answer(socket, &Answer::Challenge { nonce }, deadline)?;
        let response = envelope::read(socket, envelope::RESPONSE, deadline)?;
        let due = nonce.response(&self.body);
        // In constant time, as blake3 compares.
        if <[u8; 32]>::try_from(&response[..]).is_ok_and(|response| due == blake3::Hash::from_bytes(response)) {
            return Ok(self.hello);
        }
        // The error to report is the one found.
        let _ = refuse(socket, "the answer to this connection's challenge is wrong: it was said on another one");
        Err(HandshakeError::Repeated { peer: peer() })
    }
}
