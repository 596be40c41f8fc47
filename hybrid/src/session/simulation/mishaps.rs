//! What goes wrong.

use super::network::{End, FAULT};
use super::random::Dice;
use super::world::{Happening, World};
use crate::session::destination::{DestinationAction, DestinationEvent};
use crate::session::source::{SourceAction, SourceEvent, SourceSession};
use crate::status::MigrationStatus;

/// What goes wrong at some step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mishap {
    /// The link is cut, and both ends are told in their time.
    Cut,
    /// A lane that carries pages is lost.
    LaneLost,
    /// Nothing passes any more, and nobody is told.
    Stall { one_way: bool, for_good: bool },
    /// The next words of a side on a control lane fail to be sent, or so it seems.
    SendFails(End),
    /// A machine's next task fails.
    MachineFails(End),
    /// A session's thread has no processor for a while.
    Slow(End),
    /// The destination has no threads for new lanes.
    AttachFails,
    /// The destination's pager cannot go on.
    PagerBreaks,
    /// A process ends; its host may not be there any more to say so.
    Killed(End, bool),
    /// A controller wants out.
    Cancel,
    /// A controller cuts the link of a post-copy.
    Pause(End),
    /// A controller wants the handoff.
    StartPostcopy,
    /// A controller lets a held handoff go on, or believes so.
    Proceed,
    /// A wish to reclaim comes when the link is not lost any more.
    LateReclaim,
}

/// When something goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// At this step.
    Step(usize),
    /// So many steps after one of these actions.
    Around(Moment, usize),
}

/// The actions around which most is at stake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moment {
    Pause,
    Serve,
    Restored,
    Commit,
    Run,
    Drained,
    Acknowledge,
    Await,
    Open,
    Standing,
    Again,
}

impl Moment {
    const ALL: [Self; 11] = [
        Self::Pause,
        Self::Serve,
        Self::Restored,
        Self::Commit,
        Self::Run,
        Self::Drained,
        Self::Acknowledge,
        Self::Await,
        Self::Open,
        Self::Standing,
        Self::Again,
    ];

    pub const fn of_source(action: &SourceAction) -> Option<Self> {
        Some(match action {
            SourceAction::Pause => Self::Pause,
            SourceAction::ServePages(_) => Self::Serve,
            SourceAction::SendCommit => Self::Commit,
            SourceAction::AcknowledgeDrained => Self::Acknowledge,
            SourceAction::AwaitRejoin { .. } => Self::Await,
            SourceAction::OpenLanes => Self::Open,
            SourceAction::ServeAgain => Self::Again,
            _ => return None,
        })
    }

    pub const fn of_destination(action: &DestinationAction) -> Option<Self> {
        Some(match action {
            DestinationAction::SendRestored => Self::Restored,
            DestinationAction::Run => Self::Run,
            DestinationAction::SendDrained => Self::Drained,
            DestinationAction::SendStanding { .. } => Self::Standing,
            DestinationAction::AwaitRejoin { .. } => Self::Await,
            _ => return None,
        })
    }
}

/// What will fail when it is tried next.
#[derive(Clone, Copy, Debug, Default)]
pub struct Failing {
    pub machine: [bool; 2],
    pub send: [bool; 2],
    pub attach: bool,
}

impl Mishap {
    /// Some of them, each with the time at which it strikes.
    pub fn some(dice: &mut Dice) -> Vec<(When, Self)> {
        let count = dice.below(8);
        // An undisturbed migration takes some two hundred steps; each recovery some fifty more.
        let span = dice.pick(&[120, 250, 700]);
        let when = |dice: &mut Dice| match dice.one_in(2) {
            true => When::Step(dice.index(span)),
            false => When::Around(dice.pick(&Moment::ALL), dice.index(12)),
        };
        (0..count).map(|_| (when(dice), Self::one(dice))).collect()
    }

    fn one(dice: &mut Dice) -> Self {
        let end = dice.pick(&End::BOTH);
        match dice.below(35) {
            0..6 => Self::Cut,
            6..9 => Self::LaneLost,
            9..13 => Self::Stall { one_way: dice.one_in(2), for_good: dice.one_in(2) },
            13..16 => Self::SendFails(end),
            16..18 => Self::MachineFails(end),
            18 | 19 => Self::AttachFails,
            20 => Self::PagerBreaks,
            21 | 22 => Self::Killed(end, dice.one_in(2)),
            23 | 24 => Self::Cancel,
            25..28 => Self::Pause(end),
            28 => Self::StartPostcopy,
            29 => Self::Proceed,
            30..33 => Self::Slow(end),
            _ => Self::LateReclaim,
        }
    }
}

impl World {
    /// An action is being done: what waited for it strikes soon, or in the midst of it.
    pub fn comes_to(&mut self, moment: Option<Moment>) {
        let now = self.steps;
        for (when, _) in &mut self.mishaps {
            if let When::Around(around, later) = *when
                && Some(around) == moment
            {
                *when = When::Step(now + later);
            }
        }
        let due = |(when, _): &(When, Mishap)| matches!(when, When::Step(at) if *at <= now);
        while let Some(index) = self.mishaps.iter().position(due) {
            let (_, mishap) = self.mishaps.swap_remove(index);
            self.strike(mishap);
        }
    }

    /// The link that the source opens, or has opened last.
    fn current_link(&self) -> usize {
        self.source.opening.map_or(self.source.link, |(link, _)| link)
    }

    pub fn strike(&mut self, mishap: Mishap) {
        self.note(|| format!("MISHAP {mishap:?}"));
        self.struck += 1;
        let link = self.current_link();
        match mishap {
            Mishap::Cut => self.cut(link),
            Mishap::LaneLost => {
                let lane = FAULT + self.dice.index(self.links[link].lanes() - FAULT);
                End::BOTH.into_iter().for_each(|end| self.close_lane(end, link, lane, true));
            }
            Mishap::Stall { one_way, for_good } => {
                let end = self.dice.pick(&End::BOTH);
                let ends = if one_way { vec![end] } else { End::BOTH.to_vec() };
                self.stall(link, &ends, for_good);
                let span = self.dice.pick(&[10_000, 200_000, 1_000_000, 8_000_000]);
                let delay = self.dice.below(span);
                self.at(delay, Happening::Heal { link });
            }
            Mishap::SendFails(end) => self.failing.send[end as usize] = true,
            Mishap::MachineFails(end) => self.failing.machine[end as usize] = true,
            Mishap::Slow(end) => {
                let span = self.dice.pick(&[3_000, 50_000, 2_000_000, 8_000_000]);
                let until = self.now + self.dice.below(span);
                match end {
                    End::Source => self.source.busy_until = until,
                    End::Destination => self.destination.busy_until = until,
                }
            }
            Mishap::AttachFails => self.failing.attach = true,
            Mishap::PagerBreaks => {
                if self.destination.alive && self.destination.pager.attached.is_some() {
                    self.destination.inbox.tell(DestinationEvent::PagerBroken("broken".into()));
                    self.wake(End::Destination);
                }
            }
            Mishap::Killed(end, silently) => self.kill(end, silently),
            Mishap::Cancel => {
                if self.source.session.can_cancel().is_ok() {
                    self.wish(&SourceEvent::Cancel);
                }
            }
            Mishap::Pause(End::Source) => {
                if self.source.session.is_in_postcopy() {
                    self.tell_source_of(self.source.link, SourceEvent::Lost("paused".into()));
                }
            }
            Mishap::Pause(End::Destination) => {
                if self.destination.status == MigrationStatus::PostcopyActive {
                    self.tell_destination_of_link(DestinationEvent::Lost("paused".into()));
                }
            }
            Mishap::StartPostcopy => self.wish(&SourceEvent::StartPostcopy),
            Mishap::Proceed => {
                if self.source.session.is_held() {
                    self.wish(&SourceEvent::Proceed);
                }
            }
            Mishap::LateReclaim => self.reclaim_late(),
        }
    }

    /// Two controllers may wish the same; what was allowed when it was wished may not be when the session hears of it.
    pub fn wish(&mut self, event: &SourceEvent) {
        let times = if self.dice.one_in(4) { 2 } else { 1 };
        for _ in 0..times {
            let delay = if self.dice.one_in(3) { self.dice.below(20_000) } else { self.dice.below(200) };
            self.at(delay, Happening::Wish(event.clone()));
        }
    }

    /// The guest's right to run is back only where the link is lost when the session hears of the wish.
    fn reclaim_late(&mut self) {
        let session = &self.source.session;
        let committed =
            matches!(session, SourceSession::Committed(_) | SourceSession::Postcopy(_) | SourceSession::Rejoining(_));
        if committed && self.source.alive && self.source.todo.is_empty() && self.source.opening.is_none() {
            let (next, actions) = std::mem::take(&mut self.source.session).on(SourceEvent::Reclaim);
            self.source.session = next;
            self.source.todo = actions.into();
            self.wake(End::Source);
        }
    }

    /// Ends a process.
    pub fn kill(&mut self, end: End, silently: bool) {
        if !self.is_alive(end) {
            return;
        }
        self.note(|| format!("{end:?} is killed"));
        match end {
            End::Source => (self.source.alive, self.source.machine.runs) = (false, false),
            End::Destination => {
                (self.destination.alive, self.destination.machine.runs) = (false, false);
                self.destination.letting_go.clear();
            }
        }
        for link in 0..self.links.len() {
            if silently {
                self.stall(link, &End::BOTH, true);
            } else {
                self.shut_down(end, link);
            }
        }
    }
}
