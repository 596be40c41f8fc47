//! Certificates for tests.
use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};

use super::*;

/// A CA and its certificates, in a folder that is removed in the end.
pub struct TestSet {
    pub folder: tempfile::TempDir,
    ca: Issuer<'static, KeyPair>,
}

impl TestSet {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).unwrap();
        fs::write(folder.path().join(CA_CERT), certificate.pem()).unwrap();
        let set = Self { folder, ca: Issuer::new(params, key) };
        set.server(1, |_| {});
        set.client(2, |_| {});
        set
    }

    pub fn server(&self, serial: u64, change: impl FnOnce(&mut CertificateParams)) {
        let purpose = ExtendedKeyUsagePurpose::ServerAuth;
        self.issue((SERVER_CERT, SERVER_KEY), purpose, serial, change);
    }

    pub fn client(&self, serial: u64, change: impl FnOnce(&mut CertificateParams)) {
        let purpose = ExtendedKeyUsagePurpose::ClientAuth;
        self.issue((CLIENT_CERT, CLIENT_KEY), purpose, serial, change);
    }

    fn issue(
        &self,
        (cert_name, key_name): (&str, &str),
        purpose: ExtendedKeyUsagePurpose,
        serial: u64,
        change: impl FnOnce(&mut CertificateParams),
    ) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![purpose];
        params.serial_number = Some(SerialNumber::from(serial));
        change(&mut params);
        let certificate = params.signed_by(&key, &self.ca).unwrap();
        fs::write(self.path().join(cert_name), certificate.pem()).unwrap();
        fs::write(self.path().join(key_name), key.serialize_pem()).unwrap();
    }

    pub fn revoke(&self, serial: u64) {
        self.revoke_until(serial, 2200);
    }

    /// By a list that is good until this year begins.
    pub fn revoke_until(&self, serial: u64, year: i32) {
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2023, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2023, 1, 1),
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.ca).unwrap();
        fs::write(self.path().join(CA_CRL), list.pem().unwrap()).unwrap();
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn good_source(&self) -> Credentials {
        Credentials::load(self.path(), Role::Source).unwrap()
    }

    pub fn good_destination(&self) -> Credentials {
        Credentials::load(self.path(), Role::Destination).unwrap()
    }
}
