//! Opening new lanes in place of lost ones (`outgoing/opening.rs`, `incoming/connecting.rs`), lane by lane, with the project's own
//! [`Reception`](crate::reception::Reception).

use std::time::Instant;

use super::destination_side::{SESSION, counts, lane_id};
use super::network::{CONTROL, End, FAULT, Link, Message};
use super::source_side::{REJOIN_PATIENCE, Whither};
use super::world::{Happening, Time, World};
use crate::failure::FailureKind;
use crate::session::destination::DestinationEvent;
use crate::session::source::SourceEvent;
use crate::status::MigrationStatus;

/// As in `incoming/connecting.rs`.
const LETTING_GO_PATIENCE: Time = 5_000_000;
/// As in `outgoing/opening.rs` for connecting, and as in the handshake for its answer.
const CONNECT_PATIENCE: Time = 5_000_000;

impl World {
    /// The source's thread opens lanes, and does nothing else until they are open or refused.
    pub fn open_again(&mut self) -> Option<SourceEvent> {
        let Some(whither) = self.source.rejoin.take() else {
            return Some(SourceEvent::RejoinFailed {
                kind: FailureKind::Unreachable,
                reason: "nobody has said where the destination is now".into(),
            });
        };
        let link = self.links.len();
        let lanes = 3 + self.dice.index(3);
        self.links.push(Link::new(lanes));
        let refusal = match whither {
            Whither::There => {
                self.open_lane(link, CONTROL);
                return None;
            }
            Whither::Stranger => "the session is unknown here",
            Whither::Nowhere => "nobody listens",
        };
        self.source.opening = Some((link, CONTROL));
        self.answer(link, CONTROL, Some(refusal));
        None
    }

    fn open_lane(&mut self, link: usize, lane: usize) {
        self.source.opening = Some((link, lane));
        let delay = self.dice.below(1_000);
        self.at(delay, Happening::Hello { link, lane });
        let refusal = Some("the destination's host does not answer");
        self.at(CONNECT_PATIENCE, Happening::Answer { link, lane, refusal });
    }

    fn answer(&mut self, link: usize, lane: usize, refusal: Option<&'static str>) {
        let delay = self.dice.below(1_000);
        self.at(delay, Happening::Answer { link, lane, refusal });
    }

    /// A source's first words on a lane reach the destination's host.
    pub fn hello(&mut self, link: usize, lane: usize) {
        if self.links[link].is_stalled() {
            return;
        }
        let destination = &self.destination;
        if self.links[link].is_closed(End::Destination, lane) || !destination.alive {
            return self.answer(link, lane, Some("the connection was closed"));
        }
        if destination.over && !destination.unacknowledged {
            return self.answer(link, lane, Some("nobody listens"));
        }
        if lane != CONTROL {
            let taken = self.destination.reception.page_lane(SESSION, lane_id(lane), link);
            self.answer(link, lane, taken.is_err().then_some("another attempt has taken the place of this one"));
            if let Some(lanes) = self.destination.reception.complete() {
                let delay = self.dice.below(500);
                self.at(delay, Happening::Joined { link: lanes.control });
            }
            return;
        }
        if self.destination.reception.knows(SESSION).is_err() {
            return self.answer(link, lane, Some("the session is unknown here"));
        }
        if !self.may_be_joined() || self.destination.status == MigrationStatus::PostcopyRecover {
            self.tell_destination_of_link(DestinationEvent::Lost("its source joins again".into()));
            if let Some(old) = self.destination.link {
                self.shut_down(End::Destination, old);
            }
            self.destination.letting_go.push(link);
            self.at(LETTING_GO_PATIENCE, Happening::LettingGoEnds { link });
            return;
        }
        self.take_control_lane(link);
    }

    fn may_be_joined(&self) -> bool {
        matches!(self.destination.status, MigrationStatus::PostcopyPaused | MigrationStatus::PostcopyRecover)
            || self.destination.unacknowledged
    }

    fn take_control_lane(&mut self, link: usize) {
        let lanes = counts(self.links[link].lanes());
        let taken = self.destination.reception.control_again(SESSION, lanes, link, Instant::now());
        self.answer(link, CONTROL, taken.is_err().then_some("the session is unknown here"));
    }

    /// The destination's status has changed.
    pub fn let_all_go(&mut self) {
        for link in self.destination.letting_go.clone() {
            self.let_go(link, false);
        }
    }

    /// Whether the session has let go of its old link, for which `link` waits.
    pub fn let_go(&mut self, link: usize, at_last: bool) {
        let status = self.destination.status;
        if !(at_last || status.is_final() || status == MigrationStatus::PostcopyPaused) {
            return;
        }
        let before = self.destination.letting_go.len();
        self.destination.letting_go.retain(|other| *other != link);
        if self.destination.letting_go.len() == before || !self.destination.alive {
            return;
        }
        if self.may_be_joined() {
            self.take_control_lane(link);
        } else {
            self.answer(link, CONTROL, Some("nobody can join it in this state"));
        }
    }

    /// The destination's words on a lane reach the source, which waits for them.
    pub fn answered(&mut self, link: usize, lane: usize, refusal: Option<&'static str>) {
        if !self.source.alive || self.source.opening != Some((link, lane)) {
            return;
        }
        let refusal = refusal.or_else(|| self.links[link].is_closed(End::Source, lane).then_some("closed"));
        if let Some(refusal) = refusal {
            self.source.opening = None;
            self.shut_down(End::Source, link);
            self.note(|| format!("source: link {link} is not opened: {refusal}"));
            self.source
                .inbox
                .answer(SourceEvent::RejoinFailed { kind: FailureKind::Unreachable, reason: refusal.into() });
            self.source.todo.clear();
        } else if lane + 1 < self.links[link].lanes() {
            return self.open_lane(link, lane + 1);
        } else {
            self.source.opening = None;
            self.source.inbox.patience = Some(self.now + REJOIN_PATIENCE);
            self.source_listens(link);
        }
        self.wake(End::Source);
    }

    /// All lanes of a new link are open at the destination.
    pub fn joined(&mut self, link: usize) {
        if !self.destination.alive {
            return;
        }
        if self.destination.unacknowledged {
            return self.answer_at_last(link);
        }
        if let Some(last) = self.destination.joined.replace(link) {
            self.shut_down(End::Destination, last);
        }
        let delay = if self.dice.one_in(3) { self.dice.below(3_000) } else { 0 };
        self.at(delay, Happening::Rejoined);
    }

    /// The session is told of them.
    pub fn tell_rejoined(&mut self) {
        if !self.destination.alive {
            return;
        }
        if self.destination.over {
            // Nobody else takes them.
            let joined = self.destination.joined.take().filter(|_| self.destination.unacknowledged);
            return joined.into_iter().for_each(|link| self.answer_at_last(link));
        }
        self.destination.inbox.tell(DestinationEvent::Rejoined);
        self.wake(End::Destination);
    }

    /// The session is over and the guest complete; only its source does not know.
    pub fn answer_at_last(&mut self, link: usize) {
        self.destination.answering = Some(link);
        self.read(End::Destination, link, CONTROL..FAULT);
        self.send(End::Destination, link, CONTROL, Message::Standing { committed: true, complete: true, set: 0 });
    }

    /// The destination's guest is complete, and its source asks at last.
    pub fn answered_at_last(&mut self, link: usize, message: &Message) {
        if *message == Message::DrainedAck {
            self.destination.unacknowledged = false;
        }
        if matches!(message, Message::DrainedAck | Message::Closed) {
            self.destination.answering = None;
            self.shut_down(End::Destination, link);
        }
    }
}
