//! The guest's own progress, before, during and after the move.

use super::super::format::ns_as;
use super::super::schema::RunReport;
use super::canvas::{Anchor, Ink, PlotError, picture};
use super::ticks::{ceiling, round};
use crate::bench::guest_trace::Marks;

/// The periods' visits of every run in percent of its steady rate, over the seconds since the handoff (or the end of an
/// attempt without one);
/// `typical` is drawn on top of the others. Nothing where no run has a steady rate.
///
/// # Errors
/// When the backend fails.
pub fn draw(runs: &[RunReport], typical: &RunReport) -> Result<Option<String>, PlotError> {
    let curves: Vec<_> = runs.iter().filter_map(curve).collect();
    let Some(main) = curve(typical) else { return Ok(None) };
    let all = || curves.iter().flatten();
    let left = all().map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
    let right = all().map(|(x, _)| *x).fold(f64::NEG_INFINITY, f64::max);
    let high = ceiling(all().map(|(_, y)| *y).fold(100.0, f64::max)).clamp(120.0, 300.0);
    let span = spans(typical);
    let moved = typical.not_converged.is_none();
    let picture = picture(1000, 320, |canvas| {
        let panel = canvas.panel(70..980, 36..270, left..right, 0.0..high);
        if let Some((drained, migrate)) = span {
            panel.bar(migrate..0.0, 0.0..high, Ink::Third, 0.09)?;
            panel.bar(0.0..drained, 0.0..high, Ink::Main, 0.09)?;
        }
        let zero = if moved { "the handoff" } else { "the attempt's end" };
        panel.x_axis(&round(left, right, 12), &format!("seconds since {zero}"))?;
        panel.y_axis(&round(0.0, high, 5), "visits in a period, % of the steady rate")?;
        for points in &curves {
            panel.faint_line(points, Ink::Quiet, 1, 0.75)?;
        }
        panel.line(&main, Ink::Main, 2)?;
        panel.rule(0.0, Ink::Alarm)?;
        panel.text(if moved { "handoff" } else { "given up" }, (0.0, high), (5, 12), Anchor::Left, Ink::Alarm)?;
        if let Some((drained, migrate)) = span {
            if moved {
                panel.text("drained", (drained, high), (5, 28), Anchor::Left, Ink::Main)?;
            }
            panel.rule(migrate, Ink::Muted)?;
            panel.text("migrate", (migrate, high), (-5, 12), Anchor::Right, Ink::Muted)?;
        }
        let run = format!("run {}", typical.run);
        let mut names = vec![(run.as_str(), Ink::Main)];
        if runs.len() > 1 {
            names.push(("the other runs", Ink::Quiet));
        }
        panel.legend(&names)
    })?;
    Ok(Some(picture))
}

/// The guest's progress in a run of each mode, over the seconds since `migrate`; nothing where none has a steady rate.
///
/// # Errors
/// When the backend fails.
pub fn side_by_side(runs: &[(&str, &RunReport)]) -> Result<Option<String>, PlotError> {
    const INKS: [Ink; 4] = [Ink::Second, Ink::Third, Ink::Main, Ink::Fourth];
    let since_migrate = |(name, run): &(&str, &RunReport)| {
        let points = points(run, |marks| marks.migrate_ns)?;
        let marks = run.marks?;
        Some(((*name).to_owned(), points, ns_as(marks.completed_ns.saturating_sub(marks.migrate_ns), 1e9)))
    };
    let curves: Vec<_> = runs.iter().filter_map(since_migrate).collect();
    if curves.is_empty() {
        return Ok(None);
    }
    let all = || curves.iter().flat_map(|(_, points, _)| points);
    let left = all().map(|(x, _)| *x).fold(f64::INFINITY, f64::min).max(-1.0);
    let right = all().map(|(x, _)| *x).fold(f64::NEG_INFINITY, f64::max);
    let high = ceiling(all().map(|(_, y)| *y).fold(100.0, f64::max)).clamp(120.0, 300.0);
    let picture = picture(1000, 260, |canvas| {
        let panel = canvas.panel(70..980, 36..210, left..right, 0.0..high);
        panel.x_axis(&round(left, right, 12), "seconds since migrate")?;
        panel.y_axis(&round(0.0, high, 4), "visits in a period, % of the steady rate")?;
        panel.rule(0.0, Ink::Muted)?;
        for ((_, points, end), ink) in curves.iter().zip(INKS) {
            panel.line(points, ink, 2)?;
            panel.rule(*end, ink)?;
        }
        let names: Vec<_> = curves.iter().zip(INKS).map(|((name, ..), ink)| (name.as_str(), ink)).collect();
        panel.legend(&names)
    })?;
    Ok(Some(picture))
}

/// Seconds from the handoff to the completion and (backwards) to `migrate`.
fn spans(run: &RunReport) -> Option<(f64, f64)> {
    let marks = run.marks?;
    let from_handoff = |ns: u64| ns_as(ns, 1e9) - ns_as(marks.handoff_ns, 1e9);
    Some((from_handoff(marks.completed_ns), from_handoff(marks.migrate_ns)))
}

/// The periods as a stepped line of (seconds since the handoff, percent of the steady rate).
fn curve(run: &RunReport) -> Option<Vec<(f64, f64)>> {
    points(run, |marks| marks.handoff_ns)
}

/// The same over the seconds since the instant that `zero` takes. A period reaches from the reading of the line before to
/// that of its own.
pub(super) fn points(run: &RunReport, zero: fn(&Marks) -> u64) -> Option<Vec<(f64, f64)>> {
    let (marks, guest) = (run.marks?, run.guest.as_ref()?);
    let steady = run.figures.progress.steady_visits_per_s.filter(|rate| *rate > 0.0)?;
    let seconds = |ns: u64| ns_as(ns, 1e9) - ns_as(zero(&marks), 1e9);
    // The guest's own periods are even; their lines' arrival is not.
    let period = {
        let (first, last) = (guest.periods.first()?, guest.periods.last()?);
        let count = last.number.checked_sub(first.number).filter(|count| *count > 0)?;
        ns_as(last.read_ns.checked_sub(first.read_ns)?, 1e9) / ns_as(count, 1.0)
    };
    let mut points = Vec::new();
    for pair in guest.periods.windows(2) {
        let [before, this] = pair else { continue };
        let percent = ns_as(this.visits, 1.0) / period / steady * 100.0;
        points.push((seconds(before.read_ns), percent));
        points.push((seconds(this.read_ns), percent));
    }
    Some(points)
}

#[cfg(test)]
mod tests {
    use super::super::super::synthetic;
    use super::*;

    #[test]
    fn a_steady_guest_stands_at_a_hundred_percent() {
        let runs = synthetic::runs(1);
        let points = curve(&runs[0]).unwrap();
        let before: Vec<_> = points.iter().filter(|(x, _)| *x < -0.2).collect();
        assert!(before.len() > 10 && before.iter().all(|(_, y)| (90.0..110.0).contains(y)), "{before:?}");
        assert!(points.iter().any(|(x, y)| *x >= 0.0 && *y < 80.0), "the move is not to be seen");
    }

    #[test]
    fn a_failed_run_has_no_curve() {
        assert!(draw(&[], &RunReport::default()).unwrap().is_none());
    }
}
