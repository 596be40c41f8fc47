//! The destination's process: what its driver does (`incoming/driver.rs`), with a fake machine, a fake pager and a fake network.

use std::collections::VecDeque;
use std::time::Instant;

use switchover_wire::handshake::LaneCounts;
use switchover_wire::types::{LaneId, LaneRole, SessionId};

use super::inbox::{Inbox, Next, Speaker};
use super::memory::{Machine, Pager};
use super::mishaps::Moment;
use super::network::{CONTROL, End, FIRST_BULK, Message};
use super::world::{Happening, Time, World};
use crate::patience::Rank;
use crate::reception::Reception;
use crate::session::destination::{DestinationAction, DestinationEvent, DestinationSession};
use crate::session::{FailureKind, GuestAfter, Outcome};
use crate::status::MigrationStatus;

/// The name of the session.
pub const SESSION: SessionId = SessionId([7; 16]);

pub struct DestinationSide {
    pub alive: bool,
    pub over: bool,
    pub session: DestinationSession,
    pub inbox: Inbox<DestinationEvent>,
    pub todo: VecDeque<DestinationAction>,
    pub busy_until: Time,
    pub machine: Machine,
    pub pager: Pager,
    pub ever_ran: bool,
    pub commit_heard: bool,
    refused: bool,
    /// It has told the source that it can run the guest.
    pub confirmed: bool,
    aborted: bool,
    /// The pager or the machine has failed for good.
    pub broken: bool,
    complete_first: bool,
    state_taken: bool,
    /// The link whose control lane is listened to.
    pub link: Option<usize>,
    speakers: Vec<Option<Speaker<DestinationEvent>>>,
    /// Lanes of a source that has joined again, until the session takes them up.
    pub joined: Option<usize>,
    /// Those that it has taken up, until the source serves.
    attachable: Option<usize>,
    pub reception: Reception<usize>,
    /// A source asks to join again, and the session has to let go of its old link first.
    pub letting_go: Vec<usize>,
    /// Who is told at last that all is here.
    pub answering: Option<usize>,
    pub status: MigrationStatus,
    pub unacknowledged: bool,
    pub outcome: Option<Outcome>,
}

/// The lanes of a link, as a source announces them.
pub fn counts(lanes: usize) -> LaneCounts {
    LaneCounts { fault: 1, bulk: u8::try_from(lanes - FIRST_BULK).unwrap() }
}

/// The name of a lane that carries pages.
pub fn lane_id(lane: usize) -> LaneId {
    match lane.checked_sub(FIRST_BULK) {
        None => LaneId { role: LaneRole::Fault, index: 0 },
        Some(index) => LaneId { role: LaneRole::Bulk, index: u8::try_from(index).unwrap() },
    }
}

impl DestinationSide {
    pub fn new() -> Self {
        Self {
            alive: true,
            over: false,
            session: DestinationSession::new(),
            inbox: Inbox::new(),
            todo: VecDeque::new(),
            busy_until: 0,
            machine: Machine::default(),
            pager: Pager::default(),
            ever_ran: false,
            commit_heard: false,
            refused: false,
            confirmed: false,
            aborted: false,
            broken: false,
            complete_first: false,
            state_taken: false,
            link: None,
            speakers: Vec::new(),
            joined: None,
            attachable: None,
            reception: Reception::Waiting,
            letting_go: Vec::new(),
            answering: None,
            status: MigrationStatus::Setup,
            unacknowledged: false,
            outcome: None,
        }
    }
}

impl World {
    pub fn destination_begins(&mut self) {
        let (lanes, now) = (self.links[0].lanes(), Instant::now());
        let reception = &mut self.destination.reception;
        let taken = reception.control(SESSION, counts(lanes), 0, now, |_| true);
        let taken = taken.and_then(|()| (1..lanes).try_for_each(|lane| reception.page_lane(SESSION, lane_id(lane), 0)));
        let complete = reception.complete().is_some();
        self.must(taken.is_ok() && complete, "the first lanes are not taken");
        self.destination_listens(0);
        let delay = self.dice.below(5_000);
        self.at(delay, Happening::Prepared);
    }

    fn destination_listens(&mut self, link: usize) {
        self.destination.link = Some(link);
        let speaker = self.destination.inbox.speaker();
        self.destination.speakers.resize(link + 1, None);
        self.destination.speakers[link] = Some(speaker);
        self.begin_pulse(End::Destination, link);
    }

    pub fn tell_destination_of(&mut self, link: usize, event: DestinationEvent) {
        if let Some(speaker) = self.destination.speakers.get(link).cloned().flatten() {
            self.destination.inbox.tell_of(&speaker, event);
            self.wake(End::Destination);
        }
    }

    /// Of the link that there is now, whichever that is.
    pub fn tell_destination_of_link(&mut self, event: DestinationEvent) {
        let speaker = self.destination.inbox.speaker();
        self.destination.inbox.tell_of(&speaker, event);
        self.wake(End::Destination);
    }

    fn tell_destination(&mut self, event: DestinationEvent) {
        if self.destination.alive {
            self.destination.inbox.tell(event);
            self.wake(End::Destination);
        }
    }

    /// Memory is reserved, or could not be.
    pub fn prepared(&mut self) {
        if std::mem::take(&mut self.failing.machine[1]) {
            return self.tell_destination(DestinationEvent::PrepareFailed("no memory".into()));
        }
        self.attach(0);
        self.tell_destination(DestinationEvent::Prepared);
    }

    /// The state is loaded, or could not be.
    pub fn loaded(&mut self) {
        let fails = std::mem::take(&mut self.failing.machine[1]);
        self.tell_destination(if fails {
            DestinationEvent::LoadFailed("bad".into())
        } else {
            DestinationEvent::Loaded
        });
    }

    /// What a lane's thread makes of a message.
    pub fn destination_hears(&mut self, link: usize, lane: usize, message: Message) {
        if self.destination.answering == Some(link) {
            return self.answered_at_last(link, &message);
        }
        let event = match message {
            Message::Missing { set, complete_first } => {
                self.hand_over(link, set);
                self.destination.complete_first = complete_first;
                DestinationEvent::Missing { complete_first }
            }
            Message::State => DestinationEvent::State,
            Message::Commit => DestinationEvent::Commit,
            Message::DrainedAck => DestinationEvent::DrainedAcknowledged,
            Message::Abort => DestinationEvent::Aborted("gives up".into()),
            Message::Version { page, bytes } => {
                if self.destination.pager.attached == Some(link) {
                    self.version_lands(page, bytes);
                    self.send(End::Destination, link, lane, Message::Taken { page });
                }
                return;
            }
            Message::Page { page, bytes } => {
                if self.destination.pager.attached == Some(link) {
                    self.page_lands(page, bytes);
                }
                return;
            }
            Message::Closed if lane == CONTROL => DestinationEvent::Lost("closed".into()),
            Message::Closed => {
                if self.destination.pager.attached == Some(link) {
                    self.tell_destination_of_link(DestinationEvent::LaneLost("closed".into()));
                }
                return;
            }
            other => return self.must(false, &format!("the destination was sent {other:?}")),
        };
        if matches!(event, DestinationEvent::Aborted(_) | DestinationEvent::DrainedAcknowledged) {
            self.stop_reading(End::Destination, link);
        }
        self.tell_destination_of(link, event);
    }

    pub fn destination_turn(&mut self) {
        if !self.destination.alive || self.destination.over {
            return;
        }
        if self.destination.busy_until > self.now {
            return self.at(self.destination.busy_until - self.now, Happening::Turn(End::Destination));
        }
        if let Some(action) = self.destination.todo.pop_front() {
            self.note(|| format!("destination: {action:?}"));
            self.comes_to(Moment::of_destination(&action));
            if !self.destination.alive {
                return;
            }
            let before = self.destination.status;
            if let Some(answer) = self.destination_does(action) {
                self.destination.inbox.answer(answer);
                self.destination.todo.clear();
            }
            if self.destination.status != before {
                self.let_all_go();
            }
            return self.wake(End::Destination);
        }
        let rank = |event: &DestinationEvent| match event {
            DestinationEvent::LaneLost(_) => Rank::LaneLost,
            DestinationEvent::Aborted(_)
            | DestinationEvent::Lost(_)
            | DestinationEvent::PagerBroken(_)
            | DestinationEvent::Complete
            | DestinationEvent::DrainedAcknowledged => Rank::Explains,
            _ => Rank::Follows,
        };
        let event = match self.destination.inbox.next(self.now, rank) {
            Next::Event(Ok(event)) => event,
            Next::Event(Err(why)) => return self.must(false, why),
            Next::TimedOut => return self.must(false, "the destination has endless patience"),
            Next::Nothing => return self.wake(End::Destination),
            Next::Sleep(until) => {
                if let Some(until) = until {
                    self.at(until - self.now, Happening::Turn(End::Destination));
                }
                return;
            }
        };
        self.destination.commit_heard |= event == DestinationEvent::Commit;
        self.destination.aborted |= matches!(event, DestinationEvent::Aborted(_));
        self.destination.broken |= matches!(event, DestinationEvent::PagerBroken(_) | DestinationEvent::RunFailed(_));
        self.note(|| format!("destination: on {event:?}"));
        let (next, actions) = std::mem::take(&mut self.destination.session).on(event);
        self.destination.session = next;
        self.destination.todo = actions.into();
        self.wake(End::Destination);
    }

    /// Says something on the control lane; answers with a loss where that fails.
    fn say(&mut self, message: Message) -> Option<DestinationEvent> {
        let said = self.destination.link.is_some_and(|link| self.send(End::Destination, link, CONTROL, message));
        (!said).then(|| DestinationEvent::Lost("not sent".into()))
    }

    fn close_destination(&mut self) {
        if let Some(link) = self.destination.link {
            self.shut_down(End::Destination, link);
        }
    }

    fn destination_does(&mut self, action: DestinationAction) -> Option<DestinationEvent> {
        match action {
            DestinationAction::Status(status) => self.destination.status = status,
            DestinationAction::SendPrepared => return self.say(Message::Prepared),
            DestinationAction::LoadState => {
                if std::mem::replace(&mut self.destination.state_taken, true) {
                    return Some(DestinationEvent::LoadFailed("the state came twice".into()));
                }
                let delay = self.dice.between(50, 3_000);
                self.at(delay, Happening::Loaded);
            }
            DestinationAction::SendRestored => {
                self.destination.confirmed = true;
                return self.say(Message::Restored);
            }
            DestinationAction::SendRefused(_) => {
                self.must(!self.destination.ever_ran, "refuses a guest that has run");
                self.destination.refused = true;
                self.say(Message::Refused);
            }
            DestinationAction::AwaitRejoin { kind, reason, .. } => {
                self.must(kind != FailureKind::Protocol, &reason);
                let in_vain = self.destination.aborted || !self.destination.confirmed;
                self.must(!in_vain, "waits for a source that has not committed");
                self.must(!self.destination.broken, "waits, and could not go on");
                let serves = self.destination.pager.watched || self.destination.pager.missing == 0;
                self.must(serves, "waits without serving what is here");
                self.close_destination();
                self.destination.pager.attached = None;
                self.destination.inbox.end_link();
                if let Some(link) = self.destination.link {
                    self.end_pulse(End::Destination, link);
                }
                self.destination.attachable = None;
                self.destination.status = MigrationStatus::PostcopyPaused;
                if self.destination.joined.is_some() {
                    self.tell_destination(DestinationEvent::Rejoined);
                }
            }
            DestinationAction::SendStanding { committed } => {
                self.must(
                    committed == self.destination.ever_ran,
                    "says that it runs what it never ran, or the reverse",
                );
                let Some(link) = self.destination.joined.take() else {
                    return Some(DestinationEvent::Lost("its lanes were taken up already".into()));
                };
                self.destination.attachable = Some(link);
                self.destination_listens(link);
                let set = self.destination.pager.missing;
                return self.say(Message::Standing { committed, complete: set == 0, set });
            }
            DestinationAction::AttachLanes => {
                self.must(self.commit_submitted, "attached before the source serves");
                let link = self.destination.attachable.take();
                if std::mem::take(&mut self.failing.attach) {
                    return Some(DestinationEvent::Lost("no thread".into()));
                }
                self.must(link.is_some(), "no lanes to attach");
                link.into_iter().for_each(|link| self.attach(link));
            }
            DestinationAction::Run => return self.run_guest(),
            DestinationAction::SendRunning => {
                self.must(self.destination.ever_ran, "says that the guest runs, which it never did");
                return self.say(Message::Running);
            }
            DestinationAction::SendDrained => {
                let all = self.destination.pager.handed_over && self.destination.pager.missing == 0;
                self.must(all && self.destination.ever_ran, "says that it has all, which it has not");
                return self.say(Message::Drained);
            }
            DestinationAction::EndWatch => {
                self.must(self.destination.pager.missing == 0, "the watch ends while pages are missing");
                self.destination.pager.watched = false;
            }
            DestinationAction::MapTheRest => {
                self.must(self.destination.ever_ran, "maps what is to run before it runs");
            }
            DestinationAction::FinishPager => {
                self.must(self.destination.pager.missing == 0, "the watch ends while pages are missing");
                self.destination.pager.watched = false;
                self.close_destination();
            }
            DestinationAction::Abandon => {
                self.must(!self.destination.ever_ran, "abandons a guest that has run");
                (self.destination.pager.watched, self.destination.pager.attached) = (false, None);
                self.close_destination();
            }
            DestinationAction::StopForGood(reason) => {
                self.must(self.destination.broken, &format!("stops a guest that could go on: {reason}"));
                self.destination.machine.runs = false;
                self.close_destination();
            }
            DestinationAction::Finish(outcome) => self.destination_finishes(outcome),
        }
        None
    }

    fn run_guest(&mut self) -> Option<DestinationEvent> {
        self.must(self.commit_submitted && self.destination.commit_heard, "runs without the commit");
        self.must(!self.destination.ever_ran, "runs the guest twice");
        self.must(!self.destination.refused, "runs after its final refusal");
        let whole = self.destination.pager.missing == 0;
        self.must(self.destination.pager.handed_over, "runs without knowing what is missing");
        self.must(self.destination.state_taken, "runs without the state");
        self.must(whole || !self.destination.complete_first, "runs before its memory is complete");
        (self.destination.machine.may_run, self.destination.ever_ran) = (true, true);
        if std::mem::take(&mut self.failing.machine[1]) {
            return Some(DestinationEvent::RunFailed("tired".into()));
        }
        self.destination.machine.runs = true;
        None
    }

    fn destination_finishes(&mut self, outcome: Outcome) {
        if let Some(link) = self.destination.link {
            self.end_pulse(End::Destination, link);
        }
        self.destination.over = true;
        let (whole, ran) = (self.destination.pager.missing == 0, self.destination.ever_ran);
        if let Outcome::Failed(failure) = &outcome {
            self.must(failure.kind != FailureKind::Protocol, &failure.reason);
        }
        let true_words = match &outcome {
            Outcome::Completed | Outcome::Unacknowledged(_) => whole && self.destination.machine.runs,
            Outcome::Cancelled => false,
            Outcome::Failed(failure) => match failure.guest {
                // Who has confirmed may have been sent the commit: neither side may be left to guess.
                GuestAfter::OnSource => {
                    !ran && (!self.destination.confirmed || self.destination.refused || self.destination.aborted)
                }
                GuestAfter::Lost => ran && !self.destination.machine.runs,
                _ => false,
            },
        };
        self.must(true_words, "the destination does not say truly where the guest is");
        self.destination.unacknowledged = matches!(outcome, Outcome::Unacknowledged(_));
        self.destination.status = match &outcome {
            Outcome::Failed(_) => MigrationStatus::Failed,
            _ => MigrationStatus::Completed,
        };
        self.destination.outcome = Some(outcome);
        if let Some(link) = self.destination.joined.take().filter(|_| self.destination.unacknowledged) {
            self.answer_at_last(link);
        }
    }
}
