//! The answers on a fault lane, as they come out of its stream.
//!
//! An answer is received whole, header and page in one step, and its page copied into the alias when it is claimed. Receiving the
//! header first and the page into its place saves the copy, 0.2 µs, and costs a second step of the ring, five times as much
//! (docs/performance.md). Several answers may come in one step too.
//!
//! On a TLS lane they are opened where their records lie, and a page is copied from there: an answer is in one record, unless a
//! source cuts it otherwise.

use switchover_wire::frame::FrameError;
use switchover_wire::frame::fault::FaultReply;
use switchover_wire::socket::Socket;
use switchover_wire::tls::record::Opener;
use switchover_wire::tls::{Tls, TlsError};
use switchover_wire::types::{PAGE_SIZE, PageCount};
use thiserror::Error;

/// One answer at the most.
const LONGEST: usize = FaultReply::LEN + PAGE_SIZE;
/// Room for the answers to as many faults as a few vCPUs have at once.
const ROOM: usize = 16 * LONGEST;

/// What has come of a lane's answers, and was not taken yet.
pub struct Replies {
    bytes: Box<[u8; ROOM]>,
    /// Taken are the bytes up to here,
    taken: usize,
    /// and come up to here.
    come: usize,
    /// Whether pages have checksums.
    checksums: bool,
    /// On a TLS lane, what comes first. Only an answer that is cut in two comes into `bytes`.
    opener: Option<Box<Opener>>,
}

/// What has come is no answer.
#[derive(Debug, Error)]
pub enum ReplyError {
    /// A frame that cannot be.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A record that cannot be, or the lane's end.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// An answer that is here whole.
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    /// Its header.
    pub header: FaultReply,
    /// Where its page begins: within the opened record, or `bytes`.
    page: usize,
    in_record: bool,
}

/// What is to be received next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// Whatever comes, as much as there is room for.
    Any,
    /// The rest of an answer: so many bytes.
    Rest(usize),
}

impl Replies {
    /// Nothing has come of a lane whose pages have `checksums`, or none.
    pub fn new(checksums: bool) -> Self {
        Self { bytes: Box::new([0; ROOM]), taken: 0, come: 0, checksums, opener: None }
    }

    /// Forgets what has come: the answers of `lane` come next, whose pages have `checksums` or none.
    ///
    /// # Errors
    /// When somebody else reads from it.
    pub fn begin(&mut self, lane: &Socket, checksums: bool) -> Result<(), TlsError> {
        (self.taken, self.come, self.checksums) = (0, 0, checksums);
        self.opener = lane.tls().map(Tls::take_opener).transpose()?;
        Ok(())
    }

    /// Where the next bytes go, and what is wanted of them. There is always room for the rest of an answer.
    pub fn room(&mut self) -> (&mut [u8], Wanted) {
        self.tidy();
        let lacking = self.lacking();
        if let Some(opener) = &mut self.opener {
            let partial = opener.is_within_a_record();
            let (space, needed) = opener.space(1);
            return if partial { (&mut space[..needed], Wanted::Rest(needed)) } else { (space, Wanted::Any) };
        }
        match lacking {
            Some(rest) => (&mut self.bytes[self.come..self.come + rest], Wanted::Rest(rest)),
            None => (&mut self.bytes[self.come..], Wanted::Any),
        }
    }

    /// So many bytes have come into that [room](Self::room).
    pub fn came(&mut self, count: usize) {
        match &mut self.opener {
            Some(opener) => opener.received(count),
            None => self.come = (self.come + count).min(ROOM),
        }
    }

    fn tidy(&mut self) {
        self.bytes.copy_within(self.taken..self.come, 0);
        (self.taken, self.come) = (0, self.come - self.taken);
    }

    /// Takes the next answer that is here whole, and as it was sent, for a machine with `ram` pages.
    ///
    /// # Errors
    /// When what has come is no answer, or a damaged one.
    pub fn next(&mut self, ram: PageCount) -> Result<Option<Reply>, ReplyError> {
        while let Some(opener) = &mut self.opener {
            let length = opener.plaintext()?.len();
            if length == 0 {
                break;
            }
            let position = opener.position();
            let plain = opener.opened_at(position);
            if self.come == self.taken
                && let Some((header, whole)) = answer(&plain[..length], self.checksums, ram)?
            {
                opener.take(whole);
                return Ok(Some(Reply { header, page: position + FaultReply::LEN, in_record: true }));
            }
            // A part of an answer: what follows it is in another record.
            let count = length.min(self.wanting());
            self.tidy();
            let Some(opener) = &mut self.opener else { break };
            self.bytes[self.come..self.come + count].copy_from_slice(&opener.opened_at(position)[..count]);
            self.come += count;
            opener.take(count);
            if let Some(reply) = self.next_of_bytes(ram)? {
                return Ok(Some(reply));
            }
        }
        if self.opener.is_some() { Ok(None) } else { self.next_of_bytes(ram) }
    }

    /// How much of an answer that is cut in two may come next, at most.
    fn wanting(&self) -> usize {
        let here = self.come - self.taken;
        if here < FaultReply::LEN { FaultReply::LEN - here } else { LONGEST - here.min(LONGEST) }
    }

    fn next_of_bytes(&mut self, ram: PageCount) -> Result<Option<Reply>, ReplyError> {
        let Some((header, whole)) = answer(&self.bytes[self.taken..self.come], self.checksums, ram)? else {
            return Ok(None);
        };
        let page = self.taken + FaultReply::LEN;
        self.taken += whole;
        Ok(Some(Reply { header, page, in_record: false }))
    }

    /// The page of an answer that has one, until there is [room](Self::room) for others.
    pub fn page(&self, reply: Reply) -> Option<&[u8; PAGE_SIZE]> {
        let bytes = match &self.opener {
            Some(opener) if reply.in_record => opener.opened_at(reply.page),
            _ => self.bytes.get(reply.page..)?,
        };
        bytes.first_chunk().filter(|_| reply.header.payload() == PAGE_SIZE)
    }

    /// How much is missing of the page whose header has come.
    fn lacking(&self) -> Option<usize> {
        let here = self.come - self.taken;
        // Whatever its page, a header that was not taken is an answer with a page.
        (here >= FaultReply::LEN).then(|| LONGEST.saturating_sub(here)).filter(|rest| *rest > 0)
    }
}

/// The header of the answer that `bytes` begin with, and how long that is, once it is here whole and as it was sent.
fn answer(bytes: &[u8], checksums: bool, ram: PageCount) -> Result<Option<(FaultReply, usize)>, FrameError> {
    let Some(first) = bytes.first_chunk() else { return Ok(None) };
    let (header, checksum) = FaultReply::decode(first, ram)?;
    let whole = FaultReply::LEN + header.payload();
    let Some(page) = bytes.get(FaultReply::LEN..whole) else { return Ok(None) };
    if checksums {
        checksum.check("fault reply", [page])?;
    }
    Ok(Some((header, whole)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use switchover_wire::checksum::Checksum;
    use switchover_wire::frame::fault::ReplyContent;
    use switchover_wire::types::PageIndex;

    use super::*;

    const RAM: PageCount = PageCount(1000);

    /// The stream of these answers, and a filler for each page.
    fn stream(answers: &[(u64, bool)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, (page, raw)) in (0_u32..).zip(answers) {
            let content = if *raw { ReplyContent::Raw } else { ReplyContent::Zero };
            let payload = if *raw { vec![filler(number); PAGE_SIZE] } else { vec![] };
            let checksum = Checksum::of([&payload[..]]);
            bytes.extend(FaultReply { page: PageIndex(*page), tag: number, content }.encode(checksum));
            bytes.extend(payload);
        }
        bytes
    }

    fn filler(number: u32) -> u8 {
        number.to_le_bytes()[0].wrapping_mul(37) | 1
    }

    proptest! {
        #[test]
        fn answers_come_out_whole_however_the_stream_is_cut(
            answers in prop::collection::vec((0..RAM.0, any::<bool>()), 1..40),
            steps in prop::collection::vec(1..3 * LONGEST, 1..40),
        ) {
            let (stream, mut replies) = (stream(&answers), Replies::new(true));
            let (mut sent, mut steps) = (0, steps.into_iter().cycle());
            let mut got = Vec::new();
            while sent < stream.len() {
                let (room, wanted) = replies.room();
                prop_assert!(!room.is_empty());
                // The kernel gives what there is, or waits for all of the rest.
                let step = match wanted {
                    Wanted::Any => steps.next().unwrap().min(room.len()),
                    Wanted::Rest(rest) => rest,
                };
                let count = step.min(stream.len() - sent);
                room[..count].copy_from_slice(&stream[sent..sent + count]);
                sent += count;
                replies.came(count);
                while let Some(reply) = replies.next(RAM).unwrap() {
                    let page = replies.page(reply).copied();
                    prop_assert_eq!(page, (reply.header.payload() > 0).then(|| [filler(reply.header.tag); PAGE_SIZE]));
                    got.push((reply.header.page.0, page.is_some()));
                }
            }
            prop_assert_eq!(got, answers);
        }
    }

    #[test]
    fn the_rest_of_an_answer_is_waited_for_and_what_is_none_is_refused() {
        let stream = stream(&[(7, true)]);
        let mut replies = Replies::new(true);
        replies.room().0[..100].copy_from_slice(&stream[..100]);
        replies.came(100);
        assert!(replies.next(RAM).unwrap().is_none());
        assert_eq!(replies.room().1, Wanted::Rest(LONGEST - 100));
        replies.begin(&Socket::pair().unwrap().0, true).unwrap();
        let (room, wanted) = replies.room();
        assert_eq!((room.len(), wanted), (ROOM, Wanted::Any));
        room[..FaultReply::LEN].fill(0xff);
        replies.came(FaultReply::LEN);
        assert!(replies.next(RAM).is_err());
        // A page that was damaged on the way.
        for (checksums, at) in [(true, FaultReply::LEN), (true, LONGEST - 1), (false, LONGEST - 1)] {
            replies.begin(&Socket::pair().unwrap().0, checksums).unwrap();
            let (room, _) = replies.room();
            room[..LONGEST].copy_from_slice(&stream);
            room[at] ^= 0x10;
            replies.came(LONGEST);
            assert_eq!(replies.next(RAM).is_err(), checksums, "byte {at}");
        }
    }
}
