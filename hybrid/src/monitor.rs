//! When to stop pre-copying: another round, stop and copy, or post-copy.
//!
//! Pure: samples in, verdicts out. No clock, no socket, no thread.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How a migration may end its pre-copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Rounds until the rest fits into the downtime limit; it fails, the guest running on, where it never does.
    #[default]
    Precopy,
    /// No rounds: the handoff comes when it is asked for, and all memory follows it.
    Postcopy,
    /// Rounds for as long as they pay, then whichever handoff costs the guest less.
    Hybrid,
}

/// What bounds a migration. May change while it runs.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Limits {
    /// How it may end.
    pub mode: Mode,
    /// The longest blackout that pre-copy may end with by itself.
    pub downtime_limit: Duration,
    /// The longest blackout that the hybrid stops and copies for; past that, post-copy is the better end.
    pub blackout_target: Duration,
    /// Time for all rounds together.
    pub time_budget: Duration,
    /// Rounds in all.
    pub round_budget: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            downtime_limit: Duration::from_millis(300),
            blackout_target: Duration::from_millis(5),
            time_budget: Duration::from_secs(120),
            round_budget: 100,
        }
    }
}

/// A look at pre-copy: at the end of a round, and some milliseconds apart within it.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Since pre-copy began.
    pub at_ns: u64,
    /// Counted from 1.
    pub round: u32,
    /// Since this round began.
    pub round_ns: u64,
    /// This round is over: everything that was to be sent has been handed to the lanes.
    pub round_over: bool,
    /// Pages that this round began with.
    pub round_pages: u64,
    /// Pages of this round that no lane has taken yet.
    pub left_pages: u64,
    /// Pages sent and not acknowledged: to be fetched again after a handoff now.
    pub unacknowledged_pages: u64,
    /// Distinct pages, beside those left, that were written since they were last sent: with those left and those not
    /// acknowledged, what a handoff now would leave to be copied.
    pub dirty_pages: u64,
    /// Pages of `dirty_pages` or `left_pages` that the round before had sent too: the guest comes back to them. At the end
    /// of a round only; 0 within it.
    pub rewritten_pages: u64,
    /// Bytes that all bulk lanes together carry a second, as measured over the last stretch; the limit, where one is set and
    /// reached. 0 where nothing was measured yet.
    pub bytes_per_second: u64,
    /// Wire bytes of a page, on average over the round (zero pages and encodings counted).
    pub bytes_per_page: f64,
    /// What a handoff costs besides pages: pause, state, its loading, a round trip and a half. An estimate from this
    /// session's own round trips.
    pub handoff_ns: u64,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// Go on with this round, or begin the next.
    AnotherRound,
    /// Pause, copy the rest, run there.
    StopAndCopy,
    /// Hand off now; the rest follows.
    Postcopy,
    /// It does not converge, and post-copy is not allowed: end it, the guest running on.
    GiveUp,
}

/// What the monitor expects.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Prediction {
    /// Distinct pages of the next round, if there is one.
    pub next_round_pages: u64,
    /// How long it will take.
    pub next_round_ns: u64,
    /// The blackout, if the guest were stopped now and the rest copied first.
    pub stop_blackout_ns: u64,
    /// The blackout of a post-copy handoff now.
    pub postcopy_blackout_ns: u64,
    /// The drain after a post-copy handoff now.
    pub drain_ns: u64,
}

/// A choice and why.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Verdict {
    /// What to do.
    pub choice: Choice,
    /// Why, as a sentence for the report.
    pub reason: String,
    /// What it is based on.
    pub prediction: Prediction,
}

/// The monitor.
#[derive(Clone, Debug)]
pub struct Monitor {
    limits: Limits,
}

impl Monitor {
    /// A monitor that has seen nothing.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits }
    }

    /// The limits have changed.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// What follows from `sample`. Within a round, [`Choice::AnotherRound`] means to go on with it.
    pub fn observe(&mut self, sample: &Sample) -> Verdict {
        let rest = sample.left_pages + sample.dirty_pages + sample.unacknowledged_pages;
        let bytes = rest as f64 * sample.bytes_per_page;
        let copy_ns = bytes / sample.bytes_per_second.max(1) as f64 * 1e9;
        let prediction = Prediction {
            next_round_pages: sample.dirty_pages,
            next_round_ns: copy_ns as u64,
            stop_blackout_ns: sample.handoff_ns + copy_ns as u64,
            postcopy_blackout_ns: sample.handoff_ns,
            drain_ns: copy_ns as u64,
        };
        let limit = match self.limits.mode {
            Mode::Precopy | Mode::Postcopy => self.limits.downtime_limit,
            Mode::Hybrid => self.limits.blackout_target,
        };
        let spent =
            sample.round > self.limits.round_budget || sample.at_ns as u128 > self.limits.time_budget.as_nanos();
        let (choice, reason) = if sample.round_over && u128::from(prediction.stop_blackout_ns) <= limit.as_nanos() {
            (Choice::StopAndCopy, "the rest fits into the limit")
        } else if sample.round_over && self.limits.mode == Mode::Hybrid && sample.round >= 2 {
            (Choice::Postcopy, "another round gains less than it costs")
        } else if spent && self.limits.mode == Mode::Hybrid {
            (Choice::Postcopy, "the budget is spent")
        } else if spent {
            (Choice::GiveUp, "the budget is spent")
        } else {
            (Choice::AnotherRound, "another round pays")
        };
        Verdict { choice, reason: reason.to_owned(), prediction }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AnotherRound => "another round",
            Self::StopAndCopy => "stop and copy",
            Self::Postcopy => "post-copy",
            Self::GiveUp => "give up",
        })
    }
}
