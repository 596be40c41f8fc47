//! The table that a bench ends with.

use std::fmt::Write as _;

pub mod beside;

use super::bandwidth::Bandwidth;
use super::felt;
use super::figures::FIGURES;
use super::format::{figure, ns_as, number};
use super::latency::PARTS;
use super::matrix::{Judgement, Matrix, MatrixEntry};
use super::schema::{ModeReport, Report};

/// The report as text for a terminal.
#[must_use]
pub fn text(report: &Report) -> String {
    let mut text = String::new();
    // What the matrix and the comparison show needs no table a mode.
    let many = report.comparison.is_some() || report.matrix.as_ref().is_some_and(|matrix| matrix.cells.len() > 1);
    for mode in &report.modes {
        if many {
            doubts(&mut text, mode);
        } else {
            mode_table(&mut text, mode);
        }
    }
    if let Some(matrix) = &report.matrix {
        matrix_table(&mut text, matrix);
    }
    if let Some(comparison) = &report.comparison {
        beside::comparison(&mut text, comparison, &report.modes);
    }
    if let Some(floor) = &report.floor {
        for sum in floor.sums.iter().filter(|sum| sum.link == report.settings.link) {
            let _ = writeln!(
                text,
                "Floor, {}: {} µs at p50, {} µs at p99 (fault of a {} + 4 KiB over {})",
                sum.way,
                number(ns_as(sum.p50_ns, 1e3)),
                number(ns_as(sum.p99_ns, 1e3)),
                sum.fault,
                sum.link
            );
        }
    }
    for line in felt::against_floor(report) {
        let _ = writeln!(text, "{line}");
    }
    text
}

fn mode_table(text: &mut String, mode: &ModeReport) {
    let verified = mode.runs.iter().filter(|run| run.verified).count();
    let bandwidth = Bandwidth::from(mode.bandwidth_bit_s);
    let link = mode.bandwidth_bit_s.map(|_| format!(" at {bandwidth}bit/s")).unwrap_or_default();
    let _ = writeln!(
        text,
        "{}, {}{link}: guest memory verified in {verified} of {} runs",
        mode.vmm,
        mode.mode,
        mode.runs.len()
    );
    doubts(text, mode);
    for run in &mode.runs {
        if let Some(why) = &run.not_converged {
            let _ = writeln!(text, "  run {} did not converge, and its guest went on at the source: {why}", run.run);
        }
    }
    if let Some(endings) = endings(mode) {
        let _ = writeln!(text, "  pre-copy ended by {endings}");
    }
    if !mode.summary.is_empty() {
        let _ = writeln!(text, "\n  {:<38} {:>10} {:>10} {:>10}", "", "median", "min", "max");
    }
    for descriptor in FIGURES {
        let Some(spread) = mode.summary.get(descriptor.key) else { continue };
        let [(median, unit), (min, _), (max, _)] =
            [spread.median, spread.min, spread.max].map(|value| figure(value, descriptor.unit));
        let _ = writeln!(text, "  {:<38} {median:>10} {min:>10} {max:>10} {unit}", descriptor.label);
    }
    if mode.latency.values().any(|percentiles| percentiles.count > 0) {
        let _ = writeln!(
            text,
            "\n  {:<38} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
            "Fault latency, µs, all runs", "count", "p50", "p90", "p99", "p99.9", "max"
        );
    }
    for part in PARTS {
        let Some(percentiles) = mode.latency.get(part.key).filter(|found| found.count > 0) else { continue };
        let _ = write!(text, "  {:<38} {:>8}", part.label, percentiles.count);
        for (_, ns) in percentiles.named() {
            let _ = write!(text, " {:>8}", number(ns_as(ns, 1e3)));
        }
        text.push('\n');
    }
    if let Some(visits) = mode.latency.get(felt::KEY) {
        let _ = write!(text, "  {:<38} {:>8}", "guest's visits from the handoff on", visits.count);
        for (_, ns) in visits.named() {
            let _ = write!(text, " {:>8}", number(ns_as(ns, 1e3)));
        }
        text.push('\n');
    }
    text.push('\n');
}

fn doubts(text: &mut String, mode: &ModeReport) {
    for run in mode.runs.iter().filter(|run| !run.verified) {
        let cell = if mode.guest.is_empty() { String::new() } else { format!("{} {} ", mode.cell_name(), mode.name()) };
        let _ = writeln!(text, "  {cell}run {} is not: {}", run.run, run.doubts.join("; "));
    }
}

/// What ended pre-copy, and how often: `post-copy (4 runs), stop and copy (1 run)`; `None` where there was none.
#[must_use]
pub fn endings(mode: &ModeReport) -> Option<String> {
    let mut counted: Vec<(String, usize)> = Vec::new();
    for choice in mode.runs.iter().filter_map(|run| run.figures.ended_by) {
        let name = choice.to_string();
        match counted.iter_mut().find(|(other, _)| *other == name) {
            Some((_, count)) => *count += 1,
            None => counted.push((name, 1)),
        }
    }
    let parts: Vec<_> = counted
        .iter()
        .map(|(name, count)| format!("{name} ({count} run{})", if *count == 1 { "" } else { "s" }))
        .collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// Two lines of heading, and a row a cell.
fn matrix_table(text: &mut String, matrix: &Matrix) {
    let Some(first) = matrix.cells.first() else { return };
    let names: Vec<&str> = first.modes.iter().map(|entry| entry.mode.as_str()).collect();
    text.push_str(
        "The modes side by side: cost in s (guest progress lost + 0.1 × whole migration), and the longest gap\n",
    );
    text.push_str("that the guest saw in ms; medians\n\n");
    let _ = write!(text, "  {:<10} {:<9}", "guest", "link");
    for name in &names {
        let _ = write!(text, " {:>16}", format!("{name} s / ms"));
    }
    let _ = writeln!(text, " {:>10} {:>10}", "cost ratio", "gap ratio");
    for cell in &matrix.cells {
        let _ = write!(text, "  {:<10} {:<9}", cell.guest, cell.link().to_string());
        for name in &names {
            let entry = cell.modes.iter().find(|entry| entry.mode == *name);
            let _ = write!(text, " {:>16}", entry.map(costs).unwrap_or_default());
        }
        let _ = writeln!(text, " {:>10} {:>10}", verdict(cell.cost.as_ref()), verdict(cell.gap.as_ref()));
    }
    for (what, most, (met, all)) in [
        ("cost at most", matrix.most_cost_ratio, matrix.met(|cell| cell.cost.as_ref())),
        ("gap at most", matrix.most_gap_ratio, matrix.met(|cell| cell.gap.as_ref())),
    ] {
        let against = if what.starts_with("cost") { "the better pure mode's" } else { "post-copy's" };
        if all > 0 {
            let _ = writeln!(text, "  hybrid's {what} {most} × {against}: {met} of {all} cells");
        }
    }
    if let Some(predicted) = matrix.predicted {
        let _ = writeln!(
            text,
            "  blackout of stop and copy predicted within 2 ms or 20 %: {} of {} runs",
            predicted.within, predicted.runs
        );
    }
    text.push('\n');
}

/// `0.532 / 34.1`.
fn costs(entry: &MatrixEntry) -> String {
    match (entry.cost_s, entry.gap_ns) {
        (Some(cost), Some(gap)) => format!("{} / {}", number(cost), number(gap / 1e6)),
        (Some(cost), None) => number(cost),
        (None, _) if entry.not_converged > 0 => "not converged".to_owned(),
        (None, _) => "–".to_owned(),
    }
}

/// `0.97 yes`.
#[must_use]
pub fn verdict(judgement: Option<&Judgement>) -> String {
    let Some(judgement) = judgement else { return "–".to_owned() };
    let ratio = judgement.ratio.map_or_else(|| "–".to_owned(), number);
    format!("{ratio} {}", if judgement.met { "yes" } else { "NO" })
}

#[cfg(test)]
mod tests {
    use super::super::aggregate::Aggregate;
    use super::super::schema::RunReport;
    use super::super::synthetic;
    use super::*;

    #[test]
    fn the_table_has_every_figure_and_stays_narrow() {
        let mode = Aggregate::of("hybrid", "switchover", synthetic::hybrid_runs(3)).unwrap().report;
        let text = text(&synthetic::report(vec![mode]));
        assert!(text.contains("pre-copy ended by post-copy (3 runs)"), "{text}");
        // A peer's alone.
        for figure in FIGURES.iter().filter(|figure| figure.key != "own_downtime_ns") {
            assert!(text.contains(figure.label), "{} is missing from\n{text}", figure.label);
        }
        assert!(text.contains("verified in 3 of 3 runs") && text.contains("Floor, spinning"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }

    #[test]
    fn modes_are_shown_side_by_side_with_verdicts() {
        let (report, _) = synthetic::three_modes(2);
        let text = text(&report);
        assert!(text.contains("run 1 did not converge, and its guest went on at the source: the budget is"), "{text}");
        assert!(text.contains("not converged") && text.contains("of 1 cells"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }

    #[test]
    fn many_cells_are_one_table() {
        let (mut report, aggregates) = synthetic::three_modes(1);
        for aggregate in aggregates {
            report.modes.push(aggregate.in_cell("idle".to_owned(), "1G".parse().unwrap()).report);
        }
        report.matrix = Matrix::of(&report.modes);
        let text = text(&report);
        assert!(text.contains("idle       1G") && !text.contains("Fault latency"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }

    #[test]
    fn a_doubtful_run_is_named() {
        let mut runs = synthetic::runs(1);
        runs.push(RunReport { run: 2, doubts: vec!["it stands still".to_owned()], ..RunReport::default() });
        let mode = Aggregate::of("postcopy", "switchover", runs).unwrap().report;
        assert!(text(&synthetic::report(vec![mode])).contains("run 2 is not: it stands still"));
    }
}
