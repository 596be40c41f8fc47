//! This VMM beside a peer, as text.

use std::fmt::Write as _;

use super::super::comparison::{Best, Bound, ComparedCell, Comparison, Demand, recovered};
use super::super::figures::{FIGURES, Figure};
use super::super::format::{figure, number};
use super::super::schema::{ModeReport, Spread};

/// The figures of the table of all modes: their names, two lines of heading, whether the median's interval stands beside it,
/// and the column's width.
const COLUMNS: &[(&str, [&str; 2], bool, usize)] = &[
    ("gap_ns", ["blackout that the", "guest saw, ms"], true, 20),
    ("lost_around_s", ["progress lost", "within 10 s, s"], true, 22),
    ("recovered_s", ["95 %", "in s"], false, 7),
    ("drain_gbit_s", ["drain", "Gbit/s"], false, 7),
    ("cpu_s_per_gib", ["CPU s", "a GiB"], false, 7),
    ("own_downtime_ns", ["says", "ms"], false, 6),
];

/// All modes by what tells the two apart, and what was asked.
pub fn comparison(text: &mut String, comparison: &Comparison, modes: &[ModeReport]) {
    for cell in &comparison.cells {
        let _ = writeln!(
            text,
            "Beside {} {}, {}: medians, and in brackets where they are with 95 %\n",
            comparison.title,
            comparison.version,
            cell.name()
        );
        all_modes(text, cell, modes);
        asked(text, comparison, cell);
        text.push('\n');
    }
}

fn all_modes(text: &mut String, cell: &ComparedCell, modes: &[ModeReport]) {
    for line in 0..2 {
        let _ = write!(text, "  {:<22}{:>5}", "", if line == 0 { "runs" } else { "" });
        for (_, heading, _, width) in COLUMNS {
            let _ = write!(text, "{:>width$}", heading.get(line).copied().unwrap_or_default());
        }
        text.push('\n');
    }
    for mode in modes.iter().filter(|mode| is_in(mode, cell)) {
        let verified = mode.runs.iter().filter(|run| run.verified && run.not_converged.is_none()).count();
        let _ = write!(text, "  {:<22}{verified:>5}", mode.name());
        for (key, _, interval, width) in COLUMNS {
            let shown = FIGURES.iter().find(|figure| figure.key == *key).zip(spread(mode, key));
            let shown = match recovered(mode).filter(|_| *key == "recovered_s") {
                Some(median) => back_after(median),
                None => shown.map_or_else(|| "–".to_owned(), |(figure, spread)| value(figure, spread, *interval)),
            };
            let _ = write!(text, "{shown:>width$}");
        }
        text.push('\n');
    }
}

fn is_in(mode: &ModeReport, cell: &ComparedCell) -> bool {
    mode.guest == cell.guest && mode.bandwidth_bit_s == cell.bandwidth_bit_s
}

/// What the table of all modes shows of a figure. This VMM's own report of how long its guest stood still is the blackout.
#[must_use]
pub fn spread<'a>(mode: &'a ModeReport, key: &str) -> Option<&'a Spread> {
    let own = key == "own_downtime_ns" && mode.is_ours();
    mode.summary.get(if own { "blackout_ns" } else { key })
}

/// Seconds until a guest was back at its rate, counting runs whose guest never was.
#[must_use]
pub fn back_after(median: f64) -> String {
    if median.is_finite() { number(median) } else { "never".to_owned() }
}

/// `3.12 [2.95, 3.40]`.
fn value(descriptor: &Figure, spread: &Spread, with_interval: bool) -> String {
    let show = |value| figure(value, descriptor.unit).0;
    match spread.ci_low.zip(spread.ci_high).filter(|_| with_interval) {
        Some((low, high)) => format!("{} [{}, {}]", show(spread.median), show(low), show(high)),
        None => show(spread.median),
    }
}

fn asked(text: &mut String, comparison: &Comparison, cell: &ComparedCell) {
    if cell.demands.is_empty() {
        return;
    }
    let (met, all) = cell.met();
    let _ = writeln!(
        text,
        "\n  Asked of each post-copy mode, beside {}'s best by the same figure: {met} of {all} met",
        comparison.title
    );
    for demand in &cell.demands {
        let theirs = demand.theirs.as_ref().map(|best| best_of(demand, best)).unwrap_or_default();
        let _ = writeln!(
            text,
            "  {:<30} {:<9} {:>11} {theirs:>28} {:>12} {}",
            demand.label,
            demand.mode,
            demand.ours.map_or_else(|| "never".to_owned(), |value| with_unit(&demand.figure, value)),
            bound(demand),
            if demand.met { "yes" } else { "NO" }
        );
    }
}

/// `postcopy-preempt 19.4 ms`.
fn best_of(demand: &Demand, best: &Best) -> String {
    format!("{} {}", best.mode, with_unit(&demand.figure, best.median))
}

/// A figure's value with its unit.
#[must_use]
pub fn with_unit(key: &str, value: f64) -> String {
    let Some(descriptor) = FIGURES.iter().find(|figure| figure.key == key) else { return number(value) };
    let (shown, unit) = figure(value, descriptor.unit);
    format!("{shown} {unit}").trim_end().to_owned()
}

/// What was asked, with the ratio where that is what it bounds: `0.16 ≤ 0.1`.
#[must_use]
pub fn bound(demand: &Demand) -> String {
    let ratio = demand.ratio.map_or_else(|| "–".to_owned(), number);
    match demand.bound {
        Bound::AtMost(most) => format!("≤ {}", with_unit(&demand.figure, most)),
        Bound::RatioAtMost(most) => format!("{ratio} ≤ {most}"),
        Bound::RatioAtLeast(least) => format!("{ratio} ≥ {least}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::synthetic;
    use super::super::text;
    use super::*;

    #[test]
    fn both_vmms_are_in_one_narrow_table_and_what_was_asked_below() {
        let (report, _) = synthetic::beside_a_peer(3);
        let text = text(&report);
        for part in [
            "Beside QEMU 10.0.2, random, unlimited",
            "  postcopy  ",
            "  qemu postcopy-preempt ",
            "≤ 0.1 NO",
            "≥ 3 ",
            "≤ 2.00 s yes",
            "≤ 0.25",
            "The modes side by side",
        ] {
            assert!(text.contains(part), "`{part}` is not in\n{text}");
        }
        assert!(!text.contains("Fault latency"), "what is in the report needs no table a mode");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }

    #[test]
    fn a_ratio_stands_beside_its_bound_and_an_absent_one_is_a_dash() {
        let (report, _) = synthetic::beside_a_peer(2);
        let mut demand = report.comparison.unwrap().cells.remove(0).demands.remove(1);
        (demand.ratio, demand.bound) = (Some(0.163), Bound::RatioAtMost(0.1));
        assert_eq!(bound(&demand), "0.163 ≤ 0.1");
        demand.ratio = None;
        assert_eq!(bound(&demand), "– ≤ 0.1");
        demand.bound = Bound::AtMost(2e6);
        assert_eq!(bound(&demand), "≤ 2.00 ms");
    }
}
