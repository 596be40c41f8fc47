//! The source's process: what its driver does (`outgoing/driver.rs`), with a fake machine and a fake network.

use std::collections::VecDeque;

use super::inbox::{Inbox, Next, Speaker};
use super::memory::Machine;
use super::mishaps::Moment;
use super::network::{CONTROL, End, FAULT, FIRST_BULK, Message};
use super::world::{ALL_PAGES, Happening, PAGES, Scenario, Time, World};
use crate::patience::Rank;
use crate::session::source::{Ending, Plan, SourceAction, SourceEvent, SourceSession};
use crate::session::{FailureKind, Outcome};
use crate::status::MigrationStatus;

/// As in `outgoing/driver.rs`.
const HANDOFF_PATIENCE: Time = 5_600_000;
const ABORT_PATIENCE: Time = 1_000_000;
pub const REJOIN_PATIENCE: Time = 10_000_000;

pub struct SourceSide {
    pub alive: bool,
    pub over: bool,
    pub session: SourceSession,
    pub inbox: Inbox<SourceEvent>,
    /// What is left of a list of actions.
    pub todo: VecDeque<SourceAction>,
    /// The machine is at work, or a lane being opened.
    pub busy_until: Time,
    /// The link that is being opened, and the lane of it that is waited for.
    pub opening: Option<(usize, usize)>,
    pub machine: Machine,
    pub memory: [u32; PAGES],
    /// The machine keeps its book of written pages.
    pub noting: bool,
    pub noted: u32,
    pub throttled: bool,
    /// Pages of pre-copy that were sent and not acknowledged.
    under_way: [u8; PAGES],
    rounds: bool,
    rounds_left: u64,
    pub serving: bool,
    to_push: u32,
    /// What the destination lacks, as it has said over a new link.
    lacking: u32,
    pub link: usize,
    speakers: Vec<Option<Speaker<SourceEvent>>>,
    pub watchdog: Option<Time>,
    pub status: MigrationStatus,
    pub outcome: Option<Outcome>,
    /// Where a controller has said that the destination is now.
    pub rejoin: Option<Whither>,
}

/// Where a controller sends a source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whither {
    /// To its destination.
    There,
    /// To a destination that has never heard of it.
    Stranger,
    /// Where nobody listens.
    Nowhere,
}

impl SourceSide {
    pub fn new(scenario: Scenario) -> Self {
        Self {
            alive: true,
            over: false,
            session: SourceSession::new(Plan { rounds: scenario.rounds, hold: scenario.hold }),
            inbox: Inbox::new(),
            todo: VecDeque::new(),
            busy_until: 0,
            opening: None,
            machine: Machine { runs: true, may_run: true },
            memory: [0; PAGES],
            noting: false,
            noted: 0,
            throttled: false,
            under_way: [0; PAGES],
            rounds: false,
            rounds_left: 0,
            serving: false,
            to_push: 0,
            lacking: 0,
            link: 0,
            speakers: Vec::new(),
            watchdog: None,
            status: MigrationStatus::Setup,
            outcome: None,
            rejoin: None,
        }
    }

    fn under_way(&self) -> u32 {
        (0..PAGES).filter(|page| self.under_way[*page] > 0).fold(0, |set, page| set | 1 << page)
    }
}

impl World {
    pub fn source_begins(&mut self) {
        self.source_listens(0);
        let lanes = self.links[0].lanes();
        self.read(End::Source, 0, FIRST_BULK..lanes);
    }

    /// All lanes are open: the threads of a link start.
    pub fn source_listens(&mut self, link: usize) {
        self.source.link = link;
        let speaker = self.source.inbox.speaker();
        self.source.speakers.resize(link + 1, None);
        self.source.speakers[link] = Some(speaker);
        self.begin_pulse(End::Source, link);
        if link > 0 {
            let lanes = self.links[link].lanes();
            self.read(End::Source, link, FIRST_BULK..lanes);
        }
    }

    pub fn tell_source_of(&mut self, link: usize, event: SourceEvent) {
        if let Some(speaker) = self.source.speakers.get(link).cloned().flatten() {
            self.source.inbox.tell_of(&speaker, event);
            self.wake(End::Source);
        }
    }

    /// What a lane's thread makes of a message.
    pub fn source_hears(&mut self, link: usize, lane: usize, message: Message) {
        let event = match message {
            Message::Prepared => SourceEvent::Prepared,
            Message::Restored => SourceEvent::Restored,
            Message::Refused => SourceEvent::Refused("cannot".into()),
            Message::Running => SourceEvent::Running,
            Message::Drained => SourceEvent::Drained,
            Message::Standing { committed, complete, set } => {
                self.source.lacking = set;
                SourceEvent::Standing { committed, complete }
            }
            Message::Request { page } => {
                if link == self.source.link && self.source.serving {
                    self.send_page(link, FAULT, page);
                }
                return;
            }
            Message::Taken { page } => {
                self.source.under_way[page] -= 1;
                return;
            }
            Message::Closed if lane == CONTROL => SourceEvent::Lost("closed".into()),
            Message::Closed => SourceEvent::LaneLost("closed".into()),
            other => return self.must(false, &format!("the source was sent {other:?}")),
        };
        if matches!(event, SourceEvent::Drained | SourceEvent::Refused(_)) {
            // The control lane's thread ends with these.
            self.stop_reading(End::Source, link);
        }
        self.tell_source_of(link, event);
    }

    pub fn source_turn(&mut self) {
        if !self.source.alive || self.source.over || self.source.opening.is_some() {
            return;
        }
        if self.source.busy_until > self.now {
            return self.at(self.source.busy_until - self.now, Happening::Turn(End::Source));
        }
        if let Some(action) = self.source.todo.pop_front() {
            self.note(|| format!("source: {action:?}"));
            self.comes_to(Moment::of_source(&action));
            if !self.source.alive {
                return;
            }
            if let Some(answer) = self.source_does(action) {
                self.source.inbox.answer(answer);
                self.source.todo.clear();
            }
            return self.wake(End::Source);
        }
        let rank = |event: &SourceEvent| match event {
            SourceEvent::LaneLost(_) => Rank::LaneLost,
            SourceEvent::Refused(_) | SourceEvent::Lost(_) | SourceEvent::Drained | SourceEvent::Cancel => {
                Rank::Explains
            }
            _ => Rank::Follows,
        };
        let mut event = match self.source.inbox.next(self.now, rank) {
            Next::Event(Ok(event)) => event,
            Next::Event(Err(why)) => return self.must(false, why),
            Next::TimedOut => SourceEvent::HandoffTimedOut,
            Next::Nothing => return self.wake(End::Source),
            Next::Sleep(until) => {
                if let Some(until) = until {
                    self.at(until - self.now, Happening::Turn(End::Source));
                }
                return;
            }
        };
        if event == SourceEvent::Restored && self.source.session.may_commit() && self.source.watchdog.take().is_none() {
            event = SourceEvent::HandoffTimedOut;
        }
        self.note(|| format!("source: on {event:?}"));
        let refused = matches!(event, SourceEvent::Refused(_));
        let (next, actions) = std::mem::take(&mut self.source.session).on(event);
        let (paused, resumes) = (!self.source.machine.runs, actions.contains(&SourceAction::Resume));
        self.must(!(refused && paused) || resumes, "a final refusal does not bring the guest back");
        self.source.session = next;
        self.source.todo = actions.into();
        self.wake(End::Source);
    }

    /// The machine takes its time.
    fn source_works(&mut self) {
        self.source.busy_until = self.now + self.dice.between(50, 3_000);
    }

    fn source_does(&mut self, action: SourceAction) -> Option<SourceEvent> {
        let link = self.source.link;
        match action {
            SourceAction::Status(status) => self.source.status = status,
            SourceAction::BeginRounds => {
                if std::mem::take(&mut self.failing.machine[0]) {
                    return Some(SourceEvent::RoundsFailed("no book of written pages".into()));
                }
                (self.source.noting, self.source.noted) = (true, ALL_PAGES);
                (self.source.rounds, self.source.rounds_left) = (true, self.dice.between(1, 5));
                self.at(0, Happening::Round);
            }
            SourceAction::EndRounds => {
                self.source.rounds = false;
                self.source_works();
            }
            SourceAction::Pause => {
                self.source_works();
                if std::mem::take(&mut self.failing.machine[0]) {
                    return Some(SourceEvent::PauseFailed("tired".into()));
                }
                self.source.machine.runs = false;
                return Some(SourceEvent::Paused);
            }
            SourceAction::ServePages(ending) => return self.serve_pages(link, ending),
            SourceAction::PushPages => {
                self.must(self.source.serving, "pushes what it does not serve");
                self.at(0, Happening::Push { link });
            }
            SourceAction::SendState => {
                self.source_works();
                if std::mem::take(&mut self.failing.machine[0]) {
                    return Some(SourceEvent::StateFailed("tired".into()));
                }
                let sent = self.send(End::Source, link, CONTROL, Message::State);
                return Some(if sent { SourceEvent::StateSent } else { SourceEvent::Lost("not sent".into()) });
            }
            SourceAction::SurrenderRightToRun => self.source.machine.may_run = false,
            SourceAction::TakeBackRightToRun => {
                if !self.destination.alive {
                    // What the guest did there is lost with it.
                    self.truth = self.source.memory;
                }
                self.source.machine.may_run = true;
            }
            SourceAction::SendCommit => {
                self.must(!self.source.machine.may_run, "the right to run goes before the commit");
                self.source.inbox.patience = None;
                self.commit_submitted = true;
                if !self.send(End::Source, link, CONTROL, Message::Commit) {
                    return Some(SourceEvent::Lost("not sent".into()));
                }
            }
            SourceAction::AcknowledgeDrained => {
                self.send(End::Source, link, CONTROL, Message::DrainedAck);
            }
            SourceAction::AwaitRejoin { kind, reason } => {
                self.must(kind != FailureKind::Protocol, &reason);
                self.must(self.commit_submitted, "waits for a destination that was never committed to");
                self.source.inbox.end_link();
                self.end_pulse(End::Source, link);
                self.shut_down(End::Source, link);
                self.release_rounds();
                self.source.status = MigrationStatus::PostcopyPaused;
            }
            SourceAction::OpenLanes => {
                return self.open_again();
            }
            SourceAction::ServeAgain => {
                self.must(!self.source.machine.runs, "pages are served while the guest changes them");
                self.source.inbox.patience = None;
                (self.source.serving, self.source.to_push) = (true, self.source.lacking);
                self.read(End::Source, link, FAULT..FIRST_BULK);
            }
            SourceAction::SendAbort(_) => {
                self.arm(ABORT_PATIENCE);
                self.send(End::Source, link, CONTROL, Message::Abort);
            }
            SourceAction::CloseLanes => {
                (self.source.rounds, self.source.serving) = (false, false);
                self.source.watchdog = None;
                self.shut_down(End::Source, link);
            }
            SourceAction::Resume => {
                self.must(self.source.machine.may_run, "resumes without the right to run");
                self.must(!self.source.serving, "pages are served while the guest changes them");
                self.source.machine.runs = true;
            }
            SourceAction::Finish(outcome) => {
                self.end_pulse(End::Source, link);
                self.release_rounds();
                self.source.over = true;
                if let Outcome::Failed(failure) = &outcome {
                    self.must(failure.kind != FailureKind::Protocol, &failure.reason);
                }
                if outcome != Outcome::Completed {
                    let free = self.source.machine.runs && !self.source.noting && !self.source.throttled;
                    self.must(free, "it failed, and the guest does not run on the source as before");
                }
                self.source.status = match &outcome {
                    Outcome::Cancelled => MigrationStatus::Cancelled,
                    Outcome::Failed(_) => MigrationStatus::Failed,
                    _ => MigrationStatus::Completed,
                };
                self.source.outcome = Some(outcome);
            }
        }
        None
    }

    fn arm(&mut self, patience: Time) {
        let deadline = self.now + patience;
        self.source.watchdog = Some(deadline);
        self.at(patience, Happening::Watchdog(deadline));
    }

    fn release_rounds(&mut self) {
        (self.source.rounds, self.source.noting, self.source.throttled) = (false, false, false);
    }

    /// A round of pre-copy: sends what is noted and not under way, and decides in the end.
    pub fn round(&mut self) {
        if !self.source.alive || !self.source.rounds {
            return;
        }
        let link = self.source.link;
        let bulk = self.links[link].lanes() - FIRST_BULK;
        let work = self.source.noted & !self.source.under_way();
        for page in (0..PAGES).filter(|page| work >> page & 1 == 1) {
            if self.dice.one_in(4) {
                continue;
            }
            self.source.noted &= !(1 << page);
            self.source.under_way[page] += 1;
            let (lane, bytes) = (FIRST_BULK + self.dice.index(bulk), self.source.memory[page]);
            self.send(End::Source, link, lane, Message::Version { page, bytes });
        }
        self.source.throttled |= self.dice.one_in(4);
        self.source.rounds_left -= 1;
        if self.source.rounds_left > 0 {
            let delay = self.dice.below(3_000);
            return self.at(delay, Happening::Round);
        }
        self.source.rounds = false;
        let gives_up = self.dice.one_in(30);
        let ending = self.scenario.ending;
        self.source.inbox.tell(if gives_up {
            SourceEvent::GaveUp("does not converge".into())
        } else {
            SourceEvent::SwitchOver(ending)
        });
        self.wake(End::Source);
    }

    /// Memory no longer changes: tells what the destination lacks, and serves it.
    fn serve_pages(&mut self, link: usize, ending: Ending) -> Option<SourceEvent> {
        self.must(!self.source.machine.runs, "pages are served while the guest changes them");
        self.source.inbox.patience = Some(self.now + HANDOFF_PATIENCE);
        self.arm(HANDOFF_PATIENCE);
        let broken = (FIRST_BULK..self.links[link].lanes()).any(|lane| self.links[link].is_closed(End::Source, lane));
        if self.source.noting && broken {
            return Some(SourceEvent::StateFailed("a lane of the rounds is broken".into()));
        }
        let set = if self.source.noting { self.source.noted | self.source.under_way() } else { ALL_PAGES };
        let complete_first = ending == Ending::StopAndCopy;
        if !self.send(End::Source, link, CONTROL, Message::Missing { set, complete_first }) {
            return Some(SourceEvent::StateFailed("not sent".into()));
        }
        (self.source.serving, self.source.to_push) = (true, set);
        self.read(End::Source, link, FAULT..FIRST_BULK);
        if complete_first {
            self.at(0, Happening::Push { link });
        }
        None
    }

    fn send_page(&mut self, link: usize, lane: usize, page: usize) {
        self.must(!self.source.machine.runs, "pages are served while the guest changes them");
        let bytes = self.source.memory[page];
        self.send(End::Source, link, lane, Message::Page { page, bytes });
    }

    /// Pushes the next page.
    pub fn push(&mut self, link: usize) {
        if !self.source.alive || !self.source.serving || self.source.link != link || self.source.to_push == 0 {
            return;
        }
        let page = self.dice.index(PAGES);
        if self.source.to_push >> page & 1 == 1 {
            self.source.to_push &= !(1 << page);
            let lane = FIRST_BULK + self.dice.index(self.links[link].lanes() - FIRST_BULK);
            self.send_page(link, lane, page);
        }
        let delay = self.dice.below(2_000);
        self.at(delay, Happening::Push { link });
    }
}
