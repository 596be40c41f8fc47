//! What `switchover simulate --faults` prints.

use std::fmt::Write as _;

use super::play::Outcome;
use super::{Judged, Played};
use crate::simulate::table::bandwidth;

/// Seconds of stall below which two orders are alike: one fault.
const LEAST: f64 = 1e-4;

/// All of `judged` as text for a terminal.
#[must_use]
pub fn text(judged: &[Judged]) -> String {
    let mut text = String::new();
    let width = judged.iter().map(|one| one.name.len()).max().unwrap_or(0).max(5);
    let orders = judged.iter().flat_map(|one| one.played.iter().map(|played| played.order.len()));
    let order_width = orders.max().unwrap_or(0).max("best feasible".len());
    let _ = writeln!(
        text,
        "{:width$}  {:>8}  {:order_width$}  {:>8} {:>8} {:>8} {:>10} {:>7} {:>10} {:>10}",
        "trace", "link", "order", "asked", "raced", "landing", "stall", "× best", "drain", "finish"
    );
    for one in judged {
        let mut line = |order: &str, outcome: &Outcome| {
            let ratio =
                if one.best.stall > 0.0 { format!("{:.2}", outcome.stall / one.best.stall) } else { "-".to_owned() };
            let _ = writeln!(
                text,
                "{:width$}  {:>8}  {order:order_width$}  {:>8} {:>8} {:>8} {:>10} {ratio:>7} {:>10} {:>10}",
                one.name,
                bandwidth(one.bandwidth),
                outcome.asked,
                outcome.raced,
                outcome.landing,
                time(outcome.stall),
                time(outcome.drain),
                time(outcome.finish),
            );
        };
        for Played { order, outcome } in &one.played {
            line(order, outcome);
        }
        line("best feasible", &one.best);
        line("bound", &one.bound);
    }
    text + &summary(judged)
}

/// What each order comes to over all drains. Where the best has no stall at all no ratio to it means anything, so the orders
/// are compared with the first one too.
fn summary(judged: &[Judged]) -> String {
    let mut text = String::new();
    let Some(first) = judged.first() else { return text };
    let name = first.played.first().map_or("", |played| &played.order);
    let _ = writeln!(
        text,
        "\nover {} drains: seconds stalled, faults asked, stall against {name}'s (geometric mean), against the best's (sum)",
        judged.len()
    );
    let best: f64 = judged.iter().map(|one| one.best.stall).sum();
    let mut line = |order: &str, of_it: &dyn Fn(&Judged) -> Option<Outcome>| {
        let all = || judged.iter().filter_map(|one| Some((one.played.first()?.outcome, of_it(one)?)));
        let stall: f64 = all().map(|(_, outcome)| outcome.stall).sum();
        let asked: u64 = all().map(|(_, outcome)| outcome.asked).sum();
        let logs = all().map(|(first, outcome)| (outcome.stall.max(LEAST) / first.stall.max(LEAST)).ln());
        let mean = (logs.sum::<f64>() / judged.len() as f64).exp();
        let ratio = if best > 0.0 { format!("{:.2}", stall / best) } else { "-".to_owned() };
        let _ = writeln!(text, "  {order:28} {stall:>9.3} {asked:>10} {mean:>7.3} {ratio:>8}");
    };
    for (index, Played { order, .. }) in first.played.iter().enumerate() {
        line(order, &|one| one.played.get(index).map(|played| played.outcome));
    }
    line("best feasible", &|one| Some(one.best));
    line("bound", &|one| Some(one.bound));
    text
}

fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}
