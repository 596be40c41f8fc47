//! What `switchover simulate` prints.

use std::fmt::Write as _;

use serde::Serialize;
use switchover_hybrid::monitor::Choice;

use super::oracle::{Judged, Outcome};

/// Regrets of many migrations, as shares.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Summary {
    /// Migrations played.
    pub migrations: usize,
    /// Those in which the monitor gave up although an end was to be had. They count as the worst regret of all.
    pub missed: usize,
    /// The middle one; absent where the middle one was missed.
    pub median_regret: Option<f64>,
    /// The largest; absent where one was missed.
    pub worst_regret: Option<f64>,
}

/// The regrets of `judged`.
#[must_use]
pub fn summary<'a>(judged: impl IntoIterator<Item = &'a Judged>) -> Summary {
    let mut regrets: Vec<f64> = judged.into_iter().map(|one| one.regret.unwrap_or(f64::INFINITY)).collect();
    regrets.sort_by(f64::total_cmp);
    let finite = |regret: Option<&f64>| regret.copied().filter(|regret| regret.is_finite());
    Summary {
        migrations: regrets.len(),
        missed: regrets.iter().filter(|regret| regret.is_infinite()).count(),
        median_regret: finite(regrets.get(regrets.len() / 2)),
        worst_regret: finite(regrets.last()),
    }
}

/// All of `judged` as text for a terminal.
#[must_use]
pub fn text(judged: &[Judged]) -> String {
    let mut text = String::new();
    let width = judged.iter().map(|one| one.name.len()).max().unwrap_or(0).max(5);
    let _ = writeln!(
        text,
        "{:width$}  {:>8} {:>8}  {:13} {:>5} {:>9} {:>9} {:>9} {:>9} {:>9}  {:13} {:>5} {:>9} {:>9} {:>7}",
        "trace",
        "link",
        "delay",
        "monitor",
        "round",
        "at",
        "blackout",
        "lost",
        "total",
        "cost",
        "oracle",
        "round",
        "at",
        "cost",
        "regret"
    );
    for one in judged {
        let Outcome { round, at, blackout, lost, seconds, .. } = one.monitor;
        let _ = write!(
            text,
            "{:width$}  {:>8} {:>8}  {:13} {round:>5} {:>9} {:>9} {:>9} {:>9} {:>9.4}  ",
            one.name,
            bandwidth(one.bandwidth),
            time(one.delay),
            name(one.monitor.end),
            time(at),
            time(blackout),
            time(lost),
            time(seconds),
            one.monitor.cost()
        );
        let _ = match &one.oracle {
            Some(best) => {
                write!(text, "{:13} {:>5} {:>9} {:>9.4} ", name(best.end), best.round, time(best.at), best.cost())
            }
            None => write!(text, "{:13} {:>5} {:>9} {:>9} ", "no end", "", "", ""),
        };
        let _ = writeln!(text, "{:>7}", regret(one.regret));
    }
    let all = summary(judged);
    let _ = writeln!(
        text,
        "\nregret of {} migrations: median {}, worst {}",
        all.migrations,
        regret(all.median_regret),
        regret(all.worst_regret)
    );
    text
}

fn name(end: Choice) -> String {
    end.to_string()
}

/// A share as a percentage.
#[must_use]
pub fn regret(share: Option<f64>) -> String {
    share.map_or_else(|| "missed".to_owned(), |share| format!("{:.1} %", share * 100.0))
}

/// Bits a second.
#[must_use]
pub fn bandwidth(bits: u64) -> String {
    let bits = bits as f64;
    if bits >= 1e9 { format!("{}G", short(bits / 1e9)) } else { format!("{}M", short(bits / 1e6)) }
}

fn short(value: f64) -> String {
    format!("{}", (value * 100.0).round() / 100.0)
}

fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.2} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}
