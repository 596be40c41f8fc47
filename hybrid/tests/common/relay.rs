//! A link in the test's hands that damages one bit of what crosses it.
//!
//! Lanes are known by the order in which a source opens them: control, fault, bulk, one of each.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use switchover_wire::address::Address;
use switchover_wire::types::LaneRole;

/// The lanes in the order in which they are opened.
pub const ROLES: [LaneRole; 3] = [LaneRole::Control, LaneRole::Fault, LaneRole::Bulk];

/// One way of a lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stream {
    pub role: LaneRole,
    pub to_destination: bool,
}

impl Stream {
    pub fn all() -> impl Iterator<Item = Self> {
        ROLES.into_iter().flat_map(|role| [true, false].map(|to_destination| Self { role, to_destination }))
    }

    fn index(self) -> usize {
        let role = ROLES.iter().position(|role| *role == self.role).unwrap();
        role * 2 + usize::from(self.to_destination)
    }
}

/// A bit to flip: bit `at % 8` of byte `at / 8` of a stream, counted from its handshake on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flip {
    pub stream: Stream,
    pub at: u64,
}

#[derive(Default)]
struct Shared {
    flip: Mutex<Option<Flip>>,
    flipped: AtomicBool,
    connections: AtomicUsize,
    crossed: [AtomicU64; 6],
}

/// The link.
pub struct Relay {
    shared: Arc<Shared>,
    address: Address,
}

impl Relay {
    /// A link to `target`, which damages what `flip` says, once.
    pub fn to(target: &Address, flip: Option<Flip>) -> Self {
        let target = target.to_string().trim_start_matches("tcp:").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
        let shared = Arc::new(Shared { flip: Mutex::new(flip), ..Shared::default() });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            while let Ok((source, _)) = listener.accept() {
                // The test's last reference is gone with its relay.
                if Arc::strong_count(&accepting) == 1 {
                    return;
                }
                let Ok(destination) = TcpStream::connect(&target) else { continue };
                let role = ROLES[accepting.connections.fetch_add(1, Ordering::AcqRel) % ROLES.len()];
                for to_destination in [true, false] {
                    let (from, to) = if to_destination { (&source, &destination) } else { (&destination, &source) };
                    from.set_nodelay(true).unwrap();
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let shared = Arc::clone(&accepting);
                    thread::spawn(move || shared.carry(Stream { role, to_destination }, from, to));
                }
            }
        });
        Self { shared, address }
    }

    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// Whether the bit has been reached.
    pub fn flipped(&self) -> bool {
        self.shared.flipped.load(Ordering::Acquire)
    }

    /// Nothing is damaged any more; lanes that are opened from now on are those of a new link.
    pub fn mend(&self) {
        *self.shared.flip.lock().unwrap() = None;
        self.shared.connections.store(0, Ordering::Release);
    }

    /// How many bytes crossed a stream.
    pub fn crossed(&self, stream: Stream) -> u64 {
        self.shared.crossed[stream.index()].load(Ordering::Acquire)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // What it lets in next is the last.
        self.shared = Arc::default();
        let _ = TcpStream::connect(self.address.to_string().trim_start_matches("tcp:"));
    }
}

impl Shared {
    fn carry(&self, stream: Stream, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let count = match from.read(&mut bytes) {
                Ok(count) if count > 0 => count,
                _ => break,
            };
            let start = self.crossed[stream.index()].fetch_add(count as u64, Ordering::AcqRel);
            let mut flip = self.flip.lock().unwrap();
            if let Some(Flip { at, .. }) = flip.filter(|flip| flip.stream == stream)
                && let Some(byte) = (at / 8).checked_sub(start)
                && byte < count as u64
            {
                bytes[usize::try_from(byte).unwrap()] ^= 1 << (at % 8);
                self.flipped.store(true, Ordering::Release);
                *flip = None;
            }
            drop(flip);
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        // What one side has ended, the other learns of; both ways, as the end of a process would.
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    }
}
