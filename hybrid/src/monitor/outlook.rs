//! The ways on from here, each with its cost: end now in one of two ways, or go on for some rounds and end then.

use super::costs::{self, Link, ROUND_OVERHEAD, Rest};
use super::curve::Curve;

/// Rounds looked ahead. A round that pays shrinks the rest by a good part, so few are between all of RAM and nothing.
const AHEAD: u32 = 8;
/// Share of the limit that a blackout may fill when it only is predicted for later: there is no second try.
const MARGIN: f64 = 0.8;

/// How going on would end.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct GoingOn {
    /// What it costs from now on, the end included.
    pub cost: f64,
    /// Its seconds, the end left out.
    pub seconds: f64,
    /// Pages that the end finds.
    pub pages: f64,
    /// Whether it ends by stopping and copying.
    pub stops: bool,
    /// Rounds begun after this one.
    pub rounds: u32,
}

/// What may come.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Outlook {
    /// The cost of stopping now.
    pub stop: f64,
    /// The blackout then.
    pub stop_blackout: f64,
    /// The cost of post-copy now.
    pub postcopy: f64,
    /// Dirty pages at this round's end.
    pub round_end: f64,
    /// Dirty pages at the next one's.
    pub next_end: f64,
    /// The best end that going on may lead to, where there is one.
    pub on: Option<GoingOn>,
}

/// What an end must keep to.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Ends {
    /// The longest blackout that a stop may cause, in seconds.
    pub stop_limit: f64,
    /// Post-copy is allowed.
    pub postcopy: bool,
    /// Rounds that may still be begun.
    pub rounds: u32,
    /// Seconds that they may take.
    pub seconds: f64,
}

/// Looks ahead from a state in which `written` pages are dirty or in flight and `left` are to be sent in this round. Of those
/// written, `settled` will have been acknowledged when the guest is paused.
pub(super) fn look(written: f64, settled: f64, left: f64, link: &Link, curve: &Curve, ends: &Ends) -> Outlook {
    let left_seconds = left * link.left_page;
    let rest = Rest { written, left, hot_share: curve.share_of_left(left_seconds) };
    let paused = Rest { written: (written - settled).max(0.0), ..rest };
    let round_end = if left > 0.0 { curve.at_round_end(left, left_seconds) } else { written };
    let mut outlook = Outlook {
        stop: costs::stop_and_copy(&paused, link),
        stop_blackout: costs::stop_blackout(&paused, link),
        postcopy: costs::postcopy(&rest, link, curve),
        round_end,
        next_end: round_end,
        on: None,
    };
    let mut seconds = left_seconds;
    let mut dirtied = (round_end - written).max(0.0);
    let mut pages = round_end;
    for round in 0..=AHEAD {
        if round > 0 {
            let this = pages * link.data_page + ROUND_OVERHEAD;
            seconds += this;
            pages = curve.after_round(this);
            dirtied += pages;
            if round == 1 {
                outlook.next_end = pages;
            }
        }
        let going = round > 0 || left > 0.0;
        if going && round <= ends.rounds && seconds <= ends.seconds {
            let way = GoingOn { cost: costs::precopy(seconds, dirtied), seconds, pages, stops: false, rounds: round };
            for end in ways_to_end(way, link, curve, ends).into_iter().flatten() {
                if outlook.on.is_none_or(|best| end.cost < best.cost) {
                    outlook.on = Some(end);
                }
            }
        }
    }
    outlook
}

/// `way` with the cost of each end added that is allowed after it.
fn ways_to_end(way: GoingOn, link: &Link, curve: &Curve, ends: &Ends) -> [Option<GoingOn>; 2] {
    let rest = Rest::written(way.pages);
    let fits = costs::stop_blackout(&rest, link) <= link.handoff + (ends.stop_limit - link.handoff) * MARGIN;
    [
        fits.then(|| GoingOn { cost: way.cost + costs::stop_and_copy(&rest, link), stops: true, ..way }),
        ends.postcopy.then(|| GoingOn { cost: way.cost + costs::postcopy(&rest, link, curve), ..way }),
    ]
}
