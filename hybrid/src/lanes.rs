//! The open lanes of one side, and what has crossed them.

use std::sync::{Arc, Mutex, PoisonError};

use switchover_wire::socket::Socket;
use switchover_wire::types::{LaneId, LaneRole};

use crate::report::LaneBytes;

/// The most bulk lanes that a session may have. More do not help a host whose cores they would have to share, and a
/// page's state has room for 64 lanes in all.
pub const BULK_LANES_LIMIT: u8 = 32;

/// All lanes of a session.
#[derive(Debug, Default)]
pub struct Lanes(Mutex<Book>);

#[derive(Debug, Default)]
struct Book {
    /// Kept for their counters after they are closed, until others take their place.
    open: Vec<(LaneId, Arc<Socket>)>,
    /// What had crossed lanes that others have taken the place of.
    past: Vec<(LaneId, Crossed)>,
}

/// Bytes that crossed a lane.
#[derive(Clone, Copy, Default, Debug)]
struct Crossed {
    sent: u64,
    received: u64,
}

impl Crossed {
    fn of(socket: &Socket) -> Self {
        Self { sent: socket.counters().sent(), received: socket.counters().received() }
    }

    const fn plus(self, other: Self) -> Self {
        Self { sent: self.sent + other.sent, received: self.received + other.received }
    }

    const fn both_ways(self) -> u64 {
        self.sent + self.received
    }
}

impl Book {
    fn note(&mut self, id: LaneId, more: Crossed) {
        match self.past.iter_mut().find(|(past, _)| *past == id) {
            Some((_, crossed)) => *crossed = crossed.plus(more),
            None => self.past.push((id, more)),
        }
    }

    /// What has crossed those that are `wanted`, both ways.
    fn sum(&self, wanted: impl Fn(LaneId) -> bool) -> u64 {
        let open = self.open.iter().map(|(id, socket)| (*id, Crossed::of(socket)));
        let all = self.past.iter().copied().chain(open);
        all.filter(|(id, _)| wanted(*id)).map(|(_, crossed)| crossed.both_ways()).sum()
    }

    /// What has crossed each, those of the same name taken together.
    fn all(&self) -> Vec<(LaneId, Crossed)> {
        let mut sum = Self { open: Vec::new(), past: self.past.clone() };
        for (id, socket) in &self.open {
            sum.note(*id, Crossed::of(socket));
        }
        sum.past
    }
}

impl Lanes {
    /// Adds an open lane.
    pub fn add(&self, id: LaneId, socket: Arc<Socket>) {
        self.lock().open.push((id, socket));
    }

    /// Shuts every lane down; whoever is blocked on one is woken.
    pub fn shut_down(&self) {
        for (_, socket) in &self.lock().open {
            socket.shutdown();
        }
    }

    /// Shuts every lane down and lets go of it; what has crossed it is remembered.
    pub fn retire(&self) {
        let mut book = self.lock();
        for (id, socket) in std::mem::take(&mut book.open) {
            socket.shutdown();
            book.note(id, Crossed::of(&socket));
        }
    }

    /// Bytes that came over the lanes that are open.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.lock().open.iter().map(|(_, socket)| socket.counters().received()).sum()
    }

    /// What has crossed each.
    #[must_use]
    pub fn bytes(&self) -> Vec<LaneBytes> {
        let one = |(id, crossed): (LaneId, Crossed)| LaneBytes {
            lane: id.to_string(),
            sent: crossed.sent,
            received: crossed.received,
        };
        self.lock().all().into_iter().map(one).collect()
    }

    /// What has crossed all of them, both ways.
    #[must_use]
    pub fn transferred(&self) -> u64 {
        self.lock().sum(|_| true)
    }

    /// What has crossed the bulk lanes, both ways.
    #[must_use]
    pub fn bulk_bytes(&self) -> u64 {
        self.lock().sum(|id| id.role == LaneRole::Bulk)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
