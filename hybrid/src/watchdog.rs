//! Ends what takes too long on a session's lanes.
//!
//! A message to a peer that does not read waits for ever, and io_uring heeds no send timeout. While the guest stands still
//! that must not be: the watchdog shuts all lanes down when its deadline passes, and whoever was sending gets an error.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, unbounded};

use crate::lanes::Lanes;

/// A thread that waits for a deadline. It ends when it is told to, or with the handle.
#[derive(Debug)]
pub struct Watchdog {
    orders: Sender<Order>,
    /// When it will shut the lanes down. Taken by whoever is first: it, or whoever calls it off.
    armed: Arc<Mutex<Option<Instant>>>,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    ShutDownAt(Instant),
    LetBe,
    End,
}

impl Watchdog {
    /// A watchdog over `lanes`, asleep.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(lanes: Arc<Lanes>) -> io::Result<Self> {
        let (orders, receiver) = unbounded();
        let armed = Arc::new(Mutex::new(None));
        let watched = Arc::clone(&armed);
        thread::Builder::new().name("watchdog".to_owned()).spawn(move || watch(&receiver, &lanes, &watched))?;
        Ok(Self { orders, armed })
    }

    /// Shuts the lanes down at `deadline`, in place of an earlier one.
    pub fn arm(&self, deadline: Instant) {
        *self.armed() = Some(deadline);
        self.order(Order::ShutDownAt(deadline));
    }

    /// Lets the lanes be. `false` when it comes too late, and they are shut down, or will be in a moment.
    pub fn disarm(&self) -> bool {
        let in_time = self.armed().take().is_some();
        self.order(Order::LetBe);
        in_time
    }

    fn armed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session is over.
    pub fn end(&self) {
        self.order(Order::End);
    }

    fn order(&self, order: Order) {
        // Fails only after the end, when there is nothing left to watch.
        let _ = self.orders.send(order);
    }
}

fn watch(orders: &Receiver<Order>, lanes: &Lanes, shared: &Mutex<Option<Instant>>) {
    let mut armed: Option<Instant> = None;
    loop {
        let next = match armed {
            None => orders.recv().map_err(|_| true),
            Some(deadline) => orders.recv_deadline(deadline).map_err(|error| error.is_disconnected()),
        };
        match next {
            Ok(Order::ShutDownAt(deadline)) => armed = Some(deadline),
            Ok(Order::LetBe) => armed = None,
            Ok(Order::End) | Err(true) => return,
            Err(false) => {
                let due = |deadline: &mut Instant| *deadline <= Instant::now();
                if shared.lock().unwrap_or_else(PoisonError::into_inner).take_if(due).is_some() {
                    tracing::warn!("the destination does not read: the lanes are shut down");
                    lanes.shut_down();
                }
                armed = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsFd;
    use std::time::Duration;

    use switchover_wire::ring::Ring;
    use switchover_wire::socket::Socket;
    use switchover_wire::types::{LaneId, LaneRole};

    use super::*;

    #[test]
    fn a_send_to_a_peer_that_does_not_read_ends() {
        let (ours, _theirs) = Socket::pair().unwrap();
        let lanes = Arc::new(Lanes::default());
        let ours = Arc::new(ours);
        lanes.add(LaneId { role: LaneRole::Control, index: 0 }, Arc::clone(&ours));
        let watchdog = Watchdog::start(lanes).unwrap();
        watchdog.arm(Instant::now() + Duration::from_millis(20));
        let much = vec![0; 64 << 20];
        assert!(Ring::new(2).unwrap().send_all(ours.as_fd(), &[IoSlice::new(&much)]).is_err());
        assert!(!watchdog.disarm(), "it is too late to call it off");
    }

    #[test]
    fn a_disarmed_watchdog_does_nothing() {
        let (ours, theirs) = Socket::pair().unwrap();
        let lanes = Arc::new(Lanes::default());
        let ours = Arc::new(ours);
        lanes.add(LaneId { role: LaneRole::Control, index: 0 }, Arc::clone(&ours));
        let watchdog = Watchdog::start(lanes).unwrap();
        watchdog.arm(Instant::now() + Duration::from_secs(3600));
        assert!(watchdog.disarm());
        drop(watchdog);
        assert!(Ring::new(2).unwrap().send_all(ours.as_fd(), &[IoSlice::new(b"still open")]).is_ok());
        drop(theirs);
    }
}
