//! The table that a bench ends with.

use std::fmt::Write as _;

use super::figures::FIGURES;
use super::format::{figure, ns_as, number};
use super::latency::PARTS;
use super::schema::{ModeReport, Report};

/// The report as text for a terminal.
#[must_use]
pub fn text(report: &Report) -> String {
    let mut text = String::new();
    for mode in &report.modes {
        mode_table(&mut text, mode);
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
    text
}

fn mode_table(text: &mut String, mode: &ModeReport) {
    let verified = mode.runs.iter().filter(|run| run.verified).count();
    let _ =
        writeln!(text, "{}, {}: guest memory verified in {verified} of {} runs", mode.vmm, mode.mode, mode.runs.len());
    for run in mode.runs.iter().filter(|run| !run.verified) {
        let _ = writeln!(text, "  run {} is not: {}", run.run, run.doubts.join("; "));
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
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::super::aggregate::Aggregate;
    use super::super::schema::RunReport;
    use super::super::synthetic;
    use super::*;

    #[test]
    fn the_table_has_every_figure_and_stays_narrow() {
        let mode = Aggregate::of("postcopy", "switchover", synthetic::runs(3)).unwrap().report;
        let text = text(&synthetic::report(vec![mode]));
        for figure in FIGURES {
            assert!(text.contains(figure.label), "{} is missing from\n{text}", figure.label);
        }
        assert!(text.contains("verified in 3 of 3 runs") && text.contains("Floor, spinning"), "{text}");
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
