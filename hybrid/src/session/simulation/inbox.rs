//! A session thread's events as they wait for it: the project's own link tags, and its rules for what comes first, in virtual time.

use std::collections::VecDeque;

use crossbeam::channel::{Receiver, unbounded};

use super::world::Time;
use crate::link::{LinkTeller, Teller, Told};
use crate::patience::Rank;

/// As in `patience.rs`.
const LANE_LOSS_HELD: Time = 100_000;

/// An event, and the number of the link that it is about, which the simulation knows by itself.
type Noted<E> = (Told<E>, Option<u32>);

/// What waits for a session's thread.
pub struct Inbox<E> {
    teller: Teller<E>,
    events: Receiver<Told<E>>,
    /// The links of what is in the channel, in the same order.
    about: VecDeque<Option<u32>>,
    waiting: VecDeque<Noted<E>>,
    held_until: Option<Time>,
    /// When waiting for the other side has lasted long enough.
    pub patience: Option<Time>,
    /// How many links have ended.
    current: u32,
}

/// What a session's thread finds.
pub enum Next<E> {
    /// An event. `Err` where a lost link's is heard, or the current one's is not.
    Event(Result<E, &'static str>),
    /// One that nobody hears, because its link is over.
    Nothing,
    /// Patience has ended.
    TimedOut,
    /// It sleeps, until then at most.
    Sleep(Option<Time>),
}

/// Speaks of one link.
pub struct Speaker<E> {
    teller: LinkTeller<E>,
    link: u32,
}

impl<E> Clone for Speaker<E> {
    fn clone(&self) -> Self {
        Self { teller: self.teller.clone(), link: self.link }
    }
}

impl<E> Inbox<E> {
    pub fn new() -> Self {
        let (sender, events) = unbounded();
        Self {
            teller: Teller::new(sender),
            events,
            about: VecDeque::new(),
            waiting: VecDeque::new(),
            held_until: None,
            patience: None,
            current: 0,
        }
    }

    pub fn tell(&mut self, event: E) {
        self.teller.tell(event);
        self.about.push_back(None);
    }

    pub fn tell_of(&mut self, speaker: &Speaker<E>, event: E) {
        speaker.teller.tell(event);
        self.about.push_back(Some(speaker.link));
    }

    /// For the link that there is now.
    pub fn speaker(&self) -> Speaker<E> {
        Speaker { teller: self.teller.of_link(), link: self.current }
    }

    pub fn end_link(&mut self) {
        self.teller.end_link();
        self.current += 1;
    }

    /// What an action answers with.
    pub fn answer(&mut self, event: E) {
        self.waiting.push_back((Told::about_none(event), None));
    }

    pub fn next(&mut self, now: Time, rank: impl Fn(&E) -> Rank) -> Next<E> {
        if self.held_until.is_none() {
            if let Some(noted) = self.waiting.pop_front() {
                return self.heard(noted);
            }
            match self.receive() {
                Some(noted) if rank(noted.0.event()) == Rank::LaneLost => {
                    self.waiting.push_back(noted);
                    self.held_until = Some(now + LANE_LOSS_HELD);
                }
                Some(noted) => return self.heard(noted),
                None if self.patience.is_some_and(|until| until <= now) => {
                    self.patience = None;
                    return Next::TimedOut;
                }
                None => return Next::Sleep(self.patience),
            }
        }
        while let Some(noted) = self.receive() {
            match rank(noted.0.event()) {
                Rank::LaneLost => self.waiting.push_back(noted),
                Rank::Explains => {
                    self.held_until = None;
                    return self.heard(noted);
                }
                Rank::Follows => {
                    self.waiting.push_back(noted);
                    self.held_until = Some(now);
                    break;
                }
            }
        }
        match self.held_until.filter(|until| *until > now) {
            Some(until) => Next::Sleep(Some(until)),
            None => {
                self.held_until = None;
                self.waiting.pop_front().map_or(Next::Nothing, |noted| self.heard(noted))
            }
        }
    }

    fn receive(&mut self) -> Option<Noted<E>> {
        let told = self.events.try_recv().ok()?;
        Some((told, self.about.pop_front().flatten()))
    }

    fn heard(&self, (told, about): Noted<E>) -> Next<E> {
        let matters = about.is_none_or(|link| link == self.current);
        match (self.teller.heard(told), matters) {
            (Some(event), true) => Next::Event(Ok(event)),
            (None, false) => Next::Nothing,
            (Some(_), false) => Next::Event(Err("what a lost link says was heard")),
            (None, true) => Next::Event(Err("what the link says was not heard")),
        }
    }
}
