//! Who may be at the other end of a lane, and whether anybody on the way may read along.

use switchover_wire::address::Address;
use switchover_wire::handshake::{HandshakeError, secure_as_destination, secure_as_source};
use switchover_wire::socket::Socket;
use switchover_wire::tls::Credentials;

/// What a side's lanes are protected by. The default is nothing, and so lanes within one host only.
#[derive(Clone, Debug, Default)]
pub struct Security {
    /// TLS on every lane, with certificates on both sides.
    pub tls: Option<TlsSettings>,
    /// Without TLS: lanes to and from other hosts nevertheless. Whoever is on the way reads the guest's memory, and may change it, and
    /// whoever reaches the destination's port may give it a guest.
    pub allow_plain: bool,
}

/// One side's certificates, and what it expects of the other's.
#[derive(Clone, Debug)]
pub struct TlsSettings {
    /// This side's.
    pub credentials: Credentials,
    /// Source: the name that the destination's certificate must be for; where there is none, the host of its address.
    pub name: Option<String>,
}

impl Security {
    /// Lanes as they are, to other hosts too.
    #[must_use]
    pub const fn plain() -> Self {
        Self { tls: None, allow_plain: true }
    }

    /// Makes a source's connection to `to` what it has to be before anything is said over it.
    ///
    /// # Errors
    /// When that does not come about.
    pub(crate) fn secure_source(&self, socket: &Socket, to: &Address) -> Result<(), HandshakeError> {
        match &self.tls {
            Some(tls) => {
                let host = match to {
                    Address::Tcp { host, .. } => host,
                    Address::Unix(_) => "localhost",
                };
                secure_as_source(socket, &tls.credentials, tls.name.as_deref().unwrap_or(host))
            }
            None if self.allow_plain || socket.is_within_host() => Ok(()),
            None => Err(HandshakeError::Plain { peer: socket.peer().to_owned() }),
        }
    }

    /// Makes a connection to a destination what it has to be before anything that comes over it is looked at.
    ///
    /// # Errors
    /// When that does not come about. The source has been told, where it listens.
    pub(crate) fn secure_destination(&self, socket: &Socket) -> Result<(), HandshakeError> {
        match &self.tls {
            Some(tls) => secure_as_destination(socket, &tls.credentials),
            None if self.allow_plain || socket.is_within_host() => Ok(()),
            None => Err(HandshakeError::Plain { peer: socket.peer().to_owned() }),
        }
    }

    /// Whether a destination may listen where others than this host can connect.
    pub(crate) const fn takes_others(&self) -> bool {
        self.tls.is_some() || self.allow_plain
    }
}
