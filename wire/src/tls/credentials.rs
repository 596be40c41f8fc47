//! A side's certificates and keys: a folder with the file names that QEMU and GnuTLS's tools use.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite};
use thiserror::Error;

use super::Role;

/// The CA that both sides' certificates must be of.
pub const CA_CERT: &str = "ca-cert.pem";
/// What it has revoked; need not be there.
pub const CA_CRL: &str = "ca-crl.pem";
/// The destination's certificate.
pub const SERVER_CERT: &str = "server-cert.pem";
/// Its key.
pub const SERVER_KEY: &str = "server-key.pem";
/// The source's certificate.
pub const CLIENT_CERT: &str = "client-cert.pem";
/// Its key.
pub const CLIENT_KEY: &str = "client-key.pem";

/// The largest file that is read: some thousand certificates.
const MAX_FILE: u64 = 4 << 20;

/// Why a folder of credentials cannot be used.
#[derive(Debug, Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}; a folder of credentials holds {CA_CERT}, and {needs}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What else its folder needs for this side.
        needs: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{} is no {what}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// What the files hold does not fit together.
    #[error("the credentials in {} cannot be used: {reason}", folder.display())]
    Unusable {
        /// The folder.
        folder: PathBuf,
        /// Why.
        reason: String,
    },
}

/// One side's certificate, key, and what it trusts, ready for handshakes. Read once: a file that changes later is not seen.
#[derive(Clone, Debug)]
pub struct Credentials {
    pub(super) config: Config,
}

/// rustls's configuration for a side.
#[derive(Clone, Debug)]
pub(super) enum Config {
    Source(Arc<ClientConfig>),
    Destination(Arc<ServerConfig>),
}

impl Credentials {
    /// Reads what `role` needs from `folder`.
    ///
    /// # Errors
    /// When a file is missing or is not what its name says, or they do not fit together.
    pub fn load(folder: &Path, role: Role) -> Result<Self, CredentialsError> {
        Self::load_with(folder, role, cipher_suites())
    }

    /// [`load`](Self::load) with these ciphers, the most wanted first.
    pub(super) fn load_with(
        folder: &Path,
        role: Role,
        cipher_suites: Vec<SupportedCipherSuite>,
    ) -> Result<Self, CredentialsError> {
        let unusable = |reason: String| CredentialsError::Unusable { folder: folder.to_owned(), reason };
        let folder_file = |name: &str| folder.join(name);
        let provider = Arc::new(CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() });
        let mut roots = RootCertStore::empty();
        let ca = folder_file(CA_CERT);
        for certificate in certificates(&ca, role)? {
            roots.add(certificate).map_err(|error| content(&ca, "CA certificate", &error.to_string()))?;
        }
        let roots = Arc::new(roots);
        let revoked = revocation_lists(&folder_file(CA_CRL), role)?;
        let (cert, key) = match role {
            Role::Source => (folder_file(CLIENT_CERT), folder_file(CLIENT_KEY)),
            Role::Destination => (folder_file(SERVER_CERT), folder_file(SERVER_KEY)),
        };
        let (chain, key) = (certificates(&cert, role)?, private_key(&key, role)?);
        let config = match role {
            Role::Source => {
                let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
                    .with_crls(revoked)
                    .only_check_end_entity_revocation()
                    .enforce_revocation_expiration()
                    .build()
                    .map_err(|error| unusable(error.to_string()))?;
                let mut config = ClientConfig::builder_with_provider(provider)
                    .with_protocol_versions(&[&rustls::version::TLS13])
                    .map_err(|error| unusable(error.to_string()))?
                    .with_webpki_verifier(verifier)
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| unusable(error.to_string()))?;
                config.resumption = Resumption::disabled();
                config.enable_secret_extraction = true;
                Config::Source(Arc::new(config))
            }
            Role::Destination => {
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
                    .with_crls(revoked)
                    .only_check_end_entity_revocation()
                    .enforce_revocation_expiration()
                    .build()
                    .map_err(|error| unusable(error.to_string()))?;
                let mut config = ServerConfig::builder_with_provider(provider)
                    .with_protocol_versions(&[&rustls::version::TLS13])
                    .map_err(|error| unusable(error.to_string()))?
                    .with_client_cert_verifier(verifier)
                    .with_single_cert(chain, key)
                    .map_err(|error| unusable(error.to_string()))?;
                // No resumption: each lane shows its certificate, and the record layer knows of no tickets.
                config.session_storage = Arc::new(NoServerSessionStorage {});
                config.send_tls13_tickets = 0;
                config.max_early_data_size = 0;
                config.ignore_client_order = true;
                config.enable_secret_extraction = true;
                Config::Destination(Arc::new(config))
            }
        };
        Ok(Self { config })
    }

    /// Whose they are.
    #[must_use]
    pub const fn role(&self) -> Role {
        match self.config {
            Config::Source(_) => Role::Source,
            Config::Destination(_) => Role::Destination,
        }
    }

    #[cfg(test)]
    pub(super) const fn source_config(&self) -> Option<&Arc<ClientConfig>> {
        match &self.config {
            Config::Source(config) => Some(config),
            Config::Destination(_) => None,
        }
    }

    #[cfg(test)]
    pub(super) const fn destination_config(&self) -> Option<&Arc<ServerConfig>> {
        match &self.config {
            Config::Source(_) => None,
            Config::Destination(config) => Some(config),
        }
    }
}

/// The ciphers of TLS 1.3, the most wanted first. Both sides have AES in hardware, or would not run guests.
fn cipher_suites() -> Vec<SupportedCipherSuite> {
    use rustls::crypto::aws_lc_rs::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    vec![TLS13_AES_256_GCM_SHA384, TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256]
}

fn content(path: &Path, what: &'static str, reason: &str) -> CredentialsError {
    CredentialsError::Content { path: path.to_owned(), what, reason: reason.to_owned() }
}

fn read(path: &Path, role: Role) -> Result<Vec<u8>, CredentialsError> {
    let needs = match role {
        Role::Source => "for a source client-cert.pem and client-key.pem",
        Role::Destination => "for a destination server-cert.pem and server-key.pem",
    };
    let failed = |source| CredentialsError::Read { path: path.to_owned(), needs, source };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > MAX_FILE {
        return Err(content(path, "certificate or key", &format!("it has {size} bytes")));
    }
    fs::read(path).map_err(failed)
}

fn certificates(path: &Path, role: Role) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    const WHAT: &str = "certificate in PEM";
    let text = read(path, role)?;
    let found: Result<Vec<_>, PemError> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|error| content(path, WHAT, &error.to_string()))?;
    if found.is_empty() { Err(content(path, WHAT, "there is none in it")) } else { Ok(found) }
}

fn private_key(path: &Path, role: Role) -> Result<PrivateKeyDer<'static>, CredentialsError> {
    PrivateKeyDer::from_pem_slice(&read(path, role)?)
        .map_err(|error| content(path, "private key in PEM", &error.to_string()))
}

fn revocation_lists(path: &Path, role: Role) -> Result<Vec<CertificateRevocationListDer<'static>>, CredentialsError> {
    const WHAT: &str = "revocation list in PEM";
    let text = match read(path, role) {
        Err(CredentialsError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let found: Result<Vec<_>, PemError> = CertificateRevocationListDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|error| content(path, WHAT, &error.to_string()))?;
    // A file that is there and says nothing would pass for a list that revokes nobody.
    if found.is_empty() { Err(content(path, WHAT, "there is none in it")) } else { Ok(found) }
}
