//! Strangers: whoever connects to a destination's port and is no source of it.
//!
//! What a crowd says is decided by a stranger's number alone, so that two crowds of a size say the same: noise, other protocols,
//! handshakes that are cut short, changed or [recorded](crate::link::Recording) of a true one, the wrong one of TLS and plain words,
//! nothing at all, and a byte now and then.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::waiting::PATIENCE;

/// How many of a crowd connect at a time.
const WORKERS: usize = 4;

/// How many each of these keeps open that do not go by themselves. Together more than a destination has places for, and fewer than
/// its kernel has: whoever finds no room there is not heard for a second, which would measure the kernel.
const KEPT: usize = 25;

/// The most that is told to somebody whom nobody knows: a reason, or the certificates that everybody may see.
const TOLD: usize = 16 << 10;

/// What strangers have heard elsewhere.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// What true sources said on their lanes, with and without TLS.
    pub handshakes: Vec<Vec<u8>>,
}

/// A crowd that has come to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Came {
    /// How many connected.
    pub connected: usize,
    /// How many of them said what a true source had said before, from the first byte to the last.
    pub repeated: usize,
}

/// What a stranger does when it has spoken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Then {
    /// It says that this was all, and waits until it is hung up on.
    Ends,
    /// It stays without a word.
    Stays,
    /// It says another byte of this every now and then.
    Dribbles,
}

/// A stranger that stays.
struct Staying {
    stream: TcpStream,
    rest: VecDeque<u8>,
}

impl Heard {
    /// What the stranger of this number says at once, what it may say later, and how it goes on.
    fn says(&self, number: usize) -> (Vec<u8>, VecDeque<u8>, Then) {
        let whole = &self.handshakes[number / 10 % self.handshakes.len()];
        let ends = |bytes| (bytes, VecDeque::new(), Then::Ends);
        match number % 10 {
            0 => ends(noise(number, 1 + number * 37 % 9000)),
            1 => ends(b"GET / HTTP/1.1\r\nHost: destination\r\n\r\n".to_vec()),
            // A handshake that is cut short, somewhere.
            2 => ends(whole[..number * 7 % whole.len()].to_vec()),
            // And one of which a bit is wrong.
            3 => {
                let mut changed = whole.clone();
                let at = number * 11 % changed.len().min(400);
                changed[at] ^= 1 << (number % 8);
                ends(changed)
            }
            // Half of one, and silence.
            4 => (whole[..whole.len() / 2].to_vec(), VecDeque::new(), Then::Stays),
            5 => (Vec::new(), VecDeque::new(), Then::Stays),
            6 => (whole[..1].to_vec(), whole[1..].iter().copied().collect(), Then::Dribbles),
            _ => ends(whole.clone()),
        }
    }

    const fn repeats(number: usize) -> bool {
        number % 10 > 6
    }
}

/// So many bytes that look like none in particular, the same each time.
///
/// # Panics
/// Never.
#[must_use]
pub fn noise(seed: usize, length: usize) -> Vec<u8> {
    let byte = |number: usize| u32::try_from(number % (1 << 31)).unwrap().wrapping_mul(2_654_435_761).to_be_bytes()[0];
    (seed..seed + length).map(byte).collect()
}

/// Sends a crowd of so many to `to`, a TCP address, and returns when the last has spoken and all are gone.
///
/// # Panics
/// When one of them is taken for a source, or told more than anybody may know, or not hung up on.
#[must_use]
pub fn comes(to: &str, heard: &Heard, count: usize) -> Came {
    let to = to.strip_prefix("tcp:").expect("a TCP address");
    let (next, came) = (AtomicUsize::new(0), Mutex::new(Came::default()));
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let mut kept = VecDeque::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    let stream = TcpStream::connect(to).unwrap_or_else(|error| panic!("stranger {number}: {error}"));
                    speak(stream, heard.says(number), &mut kept);
                    dribble(&mut kept);
                    let mut came = came.lock().unwrap();
                    came.connected += 1;
                    came.repeated += usize::from(Heard::repeats(number));
                }
            });
        }
    });
    came.into_inner().unwrap()
}

fn speak(mut stream: TcpStream, (bytes, rest, then): (Vec<u8>, VecDeque<u8>, Then), kept: &mut VecDeque<Staying>) {
    // It may be hung up on while it still speaks.
    let _ = stream.write_all(&bytes);
    if then != Then::Ends {
        stream.set_nonblocking(true).unwrap();
        kept.push_back(Staying { stream, rest });
        if kept.len() > KEPT {
            kept.pop_front();
        }
        return;
    }
    let _ = stream.shutdown(Shutdown::Write);
    not_taken(&is_told(&stream));
}

fn dribble(kept: &mut VecDeque<Staying>) {
    for stranger in kept {
        if let Some(byte) = stranger.rest.pop_front() {
            let _ = stranger.stream.write(&[byte]);
        }
    }
}

/// All that somebody is told, until it is hung up on.
///
/// # Panics
/// When it is not.
#[must_use]
pub fn is_told(mut stream: &TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut told = Vec::new();
    match stream.read_to_end(&mut told) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            panic!("nobody hung up on a stranger within {PATIENCE:?}")
        }
        // A reset is one way to do it.
        _ => told,
    }
}

/// Checks that somebody who was told this was not taken for a source.
///
/// # Panics
/// When it was.
pub fn not_taken(told: &[u8]) {
    assert!(told.len() < TOLD, "{} bytes were told to a stranger", told.len());
    let mut rest = told;
    // A destination's texts: magic, length, checksum, and what it is; over TLS nothing of them can be seen.
    while let Some((header, body)) = rest.split_first_chunk::<16>()
        && header.starts_with(b"\x93SWOVA")
    {
        assert_ne!(body.first(), Some(&0), "a stranger was welcomed");
        let length = u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize;
        rest = body.get(length..).unwrap_or_default();
    }
}

/// Listens for one source, and is none that answers: what the source says first, when `connects` has made it connect.
///
/// # Panics
/// When it says nothing.
#[must_use]
pub fn first_words(connects: impl FnOnce(&str)) -> Vec<u8> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = format!("tcp:{}", listener.local_addr().unwrap());
    let heard = thread::spawn(move || {
        let (mut source, _) = listener.accept().unwrap();
        let mut words = vec![0; 64 << 10];
        let count = source.read(&mut words).unwrap();
        words.truncate(count);
        words
    });
    connects(&to);
    heard.join().unwrap()
}
