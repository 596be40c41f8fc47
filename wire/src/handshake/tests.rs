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
    let hello = read_hello_within(&far, SHORT).map(|introduction| introduction.unproven().clone());
    drop(far);
    (hello, next_answer(&near).map(said))
}

/// What a destination says next, if anything.
fn next_answer(near: &Socket) -> Option<Answer> {
    let body = envelope::read(near, envelope::ANSWER, &Deadline::after(TIME_LIMIT)).ok()?;
    Some(postcard::from_bytes(&body).unwrap())
}

fn said(answer: Answer) -> String {
    match answer {
        Answer::Refused { reason } => reason,
        Answer::Welcome(_) => "welcome".to_owned(),
        Answer::Challenge { .. } => "challenge".to_owned(),
    }
}

/// As a destination that takes whatever is sound.
fn take(far: &Socket) -> Result<Hello, HandshakeError> {
    let hello = read_hello(far)?.proven(far)?;
    accept(far, &welcome()).map(|()| hello)
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
        assert_eq!(take(&far).unwrap(), hello(role));
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
    assert!(text.contains("speaks protocol versions 7 to 9, this side version 3"), "{text}");
    let told = told.unwrap();
    assert!(told.contains("the destination speaks protocol version 3, the source versions 7 to 9"), "{told}");
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
    let error = greet_raw(&answer(&Answer::Welcome(Welcome { version: 4, ..welcome() })));
    assert!(error.to_string().contains("chose version 4, where version 3 was offered"), "{error}");
    let clock = HostClock { boot_id: "x".repeat(65) };
    let error = greet_raw(&answer(&Answer::Welcome(Welcome { clock, ..welcome() })));
    assert!(error.to_string().contains("boot id has 65 bytes"), "{error}");
    assert!(matches!(greet_raw(&begun_with(b"\x93SWOVA\r\n", &[9])), HandshakeError::Malformed { .. }));
}

/// A connection on which a source said all that it has to say, up to its welcome, as it crossed.
fn recorded(role: LaneRole) -> Vec<u8> {
    let (near, relay) = Socket::pair().unwrap();
    let (other, far) = Socket::pair().unwrap();
    let there = thread::spawn(move || take(&far).unwrap());
    let here = thread::spawn(move || greet(&near, &hello(role)).unwrap());
    let deadline = Deadline::after(TIME_LIMIT);
    let mut recording = Vec::new();
    let pass = |from: &Socket, to: &Socket, magic| {
        let body = envelope::read(from, magic, &deadline).unwrap();
        envelope::write(to, magic, &body, &deadline).unwrap();
        begun_with(&magic, &body)
    };
    recording.extend(pass(&relay, &other, envelope::HELLO));
    pass(&other, &relay, envelope::ANSWER);
    recording.extend(pass(&relay, &other, envelope::RESPONSE));
    pass(&other, &relay, envelope::ANSWER);
    here.join().unwrap();
    there.join().unwrap();
    recording
}

#[test]
fn what_was_said_on_one_connection_opens_no_other() {
    for role in [LaneRole::Control, LaneRole::Fault, LaneRole::Bulk] {
        let recording = recorded(role);
        let (near, far) = Socket::pair().unwrap();
        raw(&near, &recording);
        let introduction = read_hello(&far).unwrap();
        assert_eq!(introduction.unproven(), &hello(role), "it is a sound one");
        let error = introduction.proven(&far).unwrap_err();
        assert!(matches!(error, HandshakeError::Repeated { .. }), "{error}");
        assert_eq!(next_answer(&near).map(said).as_deref(), Some("challenge"));
        let told = next_answer(&near).map(said).unwrap();
        assert!(told.contains("said on another one"), "{told}");
    }
}

#[test]
fn a_challenge_is_answered_for_what_was_said_and_in_time() {
    let body = postcard::to_stdvec(&hello(LaneRole::Fault)).unwrap();
    let right = |nonce: Nonce| nonce.response(&body).as_bytes().to_vec();
    for case in ["taken", "for another text", "cut short", "none"] {
        let (near, far) = Socket::pair().unwrap();
        raw(&near, &wrapped(&body));
        let limit = if case == "none" { SHORT } else { TIME_LIMIT };
        let there = thread::spawn(move || {
            let proven = read_hello(&far).unwrap().proven_by(&far, &Deadline::after(limit));
            proven.map_or_else(|error| error.to_string(), |_| "taken".to_owned())
        });
        let Some(Answer::Challenge { nonce }) = next_answer(&near) else { panic!("no challenge") };
        let (response, expected) = match case {
            "taken" => (right(nonce), "taken"),
            "for another text" => (nonce.response(b"something else").as_bytes().to_vec(), "repeats it"),
            "cut short" => (right(nonce)[..31].to_vec(), "repeats it"),
            _ => (Vec::new(), "not finished within"),
        };
        if !response.is_empty() {
            envelope::write(&near, envelope::RESPONSE, &response, &Deadline::after(TIME_LIMIT)).unwrap();
        }
        let outcome = there.join().unwrap();
        assert!(outcome.contains(expected), "{case}: {outcome}");
    }
}

#[test]
fn no_two_challenges_are_alike_and_a_source_answers_one() {
    let challenge = || {
        let (near, far) = Socket::pair().unwrap();
        raw(&near, &wrapped(&postcard::to_stdvec(&hello(LaneRole::Bulk)).unwrap()));
        let introduction = read_hello(&far).unwrap();
        let _ = introduction.proven_by(&far, &Deadline::after(SHORT / 10));
        match next_answer(&near) {
            Some(Answer::Challenge { nonce }) => nonce,
            other => panic!("{:?}", other.map(said)),
        }
    };
    let nonce = challenge();
    assert_ne!(nonce, challenge());
    let challenge = begun_with(&envelope::ANSWER, &postcard::to_stdvec(&Answer::Challenge { nonce }).unwrap());
    let error = greet_raw(&[&challenge[..], &challenge].concat()).to_string();
    assert!(error.contains("challenges this side twice"), "{error}");
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
