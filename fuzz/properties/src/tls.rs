use std::fs;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::thread;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use switchover_wire::handshake::{HandshakeError, secure_as_destination, secure_as_source};
use switchover_wire::socket::Socket;
use switchover_wire::tls::record::{MAX_PLAINTEXT, Sealed};
use switchover_wire::tls::{CA_CERT, CLIENT_CERT, CLIENT_KEY, Credentials, Role, SERVER_CERT, SERVER_KEY};

use crate::input::Input;

/// What is said for sure, before what is arbitrary.
const GENUINE: &[u8] = b"what was sealed by the other side";

/// A TLS connection. The first byte says what the others are: what a destination hears of a source's handshake, what a source hears of
/// a destination's, or what follows a genuine record once the handshake is over. Neither handshake ever succeeds by such bytes, and of
/// records only the genuine one is ever opened, however they are cut.
pub fn tls(bytes: &[u8]) {
    let mut input = Input(bytes);
    let [place, step] = input.number();
    match place % 3 {
        0 => assert!(secure_as_destination(&hears(&[22], input.0), &credentials().1).is_err()),
        1 => assert!(secure_as_source(&hears(&[], input.0), &credentials().0, "localhost").is_err()),
        _ => records(usize::from(step).max(1), input.0),
    }
}

/// A connection whose other side has said this, and is gone.
fn hears(front: &[u8], bytes: &[u8]) -> Socket {
    let (near, far) = Socket::pair().unwrap();
    let mut far = UnixStream::from(far.as_fd().try_clone_to_owned().unwrap());
    // As much as the socket takes: nobody reads meanwhile.
    far.set_nonblocking(true).unwrap();
    let _ = far.write(&[front, bytes].concat());
    near
}

fn records(step: usize, bytes: &[u8]) {
    let (near, far) = Socket::pair().unwrap();
    let there = thread::spawn(move || secure_as_destination(&far, &credentials().1).map(|()| far));
    let here = secure_as_source(&near, &credentials().0, "localhost");
    let there = there.join().unwrap();
    // On a host that gives this process no time, which is nobody's fault.
    if [here.as_ref().err(), there.as_ref().err()].into_iter().flatten().any(is_timeout) {
        return;
    }
    here.unwrap();
    let far = there.unwrap();
    let mut sealed = Sealed::with_room_for(GENUINE.len());
    near.tls().unwrap().sealer().seal(&mut sealed, GENUINE.len(), |room| room.copy_from_slice(GENUINE)).unwrap();
    let stream = [sealed.bytes(), bytes].concat();
    let mut opener = far.tls().unwrap().take_opener().unwrap();
    let mut opened = Vec::new();
    let mut rest = &stream[..];
    let mut broken = false;
    while !rest.is_empty() && !broken {
        let (space, needed) = opener.space(1);
        assert!(needed >= 1 && needed <= space.len() && space.len() > MAX_PLAINTEXT);
        let count = rest.len().min(step).min(space.len());
        space[..count].copy_from_slice(&rest[..count]);
        rest = &rest[count..];
        opener.received(count);
        loop {
            match opener.plaintext() {
                Ok([]) => break,
                Ok(plain) => {
                    opened.extend_from_slice(plain);
                    let count = plain.len();
                    opener.take(count);
                }
                Err(_) => {
                    broken = true;
                    assert!(opener.plaintext().is_err(), "nothing is opened after what was wrong");
                    break;
                }
            }
        }
    }
    assert!(opened.is_empty() || opened == GENUINE);
    assert_eq!(opened.is_empty(), stream.len() - rest.len() < sealed.bytes().len());
}

fn is_timeout(error: &HandshakeError) -> bool {
    matches!(error, HandshakeError::Timeout { .. })
}

/// A source's and a destination's, made once.
fn credentials() -> &'static (Credentials, Credentials) {
    static MADE: OnceLock<(Credentials, Credentials)> = OnceLock::new();
    MADE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        write(CA_CERT, params.self_signed(&key).unwrap().pem());
        let issuer = Issuer::new(params, key);
        for (cert, key_name, purpose) in [
            (CLIENT_CERT, CLIENT_KEY, ExtendedKeyUsagePurpose::ClientAuth),
            (SERVER_CERT, SERVER_KEY, ExtendedKeyUsagePurpose::ServerAuth),
        ] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
            params.extended_key_usages = vec![purpose];
            write(cert, params.signed_by(&key, &issuer).unwrap().pem());
            write(key_name, key.serialize_pem());
        }
        let load = |role| Credentials::load(folder.path(), role).unwrap();
        (load(Role::Source), load(Role::Destination))
    })
}
