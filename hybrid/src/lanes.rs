//! The open lanes of one side, and what has crossed them.

use std::sync::{Arc, Mutex, PoisonError};

use switchover_wire::socket::Socket;
use switchover_wire::types::{LaneId, LaneRole};

use crate::report::LaneBytes;

/// The most bulk lanes that a session may have. More do not help a host whose cores they would have to share, and a
/// page's state has room for 64 lanes in all.
pub const BULK_LANES_LIMIT: u8 = 32;

/// All lanes of a session, kept for their counters after they are closed.
#[derive(Debug, Default)]
pub struct Lanes(Mutex<Vec<(LaneId, Arc<Socket>)>>);

impl Lanes {
    /// Adds an open lane.
    pub fn add(&self, id: LaneId, socket: Arc<Socket>) {
        self.lock().push((id, socket));
    }

    /// Shuts every lane down; whoever is blocked on one is woken.
    pub fn shut_down(&self) {
        for (_, socket) in self.lock().iter() {
            socket.shutdown();
        }
    }

    /// What has crossed each.
    #[must_use]
    pub fn bytes(&self) -> Vec<LaneBytes> {
        let one = |(id, socket): &(LaneId, Arc<Socket>)| LaneBytes {
            lane: id.to_string(),
            sent: socket.counters().sent(),
            received: socket.counters().received(),
        };
        self.lock().iter().map(one).collect()
    }

    /// What has crossed all of them, both ways.
    #[must_use]
    pub fn transferred(&self) -> u64 {
        self.bytes().iter().map(|lane| lane.sent + lane.received).sum()
    }

    /// What has crossed the bulk lanes, both ways.
    #[must_use]
    pub fn bulk_bytes(&self) -> u64 {
        let bulk = |(id, socket): &(LaneId, Arc<Socket>)| {
            (id.role == LaneRole::Bulk).then(|| socket.counters().sent() + socket.counters().received())
        };
        self.lock().iter().filter_map(bulk).sum()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(LaneId, Arc<Socket>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
