//! Folders of credentials, right ones and wrong ones.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use switchover_tools::certs::{Authority, Issued, Wish};
use switchover_wire::tls::{CA_CERT, CA_CRL, CLIENT_CERT, CLIENT_KEY, Credentials, Role, SERVER_CERT, SERVER_KEY};

use crate::lab::Lab;

/// The number of the certificate that is revoked.
const REVOKED: u64 = 66;

/// What may be wrong with one side's certificate, or with what it trusts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    /// Another CA has signed it.
    OtherAuthority,
    /// It is for another name. A destination's only: nobody asks for a source's.
    OtherName,
    /// It has expired.
    Expired,
    /// The CA has revoked it, and the other side knows.
    Revoked,
    /// It is one for the other side.
    Swapped,
    /// The CA's certificate was replaced by another one: the side trusts nobody whom it should.
    OtherTrust,
}

/// All of them.
pub const FLAWS: [Flaw; 6] =
    [Flaw::OtherAuthority, Flaw::OtherName, Flaw::Expired, Flaw::Revoked, Flaw::Swapped, Flaw::OtherTrust];

impl Flaw {
    /// What the other side says of such a side with `role`, and what that itself says.
    #[must_use]
    pub const fn said(self, role: Role) -> (&'static str, &'static str) {
        match (self, role) {
            (Self::OtherAuthority, _) => {
                ("is not of the CA that is trusted here", "does not trust the CA of this side's certificate")
            }
            (Self::OtherTrust, _) => {
                ("does not trust the CA of this side's certificate", "is not of the CA that is trusted here")
            }
            (Self::OtherName, _) => ("certificate is not for 127.0.0.1", "does not take this side's certificate"),
            (Self::Expired, Role::Source) => {
                ("has expired; renew its client-cert.pem", "says that this side's certificate has expired")
            }
            (Self::Expired, Role::Destination) => {
                ("has expired; renew its server-cert.pem", "says that this side's certificate has expired")
            }
            (Self::Revoked, _) => {
                ("certificate has been revoked", "says that this side's certificate has been revoked")
            }
            (Self::Swapped, Role::Source) => ("not made out for a TLS client", "does not take this side's certificate"),
            (Self::Swapped, Role::Destination) => {
                ("not made out for a TLS server", "does not take this side's certificate")
            }
        }
    }
}

/// A CA, and folders of what it signs.
pub struct Folders<'a> {
    lab: &'a Lab,
    authority: Authority,
    stranger: Authority,
}

impl<'a> Folders<'a> {
    /// In the lab.
    ///
    /// # Panics
    /// When there is no CA to be made.
    #[must_use]
    pub fn new(lab: &'a Lab) -> Self {
        Self { lab, authority: Authority::new("the CA").unwrap(), stranger: Authority::new("another CA").unwrap() }
    }

    /// A folder in which all is right for both sides. It knows what is revoked.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn good(&self) -> PathBuf {
        self.write("good", None)
    }

    /// A folder in which the certificate of `role` has a flaw.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn flawed(&self, flaw: Flaw, role: Role) -> PathBuf {
        self.write(&format!("{flaw:?}-{role:?}"), Some((flaw, role)))
    }

    fn write(&self, name: &str, wrong: Option<(Flaw, Role)>) -> PathBuf {
        let folder = self.lab.path(name);
        fs::create_dir_all(&folder).unwrap();
        let write = |name, text: &str| fs::write(folder.join(name), text).unwrap();
        let trusts_another = wrong.is_some_and(|(flaw, _)| flaw == Flaw::OtherTrust);
        write(CA_CERT, if trusts_another { self.stranger.certificate() } else { self.authority.certificate() });
        write(CA_CRL, &self.authority.revoke(&[REVOKED]).unwrap());
        for (role, cert, key) in [(Role::Source, CLIENT_CERT, CLIENT_KEY), (Role::Destination, SERVER_CERT, SERVER_KEY)]
        {
            let flaw = wrong.and_then(|(flaw, whose)| (whose == role).then_some(flaw));
            let Issued { certificate, key: secret } = self.issue(role, flaw);
            write(cert, &certificate);
            write(key, &secret);
        }
        folder
    }

    fn issue(&self, role: Role, flaw: Option<Flaw>) -> Issued {
        let name = if flaw == Some(Flaw::OtherName) { "elsewhere.example" } else { "127.0.0.1" };
        let past = |days: u64| SystemTime::now() - Duration::from_secs(days * 24 * 3600);
        let other = match role {
            Role::Source => Role::Destination,
            Role::Destination => Role::Source,
        };
        let wish = Wish {
            role: if flaw == Some(Flaw::Swapped) { other } else { role },
            names: &[name.to_owned()],
            serial: (flaw == Some(Flaw::Revoked)).then_some(REVOKED),
            validity: (flaw == Some(Flaw::Expired)).then(|| (past(30), past(1))),
        };
        let authority = if flaw == Some(Flaw::OtherAuthority) { &self.stranger } else { &self.authority };
        authority.issue(&wish).unwrap()
    }
}

/// A source's credentials.
///
/// # Panics
/// When they cannot be loaded.
#[must_use]
pub fn of_source(folder: &std::path::Path) -> Credentials {
    Credentials::load(folder, Role::Source).unwrap()
}
