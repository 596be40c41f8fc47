//! `switchover certs`: a CA and a certificate for each side, to try TLS with.
//!
//! Whoever has a PKI uses that. Here the CA's key is never written: what it has signed is all that it ever signs.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use switchover_wire::tls::{CA_CERT, CLIENT_CERT, CLIENT_KEY, Role, SERVER_CERT, SERVER_KEY};

use crate::failure::Failure;

/// A test set is not meant to last.
const VALID_FOR: Duration = Duration::from_secs(365 * 24 * 3600);
/// The other side's clock may be behind.
const VALID_BEFORE: Duration = Duration::from_secs(24 * 3600);

/// Where a destination is reached by those who try it on one host.
const DEFAULT_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// What `switchover certs` takes.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct CertsArgs {
    /// Folder for the files; made where it is missing. Nothing in it is overwritten
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// A name or address by which sources reach the destination; may be given several times [default: localhost, 127.0.0.1
    /// and ::1]
    #[arg(long, value_name = "HOST")]
    name: Vec<String>,
}

const EXAMPLES: &str = "\
Files, by the names that QEMU and GnuTLS's tools use; private keys can be read by their owner only:
  ca-cert.pem                        the CA that both sides trust
  server-cert.pem, server-key.pem    for destinations, which are TLS's servers
  client-cert.pem, client-key.pem    for sources, which are its clients

The CA's private key is not kept, so there is no further certificate of it: for another name, make a new set for all hosts. \
A folder of credentials may also hold ca-crl.pem, a revocation list.

Examples:
  To try it on one host:
    switchover certs --out creds
    switchover run --incoming tcp:127.0.0.1:4444 --tls-creds creds --qmp unix:/tmp/destination.qmp
    switchover migrate --qmp unix:/tmp/source.qmp --to tcp:127.0.0.1:4444 --tls-creds creds
  Between two hosts; copy what each needs, and no key that it does not need:
    switchover certs --out creds --name b.example --name 10.0.0.2

Exit status: 0 when all files are written, 1 when not, 2 for bad usage.";

/// Makes the set.
///
/// # Errors
/// When a name is none, or a file is there already or cannot be written.
pub fn main(args: &CertsArgs) -> Result<(), Failure> {
    let names = if args.name.is_empty() { DEFAULT_NAMES.map(str::to_owned).to_vec() } else { args.name.clone() };
    write_set(&args.out, &names)?;
    let shown = format!("wrote a CA, and certificates for {}, into {}\n", names.join(", "), args.out.display());
    let _ = io::stdout().lock().write_all(shown.as_bytes());
    Ok(())
}

/// Writes a set for destinations of these names into `folder`.
///
/// # Errors
/// When a name is none, or a file is there already or cannot be written.
pub fn write_set(folder: &Path, names: &[String]) -> Result<(), Failure> {
    let cannot = |error: rcgen::Error| {
        Failure::failed(format_args!("cannot make certificates for {}: {error}", names.join(", ")))
    };
    let authority = Authority::new("Switchover test CA").map_err(cannot)?;
    let wish = |role| Wish { role, names, serial: None, validity: None };
    let server = authority.issue(&wish(Role::Destination)).map_err(cannot)?;
    let client = authority.issue(&wish(Role::Source)).map_err(cannot)?;
    let failed = |path: &Path, error: &io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::AlreadyExists => "nothing is overwritten; choose another folder, or remove what is in it",
            _ => "can that folder be written?",
        };
        Failure::failed(format_args!("cannot write {}: {error}; {hint}", path.display()))
    };
    fs::create_dir_all(folder).map_err(|error| failed(folder, &error))?;
    let files = [
        (CA_CERT, authority.certificate(), PUBLIC),
        (SERVER_CERT, &server.certificate, PUBLIC),
        (SERVER_KEY, &server.key, PRIVATE),
        (CLIENT_CERT, &client.certificate, PUBLIC),
        (CLIENT_KEY, &client.key, PRIVATE),
    ];
    // Before any is written: half a set would be in the way of the next.
    if let Some((name, ..)) = files.iter().find(|(name, ..)| folder.join(name).exists()) {
        return Err(failed(&folder.join(name), &io::ErrorKind::AlreadyExists.into()));
    }
    for (name, text, mode) in files {
        let path = folder.join(name);
        write_new(&path, text, mode).map_err(|error| failed(&path, &error))?;
    }
    Ok(())
}

const PUBLIC: u32 = 0o644;
const PRIVATE: u32 = 0o600;

fn write_new(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?.write_all(text.as_bytes())
}

/// A CA.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

/// What a certificate is to say.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// Whose it is.
    pub role: Role,
    /// The names that it is for.
    pub names: &'a [String],
    /// Its number, to be revoked by; a random one where there is none.
    pub serial: Option<u64>,
    /// From when to when; a year from yesterday where nothing is said.
    pub validity: Option<(SystemTime, SystemTime)>,
}

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub struct Issued {
    /// For everybody.
    pub certificate: String,
    /// For its owner.
    pub key: String,
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn new(name: &str) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, None);
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { certificate, issuer: Issuer::new(params, key) })
    }

    /// Its certificate, in PEM.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// A certificate that it signs.
    ///
    /// # Errors
    /// When a name is none.
    pub fn issue(&self, wish: &Wish<'_>) -> Result<Issued, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(wish.names)?;
        let (purpose, common_name) = match wish.role {
            Role::Source => (ExtendedKeyUsagePurpose::ClientAuth, "Switchover source"),
            Role::Destination => (ExtendedKeyUsagePurpose::ServerAuth, "Switchover destination"),
        };
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        params.serial_number = wish.serial.map(SerialNumber::from);
        set_validity(&mut params, wish.validity);
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued { certificate, key: key.serialize_pem() })
    }

    /// A list that revokes the certificates of these numbers, in PEM. It is valid for a year.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn revoke(&self, serials: &[u64]) -> Result<String, rcgen::Error> {
        let now = SystemTime::now();
        let since = (now - VALID_BEFORE).into();
        let revoked = serials.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: since,
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: since,
            next_update: (now + VALID_FOR).into(),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer)?.pem()
    }
}

fn set_validity(params: &mut CertificateParams, validity: Option<(SystemTime, SystemTime)>) {
    let now = SystemTime::now();
    let (from, to) = validity.unwrap_or((now - VALID_BEFORE, now + VALID_FOR));
    (params.not_before, params.not_after) = (from.into(), to.into());
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use switchover_wire::tls::Credentials;

    use super::*;

    #[test]
    fn a_set_can_be_used_by_both_sides_and_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("new/creds");
        let args = CertsArgs { out: out.clone(), name: vec!["b.example".to_owned(), "10.0.0.2".to_owned()] };
        main(&args).unwrap();
        for role in [Role::Source, Role::Destination] {
            Credentials::load(&out, role).unwrap();
        }
        let mode = |name| fs::metadata(out.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!([SERVER_KEY, CLIENT_KEY].map(mode), [0o600; 2]);
        let before = fs::read(out.join(SERVER_KEY)).unwrap();
        fs::remove_file(out.join(CA_CERT)).unwrap();
        let refused = main(&args).unwrap_err();
        assert!(refused.sentence.contains("nothing is overwritten"), "{}", refused.sentence);
        assert_eq!(fs::read(out.join(SERVER_KEY)).unwrap(), before);
        assert!(!out.join(CA_CERT).exists(), "half a set");
    }
}
