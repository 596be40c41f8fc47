//! One guest over one link: what the monitor chose, and what would have been best.

use serde::Serialize;
use switchover_hybrid::monitor::costs::TOTAL_WEIGHT;
use switchover_hybrid::monitor::{Choice, Limits, Mode, Monitor, Sample, Verdict};

use super::bits::count;
use super::drain::drain;
use super::guest::Guest;
use super::replay::{Link, Replay};

/// Rounds after which the oracle looks no further.
const FAR: u32 = 60;

/// A migration's end, and what all of it cost.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Outcome {
    /// How it ended.
    pub end: Choice,
    /// When that was decided, in seconds since it began.
    pub at: f64,
    /// In, or at the end of, which round.
    pub round: u32,
    /// Guest-seconds lost.
    pub lost: f64,
    /// Seconds in all.
    pub seconds: f64,
    /// Seconds of blackout.
    pub blackout: f64,
}

impl Outcome {
    /// Guest-seconds lost and a tenth of the seconds in all.
    #[must_use]
    pub fn cost(&self) -> f64 {
        self.lost + TOTAL_WEIGHT * self.seconds
    }
}

/// The monitor's migration beside the best one.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Judged {
    /// The guest's name.
    pub name: String,
    /// Bits a second.
    pub bandwidth: u64,
    /// Seconds, one way.
    pub delay: f64,
    /// What the monitor did.
    pub monitor: Outcome,
    /// Why, in its words.
    pub reason: String,
    /// What would have cost least; absent where nothing was allowed.
    pub oracle: Option<Outcome>,
    /// Post-copy without any round, for comparison; absent where it is not allowed.
    pub postcopy: Option<Outcome>,
    /// How much dearer the monitor's was, as a share: 0.1 for 10 %. Absent where it gave up and an end was to be had.
    pub regret: Option<f64>,
}

/// Plays `guest` over `link`: asks the monitor until it decides, and tries every end at every sample.
#[must_use]
pub fn judge(guest: &Guest, link: Link, limits: &Limits) -> Judged {
    let mut ends = Ends { guest, link, limits, best: None };
    let postcopy = (limits.mode != Mode::Precopy).then(|| ends.postcopy(&Replay::new(guest, link), 0));
    let mut monitor = Monitor::new(*limits);
    let mut replay = Replay::new(guest, link);
    let mut chosen: Option<(Outcome, Verdict)> = None;
    loop {
        let sample = replay.sample();
        ends.try_all(&replay, &sample);
        if chosen.is_none() {
            let verdict = monitor.observe(&sample);
            if let Some(outcome) = ends.outcome(verdict.choice, &replay, &sample) {
                chosen = Some((outcome, verdict));
            }
        }
        let spent =
            u128::from(sample.at_ns) > limits.time_budget.as_nanos() || sample.round > limits.round_budget.min(FAR);
        let so_far = replay.lost() + TOTAL_WEIGHT * replay.seconds();
        let hopeless = ends.best.is_some_and(|best| so_far >= best.cost());
        if let Some((outcome, verdict)) = &chosen
            && (spent || hopeless)
        {
            let regret = match (outcome.end, ends.best) {
                (Choice::GiveUp, Some(_)) => None,
                (Choice::GiveUp, None) | (_, None) => Some(0.0),
                (_, Some(best)) => Some(outcome.cost() / best.cost() - 1.0),
            };
            return Judged {
                name: guest.name.clone(),
                bandwidth: link.bytes_per_second.saturating_mul(8),
                delay: link.delay_ns as f64 / 1e9,
                monitor: *outcome,
                reason: verdict.reason.clone(),
                oracle: ends.best,
                postcopy,
                regret,
            };
        }
    }
}

struct Ends<'a> {
    guest: &'a Guest,
    link: Link,
    limits: &'a Limits,
    best: Option<Outcome>,
}

impl Ends<'_> {
    fn try_all(&mut self, replay: &Replay<'_>, sample: &Sample) {
        let stop = self.stop(replay, sample.round);
        if stop.blackout <= self.limits.stop_limit().as_secs_f64() {
            self.keep(stop);
        }
        // No post-copy can be cheaper than its pages alone.
        let least = stop.cost() - stop.blackout * (1.0 + TOTAL_WEIGHT)
            + self.handoff() * (1.0 + TOTAL_WEIGHT)
            + (stop.blackout - self.handoff()) * TOTAL_WEIGHT;
        if self.limits.mode == Mode::Hybrid && self.best.is_none_or(|best| least < best.cost()) {
            let postcopy = self.postcopy(replay, sample.round);
            self.keep(postcopy);
        }
    }

    fn keep(&mut self, outcome: Outcome) {
        if self.best.is_none_or(|best| outcome.cost() < best.cost()) {
            self.best = Some(outcome);
        }
    }

    fn outcome(&self, choice: Choice, replay: &Replay<'_>, sample: &Sample) -> Option<Outcome> {
        match choice {
            Choice::AnotherRound => None,
            Choice::StopAndCopy => Some(self.stop(replay, sample.round)),
            Choice::Postcopy => Some(self.postcopy(replay, sample.round)),
            Choice::GiveUp => Some(Outcome {
                end: Choice::GiveUp,
                at: replay.seconds(),
                round: sample.round,
                lost: replay.lost(),
                seconds: replay.seconds(),
                blackout: 0.0,
            }),
        }
    }

    fn stop(&self, replay: &Replay<'_>, round: u32) -> Outcome {
        let blackout = self.handoff() + count(&replay.rest()) as f64 * self.link.page_seconds(self.guest);
        Outcome {
            end: Choice::StopAndCopy,
            at: replay.seconds(),
            round,
            lost: replay.lost() + blackout,
            seconds: replay.seconds() + blackout,
            blackout,
        }
    }

    fn postcopy(&self, replay: &Replay<'_>, round: u32) -> Outcome {
        let drained = drain(self.guest, self.link, replay.rest(), replay.hot(), replay.position());
        Outcome {
            end: Choice::Postcopy,
            at: replay.seconds(),
            round,
            lost: replay.lost() + self.handoff() + drained.lost,
            seconds: replay.seconds() + self.handoff() + drained.seconds,
            blackout: self.handoff(),
        }
    }

    fn handoff(&self) -> f64 {
        self.link.handoff_ns(self.guest) as f64 / 1e9
    }
}
