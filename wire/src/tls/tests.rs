use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use nix::sys::socket::{MsgFlags, recv, send};
use proptest::prelude::*;
use rcgen::{CertificateParams, date_time_ymd};
use rustls::{CipherSuiteCommon, Tls13CipherSuite};

use super::record::{MAX_PLAINTEXT, OVERHEAD, Sealed};
use super::test_set::TestSet;
use super::*;
use crate::handshake::{HandshakeError, secure_as_destination, secure_as_source};
use crate::ring::{RingError, Stream};
use crate::socket::Socket;

type Outcome = Result<(), HandshakeError>;

/// Both ends of a connection, after what each makes of the handshake.
fn shake(
    source: &Credentials,
    destination: &Credentials,
    name: &str,
) -> ((Arc<Socket>, Outcome), (Arc<Socket>, Outcome)) {
    let (near, far) = Socket::pair().unwrap();
    let credentials = destination.clone();
    let there = thread::spawn(move || {
        let outcome = secure_as_destination(&far, &credentials);
        // What a destination refuses is closed.
        if outcome.is_err() {
            far.shutdown();
        }
        (Arc::new(far), outcome)
    });
    let mut outcome = secure_as_source(&near, source, name);
    // A destination has the last word, and says it to whoever reads.
    if outcome.is_ok() {
        let mut opener = near.tls().unwrap().take_opener().unwrap();
        let mut alert = [0; 256];
        if let Ok(count @ 1..) = recv(near.as_fd().as_raw_fd(), &mut alert, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)
        {
            opener.space(1).0[..count].copy_from_slice(&alert[..count]);
            opener.received(count);
            outcome = opener.plaintext().map(drop).map_err(|error| told(error.explain()));
        }
        near.tls().unwrap().give_back(opener);
    }
    if outcome.is_err() {
        near.shutdown();
    }
    let there = there.join().unwrap();
    if outcome.is_ok() && there.1.is_err() {
        outcome = next_word(&near);
    }
    ((Arc::new(near), outcome), there)
}

fn told(reason: String) -> HandshakeError {
    HandshakeError::Tls { peer: String::new(), reason }
}

/// What a source whose handshake is over hears of a destination that did not take it.
fn next_word(near: &Socket) -> Outcome {
    let mut opener = near.tls().unwrap().take_opener().unwrap();
    let (space, _) = opener.space(1);
    let count = recv(near.as_fd().as_raw_fd(), space, MsgFlags::empty()).unwrap();
    opener.received(count);
    opener.plaintext().map(drop).map_err(|error| told(error.explain()))
}

fn pair_of(source: &Credentials, destination: &Credentials) -> (Arc<Socket>, Arc<Socket>) {
    let ((near, one), (far, other)) = shake(source, destination, "localhost");
    one.unwrap();
    other.unwrap();
    (near, far)
}

fn pair() -> (Arc<Socket>, Arc<Socket>) {
    let set = TestSet::new();
    pair_of(&set.good_source(), &set.good_destination())
}

/// A suite that wants a new key after so many records.
fn few_records(limit: u64) -> SupportedCipherSuite {
    let suite = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384.tls13().unwrap();
    let Tls13CipherSuite { common, hkdf_provider, aead_alg, quic, .. } = suite;
    let common =
        CipherSuiteCommon { confidentiality_limit: limit, hash_provider: common.hash_provider, suite: common.suite };
    SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
        common,
        hkdf_provider: *hkdf_provider,
        aead_alg: *aead_alg,
        quic: *quic,
    })))
}

fn seal(sealer: &mut record::Sealer, bytes: &[u8]) -> Vec<u8> {
    let mut sealed = Sealed::with_room_for(bytes.len());
    sealer.seal(&mut sealed, bytes.len(), |room| room.copy_from_slice(bytes)).unwrap();
    sealed.bytes().to_vec()
}

#[test]
fn lanes_carry_what_is_sent_both_ways_in_any_pieces() {
    let (near, far) = pair();
    assert!(near.tls().unwrap().cipher().contains("AES_256_GCM"), "{:?}", near.tls());
    let bytes: Vec<u8> = (0..600_000_u32).map(|at| (at * 7 + at / 256).to_le_bytes()[0]).collect();
    let expected = bytes.clone();
    let echo = thread::spawn(move || {
        let mut stream = Stream::new(far).unwrap();
        let mut got = vec![0; 600_000];
        let (one, rest) = got.split_at_mut(32);
        stream.recv_exact(&mut [IoSliceMut::new(one)]).unwrap();
        let (two, three) = rest.split_at_mut(4096);
        stream.recv_exact(&mut [IoSliceMut::new(two), IoSliceMut::new(&mut []), IoSliceMut::new(three)]).unwrap();
        stream.send_all(&[IoSlice::new(&got[..1]), IoSlice::new(&got[1..])]).unwrap();
    });
    let mut stream = Stream::new(near).unwrap();
    let parts = [IoSlice::new(&bytes[..32]), IoSlice::new(&bytes[32..4128]), IoSlice::new(&bytes[4128..])];
    assert_eq!(stream.send_all(&parts).unwrap(), 600_000);
    let mut back = vec![0; 600_000];
    for piece in back.chunks_mut(17_001) {
        stream.recv_exact(&mut [IoSliceMut::new(piece)]).unwrap();
    }
    assert!(back == expected);
    echo.join().unwrap();
}

#[test]
fn raw_parts_go_the_same_way() {
    let (near, far) = pair();
    let mut bytes = vec![0_u8; 20_000];
    bytes.iter_mut().zip(0_u32..).for_each(|(byte, at)| *byte = at.to_le_bytes()[0]);
    let part = |slice: &[u8]| libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() };
    let mut parts = [part(&bytes[..3]), part(&bytes[3..9_001]), part(&bytes[9_001..])];
    // SAFETY: the parts are of `bytes`, which lives on and is not written.
    assert_eq!(unsafe { Stream::new(near).unwrap().send_all_raw(&mut parts) }.unwrap(), 20_000);
    let got = vec![0_u8; 20_000];
    let mut parts = [part(&got[..7]), part(&got[7..])];
    // SAFETY: the parts are of `got`, which nobody refers to meanwhile.
    unsafe { Stream::new(far).unwrap().recv_exact_raw(&mut parts) }.unwrap();
    assert!(got == bytes);
}

#[test]
fn keys_are_changed_in_both_directions_as_often_as_the_cipher_wants() {
    let set = TestSet::new();
    const LIMIT: u64 = 3;
    /// Records of each side, all of them data.
    const RECORDS: u64 = 140;
    let few = || vec![few_records(LIMIT)];
    let source = Credentials::load_with(set.path(), Role::Source, few()).unwrap();
    let destination = Credentials::load_with(set.path(), Role::Destination, few()).unwrap();
    let (near, far) = pair_of(&source, &destination);
    let both = [Arc::clone(&near), Arc::clone(&far)];
    let echo = thread::spawn(move || {
        let mut stream = Stream::new(far).unwrap();
        let mut page = [0; 4112];
        for _ in 0..100 {
            stream.recv_exact(&mut [IoSliceMut::new(&mut page)]).unwrap();
            stream.send_all(&[IoSlice::new(&page)]).unwrap();
        }
        let mut much = vec![0; 40 * MAX_PLAINTEXT];
        stream.recv_exact(&mut [IoSliceMut::new(&mut much)]).unwrap();
        stream.send_all(&[IoSlice::new(&much)]).unwrap();
    });
    let mut stream = Stream::new(near).unwrap();
    let mut back = [0; 4112];
    for number in 0..100 {
        stream.send_all(&[IoSlice::new(&[number; 4112])]).unwrap();
        stream.recv_exact(&mut [IoSliceMut::new(&mut back)]).unwrap();
        assert!(back == [number; 4112]);
    }
    let much: Vec<u8> = (0..40 * MAX_PLAINTEXT).map(|at| (at % 251).to_le_bytes()[0]).collect();
    stream.send_all(&[IoSlice::new(&much)]).unwrap();
    let mut back = vec![0; much.len()];
    stream.recv_exact(&mut [IoSliceMut::new(&mut back)]).unwrap();
    assert!(back == much);
    echo.join().unwrap();
    drop(stream);
    let sent = both.each_ref().map(|socket| socket.tls().unwrap().sealer().updates());
    let received = both.each_ref().map(|socket| socket.tls().unwrap().take_opener().unwrap().updates());
    // The last of each key's records announces the next: behind every other one, but for the last.
    assert_eq!(sent, [(RECORDS - 1) / (LIMIT - 1); 2]);
    assert_eq!(received, [sent[1], sent[0]]);
}

#[test]
fn no_new_key_is_made_before_one_is_due() {
    let (near, far) = pair();
    let both = [Arc::clone(&near), Arc::clone(&far)];
    let mut stream = Stream::new(near).unwrap();
    let mut there = Stream::new(far).unwrap();
    for _ in 0..100 {
        stream.send_all(&[IoSlice::new(&[7; 100])]).unwrap();
        there.recv_exact(&mut [IoSliceMut::new(&mut [0; 100])]).unwrap();
    }
    drop((stream, there));
    assert_eq!(both[0].tls().unwrap().sealer().updates(), 0);
    assert_eq!(both[1].tls().unwrap().take_opener().unwrap().updates(), 0);
}

#[test]
fn a_new_key_that_is_asked_for_is_made() {
    let (near, far) = pair();
    let mut opener = near.tls().unwrap().take_opener().unwrap();
    let mut deliver = |bytes: &[u8]| {
        opener.space(1).0[..bytes.len()].copy_from_slice(bytes);
        opener.received(bytes.len());
        opener.plaintext().map(<[u8]>::to_vec)
    };
    let far = far.tls().unwrap();
    assert_eq!(deliver(&far.sealer().request_update().unwrap()).unwrap(), b"");
    // What is sent next announces it, and is under it.
    let answer = seal(&mut near.tls().unwrap().sealer(), b"x");
    assert_eq!(answer.len(), 5 + OVERHEAD + 1 + OVERHEAD);
    assert_eq!(near.tls().unwrap().sealer().updates(), 1);
    let mut other = far.take_opener().unwrap();
    other.space(1).0[..answer.len()].copy_from_slice(&answer);
    other.received(answer.len());
    assert_eq!(other.plaintext().unwrap(), b"x");
    // But not without end.
    let error = (0..100).find_map(|_| deliver(&far.sealer().request_update().unwrap()).err()).unwrap();
    assert!(error.to_string().contains("carry nothing"), "{error}");
}

/// What a side makes of these bytes, which the other sent instead of its own.
fn receive(change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Result<Vec<u8>, RingError> {
    let (near, far) = pair();
    let sealed = seal(&mut near.tls().unwrap().sealer(), &[0xA5; 100]);
    let changed = change(sealed);
    if !changed.is_empty() {
        send(near.as_fd().as_raw_fd(), &changed, MsgFlags::empty()).unwrap();
    }
    near.shutdown();
    let mut got = vec![0; 100];
    Stream::new(far).unwrap().recv_exact(&mut [IoSliceMut::new(&mut got)]).map(|()| got)
}

#[test]
fn what_is_not_the_record_that_is_due_ends_the_lane() {
    assert_eq!(receive(|sealed| sealed).unwrap(), [0xA5; 100]);
    for at in [0, 1, 2, 5, 50, 105, 121] {
        let error = receive(|mut sealed| {
            sealed[at] ^= 4;
            sealed
        });
        assert!(matches!(error, Err(RingError::Tls(TlsError::Record(_)))), "byte {at}: {error:?}");
    }
    let longer = receive(|mut sealed| {
        sealed[3] = 0x7F;
        sealed
    });
    assert!(longer.unwrap_err().to_string().contains("longer than any"));
    let shorter = receive(|_| vec![23, 3, 3, 0, 3, 1, 2, 3]);
    assert!(shorter.unwrap_err().to_string().contains("shorter than any"));
    let garbage = receive(|_| (0..=255).collect());
    assert!(garbage.unwrap_err().to_string().contains("does not begin as one"));
    // A record is taken once, and in its turn.
    let (near, far) = pair();
    let first = seal(&mut near.tls().unwrap().sealer(), b"first");
    let second = seal(&mut near.tls().unwrap().sealer(), b"later");
    for (order, taken) in [([&first[..], &first], 1), ([&second[..], &first], 0)] {
        let (near, far) = if taken == 1 { (Arc::clone(&near), Arc::clone(&far)) } else { pair() };
        let bytes = order.concat();
        send(near.as_fd().as_raw_fd(), &bytes, MsgFlags::empty()).unwrap();
        let mut stream = Stream::new(far).unwrap();
        let results: Vec<bool> =
            (0..2).map(|_| stream.recv_exact(&mut [IoSliceMut::new(&mut [0; 5])]).is_ok()).collect();
        assert_eq!(results, [taken == 1, false]);
    }
}

#[test]
fn an_end_is_no_success_whoever_makes_it() {
    let cut = receive(|mut sealed| {
        sealed.truncate(60);
        sealed
    });
    assert!(matches!(cut, Err(RingError::Closed { got: 0, wanted: 100 })), "{cut:?}");
    assert!(matches!(receive(|_| Vec::new()), Err(RingError::Closed { .. })));
    for (description, expected) in [(0, "ended the TLS connection"), (51, "`decrypt_error`")] {
        let (near, far) = pair();
        let alert = near.tls().unwrap().sealer().alert(description).unwrap();
        send(near.as_fd().as_raw_fd(), &alert, MsgFlags::empty()).unwrap();
        near.shutdown();
        let error = Stream::new(far).unwrap().recv_exact(&mut [IoSliceMut::new(&mut [0; 100])]).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn nothing_is_opened_behind_an_end() {
    let (near, far) = pair();
    let end = near.tls().unwrap().sealer().alert(0).unwrap();
    let more = seal(&mut near.tls().unwrap().sealer(), b"one more");
    let mut opener = far.tls().unwrap().take_opener().unwrap();
    let bytes = [end, more].concat();
    opener.space(1).0[..bytes.len()].copy_from_slice(&bytes);
    opener.received(bytes.len());
    assert!(matches!(opener.plaintext(), Err(TlsError::Closed)));
    assert!(matches!(opener.plaintext(), Err(TlsError::Broken)));
}

#[test]
fn what_one_reader_leaves_the_next_finds() {
    let (near, far) = pair();
    Stream::new(near).unwrap().send_all(&[IoSlice::new(b"for two")]).unwrap();
    let mut got = [0; 3];
    let mut first = Stream::new(Arc::clone(&far)).unwrap();
    first.recv_exact(&mut [IoSliceMut::new(&mut got)]).unwrap();
    let both = Stream::new(Arc::clone(&far)).unwrap().recv_exact(&mut [IoSliceMut::new(&mut got)]).unwrap_err();
    assert!(both.to_string().contains("somebody else reads"), "{both}");
    drop(first);
    let mut rest = [0; 4];
    Stream::new(far).unwrap().recv_exact(&mut [IoSliceMut::new(&mut rest)]).unwrap();
    assert_eq!((&got, &rest), (b"for", b" two"));
}

/// What both sides say of each other's certificates.
fn say(source: &Path, destination: &Path, name: &str) -> (String, String) {
    let load = |folder, role| Credentials::load(folder, role).unwrap();
    let ((_, one), (_, other)) = shake(&load(source, Role::Source), &load(destination, Role::Destination), name);
    let text = |outcome: Outcome| outcome.map_or_else(|error| error.to_string(), |()| "connected".to_owned());
    (text(one), text(other))
}

fn expired(params: &mut CertificateParams) {
    params.not_after = date_time_ymd(2020, 1, 1);
}

#[test]
fn each_wrong_certificate_is_refused_with_a_reason_on_both_sides() {
    let good = TestSet::new();
    assert_eq!(say(good.path(), good.path(), "localhost"), ("connected".to_owned(), "connected".to_owned()));
    let check = |set: &TestSet, source_side: bool, name, near: &str, far: &str| {
        let (source, destination) = if source_side { (set.path(), good.path()) } else { (good.path(), set.path()) };
        let (said_near, said_far) = say(source, destination, name);
        assert!(said_near.contains(near), "the source says: {said_near}");
        assert!(said_far.contains(far), "the destination says: {said_far}");
    };
    check(&good, true, "elsewhere", "not for elsewhere, but for", "does not take this side's certificate");
    // Of another CA, but trusting ours.
    let other = TestSet::new();
    fs::copy(good.path().join(CA_CERT), other.path().join(CA_CERT)).unwrap();
    check(&other, true, "localhost", "does not trust the CA", "is not of the CA that is trusted here");
    check(&other, false, "localhost", "is not of the CA that is trusted here", "does not trust the CA");

    let set = clone_of(&good);
    good.client(10, expired);
    check(&good, true, "localhost", "has expired, or is not valid yet", "has expired; renew its client-cert.pem");
    restore(&good, &set);
    good.server(11, expired);
    check(&good, true, "localhost", "has expired; renew its server-cert.pem", "has expired, or is not valid yet");
    restore(&good, &set);

    good.revoke(2);
    check(
        &good,
        true,
        "localhost",
        "says that this side's certificate has been revoked",
        "has been revoked; make it a new client",
    );
    good.revoke(1);
    check(
        &good,
        true,
        "localhost",
        "has been revoked; make it a new server",
        "says that this side's certificate has been revoked",
    );
    good.revoke(77);
    check(&good, true, "localhost", "connected", "connected");
    fs::remove_file(good.path().join(CA_CRL)).unwrap();

    // Each with the other's.
    for [from, to] in [[SERVER_CERT, CLIENT_CERT], [SERVER_KEY, CLIENT_KEY]] {
        fs::copy(good.path().join(from), good.path().join(to)).unwrap();
    }
    check(&good, true, "localhost", "does not take this side's", "not made out for a TLS client");
    restore(&good, &set);
    for [from, to] in [[CLIENT_CERT, SERVER_CERT], [CLIENT_KEY, SERVER_KEY]] {
        fs::copy(good.path().join(from), good.path().join(to)).unwrap();
    }
    check(&good, true, "localhost", "not made out for a TLS server", "does not take this side's");
}

#[test]
fn an_expired_revocation_list_vouches_for_nobody() {
    let good = TestSet::new();
    let without = clone_of(&good);
    fs::copy(good.path().join(CA_CERT), without.path().join(CA_CERT)).unwrap();
    good.revoke_until(77, 2025);
    let expected = "the revocation list has expired; put a new ca-crl.pem";
    let (source, _) = say(good.path(), without.path(), "localhost");
    assert!(source.contains(expected), "{source}");
    let (_, destination) = say(without.path(), good.path(), "localhost");
    assert!(destination.contains(expected), "{destination}");
}

#[test]
fn a_handshake_that_is_longer_than_any_is_not_waited_for() {
    let set = TestSet::new();
    let (near, far) = Socket::pair().unwrap();
    // A ClientHello that says that it has 60,000 bytes.
    let message = [&[1, 0, 0xEA, 0x60][..], &[0; 60_000]].concat();
    let records = message.chunks(MAX_PLAINTEXT).map(|piece| {
        let length = u16::try_from(piece.len()).unwrap().to_be_bytes();
        [&[22, 3, 1][..], &length, piece].concat()
    });
    send(near.as_fd().as_raw_fd(), &records.collect::<Vec<_>>().concat(), MsgFlags::empty()).unwrap();
    let error = secure_as_destination(&far, &set.good_destination()).unwrap_err().to_string();
    assert!(error.contains("longer than any needs to be"), "{error}");
}

fn clone_of(set: &TestSet) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in [SERVER_CERT, SERVER_KEY, CLIENT_CERT, CLIENT_KEY] {
        fs::copy(set.path().join(name), copy.path().join(name)).unwrap();
    }
    copy
}

fn restore(set: &TestSet, from: &tempfile::TempDir) {
    for name in [SERVER_CERT, SERVER_KEY, CLIENT_CERT, CLIENT_KEY] {
        fs::copy(from.path().join(name), set.path().join(name)).unwrap();
    }
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[test]
fn a_source_without_certificate_is_told_that_it_needs_one() {
    let set = TestSet::new();
    let mut config = (**set.good_source().source_config().unwrap()).clone();
    config.client_auth_cert_resolver = Arc::new(NoCertificate);
    let bare = Credentials { config: super::credentials::Config::Source(Arc::new(config)) };
    let ((_, one), (_, other)) = shake(&bare, &set.good_destination(), "localhost");
    let (one, other) = (one.unwrap_err().to_string(), other.unwrap_err().to_string());
    assert!(one.contains("wants a certificate of this side") && one.contains(CLIENT_CERT), "{one}");
    assert!(other.contains("presents no certificate"), "{other}");
}

#[test]
fn what_a_folder_lacks_is_said_with_what_it_should_hold() {
    let set = TestSet::new();
    for (name, role, expected) in [
        (CA_CERT, Role::Source, "a folder of credentials holds ca-cert.pem"),
        (CLIENT_CERT, Role::Source, "client-key.pem"),
        (CLIENT_KEY, Role::Source, "client-key.pem"),
        (SERVER_CERT, Role::Destination, "server-cert.pem and server-key.pem"),
        (SERVER_KEY, Role::Destination, "server-cert.pem and server-key.pem"),
    ] {
        let kept = fs::read(set.path().join(name)).unwrap();
        fs::remove_file(set.path().join(name)).unwrap();
        let error = Credentials::load(set.path(), role).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(expected), "{error}");
        fs::write(set.path().join(name), "nonsense").unwrap();
        let error = Credentials::load(set.path(), role).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("in PEM"), "{error}");
        fs::write(set.path().join(name), kept).unwrap();
    }
    fs::write(set.path().join(CA_CRL), "").unwrap();
    let error = Credentials::load(set.path(), Role::Source).unwrap_err().to_string();
    assert!(error.contains("revocation list"), "{error}");
    fs::remove_file(set.path().join(CA_CRL)).unwrap();
    fs::copy(set.path().join(SERVER_KEY), set.path().join(CLIENT_KEY)).unwrap();
    let error = Credentials::load(set.path(), Role::Source).unwrap_err().to_string();
    assert!(error.contains("cannot be used"), "{error}");
}

#[test]
fn lanes_prove_which_session_they_are_of() {
    let set = TestSet::new();
    let (source, destination) = (set.good_source(), set.good_destination());
    let [control, lane, stranger] = [(); 3].map(|()| pair_of(&source, &destination));
    let id = LaneId { role: crate::types::LaneRole::Bulk, index: 1 };
    let session = SessionId([9; 16]);
    let secret = |socket: &Arc<Socket>| socket.tls().unwrap().session_secret();
    let proof = lane.0.tls().unwrap().prove(&secret(&control.0), session, id);
    let verify = |at: &Arc<Socket>, secret, proof| at.tls().unwrap().verify(&secret, proof, session, id);
    verify(&lane.1, secret(&control.1), proof).unwrap();
    verify(&stranger.1, secret(&control.1), proof).unwrap_err();
    verify(&lane.1, secret(&stranger.1), proof).unwrap_err();
    let again = |socket: &Arc<Socket>, before: &SessionSecret| socket.tls().unwrap().session_secret_again(before);
    let (first, first_there) = (secret(&control.0), secret(&control.1));
    let proof = lane.0.tls().unwrap().prove(&again(&stranger.0, &first), session, id);
    verify(&lane.1, again(&stranger.1, &first_there), proof).unwrap();
    verify(&lane.1, first_there, proof).unwrap_err();
}

#[test]
fn either_side_without_tls_is_told_so() {
    use crate::handshake::read_hello;
    let set = TestSet::new();
    let (near, far) = Socket::pair().unwrap();
    let there = thread::spawn(move || read_hello(&far).unwrap_err().to_string());
    let said = secure_as_source(&near, &set.good_source(), "localhost").unwrap_err().to_string();
    drop(near);
    assert!(said.contains("has it credentials at all"), "{said}");
    let said = there.join().unwrap();
    assert!(said.contains("speaks TLS, and this destination has no credentials"), "{said}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn arbitrary_bytes_are_no_lane(bytes in prop::collection::vec(any::<u8>(), 1..2000), front: bool) {
        let received = receive(|_| if front { [&[23, 3, 3, 1, 0][..], &bytes].concat() } else { bytes });
        prop_assert!(received.is_err());
    }
}
