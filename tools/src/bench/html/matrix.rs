//! The modes side by side.

use std::fmt::Write as _;

use super::super::aggregate::Aggregate;
use super::super::figures::FIGURES;
use super::super::format::{figure, number};
use super::super::matrix::{Judgement, Matrix, MatrixCell, MatrixEntry};
use super::super::plots::canvas::PlotError;
use super::super::plots::progress;
use super::super::table::endings;
use super::{escape, mode_name};

/// What tells modes apart; everything else is in each mode's own section, or in the JSON.
const COMPARED: [&str; 14] = [
    "cost_s",
    "lost_s",
    "total_ns",
    "gap_ns",
    "blackout_ns",
    "predicted_blackout_ns",
    "rounds",
    "precopy_ns",
    "precopy_bytes",
    "handoff_pages",
    "drain_ns",
    "faults_remote",
    "wire_bytes",
    "end_rate_percent",
];

/// The table of all cells with its verdicts, and the modes' figures where there is one cell.
pub fn section(html: &mut String, matrix: &Matrix, aggregates: &[&Aggregate]) {
    let Some(first) = matrix.cells.first() else { return };
    html.push_str(
        "<h2>The modes side by side</h2>\n<p class=\"note\">Cost: guest progress lost, in seconds, and a tenth of the whole \
         migration's seconds; gap: the longest that the guest saw, in ms. Medians of the runs. A pre-copy that does not \
         converge costs infinitely much.</p>\n",
    );
    verdicts(html, matrix);
    predicted(html, matrix);
    html.push_str("<div class=\"scroll\"><table>\n<thead><tr><th>guest</th><th class=\"text\">link</th>");
    for entry in &first.modes {
        let name = escape(&entry.mode);
        let _ = write!(html, "<th>{name}: cost, s</th><th>gap, ms</th>");
    }
    html.push_str("<th>cost ratio</th><th>gap ratio</th></tr></thead>\n<tbody>\n");
    for cell in &matrix.cells {
        let _ = write!(html, "<tr><td>{}</td><td class=\"text\">{}</td>", escape(&cell.guest), link(cell));
        for first in &first.modes {
            entry(html, cell.modes.iter().find(|entry| entry.mode == first.mode));
        }
        judgement(html, cell.cost.as_ref());
        judgement(html, cell.gap.as_ref());
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody></table></div>\n");
    if matrix.cells.len() == 1 {
        comparison(html, aggregates);
    }
}

/// Each cell's modes by their figures and the guest's progress.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn cells(html: &mut String, aggregates: &[Aggregate]) -> Result<(), PlotError> {
    let same = |one: &Aggregate, other: &Aggregate| {
        one.report.guest == other.report.guest && one.report.bandwidth_bit_s == other.report.bandwidth_bit_s
    };
    let mut left: Vec<&Aggregate> = aggregates.iter().collect();
    while let Some(first) = left.first().copied() {
        let (cell, others): (Vec<_>, Vec<_>) = left.into_iter().partition(|aggregate| same(first, aggregate));
        left = others;
        let name = match first.report.bandwidth_bit_s {
            Some(_) => format!("{}bit/s", super::Bandwidth::from(first.report.bandwidth_bit_s)),
            None => "unlimited".to_owned(),
        };
        let _ = writeln!(html, "<h2>{}, {name}</h2>", escape(&first.report.guest));
        let typical: Vec<_> = cell
            .iter()
            .filter(|aggregate| aggregate.report.is_ours())
            .filter_map(|aggregate| Some((aggregate.report.mode.as_str(), aggregate.typical_run()?)))
            .collect();
        if let Some(svg) = progress::side_by_side(&typical)? {
            let _ = writeln!(
                html,
                "<figure role=\"img\" aria-label=\"guest progress\">{svg}<figcaption>Guest progress in the run of each \
                 mode that has the median blackout. Dashed in a mode's colour: the end of its migration.</figcaption>\
                 </figure>"
            );
        }
        comparison(html, &cell);
        for aggregate in &cell {
            doubts(html, aggregate);
        }
    }
    Ok(())
}

fn doubts(html: &mut String, aggregate: &Aggregate) {
    for run in aggregate.report.runs.iter().filter(|run| !run.verified) {
        let _ = writeln!(
            html,
            "<p class=\"bad\">{} run {}: {}</p>",
            escape(&aggregate.report.name()),
            run.run,
            escape(&run.doubts.join("; "))
        );
    }
}

fn verdicts(html: &mut String, matrix: &Matrix) {
    for (text, (met, all)) in [
        (
            format!("cost at most {} × the better pure mode’s", matrix.most_cost_ratio),
            matrix.met(|cell| cell.cost.as_ref()),
        ),
        (format!("gap at most {} × post-copy’s", matrix.most_gap_ratio), matrix.met(|cell| cell.gap.as_ref())),
    ] {
        if all > 0 {
            let class = if met == all { "good" } else { "bad" };
            let cells = if all == 1 { "cell" } else { "cells" };
            let _ = writeln!(html, "<span class=\"verdict {class}\">hybrid’s {text}: {met} of {all} {cells}</span>");
        }
    }
}

/// How well blackouts were predicted, in a sentence; nothing where none was.
fn predicted(html: &mut String, matrix: &Matrix) {
    let Some(predicted) = matrix.predicted else { return };
    let _ = writeln!(
        html,
        "<p class=\"note\">Where pre-copy ended by stop and copy, the predicted blackout was within 2 ms or 20 % of the \
         measured one in {} of {} runs.</p>",
        predicted.within, predicted.runs
    );
}

fn link(cell: &MatrixCell) -> String {
    match cell.bandwidth_bit_s {
        Some(_) => format!("{}bit/s", cell.link()),
        None => "unlimited".to_owned(),
    }
}

fn entry(html: &mut String, entry: Option<&MatrixEntry>) {
    let dash = || "–".to_owned();
    match entry {
        Some(MatrixEntry { cost_s: None, not_converged, runs, .. }) if *not_converged > 0 => {
            let _ = write!(html, "<td colspan=\"2\" class=\"quiet\">did not converge ({not_converged} of {runs})</td>");
        }
        entry => {
            let cost = entry.and_then(|entry| entry.cost_s).map_or_else(dash, number);
            let gap = entry.and_then(|entry| entry.gap_ns).map_or_else(dash, |ns| number(ns / 1e6));
            let _ = write!(html, "<td>{cost}</td><td>{gap}</td>");
        }
    }
}

fn judgement(html: &mut String, judgement: Option<&Judgement>) {
    let Some(judgement) = judgement else {
        html.push_str("<td>–</td>");
        return;
    };
    let ratio = judgement.ratio.map_or_else(|| "–".to_owned(), number);
    let (class, mark) = if judgement.met { ("good", "✓") } else { ("bad", "✗") };
    let against = escape(&judgement.against);
    let _ = write!(html, "<td class=\"{class}\" title=\"against {against}\">{ratio} {mark}</td>");
}

/// One cell's modes, figure by figure.
fn comparison(html: &mut String, modes: &[&Aggregate]) {
    html.push_str("<div class=\"scroll\"><table>\n<thead><tr><th>median (least – most)</th>");
    for mode in modes {
        let whose = if mode.report.is_ours() { String::new() } else { format!("{} ", mode.report.vmm) };
        let name = mode_name(&mode.report.mode).trim_end_matches(" migration");
        let _ = write!(html, "<th>{}</th>", escape(&format!("{whose}{name}")));
    }
    html.push_str("<th class=\"text\">unit</th></tr></thead>\n<tbody>\n");
    for descriptor in COMPARED.iter().filter_map(|key| FIGURES.iter().find(|figure| figure.key == *key)) {
        if modes.iter().all(|mode| !mode.report.summary.contains_key(descriptor.key)) {
            continue;
        }
        let _ = write!(html, "<tr><td>{}</td>", descriptor.label);
        let mut unit = "";
        for mode in modes {
            let Some(spread) = mode.report.summary.get(descriptor.key) else {
                let never = descriptor.key == "cost_s" && mode.report.not_converged() > 0;
                html.push_str(if never { "<td>∞</td>" } else { "<td>–</td>" });
                continue;
            };
            let shown = [spread.median, spread.min, spread.max].map(|value| figure(value, descriptor.unit));
            let [(median, named), (min, _), (max, _)] = &shown;
            unit = *named;
            let _ = write!(html, "<td>{median} <small>({min} – {max})</small></td>");
        }
        let _ = writeln!(html, "<td class=\"text\">{unit}</td></tr>");
    }
    html.push_str("<tr><td>Pre-copy ended by</td>");
    for mode in modes {
        let _ = write!(html, "<td>{}</td>", escape(&endings(&mode.report).unwrap_or_else(|| "–".to_owned())));
    }
    html.push_str("<td class=\"text\"></td></tr>\n<tr><td>Runs that did not converge</td>");
    for mode in modes {
        let _ = write!(html, "<td>{} of {}</td>", mode.report.not_converged(), mode.report.runs.len());
    }
    html.push_str("<td class=\"text\"></td></tr>\n</tbody></table></div>\n");
}
