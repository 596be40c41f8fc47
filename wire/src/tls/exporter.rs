//! The exporter of a TLS 1.3 connection (RFC 8446, section 7.5): secrets that the two ends of one connection know, and nobody else.
//!
//! rustls's unbuffered connections have none of their own. They do tell the secret that it is derived from, to a key log: here that
//! is a place in memory, one for each connection, that hears of nothing else.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::crypto::tls13::OkmBlock;
use rustls::{KeyLog, SupportedCipherSuite};

use super::TlsError;
use super::keys::tls13;

/// The name by which key logs know the secret.
const EXPORTER_SECRET: &str = "EXPORTER_SECRET";

/// What is exported.
pub type Exported = [u8; 32];

/// Keeps the exporter's secret of one connection.
#[derive(Clone, Default)]
pub struct ExporterSecret(Arc<Mutex<Option<OkmBlock>>>);

impl fmt::Debug for ExporterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExporterSecret(…)")
    }
}

impl KeyLog for ExporterSecret {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        if label == EXPORTER_SECRET {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(OkmBlock::new(secret));
        }
    }

    fn will_log(&self, label: &str) -> bool {
        label == EXPORTER_SECRET
    }
}

impl ExporterSecret {
    /// Exports 32 bytes under `label`, for an empty context.
    ///
    /// # Errors
    /// When the handshake has not come so far.
    pub fn export(&self, suite: SupportedCipherSuite, label: &[u8]) -> Result<Exported, TlsError> {
        let suite = tls13(suite)?;
        let secret = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let secret = secret.as_ref().ok_or(TlsError::Internal("the handshake made no exporter"))?;
        let nothing = suite.common.hash_provider.hash(&[]);
        let expander = suite.hkdf_provider.expander_for_okm(secret);
        let length = u16::try_from(expander.hash_len()).unwrap_or(u16::MAX);
        let derived = expander.expand_block(&label_info(length, label, nothing.as_ref()).parts());
        let mut exported = [0; 32];
        let expander = suite.hkdf_provider.expander_for_okm(&derived);
        expander
            .expand_slice(&label_info(32, b"exporter", nothing.as_ref()).parts(), &mut exported)
            .map_err(|_| TlsError::Internal("the exporter is too short"))?;
        Ok(exported)
    }
}

/// `HkdfLabel` of RFC 8446, section 7.1.
struct LabelInfo<'a> {
    length: [u8; 2],
    label_length: [u8; 1],
    label: &'a [u8],
    context_length: [u8; 1],
    context: &'a [u8],
}

const PREFIX: &[u8] = b"tls13 ";

fn label_info<'a>(length: u16, label: &'a [u8], context: &'a [u8]) -> LabelInfo<'a> {
    // Labels are constants of this crate, and a context is a hash: both are short.
    let one_byte = |length: usize| [u8::try_from(length).unwrap_or(u8::MAX)];
    LabelInfo {
        length: length.to_be_bytes(),
        label_length: one_byte(PREFIX.len() + label.len()),
        label,
        context_length: one_byte(context.len()),
        context,
    }
}

impl LabelInfo<'_> {
    fn parts(&self) -> [&[u8]; 6] {
        [&self.length, &self.label_length, PREFIX, self.label, &self.context_length, self.context]
    }
}

#[cfg(test)]
mod tests {
    use rustls::{ClientConnection, ServerConnection};

    use super::*;
    use crate::tls::test_set::TestSet;

    #[test]
    fn it_exports_what_rustls_would() {
        let set = TestSet::new();
        let (source, destination) = (set.good_source(), set.good_destination());
        let secret = ExporterSecret::default();
        let mut config = (**source.source_config().unwrap()).clone();
        config.key_log = Arc::new(secret.clone());
        let name = "localhost".try_into().unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut server = ServerConnection::new(Arc::clone(destination.destination_config().unwrap())).unwrap();
        let mut bytes = Vec::new();
        while client.is_handshaking() || server.is_handshaking() {
            bytes.clear();
            client.write_tls(&mut bytes).unwrap();
            server.read_tls(&mut &bytes[..]).unwrap();
            server.process_new_packets().unwrap();
            bytes.clear();
            server.write_tls(&mut bytes).unwrap();
            client.read_tls(&mut &bytes[..]).unwrap();
            client.process_new_packets().unwrap();
        }
        let label = b"EXPORTER-switchover-test";
        let theirs = server.export_keying_material([0; 32], label, None).unwrap();
        let suite = client.negotiated_cipher_suite().unwrap();
        assert_eq!(secret.export(suite, label).unwrap(), theirs);
        assert_ne!(secret.export(suite, b"EXPORTER-switchover-other").unwrap(), theirs);
        assert!(!format!("{secret:?}").contains(char::is_numeric));
    }
}
