//! A set of pages as bytes: which pages the destination must still fetch, told inside the blackout.
//!
//! The words of the bitmap are told as runs. Each begins with its length in words and its kind, packed into a varint
//! (`length << 2 | kind`, seven bits a byte, lowest first, in as few bytes as it fits into):
//!
//! | kind | the run | what follows |
//! |---|---|---|
//! | 0 | words of zeros | nothing |
//! | 1 | words of ones | nothing |
//! | 2 | other words | the words, little-endian |
//!
//! A guest's dirty pages lie in few stretches, or there are few of them, so that most of the bitmap is runs of zeros;
//! nothing here costs more than one look at each word.

use thiserror::Error;

/// Bits of a run's head that tell its kind.
const KIND_BITS: u32 = 2;
const ZEROS: u64 = 0;
const ONES: u64 = 1;
const LITERAL: u64 = 2;
/// Bytes of the longest varint: 64 bits, seven at a time.
const VARINT_MAX: usize = 10;
/// Words compared between two looks whether a run has ended: one cache line.
const BLOCK: usize = 8;

/// Bytes that are no set of pages. Offsets are counted in bytes from their beginning.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum BitmapError {
    /// They end within a run.
    #[error("a set of pages cannot be read: its bytes end within the run at byte {at}")]
    CutShort {
        /// Where the run begins.
        at: usize,
    },
    /// A number is longer than it need be, or than any number is.
    #[error("a set of pages cannot be read: the length at byte {at} is not written as lengths are")]
    BadLength {
        /// Where the number begins.
        at: usize,
    },
    /// A run of a kind that there is not.
    #[error("a set of pages cannot be read: the run at byte {at} is of the unknown kind {kind}")]
    UnknownKind {
        /// Where the run begins.
        at: usize,
        /// What it says that it is.
        kind: u64,
    },
    /// A run of no words.
    #[error("a set of pages cannot be read: the run at byte {at} is empty")]
    EmptyRun {
        /// Where the run begins.
        at: usize,
    },
    /// The runs go past the end of the bitmap.
    #[error("a set of pages cannot be read: the run at byte {at} goes past the end of its {count} words")]
    PastTheEnd {
        /// Where the run begins.
        at: usize,
        /// How many words were expected.
        count: usize,
    },
    /// The runs end before the bitmap does.
    #[error("a set of pages cannot be read: it has {words} words where {count} were expected")]
    Incomplete {
        /// How many words the runs have.
        words: usize,
        /// How many words were expected.
        count: usize,
    },
}

/// The words of a bitmap, in few bytes where it has long stretches of zeros or ones: never more than eight bytes a word
/// and ten more.
#[must_use]
pub fn encode(words: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = words;
    while let Some(word) = rest.first() {
        let (kind, length) = match *word {
            0 => (ZEROS, length_of(rest, 0)),
            u64::MAX => (ONES, length_of(rest, u64::MAX)),
            _ => (LITERAL, rest.iter().position(|word| matches!(*word, 0 | u64::MAX)).unwrap_or(rest.len())),
        };
        let (run, behind) = rest.split_at(length);
        put_varint(&mut bytes, (length as u64) << KIND_BITS | kind);
        if kind == LITERAL {
            let start = bytes.len();
            bytes.resize(start + length * 8, 0);
            for (place, word) in bytes[start..].as_chunks_mut::<8>().0.iter_mut().zip(run) {
                *place = word.to_le_bytes();
            }
        }
        rest = behind;
    }
    bytes
}

/// The words that [`encode`] was given, which were `count`.
///
/// `count` is what the reader knows from elsewhere. All runs are checked before the words are allocated; nothing is
/// allocated beside them.
///
/// # Errors
/// When the bytes are no bitmap of that many words.
pub fn decode(bytes: &[u8], count: usize) -> Result<Vec<u64>, BitmapError> {
    let mut words = Vec::new();
    decode_onto(&mut words, bytes, count)?;
    Ok(words)
}

/// As [`decode`], behind the words that are there already. Where there is room for them nothing is allocated.
///
/// # Errors
/// As for [`decode`]; nothing is added then.
pub fn decode_onto(words: &mut Vec<u64>, bytes: &[u8], count: usize) -> Result<(), BitmapError> {
    let mut found = 0;
    for run in (Runs { bytes, at: 0 }) {
        let run = run?;
        if run.length > count - found {
            return Err(BitmapError::PastTheEnd { at: run.at, count });
        }
        found += run.length;
    }
    if found != count {
        return Err(BitmapError::Incomplete { words: found, count });
    }
    let before = words.len();
    words.reserve_exact(count);
    words.resize(before + count, 0);
    let mut rest = &mut words[before..];
    for run in (Runs { bytes, at: 0 }) {
        let Run { length, kind, body, .. } = run?;
        let (own, behind) = rest.split_at_mut(length);
        match kind {
            Kind::Zeros => {}
            Kind::Ones => own.fill(u64::MAX),
            Kind::Literal => {
                for (word, bytes) in own.iter_mut().zip(body.as_chunks::<8>().0) {
                    *word = u64::from_le_bytes(*bytes);
                }
            }
        }
        rest = behind;
    }
    Ok(())
}

/// How many words from the first on are `value`.
fn length_of(words: &[u64], value: u64) -> usize {
    let (blocks, _) = words.as_chunks::<BLOCK>();
    // A difference is collected without a branch, so that the compiler can use vector registers.
    let same = |block: &&[u64; BLOCK]| block.iter().fold(0, |seen, word| seen | (word ^ value)) == 0;
    let whole = blocks.iter().take_while(same).count() * BLOCK;
    whole + words[whole..].iter().take_while(|word| **word == value).count()
}

fn put_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    bytes.push(number.to_le_bytes()[0]);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zeros,
    Ones,
    Literal,
}

struct Run<'a> {
    /// Where it begins.
    at: usize,
    kind: Kind,
    /// Words, never 0.
    length: usize,
    /// The words of a literal run.
    body: &'a [u8],
}

/// Walks the runs, checking each by itself.
struct Runs<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Runs<'a> {
    fn run(&mut self) -> Result<Run<'a>, BitmapError> {
        let at = self.at;
        let head = self.varint()?;
        let kind = match head & ((1 << KIND_BITS) - 1) {
            ZEROS => Kind::Zeros,
            ONES => Kind::Ones,
            LITERAL => Kind::Literal,
            kind => return Err(BitmapError::UnknownKind { at, kind }),
        };
        let length = usize::try_from(head >> KIND_BITS).map_err(|_| BitmapError::BadLength { at })?;
        if length == 0 {
            return Err(BitmapError::EmptyRun { at });
        }
        let mut body = [].as_slice();
        if kind == Kind::Literal {
            let end = length.checked_mul(8).and_then(|len| self.at.checked_add(len));
            body = end.and_then(|end| self.bytes.get(self.at..end)).ok_or(BitmapError::CutShort { at })?;
            self.at += body.len();
        }
        Ok(Run { at, kind, length, body })
    }

    fn varint(&mut self) -> Result<u64, BitmapError> {
        let at = self.at;
        let mut number = 0;
        for (byte, place) in self.bytes[at..].iter().zip(0..VARINT_MAX) {
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit, and a last byte of zero says nothing.
            if bits << (7 * place) >> (7 * place) != bits || (*byte == 0 && place > 0) {
                return Err(BitmapError::BadLength { at });
            }
            number |= bits << (7 * place);
            self.at += 1;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(if self.at - at == VARINT_MAX { BitmapError::BadLength { at } } else { BitmapError::CutShort { at } })
    }
}

impl<'a> Iterator for Runs<'a> {
    type Item = Result<Run<'a>, BitmapError>;

    fn next(&mut self) -> Option<Self::Item> {
        (self.at < self.bytes.len()).then(|| self.run())
    }
}

#[cfg(test)]
mod tests;
