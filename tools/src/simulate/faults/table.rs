//! What `switchover simulate --faults` prints.

use std::fmt::Write as _;

use super::{Judged, Played};
use crate::simulate::table::bandwidth;

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
        let mut line = |order: &str, outcome: &super::play::Outcome| {
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

/// How far each order is from the best, over all traces.
fn summary(judged: &[Judged]) -> String {
    let mut text = String::new();
    let Some(first) = judged.first() else { return text };
    let _ =
        writeln!(text, "\nover {} drains: stall against the best (geometric mean, worst), faults asked", judged.len());
    for (index, Played { order, .. }) in first.played.iter().enumerate() {
        let of_it = || judged.iter().filter_map(|one| one.played.get(index).map(|played| (one, played.outcome)));
        let ratios: Vec<f64> = of_it()
            .filter(|(one, _)| one.best.stall > 0.0)
            .map(|(one, outcome)| (outcome.stall / one.best.stall).max(f64::MIN_POSITIVE))
            .collect();
        let mean = (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / ratios.len().max(1) as f64).exp();
        let worst = ratios.iter().copied().fold(0.0, f64::max);
        let asked: u64 = of_it().map(|(_, outcome)| outcome.asked).sum();
        let _ = writeln!(text, "  {order:28} {mean:>6.2} {worst:>7.2} {asked:>10}");
    }
    let asked: u64 = judged.iter().map(|one| one.best.asked).sum();
    let _ = writeln!(text, "  {:28} {:>6.2} {:>7.2} {asked:>10}", "best feasible", 1.0, 1.0);
    text
}

fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}
