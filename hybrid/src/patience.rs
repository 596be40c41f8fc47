//! Waiting for a session's next event.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;

/// How long the loss of a page lane is held back: the other side closes all lanes together, and what it says on the
/// control lane while it does so is the better reason, or no loss at all.
const LANE_LOSS_HELD: Duration = Duration::from_millis(100);

/// How long to wait for the other side.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    until: Option<Instant>,
}

impl Patience {
    /// For as long as it takes.
    #[must_use]
    pub const fn endless() -> Self {
        Self { until: None }
    }

    /// Until `deadline`.
    #[must_use]
    pub const fn until(deadline: Instant) -> Self {
        Self { until: Some(deadline) }
    }
}

/// The next event, or `None` when patience ends, which it does once. The loss of a page lane comes after what else
/// arrives within a moment of it.
pub fn next_event<E>(
    events: &Receiver<E>,
    patience: &mut Patience,
    lane_lost: impl Fn(&E) -> bool,
    waiting: &mut VecDeque<E>,
) -> Option<E> {
    let received = match patience.until {
        None => events.recv().ok(),
        Some(deadline) => events.recv_deadline(deadline).ok(),
    };
    let Some(event) = received else {
        *patience = Patience::endless();
        return None;
    };
    if !lane_lost(&event) {
        return Some(event);
    }
    waiting.push_back(event);
    let held_until = Instant::now() + LANE_LOSS_HELD;
    while let Ok(next) = events.recv_deadline(held_until) {
        if lane_lost(&next) {
            waiting.push_back(next);
        } else {
            return Some(next);
        }
    }
    waiting.pop_front()
}

#[cfg(test)]
mod tests {
    use crossbeam::channel::unbounded;

    use super::*;

    #[test]
    fn a_lost_lane_waits_for_the_better_reason() {
        let (sender, events) = unbounded();
        sender.send("lane lost").unwrap();
        sender.send("lane lost").unwrap();
        sender.send("aborted").unwrap();
        let mut waiting = VecDeque::new();
        let mut next = || next_event(&events, &mut Patience::endless(), |e| *e == "lane lost", &mut waiting);
        assert_eq!(next(), Some("aborted"));
        assert_eq!(waiting, ["lane lost", "lane lost"]);
    }

    #[test]
    fn a_lost_lane_alone_is_told_in_the_end() {
        let (sender, events) = unbounded();
        sender.send(1).unwrap();
        assert_eq!(next_event(&events, &mut Patience::endless(), |_| true, &mut VecDeque::new()), Some(1));
    }

    #[test]
    fn patience_ends_once() {
        let (_sender, events) = unbounded::<u8>();
        let mut patience = Patience::until(Instant::now());
        assert_eq!(next_event(&events, &mut patience, |_| false, &mut VecDeque::new()), None);
        assert!(patience.until.is_none());
    }
}
