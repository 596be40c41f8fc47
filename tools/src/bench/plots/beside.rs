//! Two VMMs in one picture.

use super::super::format::ns_as;
use super::super::schema::{ModeReport, RunReport};
use super::canvas::{Anchor, Ink, NORMAL, PlotError, SMALL, picture};
use super::progress::points;
use super::ticks::{ceiling, decades, round};
use crate::bench::format::number;

/// Seconds shown before and after the handoff, as far as the runs reach.
const SHOWN: (f64, f64) = (-1.0, 3.0);
/// One row of a mode's dots, in pixels.
const ROW: i32 = 24;

/// The progress of the guests of two runs, one of each VMM, period by period, over the seconds since the handoff. Nothing
/// where neither has a steady rate.
///
/// # Errors
/// When the backend fails.
pub fn progress(runs: [(&str, &RunReport); 2]) -> Result<Option<String>, PlotError> {
    const INKS: [Ink; 2] = [Ink::Second, Ink::Main];
    // Ours is drawn last, on top.
    let curves: Vec<_> = runs
        .into_iter()
        .rev()
        .zip(INKS)
        .filter_map(|((name, run), ink)| {
            let (marks, points) = (run.marks?, points(run, |marks| marks.handoff_ns)?);
            let end = ns_as(marks.completed_ns.saturating_sub(marks.handoff_ns), 1e9);
            Some((name, ink, within(&points), end))
        })
        .collect();
    if curves.is_empty() {
        return Ok(None);
    }
    let all = || curves.iter().flat_map(|(_, _, points, _)| points);
    let left = all().map(|(x, _)| *x).fold(0.0, f64::min);
    let right = all().map(|(x, _)| *x).fold(0.1, f64::max);
    let high = ceiling(all().map(|(_, y)| *y).fold(100.0, f64::max)).clamp(120.0, 200.0);
    let picture = picture(1000, 330, |canvas| {
        let panel = canvas.panel(70..980, 36..280, left..right, 0.0..high);
        panel.x_axis(&round(left, right, 10), "seconds since the handoff")?;
        panel.y_axis(&round(0.0, high, 6), "visits in a period, % of the guest’s steady rate")?;
        panel.level(100.0, Ink::Muted)?;
        for (_, ink, points, _) in &curves {
            // A bar for each period, from the reading of the line before to that of its own.
            for pair in points.chunks_exact(2) {
                let [(from, height), (to, _)] = pair else { continue };
                panel.bar(*from..*to, 0.0..*height, *ink, 0.13)?;
            }
            panel.line(points, *ink, 2)?;
        }
        panel.rule(0.0, Ink::Alarm)?;
        panel.text("handoff", (0.0, high), (-5, 12), Anchor::Right, Ink::Alarm)?;
        for (index, (_, ink, _, end)) in curves.iter().rev().enumerate() {
            panel.rule(*end, *ink)?;
            let down = if index == 0 { 12 } else { 26 };
            panel.text("all memory there", (*end, high), (5, down), Anchor::Left, *ink)?;
        }
        let names: Vec<_> = curves.iter().rev().map(|(name, ink, ..)| (*name, *ink)).collect();
        panel.legend(&names)
    })?;
    Ok(Some(picture))
}

/// The part of a stepped line that is shown. Its points come in pairs, a period each.
fn within(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let shown = |pair: &&[(f64, f64)]| {
        pair.first().is_some_and(|(from, _)| *from >= SHOWN.0) && pair.last().is_some_and(|(to, _)| *to <= SHOWN.1)
    };
    points.chunks_exact(2).filter(shown).flatten().copied().collect()
}

/// What the guests of all modes saw: a dot a run, the median, and where that is with a probability of 95 %. Nothing where no
/// run has it.
///
/// # Errors
/// When the backend fails.
pub fn gaps(modes: &[&ModeReport]) -> Result<Option<String>, PlotError> {
    let of = |mode: &&ModeReport| {
        let moved = mode.carried_out().filter(|run| run.not_converged.is_none());
        let gaps: Vec<f64> =
            moved.filter_map(|run| run.figures.progress.gap_ns).map(|ns| ns_as(ns, 1e6).max(1e-3).log10()).collect();
        (!gaps.is_empty()).then(|| (mode.name(), mode.is_ours(), gaps, mode.summary.get("gap_ns").copied()))
    };
    let rows: Vec<_> = modes.iter().filter_map(of).collect();
    let all = || rows.iter().flat_map(|(_, _, gaps, _)| gaps);
    let left = all().copied().fold(f64::INFINITY, f64::min).floor();
    let right = all().copied().fold(f64::NEG_INFINITY, f64::max).ceil();
    if !left.is_finite() || !right.is_finite() {
        return Ok(None);
    }
    let right = if right > left { right } else { left + 1.0 };
    let count = i32::try_from(rows.len()).unwrap_or(i32::MAX / ROW);
    let bottom = 30 + count * ROW;
    let picture = picture(1000, u32::try_from(bottom + 48).unwrap_or(320), |canvas| {
        let panel = canvas.panel(190..930, 30..bottom, left..right, 0.0..f64::from(count));
        panel.x_axis(&decades(left, right, number), "longest gap that the guest saw, ms")?;
        for (index, (name, ours, gaps, spread)) in (0..).zip(&rows) {
            let ink = if *ours { Ink::Main } else { Ink::Second };
            let middle = f64::from(count - index) - 0.5;
            panel.pixel_text(name, 178, 30 + index * ROW + ROW / 2 + 4, Anchor::Right, Ink::Text, NORMAL)?;
            if let Some(spread) = spread {
                let at = |ns: f64| (ns / 1e6).max(1e-3).log10();
                if let Some((low, high)) = spread.ci_low.zip(spread.ci_high) {
                    panel.bar(at(low)..at(high), middle - 0.3..middle + 0.3, ink, 0.2)?;
                }
                panel.line(&[(at(spread.median), middle - 0.36), (at(spread.median), middle + 0.36)], ink, 3)?;
                let label = number(spread.median / 1e6);
                let to_the_right = gaps.iter().copied().fold(at(spread.ci_high.unwrap_or(spread.median)), f64::max);
                panel.text(&label, (to_the_right, middle), (9, 4), Anchor::Left, Ink::Muted)?;
            }
            for gap in gaps {
                panel.dot((*gap, middle), 3, ink)?;
            }
        }
        panel.pixel_text(
            "dot: a run · bar: the median · shaded: where it is, 95 %",
            930,
            18,
            Anchor::Right,
            Ink::Muted,
            SMALL,
        )
    })?;
    Ok(Some(picture))
}

#[cfg(test)]
mod tests {
    use super::super::super::synthetic;
    use super::*;

    #[test]
    fn both_guests_are_in_one_picture_with_a_bar_a_period() {
        let (_, aggregates) = synthetic::beside_a_peer(2);
        let runs = [("ours", &aggregates[0].report.runs[0]), ("theirs", &aggregates[3].report.runs[0])];
        let svg = progress(runs).unwrap().unwrap();
        for text in ["ours", "theirs", "handoff", "all memory there"] {
            assert!(svg.contains(text), "{text}");
        }
        let periods = |run: &RunReport| within(&points(run, |marks| marks.handoff_ns).unwrap()).len() / 2;
        let bars = runs.iter().map(|(_, run)| periods(run)).sum::<usize>();
        assert!(bars > 40, "{bars}");
        // The legend has a rectangle for each name.
        assert_eq!(svg.matches("<rect").count(), bars + 2);
        assert!(progress([("a", &RunReport::default()); 2]).unwrap().is_none());
    }

    #[test]
    fn every_run_of_every_mode_has_a_dot() {
        let (report, _) = synthetic::beside_a_peer(4);
        let modes: Vec<_> = report.modes.iter().collect();
        let svg = gaps(&modes).unwrap().unwrap();
        assert_eq!(svg.matches("<circle").count(), 4 * modes.len());
        assert!(svg.contains("qemu postcopy-preempt"));
        assert!(gaps(&[]).unwrap().is_none());
    }
}
