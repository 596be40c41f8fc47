//! How a lane begins: the source says who it is and what it brings, the destination takes it or says why not.
//!
//! ```text
//!     source                                        destination
//!       | ---- magic, length, CRC-32, Hello ------------> |  read_hello
//!       | <--- magic, length, CRC-32, Challenge --------- |  Introduction::proven; not over TLS
//!       | ---- magic, length, CRC-32, response ---------> |  compare
//!       | <--- magic, length, CRC-32, Welcome | Refused - |  accept | refuse
//! ```
//!
//! Every lane of a session has its own handshake, so that a lane is known by what it says and not by the order in
//! which it arrives. The machine's description comes on the control lane, before the guest is touched.
//!
//! What was recorded of one connection opens no other: over TLS the records are of their own connection, and without it the
//! source answers a [challenge](Introduction::proven) that is new each time.
//!
//! Nothing is believed: the magic is compared byte by byte as it comes, lengths are bounded before memory is
//! allocated, and a side that says nothing, or one byte a second, is given up after [`TIME_LIMIT`].

mod challenge;
mod envelope;
pub(crate) mod patient;

use std::time::Duration;
use std::{fmt, io};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::challenge::Introduction;
use self::challenge::Nonce;
use self::patient::Deadline;
use crate::clock::HostClock;
use crate::description::MachineDescription;
use crate::socket::Socket;
use crate::tls::{self, Credentials, LaneProof};
use crate::types::{LaneId, LaneRole, SessionId};

/// The oldest protocol version that is spoken here.
///
/// 1 had no checksums in the headers of frames, 2 no challenge on lanes without TLS.
pub const VERSION_MIN: u16 = 3;

/// The newest protocol version that is spoken here.
pub const VERSION_MAX: u16 = 3;

/// How long a side waits for the other in each of this module's calls. Long for any network, short for a person.
pub const TIME_LIMIT: Duration = Duration::from_secs(5);

/// How long a side that refuses waits for the other to read why.
pub(crate) const LINGER_LIMIT: Duration = Duration::from_secs(1);

/// What a TLS handshake begins with.
const TLS_HANDSHAKE: u8 = 22;

/// A TLS alert in the clear, `handshake_failure`: what a source with TLS understands of a destination without.
const TLS_REFUSAL: [u8; 7] = [21, 3, 3, 0, 2, 2, 40];

/// The longest reason of a refusal, in bytes. Longer ones are cut.
pub const MAX_REASON: usize = 1024;

/// A boot id has 36 characters.
const MAX_BOOT_ID: usize = 64;

/// How many lanes a session has besides its control lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LaneCounts {
    /// Fault lanes, at least 1.
    pub fault: u8,
    /// Bulk lanes, at least 1.
    pub bulk: u8,
}

/// What a source says first on each lane.
///
/// On the wire a field is its place: the version range comes first in every version; new fields go to the end, and
/// what follows the last known field is ignored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest protocol version that the source speaks.
    pub version_min: u16,
    /// The newest.
    pub version_max: u16,
    /// The migration that the lane belongs to.
    pub session: SessionId,
    /// Which lane it is.
    pub lane: LaneId,
    /// All the lanes there will be.
    pub lanes: LaneCounts,
    /// The machine; on the control lane, and only there.
    pub description: Option<MachineDescription>,
    /// Whose clock the source's instants are of.
    pub clock: HostClock,
    /// One bit for each capability that this migration uses.
    pub capabilities: u64,
    /// On a TLS lane: the proof that it belongs to the session. On the wire it follows the rest, for those who know of it.
    #[serde(skip)]
    pub proof: Option<LaneProof>,
}

/// A destination's answer to a lane that it takes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// The protocol version to be spoken: [`Hello::common_version`].
    pub version: u16,
    /// Whose clock the destination's instants are of.
    pub clock: HostClock,
}

#[derive(Serialize, Deserialize)]
enum Answer {
    Welcome(Welcome),
    Refused {
        reason: String,
    },
    /// Before the other two, on a lane without TLS.
    Challenge {
        nonce: Nonce,
    },
}

/// A range of protocol versions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Versions {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

const OURS: Versions = Versions { min: VERSION_MIN, max: VERSION_MAX };

impl Versions {
    /// The newest version in both ranges.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (self.min <= newest && other.min <= newest).then_some(newest)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "version {}", self.min)
        } else {
            write!(f, "versions {} to {}", self.min, self.max)
        }
    }
}

impl Hello {
    /// The newest protocol version that both sides speak.
    #[must_use]
    pub fn common_version(&self) -> Option<u16> {
        self.versions().common(OURS)
    }

    fn versions(&self) -> Versions {
        Versions { min: self.version_min, max: self.version_max }
    }

    /// What a source of this version cannot have meant.
    fn check(&self) -> Result<(), String> {
        let Self { lane, lanes, .. } = self;
        let count = match lane.role {
            LaneRole::Control => 1,
            LaneRole::Fault => lanes.fault,
            LaneRole::Bulk => lanes.bulk,
        };
        if lanes.fault == 0 || lanes.bulk == 0 {
            return Err(format!("it announces {} fault and {} bulk lanes", lanes.fault, lanes.bulk));
        }
        if lane.index >= count {
            return Err(format!("it is {lane} of {count}"));
        }
        if self.clock.boot_id.len() > MAX_BOOT_ID {
            return Err(format!("its boot id has {} bytes", self.clock.boot_id.len()));
        }
        match (&self.description, lane.role) {
            (Some(description), LaneRole::Control) => description.check_bounds().map_err(|error| error.to_string()),
            (None, LaneRole::Control) => Err("the control lane brings no machine description".to_owned()),
            (Some(_), _) => Err(format!("{lane} brings a machine description, which only the control lane does")),
            (None, _) => Ok(()),
        }
    }
}

/// What can go wrong while a lane begins.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// The kernel reports an error of the connection.
    #[error("the handshake with {peer} failed: {source}")]
    Io {
        /// The other side.
        peer: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The other side is too slow, or silent.
    #[error("the handshake with {peer} was not finished within {limit:?}; is it a Switchover that listens there?")]
    Timeout {
        /// The other side.
        peer: String,
        /// The time it had.
        limit: Duration,
    },
    /// The other side closed the connection.
    #[error(
        "{peer} closed the connection during the handshake; its own messages say why (a destination takes one \
         source only)"
    )]
    Closed {
        /// The other side.
        peer: String,
    },
    /// The other side speaks something else.
    #[error("{peer} does not speak Switchover's protocol; it began with \"{first}\"")]
    NotSwitchover {
        /// The other side.
        peer: String,
        /// Its first bytes, those that do not print escaped.
        first: String,
    },
    /// The announced length is more than any handshake needs.
    #[error("{peer} announces a handshake of {length} bytes, where {} are allowed", envelope::MAX_BODY)]
    TooLong {
        /// The other side.
        peer: String,
        /// What was announced.
        length: usize,
    },
    /// The bytes were changed on the way.
    #[error("the handshake with {peer} was damaged on the way: its CRC-32 does not match")]
    Checksum {
        /// The other side.
        peer: String,
    },
    /// It cannot be understood, or contradicts itself.
    #[error("the handshake of {peer} makes no sense: {reason}")]
    Malformed {
        /// The other side.
        peer: String,
        /// What is wrong.
        reason: String,
    },
    /// The other side did not answer what it was asked on this connection.
    #[error(
        "{peer} gave a wrong answer to this connection's challenge; what it sends was said on another connection, and somebody \
         repeats it"
    )]
    Repeated {
        /// The other side.
        peer: String,
    },
    /// There is no randomness for a challenge.
    #[error("cannot challenge {peer}: {source}; is the kernel's random source there?")]
    NoChallenge {
        /// The other side.
        peer: String,
        /// The kernel's answer.
        source: getrandom::Error,
    },
    /// No version is spoken by both sides.
    #[error("{peer} speaks protocol {theirs}, this side {ours}; use releases that have one in common")]
    Version {
        /// The other side.
        peer: String,
        /// What it speaks.
        theirs: Versions,
        /// What is spoken here.
        ours: Versions,
    },
    /// TLS does not come about.
    #[error("no TLS with {peer}: {reason}")]
    Tls {
        /// The other side.
        peer: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A lane that others could read, which nobody has allowed.
    #[error(
        "lanes with {peer} would cross the network as they are, for everybody on the way to read and change; give both sides \
         credentials (`tls-creds`), or allow plain lanes on both (`--allow-plain`, `x-switchover-allow-plain`)"
    )]
    Plain {
        /// The other side.
        peer: String,
    },
    /// The destination says no.
    #[error("{peer} refused: {reason}")]
    Refused {
        /// The destination.
        peer: String,
        /// Why.
        reason: String,
    },
}

/// Source: makes the connection a TLS one, with a destination whose certificate is for `name`. Before [`greet`].
///
/// # Errors
/// When the two do not come together, with why, and what to do.
pub fn secure_as_source(socket: &Socket, credentials: &Credentials, name: &str) -> Result<(), HandshakeError> {
    tls::connect(socket, credentials, name, &Deadline::after(TIME_LIMIT))
}

/// Destination: makes the connection a TLS one, with a source that shows a certificate of the CA. Before [`read_hello`]. A source
/// without TLS is refused in its own language, and what is neither is not talked to.
///
/// # Errors
/// When the two do not come together, with why. The source has been told, where it listens.
pub fn secure_as_destination(socket: &Socket, credentials: &Credentials) -> Result<(), HandshakeError> {
    let deadline = Deadline::after(TIME_LIMIT);
    let failed = |reason: &str| HandshakeError::Tls { peer: socket.peer().to_owned(), reason: reason.to_owned() };
    match patient::look_ahead(socket, &deadline)? {
        TLS_HANDSHAKE => tls::accept(socket, credentials, &deadline),
        first if first == envelope::HELLO[0] => {
            let reason = "this destination takes TLS lanes only; give the source its credentials (`tls-creds`)";
            let _ = refuse(socket, reason);
            patient::linger(socket, envelope::MAX_BODY, &Deadline::after(LINGER_LIMIT));
            Err(failed("the source has no TLS; give it its credentials (`tls-creds`)"))
        }
        first => Err(failed(&format!("what comes begins with {first:#04x}, which is not TLS"))),
    }
}

/// Source: says `hello`, answers the challenge where there is one, and waits for the answer.
///
/// # Errors
/// When the destination refuses, is none, or does not answer in time.
pub fn greet(socket: &Socket, hello: &Hello) -> Result<Welcome, HandshakeError> {
    greet_within(socket, hello, TIME_LIMIT)
}

/// Destination: waits for what a source says first, and checks it for sense. Where the two have no version in
/// common, or it makes no sense, the source has been refused when this returns.
///
/// # Errors
/// When it is no source, or one that cannot be understood, or it does not speak in time.
pub fn read_hello(socket: &Socket) -> Result<Introduction, HandshakeError> {
    read_hello_within(socket, TIME_LIMIT)
}

/// Destination: takes the lane.
///
/// # Errors
/// When the answer cannot be sent.
pub fn accept(socket: &Socket, welcome: &Welcome) -> Result<(), HandshakeError> {
    answer(socket, &Answer::Welcome(welcome.clone()), &Deadline::after(TIME_LIMIT))
}

/// Destination: does not take the lane, because of `reason` (cut at [`MAX_REASON`]).
///
/// # Errors
/// When the answer cannot be sent.
pub fn refuse(socket: &Socket, reason: &str) -> Result<(), HandshakeError> {
    let reason = cut(reason, MAX_REASON).to_owned();
    answer(socket, &Answer::Refused { reason }, &Deadline::after(TIME_LIMIT))
}

fn greet_within(socket: &Socket, hello: &Hello, limit: Duration) -> Result<Welcome, HandshakeError> {
    let peer = || socket.peer().to_owned();
    let malformed = |reason: String| HandshakeError::Malformed { peer: peer(), reason };
    let deadline = Deadline::after(limit);
    let mut body = postcard::to_stdvec(hello).map_err(|error| malformed(error.to_string()))?;
    body.extend(postcard::to_stdvec(&hello.proof).map_err(|error| malformed(error.to_string()))?);
    envelope::write(socket, envelope::HELLO, &body, &deadline)?;
    let mut answer = envelope::read(socket, envelope::ANSWER, &deadline)?;
    if let Ok((Answer::Challenge { nonce }, _)) = postcard::take_from_bytes(&answer) {
        envelope::write(socket, envelope::RESPONSE, nonce.response(&body).as_bytes(), &deadline)?;
        answer = envelope::read(socket, envelope::ANSWER, &deadline)?;
    }
    match postcard::take_from_bytes(&answer) {
        Ok((Answer::Welcome(welcome), _)) => {
            let asked = hello.versions();
            if !(asked.min..=asked.max).contains(&welcome.version) {
                return Err(malformed(format!("it chose version {}, where {asked} was offered", welcome.version)));
            }
            if welcome.clock.boot_id.len() > MAX_BOOT_ID {
                return Err(malformed(format!("its boot id has {} bytes", welcome.clock.boot_id.len())));
            }
            Ok(welcome)
        }
        Ok((Answer::Refused { reason }, _)) => {
            let reason = tame(&reason);
            Err(HandshakeError::Refused { peer: peer(), reason })
        }
        Ok((Answer::Challenge { .. }, _)) => Err(malformed("it challenges this side twice".to_owned())),
        Err(error) => Err(malformed(error.to_string())),
    }
}

fn read_hello_within(socket: &Socket, limit: Duration) -> Result<Introduction, HandshakeError> {
    let peer = || socket.peer().to_owned();
    let deadline = Deadline::after(limit);
    if socket.tls().is_none() && patient::look_ahead(socket, &deadline)? == TLS_HANDSHAKE {
        let _ = patient::send_all(socket, &TLS_REFUSAL, &deadline);
        patient::linger(socket, envelope::MAX_BODY, &Deadline::after(LINGER_LIMIT));
        let reason = "it speaks TLS, and this destination has no credentials; give it some (`tls-creds`)".to_owned();
        return Err(HandshakeError::Tls { peer: peer(), reason });
    }
    let body = envelope::read(socket, envelope::HELLO, &deadline)?;
    let hello = understand(&body).map_err(|wrong| match wrong {
        Wrong::Version(theirs) => HandshakeError::Version { peer: peer(), theirs, ours: OURS },
        Wrong::Sense(reason) => HandshakeError::Malformed { peer: peer(), reason },
    });
    if let Err(error) = &hello {
        // It was a Switchover's, whole and undamaged, so its user shall read why. Seen from there:
        let reason = match error {
            HandshakeError::Version { theirs, ours, .. } => {
                format!(
                    "the destination speaks protocol {ours}, the source {theirs}; use releases that have one in common"
                )
            }
            HandshakeError::Malformed { reason, .. } => format!("the source's handshake makes no sense: {reason}"),
            other => other.to_string(),
        };
        // The error to report is the one found.
        let _ = refuse(socket, &reason);
    }
    hello.map(|hello| Introduction::new(hello, body))
}

enum Wrong {
    Version(Versions),
    Sense(String),
}

fn understand(body: &[u8]) -> Result<Hello, Wrong> {
    let sense = |error: postcard::Error| Wrong::Sense(error.to_string());
    // The rest may be laid out otherwise in a version that is not ours.
    let ((min, max), _) = postcard::take_from_bytes::<(u16, u16)>(body).map_err(sense)?;
    let theirs = Versions { min, max };
    if theirs.common(OURS).is_none() {
        return Err(Wrong::Version(theirs));
    }
    let (mut hello, rest) = postcard::take_from_bytes::<Hello>(body).map_err(sense)?;
    if !rest.is_empty() {
        hello.proof = postcard::take_from_bytes(rest).map_err(sense)?.0;
    }
    hello.check().map_err(Wrong::Sense)?;
    Ok(hello)
}

fn answer(socket: &Socket, answer: &Answer, deadline: &Deadline) -> Result<(), HandshakeError> {
    let body = postcard::to_stdvec(answer)
        .map_err(|error| HandshakeError::Malformed { peer: socket.peer().to_owned(), reason: error.to_string() })?;
    envelope::write(socket, envelope::ANSWER, &body, deadline)
}

/// A reason from outside, with what could move a terminal's cursor escaped, and no longer than [`MAX_REASON`] even so.
pub(crate) fn tame(reason: &str) -> String {
    let mut tamed = String::new();
    for character in reason.chars() {
        let escaped =
            if character.is_control() { character.escape_default().to_string() } else { character.to_string() };
        if tamed.len() + escaped.len() > MAX_REASON {
            break;
        }
        tamed.push_str(&escaped);
    }
    tamed
}

/// As much of the front as fits `limit` bytes without a character cut in two.
fn cut(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len())).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests;
