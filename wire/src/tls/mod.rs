//! TLS 1.3 on a lane, with certificates on both sides.
//!
//! ```text
//!   credentials ──> handshake (rustls) ──> Tls: one for each connection, kept by its socket
//!   a folder's       certificates, name     ├── Sealer, Opener      records: a lane's bytes
//!   files                                   ├── Keys                the next keys, for updates
//!                                           └── exported secrets    which session a lane is of
//! ```
//!
//! rustls does the handshake and derives every key, through its unbuffered API. The records are sealed and opened by [`record`], at
//! the lanes' pace and in their buffers. Lanes use it by way of [`crate::ring::Stream`], or, where an event ring moves the bytes, by way of
//! the halves themselves.
//!
//! A connection that ends is an error to whoever reads from it, whether TLS ended it properly or somebody cut it: what was to come
//! is said by the messages inside.

mod binding;
mod credentials;
mod explain;
mod exporter;
mod handshake;
mod keys;
pub mod record;
#[cfg(test)]
pub(crate) mod test_set;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustls::{AlertDescription, SupportedCipherSuite};
use thiserror::Error;

use self::binding::LaneSecrets;
pub use self::binding::{LaneProof, SessionSecret};
pub use self::credentials::{
    CA_CERT, CA_CRL, CLIENT_CERT, CLIENT_KEY, Credentials, CredentialsError, SERVER_CERT, SERVER_KEY,
};
pub use self::handshake::HANDSHAKE_BUFFER;
pub(crate) use self::handshake::{accept, connect};
use self::record::{Opener, Sealer};
use crate::types::{LaneId, SessionId};

/// Which end of a migration a side is. The source is TLS's client, the destination its server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// It connects.
    Source,
    /// It listens.
    Destination,
}

/// What can go wrong on a lane after its handshake.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The other side has ended the connection properly, which is no success for that.
    #[error("the other side ended the TLS connection")]
    Closed,
    /// The other side has found something wrong.
    #[error("the other side ended the TLS connection with the alert `{}`; its own messages say why", explain::name_of(*.0))]
    Alert(AlertDescription),
    /// What came is not what the other side sent.
    #[error("a TLS record is wrong: {0}; somebody or something changes what is on the way")]
    Record(&'static str),
    /// An earlier record was wrong.
    #[error("an earlier TLS record was wrong")]
    Broken,
    /// The direction is used by somebody else.
    #[error("somebody else reads from this TLS connection")]
    Taken,
    /// rustls refuses.
    #[error("TLS failed: {0}")]
    Protocol(rustls::Error),
    /// Something that cannot be.
    #[error("TLS failed: {0}")]
    Internal(&'static str),
}

impl TlsError {
    /// In words, for a source whose first words were answered with this.
    pub(crate) fn explain(&self) -> String {
        match self {
            Self::Alert(alert) => explain::explain(&rustls::Error::AlertReceived(*alert), Role::Source),
            other => other.to_string(),
        }
    }
}

/// A certificate, by its hash.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity(blake3::Hash);

impl Identity {
    fn of(certificate: &[u8]) -> Self {
        Self(blake3::hash(certificate))
    }
}

/// A connection whose TLS handshake is over.
pub struct Tls {
    sealer: Mutex<Sealer>,
    /// Taken by whoever reads.
    opener: Mutex<Option<Box<Opener>>>,
    peer: Identity,
    secrets: LaneSecrets,
    suite: SupportedCipherSuite,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tls({})", self.cipher())
    }
}

impl Tls {
    fn new(sealer: Sealer, opener: Opener, peer: Identity, secrets: LaneSecrets, suite: SupportedCipherSuite) -> Self {
        Self { sealer: Mutex::new(sealer), opener: Mutex::new(Some(Box::new(opener))), peer, secrets, suite }
    }

    /// The cipher that was agreed on, by its name.
    #[must_use]
    pub fn cipher(&self) -> String {
        format!("{:?}", self.suite.suite())
    }

    /// The sending half. Who holds it while the records are on their way to the socket keeps them in order.
    pub fn sealer(&self) -> MutexGuard<'_, Sealer> {
        self.sealer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The receiving half, with what has been received and not been taken; until it is given back, nobody else reads.
    ///
    /// # Errors
    /// When somebody else has it.
    pub fn take_opener(&self) -> Result<Box<Opener>, TlsError> {
        self.opener.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or(TlsError::Taken)
    }

    /// Gives the receiving half back, for the next who reads.
    pub fn give_back(&self, opener: Box<Opener>) {
        *self.opener.lock().unwrap_or_else(PoisonError::into_inner) = Some(opener);
    }

    /// The secret of a session whose first control lane this is.
    #[must_use]
    pub const fn session_secret(&self) -> SessionSecret {
        SessionSecret::of_first(&self.secrets, self.peer)
    }

    /// The secret of a session that is joined again over this, its next control lane.
    #[must_use]
    pub const fn session_secret_again(&self, before: &SessionSecret) -> SessionSecret {
        before.joined_again(&self.secrets, self.peer)
    }

    /// Source: the proof that this is the lane of that session.
    #[must_use]
    pub fn prove(&self, secret: &SessionSecret, session: SessionId, lane: LaneId) -> LaneProof {
        secret.prove(session, lane, &self.secrets)
    }

    /// Destination: whether this is the lane of that session.
    ///
    /// # Errors
    /// When it is not, with what to tell the source.
    pub fn verify(
        &self,
        secret: &SessionSecret,
        proof: LaneProof,
        session: SessionId,
        lane: LaneId,
    ) -> Result<(), String> {
        secret.verify(proof, session, lane, &self.secrets, &self.peer)
    }
}
