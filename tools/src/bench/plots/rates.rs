//! Pushed bytes and faults over the time of the drain.

use switchover_hybrid::report::SideReport;
use switchover_wire::types::PAGE_SIZE;

use super::super::format::ns_as;
use super::canvas::{Ink, PlotError, picture};
use super::ticks::{ceiling, round};

/// More steps than a picture can show are added up until they fit.
const MOST_STEPS: usize = 450;

/// Both rates of a destination's report; nothing where it has none.
///
/// # Errors
/// When the backend fails.
pub fn draw(destination: &SideReport) -> Result<Option<String>, PlotError> {
    let Some(rates) = destination.rates.as_ref() else { return Ok(None) };
    let slices = rates.faults.len().max(rates.pushed.len());
    if slices == 0 || rates.slice_ns == 0 {
        return Ok(None);
    }
    let together = slices.div_ceil(MOST_STEPS).max(1);
    let step_ms = ns_as(rates.slice_ns, 1e6) * ns_as(together as u64, 1.0);
    let zero = destination.instants.commit_ns.unwrap_or(rates.start_ns);
    let start_ms = ns_as(rates.start_ns, 1e6) - ns_as(zero, 1e6);
    // Pages in a millisecond are 4096 · 8 bits in 10^-3 s.
    let gbit_s = f64::from(u32::try_from(PAGE_SIZE * 8).unwrap_or(0)) / 1e6 / step_ms;
    let pushed = steps(&rates.pushed, slices, together, start_ms, step_ms, gbit_s);
    let faults = steps(&rates.faults, slices, together, start_ms, step_ms, 1.0 / step_ms);
    let x = start_ms.min(0.0)..start_ms + step_ms * ns_as(slices.div_ceil(together) as u64, 1.0);
    let top = |points: &[(f64, f64)]| ceiling(points.iter().map(|(_, y)| *y).fold(0.0, f64::max) * 1.02);
    let picture = picture(1000, 400, |canvas| {
        let marks = round(x.start, x.end, 10);
        for (down, points, title, ink) in [
            (34..170, &pushed, "pushed pages placed, Gbit/s", Ink::Main),
            (214..350, &faults, "remote and raced faults taken, per ms", Ink::Second),
        ] {
            let high = top(points);
            let panel = canvas.panel(70..980, down, x.clone(), 0.0..high);
            panel.y_axis(&round(0.0, high, 4), title)?;
            let last = ink == Ink::Second;
            panel.x_axis(&marks, if last { "ms since the commit arrived" } else { "" })?;
            panel.fill_below(points, ink, 0.22)?;
            panel.line(points, ink, 1)?;
        }
        Ok(())
    })?;
    Ok(Some(picture))
}

/// Counts as a stepped line.
fn steps(counts: &[u32], slices: usize, together: usize, start: f64, step: f64, scale: f64) -> Vec<(f64, f64)> {
    let mut points = Vec::new();
    let mut x = start;
    for first in (0..slices).step_by(together) {
        let group = counts.iter().skip(first).take(together);
        let y = group.map(|count| f64::from(*count)).sum::<f64>() * scale;
        points.push((x, y));
        x += step;
        points.push((x, y));
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_added_up_and_none_is_lost() {
        let points = steps(&[1, 2, 3, 4, 5], 5, 2, 10.0, 4.0, 1.0);
        assert_eq!(points, [(10.0, 3.0), (14.0, 3.0), (14.0, 7.0), (18.0, 7.0), (18.0, 5.0), (22.0, 5.0)]);
    }

    #[test]
    fn a_report_without_rates_has_no_picture() {
        let (source, destination) = super::super::super::synthetic::sides(1);
        assert!(draw(&source).unwrap().is_none());
        assert!(draw(&destination).unwrap().is_some_and(|svg| svg.contains("</svg>")));
    }
}
