use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::thread;

use switchover_wire::clock::HostClock;
use switchover_wire::handshake::{
    HandshakeError, Hello, LaneCounts, MAX_REASON, VERSION_MAX, VERSION_MIN, Welcome, accept, greet, read_hello,
};
use switchover_wire::socket::Socket;
use switchover_wire::types::{LaneId, LaneRole, SessionId};

use crate::input::Input;

/// No text of a handshake is as long, and a socket takes it without anybody reading.
const LONGEST: usize = 80 << 10;

const HELLO: [u8; 8] = *b"\x93SWOVR\r\n";
const ANSWER: [u8; 8] = *b"\x93SWOVA\r\n";

/// What comes first on a lane, on either side, through real sockets. The lowest bit of the first byte says which side reads, the
/// next whether the bytes are wrapped as a handshake's text is.
pub fn handshake(bytes: &[u8]) {
    let mut input = Input(bytes);
    let how = input.u8();
    let text = input.bytes(LONGEST);
    let (from_source, wrapped) = (how & 1 == 0, how & 2 != 0);
    let (near, far) = Socket::pair().unwrap();
    let mut stream = UnixStream::from(near.as_fd().try_clone_to_owned().unwrap());
    if wrapped {
        let length = u32::try_from(text.len()).unwrap();
        stream.write_all(if from_source { &HELLO } else { &ANSWER }).unwrap();
        stream.write_all(&length.to_le_bytes()).unwrap();
        stream.write_all(&crc32fast::hash(text).to_le_bytes()).unwrap();
    }
    stream.write_all(text).unwrap();
    drop((stream, near));
    if from_source {
        if let Ok(introduction) = read_hello(&far) {
            source_is_understood(introduction.unproven());
            // Nobody has said on this connection what a challenge asks for.
            assert!(introduction.proven(&far).is_err(), "a recording was taken");
        }
        return;
    }
    match greet(&far, &hello()) {
        Ok(welcome) => assert!(greeted(&hello(), &welcome).is_none_or(|(_, heard)| heard == welcome)),
        Err(HandshakeError::Refused { reason, .. }) => {
            assert!(
                reason.len() <= MAX_REASON && !reason.contains(char::is_control),
                "a reason that is not fit to be shown"
            );
        }
        Err(error) => assert!(!error.to_string().contains(char::is_control), "{error:?}"),
    }
}

/// What passed the checks makes sense, and survives being said again.
fn source_is_understood(hello: &Hello) {
    let version = hello.common_version().expect("a version that both speak");
    if let Some(machine) = &hello.description {
        machine.check_bounds().expect("a description within bounds");
        assert!(machine.pages().0 > 0);
        assert!(machine.mismatches(machine).is_empty());
    }
    let welcome = Welcome { version, clock: hello.clock.clone() };
    if let Some(heard) = greeted(hello, &welcome) {
        assert_eq!(heard, (hello.clone(), welcome));
    }
}

/// What the two sides understand of each other; `None` on a host that gives this process no time, which is nobody's fault.
fn greeted(hello: &Hello, welcome: &Welcome) -> Option<(Hello, Welcome)> {
    let (source, destination) = Socket::pair().unwrap();
    let said = hello.clone();
    let there = thread::spawn(move || greet(&source, &said));
    let heard = read_hello(&destination)
        .and_then(|introduction| introduction.proven(&destination))
        .and_then(|heard| accept(&destination, welcome).map(|()| heard));
    // Whose other side is not there any more has no answer to wait for.
    drop(destination);
    let there = there.join().unwrap();
    let late = |error: &HandshakeError| matches!(error, HandshakeError::Timeout { .. });
    if heard.as_ref().is_err_and(late) || there.as_ref().is_err_and(late) {
        return None;
    }
    Some((heard.unwrap(), there.unwrap()))
}

fn hello() -> Hello {
    Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        session: SessionId([7; 16]),
        lane: LaneId { role: LaneRole::Bulk, index: 0 },
        lanes: LaneCounts { fault: 1, bulk: 1 },
        description: None,
        clock: HostClock { boot_id: "here".to_owned() },
        capabilities: 0,
        proof: None,
    }
}
