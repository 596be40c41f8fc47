//! This VMM beside a peer.

use std::fmt::Write as _;

use super::super::aggregate::Aggregate;
use super::super::comparison::{Best, ComparedCell, ComparedFamily, ComparedFigure, Comparison, Demand, recovered};
use super::super::figures::FIGURES;
use super::super::format::{figure, number};
use super::super::modes::Family;
use super::super::plots::beside;
use super::super::plots::canvas::PlotError;
use super::super::schema::{ModeReport, OURS, Report, RunReport};
use super::super::table::beside::{back_after, bound, spread, with_unit};
use super::escape;

/// What tells the modes of both apart: the figure, and the heading of its column.
const COLUMNS: [(&str, &str); 8] = [
    ("gap_ns", "blackout the guest saw, ms"),
    ("own_downtime_ns", "VMM says, ms"),
    ("lost_around_s", "progress lost, s"),
    ("recovered_s", "back at 95&nbsp;%, s"),
    ("drain_gbit_s", "drain, Gbit/s"),
    ("total_ns", "whole migration, ms"),
    ("cpu_s_per_gib", "CPU, s a GiB"),
    ("page_requests", "pages asked for"),
];

/// Pictures and tables of both.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn section(
    html: &mut String,
    report: &Report,
    comparison: &Comparison,
    aggregates: &[Aggregate],
) -> Result<(), PlotError> {
    let peer = escape(&format!("{} {}", comparison.title, comparison.version));
    for cell in &comparison.cells {
        let modes: Vec<_> =
            aggregates.iter().map(|aggregate| &aggregate.report).filter(|mode| is_in(mode, cell)).collect();
        let title = if comparison.cells.len() > 1 { format!(", {}", escape(&cell.name())) } else { String::new() };
        let _ = writeln!(
            html,
            "<h2>Beside {peer}{title}</h2>\n<p class=\"note\">The same guest, memory, vCPUs and link, and the guest’s own \
             words for both. The modes’ runs took turns, each round in an order of its own (seed {}). Brackets: where the \
             median is with a probability of 95&nbsp;%, by bootstrap.</p>",
            report.settings.seed
        );
        verdict(html, cell);
        pictures(html, cell, &modes, &peer)?;
        all_modes(html, &modes);
        asked(html, cell, &peer);
        for family in &cell.families {
            best(html, family, &peer);
        }
    }
    Ok(())
}

fn is_in(mode: &ModeReport, cell: &ComparedCell) -> bool {
    mode.guest == cell.guest && mode.bandwidth_bit_s == cell.bandwidth_bit_s
}

fn verdict(html: &mut String, cell: &ComparedCell) {
    let (met, all) = cell.met();
    if all > 0 {
        let class = if met == all { "good" } else { "bad" };
        let _ = writeln!(html, "<span class=\"verdict {class}\">{met} of {all} demands met</span>");
    }
}

/// The guests of the two modes with the shortest gaps, and the gaps of all.
fn pictures(html: &mut String, cell: &ComparedCell, modes: &[&ModeReport], peer: &str) -> Result<(), PlotError> {
    let gaps = cell.families.iter().find(|found| found.family == Family::PostCopy);
    let gaps = gaps.and_then(|found| found.figures.iter().find(|found| found.figure == "gap_ns"));
    let pair = gaps.and_then(|found| found.ours.as_ref().zip(found.theirs.as_ref()));
    if let Some((ours, theirs)) = pair {
        let run = |best: &Best, is_ours: bool| -> Option<&RunReport> {
            let mode = modes.iter().find(|mode| mode.is_ours() == is_ours && mode.mode == best.mode)?;
            mode.run_with_median_gap()
        };
        if let Some((our_run, their_run)) = run(ours, true).zip(run(theirs, false)) {
            let names = [format!("{OURS} {}", ours.mode), format!("{peer} {}", theirs.mode)];
            let [our_name, their_name] = &names;
            let svg = beside::progress([(our_name, our_run), (their_name, their_run)])?;
            let caption = "Of each VMM the post-copy mode whose guest saw the shortest blackouts, and of that the run with the \
                           median one. A bar is a period of the guest.";
            super::section(html, "Both guests around the move", svg, caption);
        }
    }
    let caption = "One logarithmic axis: a blackout ten times as long is as far to the right everywhere.";
    super::section(html, "Blackouts that the guests saw", beside::gaps(modes)?, caption);
    Ok(())
}

fn all_modes(html: &mut String, modes: &[&ModeReport]) {
    html.push_str("<h3>All modes</h3>\n<div class=\"scroll\"><table class=\"tight\">\n<thead><tr><th>median</th>");
    for (_, heading) in COLUMNS {
        let _ = write!(html, "<th class=\"wrap\">{heading}</th>");
    }
    html.push_str("<th class=\"wrap\">runs verified</th></tr></thead>\n<tbody>\n");
    for mode in modes {
        let class = if mode.is_ours() { " class=\"ours\"" } else { "" };
        let _ = write!(html, "<tr{class}><td>{}</td>", escape(&mode.name()));
        for (key, _) in COLUMNS {
            let never = recovered(mode).filter(|median| key == "recovered_s" && mode_lacks(mode, key, *median));
            if let Some(median) = never {
                let _ = write!(html, "<td>{}</td>", back_after(median));
                continue;
            }
            let found = FIGURES.iter().find(|figure| figure.key == key).zip(spread(mode, key));
            let Some((descriptor, found)) = found else {
                html.push_str("<td>–</td>");
                continue;
            };
            let show = |value| figure(value, descriptor.unit).0;
            let interval = found.ci_low.zip(found.ci_high);
            let interval = interval.map(|(low, high)| format!("<br><small>[{}, {}]</small>", show(low), show(high)));
            let _ = write!(html, "<td>{}{}</td>", show(found.median), interval.unwrap_or_default());
        }
        let good = mode.runs.iter().filter(|run| run.verified).count();
        let stayed = match mode.not_converged() {
            0 => String::new(),
            stayed => format!("<br><small>{stayed} did not converge</small>"),
        };
        let _ = writeln!(html, "<td>{good} of {}{stayed}</td></tr>", mode.runs.len());
    }
    html.push_str("</tbody></table></div>\n");
}

/// Whether some of a mode's runs have not the figure, so that its summary does not say how it went.
fn mode_lacks(mode: &ModeReport, key: &str, median: f64) -> bool {
    mode.summary.get(key).is_none_or(|spread| spread.median.total_cmp(&median).is_ne())
}

fn asked(html: &mut String, cell: &ComparedCell, peer: &str) {
    if cell.demands.is_empty() {
        return;
    }
    let _ = writeln!(
        html,
        "<h3>What is asked of post-copy</h3>\n<p class=\"note\">Of each of its modes, beside the best that {peer} does by the \
         same figure in any post-copy mode.</p>\n<div class=\"scroll\"><table>\n<thead><tr><th>figure</th><th class=\"text\">\
         mode</th><th>{OURS}</th><th>{peer}’s best</th><th>asked</th><th>met</th></tr></thead>\n<tbody>"
    );
    for demand in &cell.demands {
        let (class, mark) = if demand.met { ("good", "yes") } else { ("bad", "NO") };
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td class=\"text\">{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"{class}\">{mark}</td></tr>",
            escape(&demand.label),
            escape(&demand.mode),
            demand.ours.map_or_else(|| "never".to_owned(), |value| with_unit(&demand.figure, value)),
            theirs(demand),
            bound(demand),
        );
    }
    html.push_str("</tbody></table></div>\n");
}

fn theirs(demand: &Demand) -> String {
    let Some(best) = &demand.theirs else { return String::new() };
    format!("{} <small>{}</small>", with_unit(&demand.figure, best.median), escape(&best.mode))
}

/// The best of both, figure by figure.
fn best(html: &mut String, family: &ComparedFamily, peer: &str) {
    let _ = writeln!(
        html,
        "<h3>The best of both: {}</h3>\n<div class=\"scroll\"><table>\n<thead><tr><th>figure</th><th>{OURS}</th><th>{peer}</th>\
         <th>ratio</th></tr></thead>\n<tbody>",
        family.family
    );
    for found in &family.figures {
        let label = FIGURES.iter().find(|figure| figure.key == found.figure).map_or("", |figure| figure.label);
        // A figure's row stands alone here, without the one that its label goes on from.
        let label = if found.figure == "lost_around_s" { "Guest progress lost within 10 s" } else { label };
        let _ = writeln!(
            html,
            "<tr><td>{label}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            named(found.ours.as_ref(), &found.figure),
            named(found.theirs.as_ref(), &found.figure),
            ratio(found)
        );
    }
    html.push_str("</tbody></table></div>\n");
}

fn named(best: Option<&Best>, key: &str) -> String {
    let Some(best) = best else { return "–".to_owned() };
    format!("{} <small>{}</small>", with_unit(key, best.median), escape(&best.mode))
}

fn ratio(found: &ComparedFigure) -> String {
    let Some(ratio) = found.ratio else { return "–".to_owned() };
    let interval = found.ratio_low.zip(found.ratio_high);
    let interval = interval.map(|(low, high)| format!(" <small>[{}, {}]</small>", number(low), number(high)));
    format!("{}{}", number(ratio), interval.unwrap_or_default())
}
