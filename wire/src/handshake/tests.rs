use std::os::fd::{AsFd, AsRawFd};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use nix::sys::socket::{MsgFlags, send};
use proptest::prelude::*;

use super::*;
use crate::description::tests::sample;

const SHORT: Duration = Duration::from_millis(60);

fn hello(role: LaneRole) -> Hello {
    Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        session: SessionId([7; 16]),
        lane: LaneId { role, index: 0 },
        lanes: LaneCounts { fault: 1, bulk: 2 },
        description: (role == LaneRole::Control).then(sample),
        clock: HostClock { boot_id: "source".to_owned() },
        capabilities: 5,
        proof: None,
    }
}

fn welcome() -> Welcome {
    Welcome { version: VERSION_MAX, clock: HostClock { boot_id: "destination".to_owned() } }
}

fn raw(socket: &Socket, bytes: &[u8]) {
    let sent = send(socket.as_fd().as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
}

fn wrapped(body: &[u8]) -> Vec<u8> {
    begun_with(b"\x93SWOVR\r\n", body)
}

fn begun_with(magic: &[u8; 8], body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    [magic, &length.to_le_bytes()[..], &crc32fast::hash(body).to_le_bytes(), body].concat()
}

/// What a destination makes of these bytes, and what it told the source.
fn read_raw(bytes: &[u8]) -> (Result<Hello, HandshakeError>, Option<String>) {
    let (near, far) = Socket::pair().unwrap();
    raw(&near, bytes);
    let hello = read_hello_within(&far, SHORT);
    drop(far);
    let told = envelope::read(&near, envelope::ANSWER, &Deadline::after(SHORT)).ok().map(|body| {
        match postcard::from_bytes(&body).unwrap() {
            Answer::Refused { reason } => reason,
            Answer::Welcome(_) => "welcome".to_owned(),
        }
    });
    (hello, told)
}

/// What a source makes of a destination that answers these bytes.
fn greet_raw(bytes: &[u8]) -> HandshakeError {
    let (near, far) = Socket::pair().unwrap();
    raw(&far, bytes);
    greet_within(&near, &hello(LaneRole::Fault), SHORT).unwrap_err()
}

#[test]
fn a_lane_of_each_role_is_greeted_and_taken() {
    for role in [LaneRole::Control, LaneRole::Fault, LaneRole::Bulk] {
        let (near, far) = Socket::pair().unwrap();
        let source = thread::spawn(move || {
            let answer = greet(&near, &hello(role));
            (answer, near.counters().sent(), near.counters().received())
        });
        assert_eq!(read_hello(&far).unwrap(), hello(role));
        accept(&far, &welcome()).unwrap();
        let (answer, sent, received) = source.join().unwrap();
        assert_eq!(answer.unwrap(), welcome());
        assert_eq!((sent, received), (far.counters().received(), far.counters().sent()));
        assert!(sent > 16 && received > 16);
    }
}

#[test]
fn a_refusal_reaches_the_source_as_it_was_said() {
    let (near, far) = Socket::pair().unwrap();
    let source = thread::spawn(move || greet(&near, &hello(LaneRole::Control)).unwrap_err().to_string());
    read_hello(&far).unwrap();
    refuse(&far, "the machines differ\u{1b}[2J").unwrap();
    assert_eq!(source.join().unwrap(), "unix:(pair) refused: the machines differ\\u{1b}[2J");
}

#[test]
fn a_long_reason_is_cut_between_characters() {
    let (near, far) = Socket::pair().unwrap();
    refuse(&far, &"xé".repeat(1000)).unwrap();
    match greet(&near, &hello(LaneRole::Fault)) {
        Err(HandshakeError::Refused { reason, .. }) => {
            assert!(reason.len() <= MAX_REASON && reason.len() > MAX_REASON - 4, "{}", reason.len());
            assert!("xé".repeat(1000).starts_with(&reason));
        }
        other => panic!("{other:?}"),
    }
    // Cut by whoever sends it, too: a destination must not fail at refusing.
    let (near, far) = Socket::pair().unwrap();
    refuse(&far, &"x".repeat(2 * envelope::MAX_BODY)).unwrap();
    assert!(envelope::read(&near, envelope::ANSWER, &Deadline::after(SHORT)).unwrap().len() < MAX_REASON + 8);
}

#[test]
fn another_protocol_is_shown_as_it_began() {
    let (hello, told) = read_raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let text = hello.unwrap_err().to_string();
    assert!(text.contains(r#"it began with "GET / HTTP/1.1\r\nHost: x\r\n\r\n""#), "{text}");
    assert_eq!(told, None);
    let text = greet_raw(b"\x00\xffSSH").to_string();
    assert!(text.contains(r#"began with "\x00\xffSSH""#), "{text}");
    // Four bytes are enough to know: the rest is not waited for.
    let error = read_raw(b"\x93SWX").0.unwrap_err();
    assert!(matches!(error, HandshakeError::NotSwitchover { .. }), "{error}");
}

#[test]
fn ranges_without_a_common_version_are_refused_with_both() {
    let future = postcard::to_stdvec(&(7_u16, 9_u16, "laid out otherwise")).unwrap();
    let (hello, told) = read_raw(&wrapped(&future));
    let text = hello.unwrap_err().to_string();
    assert!(text.contains("speaks protocol versions 7 to 9, this side version 2"), "{text}");
    let told = told.unwrap();
    assert!(told.contains("the destination speaks protocol version 2, the source versions 7 to 9"), "{told}");
}

#[test]
fn the_highest_common_version_is_chosen() {
    let range = |min, max| Versions { min, max };
    for (a, b, common) in [
        (range(1, 1), range(1, 1), Some(1)),
        (range(1, 4), range(2, 9), Some(4)),
        (range(3, 9), range(1, 5), Some(5)),
        (range(1, 2), range(3, 4), None),
        (range(3, 4), range(1, 2), None),
        (range(5, 1), range(1, 5), None),
    ] {
        assert_eq!(a.common(b), common, "{a} and {b}");
    }
    let newer = Hello { version_max: 900, ..hello(LaneRole::Fault) };
    assert_eq!(newer.common_version(), Some(VERSION_MAX));
}

#[test]
fn fields_of_a_later_version_are_ignored() {
    let mut body = postcard::to_stdvec(&hello(LaneRole::Control)).unwrap();
    // No proof, and then what is not known here.
    body.extend_from_slice(b"\0later");
    assert_eq!(read_raw(&wrapped(&body)).0.unwrap(), hello(LaneRole::Control));
}

#[test]
fn a_hello_that_makes_no_sense_is_refused_with_the_reason() {
    let control = hello(LaneRole::Control);
    let mut wrong_machine = control.clone();
    wrong_machine.description.as_mut().unwrap().vcpus = 0;
    let bulk = |index| Hello { lane: LaneId { role: LaneRole::Bulk, index }, ..hello(LaneRole::Bulk) };
    for (hello, expected) in [
        (Hello { description: None, ..control.clone() }, "no machine description"),
        (Hello { description: Some(sample()), ..hello(LaneRole::Fault) }, "fault lane 0 brings a machine description"),
        (wrong_machine, "the number of vCPUs is 0"),
        (bulk(2), "it is bulk lane 2 of 2"),
        (Hello { lane: LaneId { role: LaneRole::Control, index: 1 }, ..control.clone() }, "control lane 1 of 1"),
        (Hello { lanes: LaneCounts { fault: 0, bulk: 1 }, ..control.clone() }, "0 fault and 1 bulk"),
        (Hello { lanes: LaneCounts { fault: 1, bulk: 0 }, ..control.clone() }, "1 fault and 0 bulk"),
        (Hello { clock: HostClock { boot_id: "x".repeat(65) }, ..control }, "boot id has 65 bytes"),
    ] {
        let (read, told) = read_raw(&wrapped(&postcard::to_stdvec(&hello).unwrap()));
        let text = read.unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
        let told = told.unwrap();
        assert!(told.contains(expected), "{told}");
    }
    assert!(read_raw(&wrapped(&postcard::to_stdvec(&bulk(1)).unwrap())).0.is_ok());
}

#[test]
fn lengths_and_checksums_are_checked() {
    let good = wrapped(&postcard::to_stdvec(&hello(LaneRole::Control)).unwrap());
    let mut long = good.clone();
    long[8..12].copy_from_slice(&65537_u32.to_le_bytes());
    assert!(matches!(read_raw(&long).0, Err(HandshakeError::TooLong { length: 65537, .. })));
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert!(matches!(read_raw(&damaged).0, Err(HandshakeError::Checksum { .. })));
    assert!(matches!(read_raw(&wrapped(&[1])).0, Err(HandshakeError::Malformed { .. })));
    let (near, far) = Socket::pair().unwrap();
    raw(&near, &good[..20]);
    near.shutdown();
    assert!(matches!(read_hello(&far), Err(HandshakeError::Closed { .. })));
}

#[test]
fn an_echo_is_no_answer() {
    let echo = wrapped(&postcard::to_stdvec(&hello(LaneRole::Control)).unwrap());
    assert!(matches!(greet_raw(&echo), HandshakeError::NotSwitchover { .. }));
}

#[test]
fn an_answer_is_checked_too() {
    let answer = |answer: &Answer| begun_with(b"\x93SWOVA\r\n", &postcard::to_stdvec(answer).unwrap());
    let error = greet_raw(&answer(&Answer::Welcome(Welcome { version: 3, ..welcome() })));
    assert!(error.to_string().contains("chose version 3, where version 2 was offered"), "{error}");
    let clock = HostClock { boot_id: "x".repeat(65) };
    let error = greet_raw(&answer(&Answer::Welcome(Welcome { clock, ..welcome() })));
    assert!(error.to_string().contains("boot id has 65 bytes"), "{error}");
    assert!(matches!(greet_raw(&begun_with(b"\x93SWOVA\r\n", &[9])), HandshakeError::Malformed { .. }));
}

#[test]
fn a_silent_peer_is_given_up() {
    let (near, far) = Socket::pair().unwrap();
    assert!(matches!(read_hello_within(&far, SHORT), Err(HandshakeError::Timeout { .. })));
    let error = greet_within(&near, &hello(LaneRole::Fault), SHORT).unwrap_err();
    assert!(matches!(error, HandshakeError::Timeout { .. }), "{error}");
}

#[test]
fn a_peer_that_dribbles_is_given_up() {
    let (near, far) = Socket::pair().unwrap();
    let bytes = wrapped(&postcard::to_stdvec(&hello(LaneRole::Control)).unwrap());
    let (done, stop) = mpsc::channel::<()>();
    let slow = thread::spawn(move || {
        // Every pause is shorter than the limit, all of them together are much longer.
        for byte in bytes {
            raw(&near, &[byte]);
            if stop.recv_timeout(SHORT / 6) != Err(mpsc::RecvTimeoutError::Timeout) {
                break;
            }
        }
    });
    let start = Instant::now();
    assert!(matches!(read_hello_within(&far, SHORT), Err(HandshakeError::Timeout { .. })));
    assert!(start.elapsed() >= SHORT && start.elapsed() < SHORT * 10);
    drop(done);
    slow.join().unwrap();
}

#[test]
fn a_destination_that_closes_is_no_success() {
    let (near, far) = Socket::pair().unwrap();
    drop(far);
    let error = greet(&near, &hello(LaneRole::Fault)).unwrap_err();
    assert!(matches!(error, HandshakeError::Closed { .. }), "{error}");
}

#[test]
fn a_refusal_is_read_even_if_the_destination_has_closed() {
    let (near, far) = Socket::pair().unwrap();
    refuse(&far, "taken").unwrap();
    drop(far);
    let error = greet(&near, &hello(LaneRole::Fault)).unwrap_err();
    assert!(matches!(&error, HandshakeError::Refused { reason, .. } if reason == "taken"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn arbitrary_bodies_never_panic(body: Vec<u8>) {
        let _ = understand(&body);
        let _ = postcard::take_from_bytes::<Answer>(&body);
    }

    #[test]
    fn a_damaged_hello_never_panics(at in 0..100_usize, change in 1..=255_u8) {
        let mut body = postcard::to_stdvec(&hello(LaneRole::Control)).unwrap();
        let at = at % body.len();
        body[at] ^= change;
        let _ = understand(&body);
    }
}
