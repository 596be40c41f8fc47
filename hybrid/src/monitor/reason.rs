//! Why, in a sentence with the numbers in it.

use super::outlook::{GoingOn, Outlook};
use super::{Choice, Limits, Mode, Sample, Spent, whole};

/// What the sentence is about.
pub(super) struct Seen<'a> {
    pub limits: &'a Limits,
    pub sample: &'a Sample,
    pub spent: Option<Spent>,
    pub measured: bool,
}

/// The sentence for `choice`.
pub(super) fn sentence(choice: Choice, outlook: &Outlook, seen: &Seen<'_>) -> String {
    if seen.limits.mode == Mode::Postcopy {
        return "post-copy was asked for: no rounds".to_owned();
    }
    match choice {
        Choice::StopAndCopy => stop(outlook, seen),
        Choice::Postcopy => postcopy(outlook, seen),
        Choice::GiveUp => format!(
            "{}, and {}, over the limit of {}",
            spent(seen),
            blackout(outlook, seen),
            time(seen.limits.stop_limit().as_secs_f64())
        ),
        Choice::AnotherRound => go_on(outlook, seen),
    }
}

fn stop(outlook: &Outlook, seen: &Seen<'_>) -> String {
    let fits =
        format!("{}, within the limit of {}", blackout(outlook, seen), time(seen.limits.stop_limit().as_secs_f64()));
    match (seen.spent, outlook.on) {
        (Some(_), _) => format!("{}, and {fits}", spent(seen)),
        (None, Some(on)) => format!(
            "{fits}; going on {} costs {} guest-seconds, stopping {}",
            way(&on, seen),
            cost(on.cost),
            cost(outlook.stop)
        ),
        (None, None) => format!("{fits}, and no round is left that could make it shorter"),
    }
}

fn postcopy(outlook: &Outlook, seen: &Seen<'_>) -> String {
    let rest = format!("{} pages are left{}", rest(seen.sample), probe(seen.sample));
    match (seen.spent, outlook.on) {
        (Some(_), _) => format!("{}: {rest} for post-copy", spent(seen)),
        (None, Some(on)) => format!(
            "{rest}, and another {} of pre-copy would leave {}: going on costs {} guest-seconds, post-copy now {}",
            time(on.seconds),
            whole(on.pages),
            cost(on.cost),
            cost(outlook.postcopy)
        ),
        (None, None) => format!("{rest}, and neither a round nor a stop fits into what is allowed"),
    }
}

/// What a sample of RAM has shown, where there is one.
fn probe(sample: &Sample) -> String {
    if sample.probe_pages == 0 {
        return String::new();
    }
    let (pages, dirty) = (sample.probe_pages, sample.probe_dirty_pages);
    format!(" ({dirty} of {pages} sampled ones were written within {})", time(sample.probe_ns as f64 / 1e9))
}

fn go_on(outlook: &Outlook, seen: &Seen<'_>) -> String {
    if !seen.measured {
        return "nothing was measured yet".to_owned();
    }
    match outlook.on {
        None => format!(
            "{} pages are left: neither a stop nor a round ahead comes below the limit of {} yet",
            rest(seen.sample),
            time(seen.limits.stop_limit().as_secs_f64())
        ),
        Some(on) => {
            let now = if seen.limits.mode == Mode::Hybrid {
                format!("post-copy now {}", cost(outlook.postcopy))
            } else {
                format!("stopping now {} with {}", cost(outlook.stop), blackout(outlook, seen))
            };
            format!(
                "going on {} leaves {} pages and costs {} guest-seconds, {now}",
                way(&on, seen),
                whole(on.pages),
                cost(on.cost)
            )
        }
    }
}

/// How long going on goes on.
fn way(on: &GoingOn, seen: &Seen<'_>) -> String {
    let end = if on.stops { "to a stop" } else { "to post-copy" };
    match on.rounds {
        0 => format!("to the end of round {} and {end} in {}", seen.sample.round, time(on.seconds)),
        1 => format!("for one more round and {end} in {}", time(on.seconds)),
        rounds => format!("for {rounds} more rounds and {end} in {}", time(on.seconds)),
    }
}

fn blackout(outlook: &Outlook, seen: &Seen<'_>) -> String {
    format!("{} pages copy in a blackout of {}", rest(seen.sample), time(outlook.stop_blackout))
}

fn rest(sample: &Sample) -> u64 {
    sample.left_pages.saturating_add(sample.dirty_pages).saturating_add(sample.unacknowledged_pages)
}

fn spent(seen: &Seen<'_>) -> String {
    match seen.spent {
        Some(Spent::Rounds) => format!("the budget of {} rounds is spent", seen.limits.round_budget),
        _ => format!("the budget of {} is spent", time(seen.limits.time_budget.as_secs_f64())),
    }
}

fn cost(guest_seconds: f64) -> String {
    format!("{guest_seconds:.3}")
}

fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}
