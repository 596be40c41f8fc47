//! The operator: sees the statuses, and does what the failure table tells. When nothing goes wrong any more, that must lead to
//! an end.

use super::mishaps::When;
use super::network::End;
use super::source_side::Whither;
use super::world::{Happening, World};
use crate::session::source::{SourceEvent, SourceSession};
use crate::session::{GuestAfter, Outcome};

/// How often the operator looks, once nothing goes wrong any more, before there must be an end: each look is a second or two later.
const LOOKS: u32 = 40;

impl World {
    pub fn operator(&mut self) {
        if self.is_settled() {
            self.settled = true;
            return self.check_end();
        }
        // Nothing will go wrong around what does not happen.
        let patience = self.now > 60_000_000;
        self.mishaps.retain(|(when, _)| matches!(when, When::Step(_)) || !patience);
        let quiet = self.mishaps.is_empty() && self.links.iter().all(|link| !link.is_passing_stall());
        if quiet {
            // What was to fail next has had its time.
            self.failing = super::mishaps::Failing::default();
            self.looks += 1;
        }
        if self.looks > LOOKS {
            let (source, destination) = (&self.source.session, &self.destination.session);
            let story = format!("they wait for ever: source {source:?}, destination {destination:?}");
            return self.must(false, &story);
        }
        self.look(quiet);
        let delay =
            if quiet || self.dice.one_in(3) { self.dice.between(800_000, 2_000_000) } else { self.dice.below(30_000) };
        self.at(delay, Happening::Operator);
    }

    fn look(&mut self, quiet: bool) {
        if !self.source.alive {
            // Where its guest had moved, that lacks what only the source had.
            if quiet && self.destination.alive && !self.destination.over {
                self.kill(End::Destination, false);
            }
            return;
        }
        match &self.source.session {
            SourceSession::Setup(_) | SourceSession::Active(_) if !self.scenario.rounds || self.scenario.impatient => {
                self.wish(&SourceEvent::StartPostcopy);
            }
            session if session.is_held() => self.wish(&SourceEvent::Proceed),
            SourceSession::Paused(_) if self.source.todo.is_empty() => self.recover(quiet),
            SourceSession::Over if self.source.over && self.destination.alive && !self.destination.over => {
                let on_source = !matches!(self.source.outcome, Some(Outcome::Completed));
                if quiet && on_source {
                    // It waits for a source that will not come.
                    self.must(!self.destination.ever_ran, "the source has its guest back from where it runs");
                    self.kill(End::Destination, false);
                }
            }
            _ => {}
        }
    }

    fn recover(&mut self, quiet: bool) {
        if !self.destination.alive {
            return self.wish(&SourceEvent::Reclaim);
        }
        match &self.destination.outcome {
            // It says itself that it never ran the guest and never will: it is fenced before anyone relies on that.
            Some(Outcome::Failed(failure)) if failure.guest == GuestAfter::OnSource => {
                return self.kill(End::Destination, false);
            }
            Some(Outcome::Failed(_)) => return self.kill(End::Source, false),
            _ => {}
        }
        self.source.rejoin = Some(match self.dice.below(12) {
            0 if !quiet => Whither::Stranger,
            1 if !quiet => Whither::Nowhere,
            _ => Whither::There,
        });
        self.wish(&SourceEvent::Rejoin);
    }

    /// Whether nothing remains to be done.
    fn is_settled(&self) -> bool {
        let source_ends = !self.source.alive || self.source.over;
        let destination_ends = !self.destination.alive || self.destination.over;
        source_ends && destination_ends
    }

    fn check_end(&mut self) {
        let runs_here = self.source.alive && self.source.machine.runs;
        let runs_there = self.destination.alive && self.destination.machine.runs;
        let stopped =
            matches!(&self.destination.outcome, Some(Outcome::Failed(failure)) if failure.guest == GuestAfter::Lost);
        let killed = !self.source.alive || !self.destination.alive;
        self.must(runs_here || runs_there || stopped || killed, "the guest runs nowhere, and nobody was killed");
        // A destination that dies without the commit, or in vain, takes nothing with it.
        let reclaimable = self.source.alive && self.source.outcome != Some(Outcome::Completed);
        self.must(runs_here || !reclaimable, "the source lives and was not emptied, but its guest does not run");
        if self.destination.outcome == Some(Outcome::Completed) {
            let known = !self.source.alive || self.source.outcome == Some(Outcome::Completed);
            self.must(known, "the destination is done, and the source does not know");
        }
        if self.struck == 0 {
            let done = [&self.source.outcome, &self.destination.outcome].map(|it| *it == Some(Outcome::Completed));
            let gave_up =
                matches!(&self.source.outcome, Some(Outcome::Failed(failure)) if failure.reason.contains("converge"));
            self.must(done == [true, true] || gave_up, "undisturbed, and not completed on both sides");
        }
    }
}
