//! Why a handshake failed, in a sentence that says what to do.

use rustls::{AlertDescription, CertificateError, Error, PeerIncompatible};

use super::Role;

/// In words, as seen by the side with this role.
pub fn explain(error: &Error, role: Role) -> String {
    let (peer, kind, own) = match role {
        Role::Source => ("the destination", "server", "client"),
        Role::Destination => ("the source", "client", "server"),
    };
    let own_files = format!(
        "its user reads why: is this side's {own}-cert.pem in date, of the CA that {peer} trusts, and not revoked"
    );
    match error {
        Error::InvalidCertificate(error) => certificate(error, peer, kind),
        Error::NoCertificatesPresented
        | Error::PeerIncompatible(PeerIncompatible::NoCertificateRequestSignatureSchemesInCommon) => {
            format!(
                "{peer} presents no certificate; it needs {kind}-cert.pem and {kind}-key.pem in its folder of credentials"
            )
        }
        Error::AlertReceived(alert) => match alert {
            // The latter where two CAs have the same name.
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                format!("{peer} does not trust the CA of this side's certificate; both sides need the same ca-cert.pem")
            }
            AlertDescription::CertificateExpired => {
                format!(
                    "{peer} says that this side's certificate has expired, or is not valid yet; renew {own}-cert.pem, or set the clocks"
                )
            }
            AlertDescription::CertificateRevoked => {
                format!("{peer} says that this side's certificate has been revoked; make a new {own}-cert.pem")
            }
            AlertDescription::HandshakeFailure => {
                format!(
                    "{peer} ended the handshake with the alert `handshake_failure`; has it credentials at all (`tls-creds`)?"
                )
            }
            AlertDescription::CertificateRequired => {
                format!(
                    "{peer} wants a certificate of this side; put {own}-cert.pem and {own}-key.pem into its folder of credentials"
                )
            }
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown => {
                let name = match role {
                    Role::Source => "",
                    Role::Destination => ", and is it made out for the name that the source looks for (`tls-hostname`)",
                };
                format!(
                    "{peer} does not take this side's certificate ({}); {own_files}, and a {own}'s{name}?",
                    name_of(*alert)
                )
            }
            alert => format!("{peer} ended the handshake with the alert `{}`; {own_files}?", name_of(*alert)),
        },
        Error::InvalidMessage(_) => format!("what {peer} sends is not TLS; do both sides have `tls-creds`?"),
        Error::PeerIncompatible(reason) => {
            format!("{peer} speaks TLS, but not so that both sides can: {reason:?}; TLS 1.3 is needed")
        }
        other => format!("the TLS handshake failed: {other}"),
    }
}

fn certificate(error: &CertificateError, peer: &str, kind: &str) -> String {
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => format!(
            "{peer}'s certificate is not of the CA that is trusted here; both sides need the same ca-cert.pem, and {kind}-cert.pem must \
             be signed by it"
        ),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            format!("{peer}'s certificate has expired; renew its {kind}-cert.pem, or set the clocks")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            format!("{peer}'s certificate is not valid yet; are the clocks right?")
        }
        CertificateError::Revoked => format!("{peer}'s certificate has been revoked; make it a new {kind}-cert.pem"),
        CertificateError::ExpiredRevocationList | CertificateError::ExpiredRevocationListContext { .. } => {
            "the revocation list has expired; put a new ca-crl.pem into this side's folder of credentials".to_owned()
        }
        CertificateError::UnknownRevocationStatus => {
            format!("no revocation list of ca-crl.pem is of the CA that signed {peer}'s certificate; add that CA's")
        }
        CertificateError::NotValidForNameContext { expected, presented } => format!(
            "{peer}'s certificate is not for {}, but for {}; connect to a name that it is made out for, or say which (`tls-hostname`)",
            expected.to_str(),
            if presented.is_empty() { "no name".to_owned() } else { presented.join(", ") }
        ),
        CertificateError::NotValidForName => {
            format!(
                "{peer}'s certificate is for another name; connect to a name that it is made out for, or say which (`tls-hostname`)"
            )
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            format!(
                "{peer}'s certificate is not made out for a TLS {kind}; were {kind}-cert.pem and the other one swapped?"
            )
        }
        other => format!("{peer}'s certificate is not taken: {other}"),
    }
}

/// An alert's name in RFC 8446.
pub fn name_of(alert: AlertDescription) -> String {
    let mut name = String::new();
    for character in format!("{alert:?}").chars() {
        if character.is_ascii_uppercase() && name.ends_with(|last: char| last.is_ascii_lowercase()) {
            name.push('_');
        }
        name.push(character.to_ascii_lowercase());
    }
    name
}
