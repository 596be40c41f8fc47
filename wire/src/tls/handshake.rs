//! The TLS handshake of a lane, on plain system calls: it happens once, before there is a ring.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{Error, ExtractedSecrets, SupportedCipherSuite};

use super::credentials::Config;
use super::explain::explain;
use super::exporter::ExporterSecret;
use super::keys::{Connection, Keys};
use super::record::{Opener, Sealer};
use super::{Credentials, Identity, Role, Tls, TlsError};
use crate::handshake::patient::{self, Deadline};
use crate::handshake::{HandshakeError, LINGER_LIMIT};
use crate::socket::Socket;

/// The most bytes of a handshake that are held at once, in each direction: chains of some ten certificates.
pub const HANDSHAKE_BUFFER: usize = 32 << 10;

/// The most bytes that the other side may send in a whole handshake.
const HANDSHAKE_LIMIT: usize = 128 << 10;

/// The most that is read and thrown away of a peer that is to read why it was refused.
const LINGER_BYTES: usize = 256 << 10;

const SESSION_LABEL: &[u8] = b"EXPORTER-switchover-session";
const REJOIN_LABEL: &[u8] = b"EXPORTER-switchover-rejoin";
const LANE_LABEL: &[u8] = b"EXPORTER-switchover-lane";

/// Source: makes the connection a TLS one with a destination whose certificate is for `name`.
///
/// # Errors
/// When the two do not come together, with why in a sentence.
pub fn connect(
    socket: &Socket,
    credentials: &Credentials,
    name: &str,
    deadline: &Deadline,
) -> Result<(), HandshakeError> {
    let failed = |reason: String| HandshakeError::Tls { peer: socket.peer().to_owned(), reason };
    let Config::Source(config) = &credentials.config else {
        return Err(failed("these are a destination's credentials".to_owned()));
    };
    let name = ServerName::try_from(name.to_owned()).map_err(|_| {
        failed(format!(
            "`{name}` is neither a host's name nor an address that a certificate could be for; see `tls-hostname`"
        ))
    })?;
    let exporter = ExporterSecret::default();
    let mut config = (**config).clone();
    config.key_log = Arc::new(exporter.clone());
    let connection =
        UnbufferedClientConnection::new(Arc::new(config), name).map_err(|error| failed(error.to_string()))?;
    Shaker {
        socket,
        deadline,
        role: Role::Source,
        incoming: Vec::new(),
        outgoing: Vec::new(),
        early: Vec::new(),
        total: 0,
    }
    .finish(connection, &exporter)
}

/// Destination: makes the connection a TLS one with a source that has a certificate of the CA.
///
/// # Errors
/// When the two do not come together, with why in a sentence. The source has been told, where it listens.
pub fn accept(socket: &Socket, credentials: &Credentials, deadline: &Deadline) -> Result<(), HandshakeError> {
    let failed = |reason: String| HandshakeError::Tls { peer: socket.peer().to_owned(), reason };
    let Config::Destination(config) = &credentials.config else {
        return Err(failed("these are a source's credentials".to_owned()));
    };
    let exporter = ExporterSecret::default();
    let mut config = (**config).clone();
    config.key_log = Arc::new(exporter.clone());
    let connection = UnbufferedServerConnection::new(Arc::new(config)).map_err(|error| failed(error.to_string()))?;
    Shaker {
        socket,
        deadline,
        role: Role::Destination,
        incoming: Vec::new(),
        outgoing: Vec::new(),
        early: Vec::new(),
        total: 0,
    }
    .finish(connection, &exporter)
}

/// A handshake under way.
struct Shaker<'a> {
    socket: &'a Socket,
    deadline: &'a Deadline,
    role: Role,
    /// Received and not processed; at most [`HANDSHAKE_BUFFER`].
    incoming: Vec<u8>,
    /// To be sent; at most [`HANDSHAKE_BUFFER`].
    outgoing: Vec<u8>,
    /// What a source says first, which comes right behind its last word of the handshake: bounded by `incoming`.
    early: Vec<u8>,
    /// Received in all.
    total: usize,
}

/// What a status of rustls calls for.
enum Step {
    Again,
    Send,
    Receive,
    Done,
    Closed,
    Failed(Error),
}

/// rustls's connection of either side, as far as a handshake needs it.
trait Shaking: Sized {
    fn step(&mut self, incoming: &mut [u8], outgoing: &mut Vec<u8>, early: &mut Vec<u8>) -> (usize, Step);
    fn suite(&self) -> Option<SupportedCipherSuite>;
    fn peer(&self) -> Option<Identity>;
    fn into_keys(self) -> Result<(ExtractedSecrets, Connection), Error>;
}

macro_rules! shaking {
    ($connection:ty, $side:path) => {
        impl Shaking for $connection {
            fn step(&mut self, incoming: &mut [u8], outgoing: &mut Vec<u8>, early: &mut Vec<u8>) -> (usize, Step) {
                let UnbufferedStatus { discard, state } = self.process_tls_records(incoming);
                (discard, step(state, outgoing, early))
            }

            fn suite(&self) -> Option<SupportedCipherSuite> {
                self.negotiated_cipher_suite()
            }

            fn peer(&self) -> Option<Identity> {
                self.peer_certificates().and_then(|chain| chain.first()).map(|certificate| Identity::of(certificate))
            }

            fn into_keys(self) -> Result<(ExtractedSecrets, Connection), Error> {
                self.dangerous_into_kernel_connection().map(|(secrets, connection)| (secrets, $side(connection)))
            }
        }
    };
}

shaking!(UnbufferedClientConnection, Connection::Source);
shaking!(UnbufferedServerConnection, Connection::Destination);

fn step<Data>(
    state: Result<ConnectionState<'_, '_, Data>, Error>,
    outgoing: &mut Vec<u8>,
    early: &mut Vec<u8>,
) -> Step {
    match state {
        Ok(ConnectionState::EncodeTlsData(mut data)) => match encode(outgoing, |space| data.encode(space)) {
            Ok(()) => Step::Again,
            Err(error) => Step::Failed(error),
        },
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Step::Send
        }
        Ok(ConnectionState::BlockedHandshake) => Step::Receive,
        Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Step::Closed,
        Ok(ConnectionState::ReadTraffic(mut data)) => {
            while let Some(record) = data.next_record() {
                match record {
                    Ok(record) => early.extend_from_slice(record.payload),
                    Err(error) => return Step::Failed(error),
                }
            }
            Step::Again
        }
        // Data before the handshake, which no side of ours allows.
        Ok(_) => Step::Failed(Error::General("application data came before its time".to_owned())),
        Err(error) => Step::Failed(error),
    }
}

/// Appends what `encode` writes, which says how much room it needs.
fn encode(
    outgoing: &mut Vec<u8>,
    mut encode: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
) -> Result<(), Error> {
    let start = outgoing.len();
    loop {
        match encode(&mut outgoing[start..]) {
            Ok(written) => {
                outgoing.truncate(start + written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(size)) if start + size.required_size <= HANDSHAKE_BUFFER => {
                outgoing.resize(start + size.required_size, 0);
            }
            Err(_) => return Err(Error::General("this side's certificates are too long for a handshake".to_owned())),
        }
    }
}

impl Shaker<'_> {
    fn finish<C: Shaking>(mut self, mut connection: C, exporter: &ExporterSecret) -> Result<(), HandshakeError> {
        self.shake(&mut connection)?;
        let tls = self.establish(connection, exporter).map_err(|error| self.failed(error.to_string()))?;
        let first = self.socket.secure(tls);
        first.then_some(()).ok_or_else(|| self.failed("it was made twice on one connection".to_owned()))
    }

    fn shake<C: Shaking>(&mut self, connection: &mut C) -> Result<(), HandshakeError> {
        self.socket.send_at_once().map_err(|error| self.failed(error.to_string()))?;
        loop {
            let (discard, step) = connection.step(&mut self.incoming, &mut self.outgoing, &mut self.early);
            self.incoming.drain(..discard.min(self.incoming.len()));
            match step {
                Step::Again => {}
                Step::Send => self.send()?,
                Step::Receive => self.receive()?,
                Step::Done => return self.send(),
                Step::Closed => return Err(HandshakeError::Closed { peer: self.socket.peer().to_owned() }),
                Step::Failed(error) => {
                    self.part(connection, &error);
                    return Err(self.failed(explain(&error, self.role)));
                }
            }
        }
    }

    fn failed(&self, reason: String) -> HandshakeError {
        HandshakeError::Tls { peer: self.socket.peer().to_owned(), reason }
    }

    /// Tells the other side why, and lets it read that: a connection that is closed with bytes unread takes back what it said.
    fn part<C: Shaking>(&mut self, connection: &mut C, error: &Error) {
        if matches!(error, Error::AlertReceived(_)) {
            return;
        }
        // rustls hands out the alert to whoever asks once more. Once: asked again, it would look at what follows what was wrong, of
        // which it takes for granted that nobody does (it panics on some).
        connection.step(&mut self.incoming, &mut self.outgoing, &mut self.early);
        if self.send().is_ok() {
            patient::linger(self.socket, LINGER_BYTES, &Deadline::after(LINGER_LIMIT));
        }
    }

    fn send(&mut self) -> Result<(), HandshakeError> {
        patient::send_all(self.socket, &self.outgoing, self.deadline)?;
        self.outgoing.clear();
        Ok(())
    }

    fn receive(&mut self) -> Result<(), HandshakeError> {
        let start = self.incoming.len();
        if start >= HANDSHAKE_BUFFER || self.total >= HANDSHAKE_LIMIT {
            return Err(self.failed("the other side's handshake is longer than any needs to be".to_owned()));
        }
        self.incoming.resize(HANDSHAKE_BUFFER, 0);
        let received = patient::receive_some(self.socket, &mut self.incoming[start..], self.deadline);
        self.incoming.truncate(start + received.as_ref().copied().unwrap_or(0));
        self.total += received?;
        Ok(())
    }

    /// What a lane needs, once the handshake is over.
    fn establish<C: Shaking>(&self, connection: C, exporter: &ExporterSecret) -> Result<Tls, TlsError> {
        let suite = connection.suite().ok_or(TlsError::Internal("the handshake chose no cipher"))?;
        let peer = connection.peer().ok_or(TlsError::Internal("the other side showed no certificate"))?;
        let export = |label| exporter.export(suite, label);
        let (session, rejoin, lane) = (export(SESSION_LABEL)?, export(REJOIN_LABEL)?, export(LANE_LABEL)?);
        let (secrets, connection) = connection.into_keys().map_err(TlsError::Protocol)?;
        let keys = Keys::new(connection)?;
        let update_wanted = Arc::new(AtomicBool::new(false));
        let sealer = Sealer::new(secrets.tx, &keys, &update_wanted)?;
        let opener = Opener::new(secrets.rx, &keys, &update_wanted, &self.early, &self.incoming)?;
        Ok(Tls::new(sealer, opener, peer, super::binding::LaneSecrets { session, rejoin, lane }, suite))
    }
}
