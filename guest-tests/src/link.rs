//! A link in the test's hands: what the two sides of a migration say to each other passes through here, and can be cut, held up
//! or slowed down at a place that is exact to the message, or to the byte.
//!
//! ```text
//!   source ── one connection a lane ──▶ Link ── one connection a lane ──▶ destination
//!                                        │
//!           hold(mark) ── until it is reached ── let_go, or cut, stall, mend
//! ```
//!
//! A lane is known by what it says in its handshake, and a control lane's messages by their number: nothing else is understood
//! here, and nothing is changed, but for a bit that [`Link::damage`] names. Of a lane over TLS nothing is understood at all: it can be
//! cut, stalled, slowed down and damaged. What follows a held message waits behind it; other lanes and the other direction go on.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::socket::{setsockopt, sockopt};

use crate::waiting::{PATIENCE, until};

/// What each record of TLS begins with, of whatever type.
const TLS_RECORDS: std::ops::RangeInclusive<u8> = 20..=23;

/// What a lane is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The session's messages.
    Control,
    /// Requests and their pages.
    Fault,
    /// Pushed pages.
    Bulk,
}

/// Which way something goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Toward {
    /// From the source.
    Destination,
    /// From the destination.
    Source,
}

/// A message on a control lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "they are described where they are spoken")]
pub enum Message {
    Prepared,
    State,
    Restored,
    Commit,
    Running,
    Drained,
    DrainedAck,
    Abort,
    /// Of pre-copy, by its number.
    Round(u8),
    Missing,
    Standing,
}

/// A place in what is said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mark {
    /// The last words of the handshake on a lane of this role: the answer to a challenge, and the answer to all of it.
    Greeting(Role, Toward),
    /// A message.
    Message(Message),
    /// So many bytes have crossed all lanes of this role, greetings not counted.
    Bytes(Role, Toward, u64),
}

/// What a source has said on a lane, from the first byte on.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Recording {
    /// The lane's; unknown over TLS.
    pub role: Option<Role>,
    /// As it crossed; of what is longer, the beginning.
    pub bytes: Vec<u8>,
}

/// How much of a lane is recorded: its handshake, and some of what follows.
const RECORDED: usize = 64 << 10;

/// How a connection is ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// As by a process that closes it: FIN.
    Closed,
    /// As by a host that has forgotten it: RST.
    Reset,
}

/// A link from wherever a source connects to, to a destination.
#[derive(Debug)]
pub struct Link {
    shared: Arc<Shared>,
    address: String,
}

#[derive(Debug)]
struct Shared {
    target: String,
    state: Mutex<State>,
    changed: Condvar,
    ended: AtomicBool,
}

#[derive(Debug)]
struct State {
    pairs: Vec<Arc<Pair>>,
    door: Door,
    /// One lane goes elsewhere: how many go where they should before it, and its address.
    detour: Option<(usize, String)>,
    delay: Duration,
    hold: Hold,
    /// A bit to be flipped, counted from what crosses its way next.
    damage: Option<(Role, Toward, u64)>,
    /// By role and direction.
    crossed: [u64; 6],
    /// Of each lane that was begun.
    recordings: Vec<Recording>,
    /// When it was last cut, or began to stall.
    struck: Option<SystemTime>,
}

/// What becomes of new connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Door {
    Open,
    Shut,
    OpensAt(Instant),
    /// They are taken, and nothing on them goes any further.
    Silent,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hold {
    Nothing,
    At(Mark),
    Holding,
}

/// The two connections of a lane.
#[derive(Debug)]
struct Pair {
    source: TcpStream,
    destination: TcpStream,
    /// Its number among all that were begun.
    number: usize,
    role: OnceLock<Role>,
    cut: AtomicBool,
    stalled: AtomicBool,
}

/// Where a greeting says how long its body is.
const GREETING_LENGTH_AT: usize = 8;

/// What comes before the body of a control lane's message: its length, and two checksums.
const MESSAGE_HEADER: usize = 12;

/// How long a write waits for a side that does not read before it looks whether the link was cut.
const LOOK: Duration = Duration::from_millis(20);

impl Link {
    /// A link to the destination that listens at `target`, a TCP address.
    ///
    /// # Panics
    /// When there is no port for it.
    #[must_use]
    pub fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let state = State {
            pairs: Vec::new(),
            door: Door::Open,
            detour: None,
            delay: Duration::ZERO,
            hold: Hold::Nothing,
            damage: None,
            crossed: [0; 6],
            recordings: Vec::new(),
            struck: None,
        };
        let target = target.strip_prefix("tcp:").expect("a TCP address").to_owned();
        let (state, ended) = (Mutex::new(state), AtomicBool::new(false));
        let shared = Arc::new(Shared { target, state, changed: Condvar::new(), ended });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accepting.accept(&listener));
        Self { shared, address }
    }

    /// Where the source is to connect to.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Holds up the first that comes to `mark` from now on, and what follows it on its way. What was held goes on.
    pub fn hold(&self, mark: Mark) {
        let mut state = self.shared.state();
        state.hold = Hold::At(mark);
        state.crossed = [0; 6];
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Whether something is held.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.shared.state().hold == Hold::Holding
    }

    /// Waits until something is held.
    ///
    /// # Panics
    /// When nothing comes to the mark.
    pub fn wait_held(&self) {
        let mut state = self.shared.state();
        let end = Instant::now() + PATIENCE;
        while state.hold != Hold::Holding {
            let left = end.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "waited {PATIENCE:?} in vain: {:?}, {} lanes so far",
                state.hold,
                state.recordings.len()
            );
            state = self.shared.wait(state, left);
        }
    }

    /// Lets what is held go on, and what would be.
    pub fn let_go(&self) {
        self.shared.state().hold = Hold::Nothing;
        self.shared.changed.notify_all();
    }

    /// Ends all connections, and what is held on them is lost. New ones are refused until [`mend`](Self::mend).
    pub fn cut(&self, how: Ended) {
        self.end_all(how, Door::Shut);
    }

    /// Ends all connections; new ones are refused for so long.
    pub fn cut_for(&self, time: Duration, how: Ended) {
        self.end_all(how, Door::OpensAt(Instant::now() + time));
    }

    /// Nothing crosses any more, and nobody is told.
    pub fn stall(&self) {
        let mut state = self.shared.state();
        state.door = Door::Silent;
        state.struck = Some(SystemTime::now());
        state.hold = Hold::Nothing;
        for pair in &state.pairs {
            pair.stalled.store(true, Ordering::Release);
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// New connections cross again. Old ones stay as they are.
    pub fn mend(&self) {
        self.shared.state().door = Door::Open;
    }

    /// Of the lanes that are begun from now on, the one behind so many others goes to `elsewhere`, a TCP address.
    ///
    /// # Panics
    /// When it is none.
    pub fn divert(&self, behind: usize, elsewhere: &str) {
        let elsewhere = elsewhere.strip_prefix("tcp:").expect("a TCP address").to_owned();
        self.shared.state().detour = Some((behind, elsewhere));
    }

    /// Everything takes so much longer from now on, each way.
    pub fn delay(&self, by: Duration) {
        self.shared.state().delay = by;
    }

    /// Flips one bit of what crosses the lanes of a role, so many bits from now.
    pub fn damage(&self, role: Role, toward: Toward, bit: u64) {
        self.shared.state().damage = Some((role, toward, bit));
    }

    /// Waits until that bit was flipped.
    ///
    /// # Panics
    /// When so much does not cross.
    pub fn wait_damaged(&self) {
        until("a bit is flipped", || self.shared.state().damage.is_none().then_some(()));
    }

    /// What the source has said so far, of each lane in the order in which they were begun.
    #[must_use]
    pub fn recordings(&self) -> Vec<Recording> {
        self.shared.state().recordings.clone()
    }

    /// When it was last cut, or began to stall.
    #[must_use]
    pub fn struck(&self) -> Option<SystemTime> {
        self.shared.state().struck
    }

    fn end_all(&self, how: Ended, door: Door) {
        let mut state = self.shared.state();
        state.door = door;
        state.struck = Some(SystemTime::now());
        state.hold = Hold::Nothing;
        for pair in state.pairs.drain(..) {
            pair.end(how);
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        self.cut(Ended::Reset);
        // Wakes its listener up.
        let _ = TcpStream::connect(self.address.trim_start_matches("tcp:"));
    }
}

impl Pair {
    fn end(&self, how: Ended) {
        self.cut.store(true, Ordering::Release);
        for socket in [&self.source, &self.destination] {
            let _ = match how {
                Ended::Closed => socket.shutdown(Shutdown::Both),
                // Told to nobody, but it wakes our own reader; the reset is sent when the last holder has let go.
                Ended::Reset => {
                    let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                    let _ = setsockopt(socket, sockopt::Linger, &at_once);
                    socket.shutdown(Shutdown::Read)
                }
            };
        }
    }

    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// The socket that is read, and the one that is written.
    const fn sockets(&self, toward: Toward) -> (&TcpStream, &TcpStream) {
        match toward {
            Toward::Destination => (&self.source, &self.destination),
            Toward::Source => (&self.destination, &self.source),
        }
    }
}

impl State {
    /// Where the next lane goes to.
    fn next_target(&mut self, usual: &str) -> String {
        match self.detour.take() {
            Some((0, elsewhere)) => return elsewhere,
            Some((behind, elsewhere)) => self.detour = Some((behind - 1, elsewhere)),
            None => {}
        }
        usual.to_owned()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, most: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, most).unwrap_or_else(PoisonError::into_inner).0
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        while let Ok((source, _)) = listener.accept() {
            if self.ended.load(Ordering::Acquire) {
                return;
            }
            let mut state = self.state();
            if matches!(state.door, Door::OpensAt(at) if Instant::now() >= at) {
                state.door = Door::Open;
            }
            if !matches!(state.door, Door::Open | Door::Silent) {
                continue;
            }
            // One that is not there is one that hangs up.
            let target = state.next_target(&self.target);
            let Ok(destination) = TcpStream::connect(target) else { continue };
            for socket in [&source, &destination] {
                socket.set_nodelay(true).unwrap();
                socket.set_write_timeout(Some(LOOK)).unwrap();
            }
            let (role, cut) = (OnceLock::new(), AtomicBool::new(false));
            let stalled = AtomicBool::new(state.door == Door::Silent);
            let number = state.recordings.len();
            state.recordings.push(Recording::default());
            let pair = Arc::new(Pair { source, destination, number, role, cut, stalled });
            state.pairs.push(Arc::clone(&pair));
            drop(state);
            for toward in [Toward::Destination, Toward::Source] {
                let (shared, pair) = (Arc::clone(self), Arc::clone(&pair));
                thread::spawn(move || {
                    // An end is passed on, as far as it is one: a cut tells each side itself, and through a link that stalls not
                    // even that comes.
                    let ended = shared.relay(&pair, toward).is_ok();
                    if ended && !pair.is_cut() && !pair.stalled.load(Ordering::Acquire) {
                        let _ = pair.sockets(toward).1.shutdown(Shutdown::Write);
                    }
                });
            }
        }
    }

    /// Passes on what goes one way, to its end.
    fn relay(&self, pair: &Pair, toward: Toward) -> io::Result<()> {
        let (mut from, _) = pair.sockets(toward);
        let mut greeting = vec![0; 16];
        if !fill(from, &mut greeting[..1])? {
            return Ok(());
        }
        if TLS_RECORDS.contains(&greeting[0]) {
            self.pass(pair, toward, None, &greeting[..1])?;
            return self.pass_sealed(pair, toward);
        }
        if !fill(from, &mut greeting[1..])? {
            return Ok(());
        }
        append(from, &mut greeting, GREETING_LENGTH_AT)?;
        if toward == Toward::Destination {
            // Behind the two versions and the session's name.
            let role = match greeting.get(16 + 18) {
                Some(0) => Role::Control,
                Some(1) => Role::Fault,
                Some(2) => Role::Bulk,
                other => panic!("a lane of role {other:?}"),
            };
            pair.role.get_or_init(|| role);
            self.state().recordings[pair.number].role = Some(role);
        }
        let role = *pair.role.get().expect("a destination only answers");
        self.pass(pair, toward, None, &greeting)?;
        let mut greeting = vec![0; 16];
        if !fill(from, &mut greeting)? {
            return Ok(());
        }
        append(from, &mut greeting, GREETING_LENGTH_AT)?;
        self.pass(pair, toward, Some(Mark::Greeting(role, toward)), &greeting)?;
        if role == Role::Control {
            loop {
                let mut message = vec![0; MESSAGE_HEADER];
                if !fill(from, &mut message)? {
                    return Ok(());
                }
                append(from, &mut message, 0)?;
                self.pass(pair, toward, mark_of(&message[MESSAGE_HEADER..]), &message)?;
            }
        }
        let mut bytes = vec![0; 64 << 10];
        loop {
            let count = from.read(&mut bytes)?;
            if count == 0 {
                return Ok(());
            }
            self.pass_bytes(pair, role, toward, &bytes[..count])?;
        }
    }

    /// Passes on what cannot be understood, to its end: a lane over TLS.
    fn pass_sealed(&self, pair: &Pair, toward: Toward) -> io::Result<()> {
        let (mut from, _) = pair.sockets(toward);
        let mut bytes = vec![0; 64 << 10];
        loop {
            let count = from.read(&mut bytes)?;
            if count == 0 {
                return Ok(());
            }
            self.pass(pair, toward, None, &bytes[..count])?;
        }
    }

    /// Passes bytes on, up to where they are to be held, and the others behind that.
    fn pass_bytes(&self, pair: &Pair, role: Role, toward: Toward, bytes: &[u8]) -> io::Result<()> {
        let (before, mark) = {
            let mut state = self.state();
            let crossed = &mut state.crossed[role as usize * 2 + toward as usize];
            let start = *crossed;
            *crossed += bytes.len() as u64;
            let end = *crossed;
            match state.hold {
                Hold::At(mark @ Mark::Bytes(held, way, at)) if held == role && way == toward && at <= end => {
                    (usize::try_from(at.saturating_sub(start)).unwrap(), Some(mark))
                }
                _ => (0, None),
            }
        };
        let (before, behind) = bytes.split_at(before);
        self.pass(pair, toward, None, before)?;
        self.pass(pair, toward, mark, behind)
    }

    fn pass(&self, pair: &Pair, toward: Toward, mark: Option<Mark>, bytes: &[u8]) -> io::Result<()> {
        let damaged = self.damaged(pair, toward, bytes);
        let mut bytes = damaged.as_deref().unwrap_or(bytes);
        let delay = {
            let mut state = self.state();
            if toward == Toward::Destination {
                let recorded = &mut state.recordings[pair.number].bytes;
                recorded.extend(bytes.iter().take(RECORDED.saturating_sub(recorded.len())));
            }
            if mark.is_some_and(|mark| state.hold == Hold::At(mark)) {
                state.hold = Hold::Holding;
                self.changed.notify_all();
                while state.hold == Hold::Holding && !pair.is_cut() {
                    state = self.wait(state, PATIENCE);
                }
            }
            while pair.stalled.load(Ordering::Acquire) && !pair.is_cut() {
                state = self.wait(state, PATIENCE);
            }
            state.delay
        };
        if !delay.is_zero() {
            thread::sleep(delay);
        }
        let (_, mut to) = pair.sockets(toward);
        while !bytes.is_empty() {
            if pair.is_cut() || pair.stalled.load(Ordering::Acquire) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            match to.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Shared {
    /// The bytes with the bit flipped that is to be flipped, where that is among them.
    fn damaged(&self, pair: &Pair, toward: Toward, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut state = self.state();
        let (role, way, left) = state.damage.as_mut()?;
        if pair.role.get() != Some(role) || *way != toward {
            return None;
        }
        let (byte, bit) = (usize::try_from(*left / 8).unwrap(), *left % 8);
        if byte >= bytes.len() {
            *left -= bytes.len() as u64 * 8;
            return None;
        }
        state.damage = None;
        let mut damaged = bytes.to_vec();
        damaged[byte] ^= 1 << bit;
        Some(damaged)
    }
}

/// Fills `bytes`; `false` when the end comes first.
fn fill(mut from: &TcpStream, bytes: &mut [u8]) -> io::Result<bool> {
    let mut got = 0;
    while got < bytes.len() {
        match from.read(&mut bytes[got..])? {
            0 => return Ok(false),
            count => got += count,
        }
    }
    Ok(true)
}

/// Reads the body of what has its length at `at`.
fn append(from: &TcpStream, header: &mut Vec<u8>, at: usize) -> io::Result<()> {
    let length = u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let start = header.len();
    header.resize(start + length as usize, 0);
    if fill(from, &mut header[start..])? { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// What a control lane's message is; `None` of those that no test waits for.
fn mark_of(body: &[u8]) -> Option<Mark> {
    Some(Mark::Message(match body {
        [0, ..] => Message::Prepared,
        [1, ..] => Message::State,
        [2, ..] => Message::Restored,
        [4, ..] => Message::Commit,
        [5, ..] => Message::Running,
        [6, ..] => Message::Drained,
        [7, ..] => Message::DrainedAck,
        [8, ..] => Message::Abort,
        [9, round, ..] => Message::Round(*round),
        [10, ..] => Message::Missing,
        [12, ..] => Message::Standing,
        _ => return None,
    }))
}
