//! How many strangers a destination listens to at once, and for how long: from the acceptance of a connection until it is known
//! whose it is.
//!
//! Whoever can reach the port can connect to it, so all that a connection costs before that has a bound here, whatever protocol
//! the two speak meanwhile:
//! - [`PLACES`] connections are listened to at a time, each by a thread. One more takes the place of another: of the address
//!   that has the most, its oldest one, since a source speaks at once. An address that is alone may have all places; one that
//!   comes later gets its share of them at once.
//! - Each has [`HEARING`] at least, unless its address has more than half of the places and another one comes: until the oldest
//!   has had that, the next ones wait in the kernel's queue. So a source among many strangers is not thrown out before its first
//!   words are read.
//! - A place is free when its thread has let go of it, and not before: there are never more.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use switchover_wire::socket::Socket;

/// Connections whose peer is not known yet. Each costs a thread, and 64 KiB for what it says at most: 4 MiB together.
pub const PLACES: usize = 64;

/// How long a connection is listened to before another may take its place. Before it is known, a source needs a round trip, for TLS or
/// to answer its challenge, and what that takes to compute: this is enough between two continents, and on a busy host. So long, and
/// what is before it in the kernel's queue, waits a source that finds strangers in all places, for each of its lanes.
const HEARING: Duration = Duration::from_millis(200);

/// The connections that are listened to.
#[derive(Debug, Default)]
pub struct Gate {
    places: Mutex<Places>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct Places {
    next: u64,
    taken: Vec<Guest>,
}

#[derive(Debug)]
struct Guest {
    number: u64,
    socket: Arc<Socket>,
    from: Option<IpAddr>,
    since: Instant,
    /// Its place is wanted, and its connection shut down.
    asked_out: bool,
    /// It is a source, as far as can be known: nobody takes its place.
    known: bool,
}

/// A connection's place, until this is dropped.
#[derive(Debug)]
pub struct Place {
    gate: Arc<Gate>,
    number: u64,
}

/// Whose place was taken.
#[derive(Debug)]
pub struct Displaced(pub Arc<Socket>);

impl Gate {
    /// Waits for a place and takes it. `told` hears of each connection that has to go for it.
    pub fn enter(self: &Arc<Self>, socket: &Arc<Socket>, mut told: impl FnMut(Displaced)) -> Place {
        let from = socket.peer_ip();
        let mut places = self.lock();
        while places.taken.len() >= PLACES {
            let wait = match places.displace(from, Instant::now()) {
                Ok(Some(displaced)) => {
                    told(displaced);
                    continue;
                }
                // Somebody is on the way out, or is to be waited for.
                Ok(None) => HEARING,
                Err(wait) => wait,
            };
            places = self.left.wait_timeout(places, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        let number = places.next;
        places.next += 1;
        let socket = Arc::clone(socket);
        places.taken.push(Guest { number, socket, from, since: Instant::now(), asked_out: false, known: false });
        Place { gate: Arc::clone(self), number }
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Places {
    /// Shuts down the connection whose place `from` gets, unless one is on its way out; or says how long to wait for one.
    fn displace(&mut self, from: Option<IpAddr>, now: Instant) -> Result<Option<Displaced>, Duration> {
        if self.taken.iter().any(|guest| guest.asked_out) {
            return Ok(None);
        }
        let mut crowd: HashMap<Option<IpAddr>, usize> = HashMap::new();
        for guest in &self.taken {
            *crowd.entry(guest.from).or_default() += 1;
        }
        let most = crowd.values().copied().max().unwrap_or(0);
        let may_go = |guest: &Guest| !guest.known && crowd.get(&guest.from).copied() == Some(most);
        // In order of arrival.
        let Some(oldest) = self.taken.iter_mut().find(|guest| may_go(guest)) else { return Ok(None) };
        let greedy = most > PLACES / 2 && oldest.from != from;
        let heard = now.saturating_duration_since(oldest.since);
        if !greedy && heard < HEARING {
            return Err(HEARING.saturating_sub(heard));
        }
        oldest.asked_out = true;
        oldest.socket.shutdown();
        Ok(Some(Displaced(Arc::clone(&oldest.socket))))
    }
}

impl Place {
    /// The peer has proved to be a source: it is no longer thrown out. It keeps its place until it has its answer.
    pub fn is_known(&self) {
        if let Some(guest) = self.gate.lock().taken.iter_mut().find(|guest| guest.number == self.number) {
            guest.known = true;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.gate.lock().taken.retain(|guest| guest.number != self.number);
        self.gate.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(from: &[u8]) -> (Places, Vec<Socket>) {
        let mut others = Vec::new();
        let since = Instant::now();
        let taken = (0..).zip(from).map(|(number, from)| {
            let (near, far) = Socket::pair().unwrap();
            others.push(far);
            let from = Some(IpAddr::from([10, 0, 0, *from]));
            Guest { number, socket: Arc::new(near), from, since, asked_out: false, known: false }
        });
        let taken = taken.collect();
        (Places { next: 1000, taken }, others)
    }

    fn gone(places: &Places) -> Vec<u64> {
        places.taken.iter().filter(|guest| guest.asked_out).map(|guest| guest.number).collect()
    }

    const ONE: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)));
    const TWO: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2)));

    #[test]
    fn the_oldest_goes_once_it_was_listened_to_and_one_at_a_time() {
        let (mut places, _others) = places(&[1; PLACES]);
        let now = places.taken[0].since;
        assert_eq!(places.displace(ONE, now).unwrap_err(), HEARING);
        assert!(places.displace(ONE, now + HEARING).unwrap().is_some());
        assert!(places.displace(ONE, now + HEARING).unwrap().is_none(), "its place is about to be free");
        assert_eq!(gone(&places), [0]);
    }

    #[test]
    fn an_address_that_has_most_places_makes_room_for_another_at_once() {
        let mut from = [1; PLACES];
        from[0] = 2;
        let (mut places, _others) = places(&from);
        let now = places.taken[0].since;
        assert!(places.displace(TWO, now).unwrap().is_some());
        assert_eq!(gone(&places), [1], "not the place of the one that has fewer");
    }

    #[test]
    fn who_is_known_is_not_thrown_out() {
        let (mut places, _others) = places(&[1; PLACES]);
        places.taken[0].known = true;
        let late = places.taken[0].since + HEARING;
        assert!(places.displace(ONE, late).unwrap().is_some());
        assert_eq!(gone(&places), [1]);
    }

    #[test]
    fn there_are_never_more_than_the_places() {
        let gate = Arc::new(Gate::default());
        let mut others = Vec::new();
        let (leave, left) = std::sync::mpsc::channel::<Place>();
        let mut most = 0;
        // Whoever is shut down leaves, as its thread would.
        let leaving = std::thread::spawn(move || left.into_iter().for_each(drop));
        let mut inside: Vec<(Arc<Socket>, Place)> = Vec::new();
        for _ in 0..PLACES * 2 {
            let (near, far) = Socket::pair().unwrap();
            others.push(far);
            let near = Arc::new(near);
            let place = gate.enter(&near, |Displaced(gone)| {
                let at = inside.iter().position(|(socket, _)| Arc::ptr_eq(socket, &gone)).unwrap();
                leave.send(inside.remove(at).1).unwrap();
            });
            inside.push((near, place));
            most = most.max(gate.lock().taken.len());
        }
        drop(leave);
        leaving.join().unwrap();
        assert_eq!(most, PLACES);
        drop(inside);
        assert!(gate.lock().taken.is_empty());
    }
}
