//! The phases on both sides, and the handoff under the magnifying glass.

use std::ops::Range;

use switchover_hybrid::report::{PhaseSpan, RoundReport, SideReport};

use super::super::format::{millis, ns_as, number};
use super::canvas::{Anchor, Canvas, Ink, Panel, PlotError, estimated_width, picture};
use super::ticks::round;

/// Statuses are drawn on the upper row of a side, everything else on the lower one.
const STATUSES: &[&str] =
    &["setup", "active", "pre-switchover", "device", "postcopy-active", "postcopy-paused", "postcopy-recover"];
/// Rows from top to bottom, in units of the y axis.
const ROWS: [(f64, f64); 4] = [(3.4, 4.2), (2.75, 3.25), (1.3, 2.1), (0.65, 1.15)];
const TOP: f64 = 4.6;
/// How much of the blackout's length is shown before and after it.
const CONTEXT: f64 = 0.35;

/// Both sides' phases in one picture: the whole migration, and below it the blackout enlarged.
///
/// The two sides share an axis only where they read one clock; elsewhere the destination's is moved so that the
/// commit leaves and arrives at once, and the picture says so.
///
/// # Errors
/// When the backend fails.
pub fn draw(source: &SideReport, destination: &SideReport) -> Result<Option<String>, PlotError> {
    let Some(zero) = source.instants.last_exit_ns.or(source.phases.first().map(|phase| phase.start_ns)) else {
        return Ok(None);
    };
    let same_clock = source.clock.same_host(&destination.clock);
    let shift = match (source.instants.commit_ns, destination.instants.commit_ns) {
        (Some(sent), Some(arrived)) if !same_clock => ns_as(sent, 1e6) - ns_as(arrived, 1e6),
        _ => 0.0,
    };
    let here = |ns: u64| ns_as(ns, 1e6) - ns_as(zero, 1e6);
    let there = |ns: u64| here(ns) + shift;
    let rounds = bands(source, here);
    let moments = Moments {
        rounds,
        commit: source.instants.commit_ns.map(here),
        blackout: source.instants.last_exit_ns.map(here).zip(destination.instants.first_entry_ns.map(there)),
        drained: source.instants.drained_ns.map(here),
        same_clock,
    };
    let rows = rows(&source.phases, here, 0).chain(rows(&destination.phases, there, 2)).collect::<Vec<_>>();
    let from = rows.iter().map(|bar| bar.x.start).fold(f64::INFINITY, f64::min);
    let to = rows.iter().map(|bar| bar.x.end).fold(f64::NEG_INFINITY, f64::max);
    if !(to - from).is_finite() || to <= from {
        return Ok(None);
    }
    let margin = (to - from) * 0.02;
    let near = moments.blackout.map(|(start, end)| {
        let context = (end - start).abs().max(0.05) * CONTEXT;
        start - context..end + context
    });
    let height = if near.is_some() { 500 } else { 250 };
    let picture = picture(1000, height, |canvas| {
        let title = "ms since the last vCPU left the guest on the source";
        panel(canvas, 34..190, from - margin..to + margin, &rows, &moments, "the whole migration", title)?;
        if let Some(near) = near {
            panel(canvas, 284..440, near, &rows, &moments, "the handoff, enlarged", title)?;
        }
        Ok(())
    })?;
    Ok(Some(picture))
}

/// The phases of a source whose guest was not moved.
///
/// # Errors
/// When the backend fails.
pub fn draw_source(source: &SideReport) -> Result<Option<String>, PlotError> {
    let Some(zero) = source.phases.first().map(|phase| phase.start_ns) else { return Ok(None) };
    let here = |ns: u64| ns_as(ns, 1e6) - ns_as(zero, 1e6);
    let rows: Vec<_> = rows(&source.phases, here, 0).collect();
    let to = rows.iter().map(|bar| bar.x.end).fold(0.0, f64::max);
    if to <= 0.0 {
        return Ok(None);
    }
    let moments =
        Moments { rounds: bands(source, here), commit: None, blackout: None, drained: None, same_clock: true };
    let picture = picture(1000, 250, |canvas| {
        panel(
            canvas,
            34..190,
            -to * 0.02..to * 1.02,
            &rows,
            &moments,
            "the whole attempt",
            "ms since the migration began",
        )
    })?;
    Ok(Some(picture))
}

/// Where the rounds of pre-copy are.
fn bands(source: &SideReport, time: impl Fn(u64) -> f64) -> Vec<(u32, Range<f64>)> {
    let rounds = source.precopy.iter().flat_map(|precopy| &precopy.rounds);
    let whole = |round: &&RoundReport| round.end_ns >= round.start_ns;
    rounds.filter(whole).map(|round| (round.round, time(round.start_ns)..time(round.end_ns))).collect()
}

struct Moments {
    rounds: Vec<(u32, Range<f64>)>,
    commit: Option<f64>,
    blackout: Option<(f64, f64)>,
    drained: Option<f64>,
    same_clock: bool,
}

struct Bar {
    name: String,
    x: Range<f64>,
    row: usize,
}

fn rows(phases: &[PhaseSpan], time: impl Fn(u64) -> f64, first_row: usize) -> impl Iterator<Item = Bar> {
    phases.iter().filter_map(move |phase| {
        let end = phase.end_ns.filter(|end| *end >= phase.start_ns)?;
        let row = if STATUSES.contains(&phase.name.as_str()) { first_row } else { first_row + 1 };
        Some(Bar { name: phase.name.clone(), x: time(phase.start_ns)..time(end), row })
    })
}

fn colour(name: &str) -> Ink {
    match name {
        "setup" => Ink::Quiet,
        "active" => Ink::Third,
        "device" | "pre-switchover" => Ink::Second,
        "postcopy-active" => Ink::Main,
        "postcopy-paused" | "postcopy-recover" => Ink::Alarm,
        _ => Ink::Fourth,
    }
}

fn panel(
    canvas: &Canvas<'_>,
    down: Range<i32>,
    x: Range<f64>,
    bars: &[Bar],
    moments: &Moments,
    name: &str,
    title: &str,
) -> Result<(), PlotError> {
    let panel = canvas.panel(104..980, down, x.clone(), 0.0..TOP);
    panel.x_axis(&round(x.start, x.end, 10), title)?;
    panel.y_axis(&[], name)?;
    draw_rounds(&panel, &moments.rounds, &x)?;
    for (label, y, first_row) in [("source", 3.62, 0), ("destination", 1.52, 2)] {
        if bars.iter().any(|bar| bar.row / 2 * 2 == first_row) {
            panel.text(label, (x.start, y), (-10, 0), Anchor::Right, Ink::Text)?;
        }
    }
    if let Some((start, end)) = moments.blackout {
        panel.bar(start..end, 0.0..TOP, Ink::Alarm, 0.16)?;
    }
    for row in 0..ROWS.len() {
        draw_row(&panel, row, bars, &x)?;
    }
    draw_moments(&panel, moments, &x)
}

/// Draws the rounds as bands, every other one darker, with their numbers between the two sides' rows.
fn draw_rounds(panel: &Panel<'_>, rounds: &[(u32, Range<f64>)], shown: &Range<f64>) -> Result<(), PlotError> {
    for (number, band) in rounds.iter().filter(|(_, band)| band.end > shown.start && band.start < shown.end) {
        let band = band.start.max(shown.start)..band.end.min(shown.end);
        let opacity = if number % 2 == 1 { 0.2 } else { 0.1 };
        panel.bar(band.clone(), 0.0..TOP, Ink::Third, opacity)?;
        let fits = |label: &String| f64::from(estimated_width(label) + 4) < panel.width_of(band.end - band.start);
        if let Some(label) = [format!("round {number}"), number.to_string()].into_iter().find(fits) {
            panel.text(&label, (f64::midpoint(band.start, band.end), 2.27), (0, 0), Anchor::Middle, Ink::Muted)?;
        }
    }
    Ok(())
}

/// Draws the bars of one row. A name stands in its bar; names of bars too short for that stand behind the last of
/// them, where there is room before the next bar.
fn draw_row(panel: &Panel<'_>, row: usize, bars: &[Bar], shown: &Range<f64>) -> Result<(), PlotError> {
    let Some((bottom, top)) = ROWS.get(row).copied() else { return Ok(()) };
    let middle = f64::midpoint(bottom, top);
    let mut visible: Vec<_> = bars
        .iter()
        .filter(|bar| bar.row == row && bar.x.end > shown.start && bar.x.start < shown.end)
        .map(|bar| (bar, bar.x.start.max(shown.start)..bar.x.end.min(shown.end)))
        .collect();
    visible.sort_by(|(_, one), (_, other)| one.start.total_cmp(&other.start));
    let mut nameless: Vec<String> = Vec::new();
    for (index, (bar, x)) in visible.iter().enumerate() {
        panel.bar(x.clone(), bottom..top, colour(&bar.name), 1.0)?;
        // Parts the bar from the one before.
        panel.line(&[(x.start, bottom), (x.start, top)], Ink::Paper, 1)?;
        let long = format!("{} {} ms", bar.name, number(bar.x.end - bar.x.start));
        let fits = |label: &str, width: f64| f64::from(estimated_width(label) + 10) < panel.width_of(width);
        let inside = [long.clone(), bar.name.clone()].into_iter().find(|label| fits(label, x.end - x.start));
        match inside {
            Some(label) => {
                let at = (f64::midpoint(x.start, x.end), middle);
                panel.text(&label, at, (0, 3), Anchor::Middle, Ink::OnFill)?;
                nameless.clear();
            }
            None => {
                nameless.push(long);
                let room = visible.get(index + 1).map_or(shown.end, |(_, next)| next.start) - x.end;
                let label = nameless.join(", ");
                if fits(&label, room) {
                    panel.text(&label, (x.end, middle), (5, 3), Anchor::Left, Ink::Muted)?;
                    nameless.clear();
                }
            }
        }
    }
    Ok(())
}

fn draw_moments(panel: &Panel<'_>, moments: &Moments, shown: &Range<f64>) -> Result<(), PlotError> {
    if let Some((start, end)) = moments.blackout {
        panel.rule(start, Ink::Alarm)?;
        panel.rule(end, Ink::Alarm)?;
        let ns = ((end - start) * 1e6).max(0.0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a span of a run, not negative")]
        let length = millis(ns as u64);
        let label = if moments.same_clock {
            format!("blackout {length} ms")
        } else {
            format!("blackout {length} ms less the commit's way: two clocks")
        };
        let wide = panel.width_of(end - start) > f64::from(estimated_width(&label));
        let (x, anchor, by) = if wide {
            (f64::midpoint(start, end), Anchor::Middle, 0)
        } else if panel.width_of(shown.end - end) > f64::from(estimated_width(&label) + 60) {
            (end, Anchor::Left, 5)
        } else {
            (start, Anchor::Right, -5)
        };
        panel.text(&label, (x, TOP), (by, -3), anchor, Ink::Alarm)?;
    }
    if let Some(commit) = moments.commit {
        panel.line(&[(commit, 0.0), (commit, TOP)], Ink::Text, 2)?;
        panel.text("commit", (commit, 0.0), (-6, -5), Anchor::Right, Ink::Text)?;
    }
    if let Some(drained) = moments.drained.filter(|drained| shown.contains(drained)) {
        panel.rule(drained, Ink::Muted)?;
        panel.text("drained", (drained, TOP), (-4, -3), Anchor::Right, Ink::Muted)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::super::synthetic;
    use super::*;

    #[test]
    fn both_sides_and_the_moments_are_in_the_picture() {
        let (source, destination) = synthetic::sides(1);
        let svg = draw(&source, &destination).unwrap().unwrap();
        for word in ["source", "destination", "commit", "drained", "save-state", "load-state", "postcopy-active"] {
            assert!(svg.contains(word), "{word}");
        }
        assert!(!svg.contains("two clocks"));
    }

    #[test]
    fn rounds_are_bands_with_their_numbers() {
        let (source, destination) = synthetic::hybrid_sides(1);
        let svg = draw(&source, &destination).unwrap().unwrap();
        assert!(svg.contains("round 1"));
        let (source, destination) = synthetic::sides(1);
        assert!(!draw(&source, &destination).unwrap().unwrap().contains("round 1"));
        let stayed = synthetic::stayed_runs(1).remove(0).source.unwrap();
        let svg = draw_source(&stayed).unwrap().unwrap();
        assert!(svg.contains("round 1") && svg.contains("the whole attempt") && !svg.contains("destination"));
    }

    #[test]
    fn two_clocks_are_said_to_be_two() {
        let (source, mut destination) = synthetic::sides(1);
        destination.clock.boot_id = "another".to_owned();
        assert!(draw(&source, &destination).unwrap().unwrap().contains("two clocks"));
    }

    #[test]
    fn a_migration_without_phases_has_no_picture() {
        let (mut source, mut destination) = synthetic::sides(1);
        source.phases.clear();
        destination.phases.clear();
        assert!(draw(&source, &destination).unwrap().is_none());
    }
}
