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

/// What an event is to the loss of a page lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rank {
    /// It is such a loss.
    LaneLost,
    /// It ends the session, or makes the loss harmless: it comes first, if it follows within a moment.
    Explains,
    /// Anything else, which must not get ahead of a known loss: least of all a step of the handoff.
    Follows,
}

/// The next event, or `None` when patience ends, which it does once.
pub fn next_event<E>(
    events: &Receiver<E>,
    patience: &mut Patience,
    rank: impl Fn(&E) -> Rank,
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
    if rank(&event) != Rank::LaneLost {
        return Some(event);
    }
    waiting.push_back(event);
    let held_until = Instant::now() + LANE_LOSS_HELD;
    while let Ok(next) = events.recv_deadline(held_until) {
        match rank(&next) {
            Rank::LaneLost => waiting.push_back(next),
            Rank::Explains => return Some(next),
            Rank::Follows => {
                waiting.push_back(next);
                break;
            }
        }
    }
    waiting.pop_front()
}

#[cfg(test)]
mod tests {
    use crossbeam::channel::unbounded;

    use super::*;

    fn rank(event: &&str) -> Rank {
        match *event {
            "lane lost" => Rank::LaneLost,
            "aborted" => Rank::Explains,
            _ => Rank::Follows,
        }
    }

    fn told(sent: &[&'static str]) -> Vec<&'static str> {
        let (sender, events) = unbounded();
        for event in sent {
            sender.send(*event).unwrap();
        }
        let (mut waiting, mut told) = (VecDeque::new(), Vec::new());
        while told.len() < sent.len() {
            let next = waiting.pop_front();
            told.extend(next.or_else(|| next_event(&events, &mut Patience::endless(), rank, &mut waiting)));
        }
        told
    }

    #[test]
    fn a_lost_lane_waits_for_the_better_reason() {
        assert_eq!(told(&["lane lost", "lane lost", "aborted"]), ["aborted", "lane lost", "lane lost"]);
    }

    #[test]
    fn no_step_of_the_handoff_gets_ahead_of_a_lost_lane() {
        assert_eq!(told(&["lane lost", "restored", "aborted"]), ["lane lost", "restored", "aborted"]);
    }

    #[test]
    fn a_lost_lane_alone_is_told_in_the_end() {
        assert_eq!(told(&["lane lost"]), ["lane lost"]);
    }

    #[test]
    fn patience_ends_once() {
        let (_sender, events) = unbounded::<u8>();
        let mut patience = Patience::until(Instant::now());
        assert_eq!(next_event(&events, &mut patience, |_| Rank::Follows, &mut VecDeque::new()), None);
        assert!(patience.until.is_none());
    }
}
