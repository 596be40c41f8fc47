//! What the two sides of a session say to each other on the control lane.
//!
//! A message is its length (4 bytes, little-endian), the CRC-32 of its body (4), that of these eight bytes (4), and the body,
//! postcard. The length has a checksum of its own because a damaged one would be waited for, perhaps for ever.

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::clock::HostClock;
use crate::handshake::tame;
use crate::ring::{RingError, Stream};
use crate::socket::Socket;
use crate::types::{PageCount, PageIndex};

/// The longest body of a message, in bytes. Saved state is the only large one: a few KiB a vCPU.
pub const MAX_MESSAGE: usize = 16 << 20;

const HEADER: usize = 12;

/// What is received of a body at once, in bytes.
const PIECE: usize = 64 << 10;

/// A message on the control lane.
///
/// On the wire a variant is its number in this list and a field its place: add at the end, never change.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ControlMessage {
    /// Destination: machine built, memory reserved, pager serving, lanes open. The handoff may come.
    Prepared {
        /// Whose clock the destination's instants are of.
        clock: HostClock,
    },
    /// Source: everything but memory. The guest is paused.
    State {
        /// The machine's own encoding.
        state: Vec<u8>,
        /// Whether the guest ran when it was paused, and so shall run on the destination.
        was_running: bool,
    },
    /// Destination: the state is loaded; waiting for the commit.
    Restored,
    /// Destination: its final word. The guest never ran here and never will.
    Refused {
        /// Why, as a sentence.
        reason: String,
    },
    /// Source: the guest is the destination's now.
    Commit,
    /// Destination: the guest runs, or stands ready where its user had paused it.
    Running {
        /// When the first vCPU entered the guest, on the destination's clock, in nanoseconds.
        first_entry_ns: Option<u64>,
    },
    /// Destination: every page is here. The source's copy is no longer needed.
    Drained {
        /// As in [`ControlMessage::Running`], for a guest that had not entered then.
        first_entry_ns: Option<u64>,
        /// When the last page was placed, on the destination's clock, in nanoseconds.
        last_page_ns: u64,
    },
    /// Source: it knows of [`ControlMessage::Drained`]; nothing more will come.
    DrainedAck,
    /// Source: there will be no commit.
    Abort {
        /// Why, as a sentence.
        reason: String,
    },
    /// Source: this round of pre-copy begins. A hint on what is likely to come again.
    Round {
        /// Counted from 1.
        number: u32,
    },
    /// Source: the guest is paused, and of this stretch of RAM these pages are still to be sent. What came of them before
    /// counts for nothing; all others are complete. Comes before [`ControlMessage::State`], and covers RAM from its first
    /// page to its last, in several messages where it is large. From a destination, after [`ControlMessage::Standing`]: these
    /// are not here.
    Missing {
        /// The stretch's first page, a multiple of 64: where the one before ended.
        first: PageIndex,
        /// Its length.
        pages: PageCount,
        /// One bit a page, as [`crate::bitmap::encode`] writes it.
        set: Vec<u8>,
        /// Confirm the state only when every page is here: the guest shall not run before.
        complete_first: bool,
    },
    /// Either side: it is there. Says nothing else, and is sent so often that its absence does.
    Heartbeat,
    /// Destination, over the lanes of a source that joins again: where it stands. Where it is not complete,
    /// [`ControlMessage::Missing`] follows from its side, and then the source's [`ControlMessage::Commit`].
    Standing {
        /// It has the commit: the guest is its own.
        committed: bool,
        /// It has every page.
        complete: bool,
    },
    /// Destination, where memory is to be compared, and before [`ControlMessage::Drained`]: digests of what the guest was given
    /// there, in several messages where there are many.
    Digests {
        /// Of this chunk of 64 pages on: where the one before ended.
        first: u64,
        /// 16 bytes a chunk.
        digests: Vec<u8>,
    },
    /// Source, before [`ControlMessage::DrainedAck`]: what the comparison came to.
    Compared {
        /// Where memory differs: the first page and how many of each stretch, [`RANGES_TOLD`] at most.
        differing: Vec<(PageIndex, PageCount)>,
    },
}

/// The most bytes of digests in one [`ControlMessage::Digests`].
pub const DIGEST_BYTES: usize = 8 << 20;

/// The most stretches that a [`ControlMessage::Compared`] names.
pub const RANGES_TOLD: usize = 256;

/// The most pages that one [`ControlMessage::Missing`] tells about: at most 8 MiB of bits, and so within [`MAX_MESSAGE`].
pub const MISSING_PAGES: u64 = MISSING_WORDS as u64 * 64;

/// [`MISSING_PAGES`] as words of 64.
pub const MISSING_WORDS: usize = 1 << 20;

impl ControlMessage {
    /// Its name, for logs: the content of `State` is no reading matter.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Prepared { .. } => "Prepared",
            Self::State { .. } => "State",
            Self::Restored => "Restored",
            Self::Refused { .. } => "Refused",
            Self::Commit => "Commit",
            Self::Running { .. } => "Running",
            Self::Drained { .. } => "Drained",
            Self::DrainedAck => "DrainedAck",
            Self::Abort { .. } => "Abort",
            Self::Round { .. } => "Round",
            Self::Missing { .. } => "Missing",
            Self::Heartbeat => "Heartbeat",
            Self::Standing { .. } => "Standing",
            Self::Digests { .. } => "Digests",
            Self::Compared { .. } => "Compared",
        }
    }
}

/// What can go wrong with a message. After any of these the lane is of no more use.
#[derive(Debug, Error)]
pub enum MessageError {
    /// The connection ended, between two messages or within one.
    #[error("the control lane with {peer} was closed after {got} of the {wanted} bytes of a message's {part}")]
    Closed {
        /// The other side.
        peer: String,
        /// "header" or "body".
        part: &'static str,
        /// Bytes of the part received; 0 of a header is an end between two messages.
        got: usize,
        /// Bytes the part has.
        wanted: usize,
    },
    /// The kernel reports an error.
    #[error("the control lane with {peer} failed: {source}")]
    Io {
        /// The other side.
        peer: String,
        /// What failed.
        source: RingError,
    },
    /// A message is longer than any can be.
    #[error("a message on the control lane with {peer} has {length} bytes, more than the {MAX_MESSAGE} allowed")]
    TooLong {
        /// The other side.
        peer: String,
        /// Bytes of its body.
        length: usize,
    },
    /// A message was damaged on the way.
    #[error(
        "a message on the control lane with {peer} is damaged: the CRC-32 of its {part} is {actual:#010x}, not \
         {announced:#010x}"
    )]
    Checksum {
        /// The other side.
        peer: String,
        /// "header" or "body".
        part: &'static str,
        /// As computed here.
        actual: u32,
        /// As received.
        announced: u32,
    },
    /// The body is no message.
    #[error("a message on the control lane with {peer} cannot be understood: {reason}")]
    Malformed {
        /// The other side.
        peer: String,
        /// What is wrong.
        reason: String,
    },
}

impl ControlMessage {
    /// The message that this body of at most [`MAX_MESSAGE`] bytes is.
    ///
    /// # Errors
    /// What is wrong, when it is none.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        match postcard::take_from_bytes::<Self>(body) {
            Ok((message, [])) => Ok(message.tamed()),
            Ok((_, rest)) => Err(format!("{} bytes are left over", rest.len())),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The message with its text cut to a length, and harmless on a terminal: it ends up in logs and errors.
    fn tamed(self) -> Self {
        match self {
            Self::Refused { reason } => Self::Refused { reason: tame(&reason) },
            Self::Abort { reason } => Self::Abort { reason: tame(&reason) },
            other => other,
        }
    }
}

/// The sending half of a control lane.
pub struct ControlWriter {
    socket: Arc<Socket>,
    stream: Stream,
}

impl ControlWriter {
    /// The half that sends on `socket`. Bytes are counted in the socket's counters.
    ///
    /// # Errors
    /// When the kernel gives no ring.
    pub fn new(socket: Arc<Socket>) -> Result<Self, MessageError> {
        let stream = new_stream(&socket)?;
        Ok(Self { socket, stream })
    }

    /// Hands `message` to the socket.
    ///
    /// # Errors
    /// When the connection is broken; the other side may have got the message nevertheless. A message that is too
    /// long is not sent at all.
    pub fn send(&mut self, message: &ControlMessage) -> Result<(), MessageError> {
        let peer = || self.socket.peer().to_owned();
        let body = postcard::to_stdvec(message)
            .map_err(|error| MessageError::Malformed { peer: peer(), reason: error.to_string() })?;
        let length = u32::try_from(body.len()).ok().filter(|_| body.len() <= MAX_MESSAGE);
        let Some(length) = length else { return Err(MessageError::TooLong { peer: peer(), length: body.len() }) };
        let header = header(length, &body);
        let parts = [IoSlice::new(&header), IoSlice::new(&body)];
        let sent = self.stream.send_all(&parts).map_err(|source| MessageError::Io { peer: peer(), source })?;
        self.socket.counters().add_sent(sent as u64);
        Ok(())
    }
}

/// The receiving half of a control lane.
pub struct ControlReader {
    socket: Arc<Socket>,
    stream: Stream,
}

impl ControlReader {
    /// The half that receives from `socket`. Bytes are counted in the socket's counters.
    ///
    /// # Errors
    /// When the kernel gives no ring.
    pub fn new(socket: Arc<Socket>) -> Result<Self, MessageError> {
        let stream = new_stream(&socket)?;
        Ok(Self { socket, stream })
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// When the connection ends or breaks, or what comes is no message.
    pub fn recv(&mut self) -> Result<ControlMessage, MessageError> {
        let mut header = [0; HEADER];
        self.fill("header", &mut header)?;
        let [l0, l1, l2, l3, c0, c1, c2, c3, own @ ..] = header;
        check_sum("header", &header[..8], u32::from_le_bytes(own), self.peer())?;
        let announced = u32::from_le_bytes([c0, c1, c2, c3]);
        // Checked before anything is allocated for it.
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_MESSAGE {
            return Err(MessageError::TooLong { peer: self.peer().to_owned(), length });
        }
        let mut body = vec![0; length];
        self.fill("body", &mut body)?;
        check_sum("body", &body, announced, self.peer())?;
        ControlMessage::decode(&body).map_err(|reason| MessageError::Malformed { peer: self.peer().to_owned(), reason })
    }

    fn fill(&mut self, part: &'static str, buffer: &mut [u8]) -> Result<(), MessageError> {
        let length = buffer.len();
        // Piece by piece, since what has come of a long body is a sign of life.
        let counters = Arc::clone(self.socket.counters());
        let mut pieces = buffer.chunks_mut(PIECE);
        let mut got_before = 0;
        let received = pieces.try_for_each(|piece| {
            self.stream.recv_exact(&mut [IoSliceMut::new(piece)])?;
            counters.add_received(piece.len() as u64);
            got_before += piece.len();
            Ok(())
        });
        match received {
            Ok(()) => Ok(()),
            Err(RingError::Closed { got, .. }) => {
                Err(MessageError::Closed { peer: self.peer().to_owned(), part, got: got_before + got, wanted: length })
            }
            Err(RingError::Io { source, .. }) if source.kind() == io::ErrorKind::ConnectionReset => {
                Err(MessageError::Closed { peer: self.peer().to_owned(), part, got: 0, wanted: length })
            }
            Err(source) => Err(MessageError::Io { peer: self.peer().to_owned(), source }),
        }
    }

    fn peer(&self) -> &str {
        self.socket.peer()
    }
}

fn header(length: u32, body: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4..8].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
    let own = crc32fast::hash(&header[..8]);
    header[8..].copy_from_slice(&own.to_le_bytes());
    header
}

fn check_sum(part: &'static str, bytes: &[u8], announced: u32, peer: &str) -> Result<(), MessageError> {
    let actual = crc32fast::hash(bytes);
    if actual == announced {
        return Ok(());
    }
    Err(MessageError::Checksum { peer: peer.to_owned(), part, actual, announced })
}

fn new_stream(socket: &Arc<Socket>) -> Result<Stream, MessageError> {
    Stream::new(Arc::clone(socket)).map_err(|source| MessageError::Io { peer: socket.peer().to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    fn lane() -> (Arc<Socket>, Arc<Socket>) {
        let (near, far) = Socket::pair().unwrap();
        (Arc::new(near), Arc::new(far))
    }

    /// Puts raw bytes on the wire, closes it, and receives.
    fn receive(bytes: &[u8]) -> Result<ControlMessage, MessageError> {
        let (near, far) = lane();
        Stream::new(near).unwrap().send_all(&[IoSlice::new(bytes)]).unwrap();
        ControlReader::new(far).unwrap().recv()
    }

    fn framed(body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap();
        [&header(length, body)[..], body].concat()
    }

    fn any_message() -> impl Strategy<Value = ControlMessage> {
        prop_oneof![
            any::<String>().prop_map(|boot_id| ControlMessage::Prepared { clock: HostClock { boot_id } }),
            (any::<Vec<u8>>(), any::<bool>())
                .prop_map(|(state, was_running)| ControlMessage::State { state, was_running }),
            Just(ControlMessage::Restored),
            any::<String>().prop_map(|reason| ControlMessage::Refused { reason }),
            Just(ControlMessage::Commit),
            any::<Option<u64>>().prop_map(|first_entry_ns| ControlMessage::Running { first_entry_ns }),
            (any::<Option<u64>>(), any::<u64>()).prop_map(|(first_entry_ns, last_page_ns)| {
                ControlMessage::Drained { first_entry_ns, last_page_ns }
            }),
            Just(ControlMessage::DrainedAck),
            any::<String>().prop_map(|reason| ControlMessage::Abort { reason }),
            any::<u32>().prop_map(|number| ControlMessage::Round { number }),
            Just(ControlMessage::Heartbeat),
            (any::<bool>(), any::<bool>())
                .prop_map(|(committed, complete)| ControlMessage::Standing { committed, complete }),
            (any::<u64>(), any::<Vec<u8>>()).prop_map(|(first, digests)| ControlMessage::Digests { first, digests }),
            any::<Vec<(u64, u64)>>().prop_map(|ranges| ControlMessage::Compared {
                differing: ranges.into_iter().map(|(first, pages)| (PageIndex(first), PageCount(pages))).collect(),
            }),
            (any::<u64>(), any::<u64>(), any::<Vec<u8>>(), any::<bool>()).prop_map(
                |(first, pages, set, complete_first)| ControlMessage::Missing {
                    first: PageIndex(first),
                    pages: PageCount(pages),
                    set,
                    complete_first,
                }
            ),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn messages_survive_the_wire(messages in prop::collection::vec(any_message(), 1..8)) {
            let (near, far) = lane();
            let sent = messages.clone();
            let near_counters = Arc::clone(near.counters());
            let writer = thread::spawn(move || {
                let mut writer = ControlWriter::new(near).unwrap();
                sent.iter().for_each(|message| writer.send(message).unwrap());
            });
            let mut reader = ControlReader::new(Arc::clone(&far)).unwrap();
            for message in messages {
                prop_assert_eq!(reader.recv().unwrap(), message.tamed());
            }
            writer.join().unwrap();
            prop_assert_eq!(far.counters().received(), near_counters.sent());
        }

        #[test]
        fn arbitrary_bodies_never_panic(body: Vec<u8>) {
            if let Ok(message) = receive(&framed(&body)) {
                // Varints have more than one spelling, so only the meaning is compared.
                prop_assert_eq!(receive(&framed(&postcard::to_stdvec(&message).unwrap())).unwrap(), message);
            }
        }
    }

    #[test]
    fn both_halves_work_at_once_on_one_socket() {
        let (near, far) = lane();
        let echo = thread::spawn(move || {
            let (mut reader, mut writer) =
                (ControlReader::new(Arc::clone(&far)).unwrap(), ControlWriter::new(far).unwrap());
            while let Ok(message) = reader.recv() {
                writer.send(&message).unwrap();
            }
        });
        let large = ControlMessage::State { state: vec![0xA5; 3 << 20], was_running: true };
        let mut reader = ControlReader::new(Arc::clone(&near)).unwrap();
        let answers = thread::spawn(move || (reader.recv().unwrap(), reader.recv().unwrap()));
        let mut writer = ControlWriter::new(Arc::clone(&near)).unwrap();
        writer.send(&large).unwrap();
        writer.send(&ControlMessage::Commit).unwrap();
        let (first, second) = answers.join().unwrap();
        assert!(first == large && second == ControlMessage::Commit);
        near.shutdown();
        echo.join().unwrap();
    }

    #[test]
    fn the_numbers_on_the_wire_do_not_change() {
        let clock = HostClock { boot_id: "b".to_owned() };
        let reason = "r".to_owned();
        for (message, bytes) in [
            (ControlMessage::Prepared { clock }, &[0, 1, b'b'][..]),
            (ControlMessage::State { state: vec![9, 8], was_running: true }, &[1, 2, 9, 8, 1]),
            (ControlMessage::Restored, &[2]),
            (ControlMessage::Refused { reason: reason.clone() }, &[3, 1, b'r']),
            (ControlMessage::Commit, &[4]),
            (ControlMessage::Running { first_entry_ns: Some(5) }, &[5, 1, 5]),
            (ControlMessage::Drained { first_entry_ns: None, last_page_ns: 7 }, &[6, 0, 7]),
            (ControlMessage::DrainedAck, &[7]),
            (ControlMessage::Abort { reason }, &[8, 1, b'r']),
            (ControlMessage::Round { number: 3 }, &[9, 3]),
            (ControlMessage::Heartbeat, &[11]),
            (ControlMessage::Standing { committed: true, complete: false }, &[12, 1, 0]),
            (ControlMessage::Digests { first: 2, digests: vec![9] }, &[13, 2, 1, 9]),
            (ControlMessage::Compared { differing: vec![(PageIndex(5), PageCount(6))] }, &[14, 1, 5, 6]),
        ] {
            assert_eq!(postcard::to_stdvec(&message).unwrap(), bytes, "{}", message.name());
        }
    }

    #[test]
    fn what_is_wrong_with_a_message_is_said() {
        let mut damaged = framed(&[4]);
        damaged[HEADER] ^= 1;
        let mut shorter = framed(&[4, 4]);
        shorter[0] = 1;
        let too_long = header(u32::try_from(MAX_MESSAGE).unwrap() + 1, &[]);
        let state = postcard::to_stdvec(&ControlMessage::State { state: vec![1; 9], was_running: true }).unwrap();
        for (bytes, expected) in [
            (&[][..], "closed after 0 of the 12 bytes of a message's header"),
            (&framed(&[4])[..3], "closed after 3 of the 12 bytes of a message's header"),
            (&framed(&state)[..14], "closed after 2 of the 12 bytes of a message's body"),
            (&damaged, "is damaged: the CRC-32 of its body"),
            (&shorter, "is damaged: the CRC-32 of its header"),
            (&too_long, "has 16777217 bytes"),
            (&framed(&[]), "cannot be understood"),
            (&framed(&[99]), "cannot be understood"),
            (&framed(&[4, 0]), "1 bytes are left over"),
            (&framed(&[1, 200, 1]), "cannot be understood"),
        ] {
            let error = receive(bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{bytes:?}: {error}");
            assert!(error.contains("control lane with unix:(pair)"), "{error}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_message_is_found() {
        let whole = framed(&postcard::to_stdvec(&ControlMessage::Round { number: 300 }).unwrap());
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = receive(&bytes).unwrap_err();
            assert!(matches!(error, MessageError::Checksum { .. }), "bit {bit}: {error}");
        }
    }

    #[test]
    fn a_message_that_is_too_long_is_not_sent() {
        let (near, far) = lane();
        let mut writer = ControlWriter::new(Arc::clone(&near)).unwrap();
        let large = ControlMessage::State { state: vec![0; MAX_MESSAGE], was_running: true };
        assert!(matches!(writer.send(&large), Err(MessageError::TooLong { .. })));
        assert_eq!(near.counters().sent(), 0);
        writer.send(&ControlMessage::Restored).unwrap();
        assert_eq!(ControlReader::new(far).unwrap().recv().unwrap(), ControlMessage::Restored);
    }

    #[test]
    fn a_shut_down_lane_wakes_its_reader() {
        let (near, far) = lane();
        let mut reader = ControlReader::new(Arc::clone(&far)).unwrap();
        let waiting = thread::spawn(move || reader.recv());
        far.shutdown();
        assert!(matches!(waiting.join().unwrap(), Err(MessageError::Closed { got: 0, .. })));
        drop(near);
    }

    #[test]
    fn text_from_outside_is_short_and_harmless_on_a_terminal() {
        let reason = format!("\u{1b}[2J{}", "x".repeat(1 << 15));
        let body = postcard::to_stdvec(&ControlMessage::Abort { reason }).unwrap();
        let Ok(ControlMessage::Abort { reason }) = receive(&framed(&body)) else { panic!("it is a message") };
        assert!(!reason.contains('\u{1b}') && reason.len() <= crate::handshake::MAX_REASON, "{} bytes", reason.len());
    }
}
