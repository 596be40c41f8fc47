//! Which of a session's links an event belongs to: what a lost one still says means nothing to the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crossbeam::channel::Sender;

/// An event for a session.
#[derive(Clone, Debug)]
pub struct Told<E> {
    /// The link that it is about; `None` where it is about none.
    link: Option<u32>,
    event: E,
}

/// Tells a session of events.
#[derive(Debug)]
pub struct Teller<E> {
    events: Sender<Told<E>>,
    current: Arc<AtomicU32>,
}

impl<E> Clone for Teller<E> {
    fn clone(&self) -> Self {
        Self { events: self.events.clone(), current: Arc::clone(&self.current) }
    }
}

/// Tells a session of what one link says.
#[derive(Debug)]
pub struct LinkTeller<E> {
    events: Sender<Told<E>>,
    link: u32,
}

impl<E> Clone for LinkTeller<E> {
    fn clone(&self) -> Self {
        Self { events: self.events.clone(), link: self.link }
    }
}

impl<E> Teller<E> {
    /// For the session that receives from the other end of `events`.
    pub fn new(events: Sender<Told<E>>) -> Self {
        Self { events, current: Arc::default() }
    }

    /// Tells of what is about no link. Says whether somebody listens.
    pub fn tell(&self, event: E) -> bool {
        self.events.send(Told::about_none(event)).is_ok()
    }

    /// For the link that there is now.
    pub fn of_link(&self) -> LinkTeller<E> {
        LinkTeller { events: self.events.clone(), link: self.current.load(Ordering::Acquire) }
    }

    /// The link is over: nothing that it says is heard any more.
    pub fn end_link(&self) {
        self.current.fetch_add(1, Ordering::AcqRel);
    }

    /// The event, unless it is about a link that is over.
    pub fn heard(&self, told: Told<E>) -> Option<E> {
        let current = self.current.load(Ordering::Acquire);
        told.link.is_none_or(|link| link == current).then_some(told.event)
    }
}

impl<E> LinkTeller<E> {
    /// Tells of what the link says. Says whether somebody listens.
    pub fn tell(&self, event: E) -> bool {
        self.events.send(Told { link: Some(self.link), event }).is_ok()
    }
}

impl<E> Told<E> {
    /// An event that is about no link.
    pub const fn about_none(event: E) -> Self {
        Self { link: None, event }
    }

    /// What it tells, whether or not it still matters.
    pub const fn event(&self) -> &E {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use crossbeam::channel::unbounded;

    use super::*;

    #[test]
    fn what_a_lost_link_says_is_not_heard() {
        let (events, told) = unbounded();
        let teller = Teller::new(events);
        let first = teller.of_link();
        assert!(first.tell("in time") && teller.heard(told.recv().unwrap()) == Some("in time"));
        assert!(first.tell("late") && teller.tell("always"));
        teller.end_link();
        assert!(teller.of_link().tell("new"));
        let heard: Vec<_> = told.try_iter().map(|told| teller.heard(told)).collect();
        assert_eq!(heard, [None, Some("always"), Some("new")]);
        drop(told);
        assert!(!teller.tell("nobody") && !first.tell("nobody"));
    }
}
