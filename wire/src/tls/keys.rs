//! Where the keys of a lane come from: rustls, by way of what it makes for those who encrypt records themselves.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, SupportedCipherSuite};

use super::TlsError;

/// Derives a lane's next keys.
pub struct Keys {
    connection: Mutex<Connection>,
    limit: u64,
}

/// rustls's names for the two sides; here they are the source and the destination.
pub enum Connection {
    /// A source's.
    Source(KernelConnection<ClientConnectionData>),
    /// A destination's.
    Destination(KernelConnection<ServerConnectionData>),
}

type Secrets = (u64, ConnectionTrafficSecrets);

impl Keys {
    /// Of a connection whose handshake is over.
    pub fn new(connection: Connection) -> Result<Arc<Self>, TlsError> {
        let suite = match &connection {
            Connection::Source(connection) => connection.negotiated_cipher_suite(),
            Connection::Destination(connection) => connection.negotiated_cipher_suite(),
        };
        let limit = tls13(suite)?.common.confidentiality_limit;
        Ok(Arc::new(Self { connection: Mutex::new(connection), limit }))
    }

    /// How many records a key may protect.
    pub const fn limit(&self) -> u64 {
        self.limit
    }

    /// The key after the one that is sent with.
    pub fn next_to_send(&self) -> Result<Secrets, TlsError> {
        match &mut *self.connection.lock().unwrap_or_else(PoisonError::into_inner) {
            Connection::Source(connection) => connection.update_tx_secret(),
            Connection::Destination(connection) => connection.update_tx_secret(),
        }
        .map_err(TlsError::Protocol)
    }

    /// The key after the one that is received with.
    pub fn next_to_receive(&self) -> Result<Secrets, TlsError> {
        match &mut *self.connection.lock().unwrap_or_else(PoisonError::into_inner) {
            Connection::Source(connection) => connection.update_rx_secret(),
            Connection::Destination(connection) => connection.update_rx_secret(),
        }
        .map_err(TlsError::Protocol)
    }
}

/// The suite as one of TLS 1.3, which alone is compiled in.
pub fn tls13(suite: SupportedCipherSuite) -> Result<&'static rustls::Tls13CipherSuite, TlsError> {
    suite.tls13().ok_or(TlsError::Internal("a cipher of an older TLS was negotiated"))
}
