//! Fault latency by percentile.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;

use super::super::format::{micros, ns_as};
use super::canvas::{Anchor, Ink, Panel, PlotError, picture};
use super::ticks::{Tick, decades};
use crate::floor::FloorSum;

/// Curves in the order in which they are drawn: part, name, colour, width.
const CURVES: &[(&str, &str, Ink, u32)] = &[
    ("queue", "queue", Ink::Fifth, 1),
    ("place", "place", Ink::Third, 1),
    ("wake", "wake", Ink::Fourth, 1),
    ("wire", "wire", Ink::Second, 1),
    ("local_total", "local", Ink::Quiet, 2),
    ("total", "remote and raced", Ink::Main, 3),
];
/// Steps between two halvings of the distance to 100 %.
const RESOLUTION: u32 = 12;

/// The distributions in `merged`, with the medians of `floor` as level lines.
///
/// # Errors
/// When the backend fails.
pub fn draw(merged: &BTreeMap<&'static str, Histogram<u64>>, floor: &[FloorSum]) -> Result<String, PlotError> {
    let curves: Vec<_> = CURVES
        .iter()
        .filter_map(|(key, name, ink, width)| {
            let histogram = merged.get(key).filter(|histogram| !histogram.is_empty())?;
            Some((points(histogram), *name, *ink, *width))
        })
        .collect();
    let most = merged.values().map(Histogram::len).max().unwrap_or(1);
    let far = ns_as(most, 1.0).log10().max(2.0) + 0.1;
    let values = || curves.iter().flat_map(|(points, ..)| points.iter().map(|(_, y)| *y));
    let low = values().fold(f64::INFINITY, f64::min).clamp(-1.0, 3.0).floor();
    let high = values().fold(1.0, f64::max).max(low + 1.0).ceil();
    picture(1000, 400, |canvas| {
        let panel = canvas.panel(70..980, 36..350, 0.0..far, low..high);
        let percentiles: Vec<Tick> = decades(0.0, far, |tail| format!("{} %", percent(tail)));
        panel.x_axis(&percentiles, "percentile")?;
        panel.y_axis(&decades(low, high, |us| format!("{} µs", whole(us))), "latency (log scale)")?;
        let median = 2_f64.log10();
        panel.rule(median, Ink::Quiet)?;
        panel.text("50 %", (median, low), (4, -6), Anchor::Left, Ink::Muted)?;
        for (points, _, ink, width) in &curves {
            panel.line(points, *ink, *width)?;
        }
        draw_floor(&panel, floor, far)?;
        let names: Vec<_> = curves.iter().rev().map(|(_, name, ink, _)| (*name, *ink)).collect();
        panel.legend(&names)
    })
}

/// Each median as a level with its name: above the line, or below it for the lower of two.
fn draw_floor(panel: &Panel<'_>, floor: &[FloorSum], right: f64) -> Result<(), PlotError> {
    let lowest = floor.iter().map(|sum| sum.p50_ns).min();
    for FloorSum { way, p50_ns, .. } in floor {
        let y = ns_as(*p50_ns, 1e3).log10();
        panel.level(y, Ink::Alarm)?;
        let below = floor.len() > 1 && Some(*p50_ns) == lowest;
        let label = format!("floor, {way}: {} at p50", micros(*p50_ns));
        panel.text(&label, (right, y), (-4, if below { 13 } else { -5 }), Anchor::Right, Ink::Alarm)?;
    }
    Ok(())
}

/// Points of (log10 of 1/(1 − quantile), log10 of µs), as far out as there are samples.
fn points(histogram: &Histogram<u64>) -> Vec<(f64, f64)> {
    let furthest = ns_as(histogram.len(), 1.0).log10();
    let mut points: Vec<(f64, f64)> = Vec::new();
    for step in histogram.iter_quantiles(RESOLUTION) {
        let tail = 1.0 - step.quantile_iterated_to();
        let x = if tail > 0.0 { (-tail.log10()).min(furthest) } else { furthest };
        let y = ns_as(step.value_iterated_to().max(1), 1e3).log10();
        points.push((x, y));
    }
    points
}

/// A power of ten, with no more decimals than it needs.
fn whole(value: f64) -> String {
    let decimals = if value < 1.0 { (-value.log10()).ceil().clamp(0.0, 9.0) } else { 0.0 };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=9")]
    let decimals = decimals as usize;
    format!("{value:.decimals$}")
}

/// The percentile whose tail is one in `tail`: 10 → "90", 1000 → "99.9".
fn percent(tail: f64) -> String {
    let decimals = if tail > 100.0 { (tail.log10().round() - 2.0).clamp(0.0, 6.0) } else { 0.0 };
    let mut text = format!("{:.6}", 100.0 * (1.0 - 1.0 / tail));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=6")]
    let keep =
        text.find('.').map_or(text.len(), |point| point + if decimals > 0.0 { 1 + decimals as usize } else { 0 });
    text.truncate(keep);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_named_by_their_nines() {
        let names: Vec<_> = [1.0, 10.0, 100.0, 1000.0, 10_000.0].map(percent).into_iter().collect();
        assert_eq!(names, ["0", "90", "99", "99.9", "99.99"]);
    }

    #[test]
    fn a_curve_reaches_no_further_than_its_samples() {
        let mut histogram = Histogram::<u64>::new(3).unwrap();
        for value in 1..=1000_u64 {
            histogram.record(value * 1000).unwrap();
        }
        let points = points(&histogram);
        let last = points.last().unwrap();
        assert!((last.0 - 3.0).abs() < 1e-9 && (last.1 - 3.0).abs() < 0.01, "{last:?}");
        assert!(points.windows(2).all(|pair| pair[0].0 <= pair[1].0 && pair[0].1 <= pair[1].1));
    }
}
