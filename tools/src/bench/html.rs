//! `report.html`: one file with everything in it, no script, nothing loaded from elsewhere.

use std::fmt::Write as _;

mod beside;
mod loaded;
mod matrix;
mod precopy;

use super::aggregate::Aggregate;
use super::bandwidth::Bandwidth;
use super::figures::FIGURES;
use super::format::{bytes, count, figure, micros, millis, ns_as, number};
use super::latency::{PARTS, Percentiles};
use super::plots::canvas::{Ink, PlotError};
use super::plots::{latency, progress, rates, timeline};
use super::schema::{Report, RunReport, Spread};
use crate::floor::{FloorReport, FloorSum};

const STYLE: &str = include_str!("report.css");

/// The page for `report`, whose modes were made from `aggregates`.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn page(report: &Report, aggregates: &[Aggregate]) -> Result<String, PlotError> {
    let mut html = String::new();
    let title = format!("switchover: {}", modes(report));
    let _ = write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>{}</title>\n<style>\n{STYLE}{}</style>\n</head>\n\
         <body>\n<main>\n",
        escape(&title),
        ink_rules()
    );
    header(&mut html, report);
    if let Some(comparison) = &report.comparison {
        beside::section(&mut html, report, comparison, aggregates)?;
    }
    if let Some(matrix) = &report.matrix {
        let ours = || aggregates.iter().filter(|aggregate| aggregate.report.is_ours());
        matrix::section(&mut html, matrix, &ours().collect::<Vec<_>>());
    }
    if report.matrix.as_ref().is_none_or(|matrix| matrix.cells.len() == 1) {
        for aggregate in aggregates {
            mode(&mut html, report, aggregate)?;
        }
    } else {
        matrix::cells(&mut html, aggregates)?;
    }
    if let Some(floor) = &report.floor {
        floor_table(&mut html, floor);
    }
    loaded::section(&mut html, report);
    setting(&mut html, report);
    html.push_str("</main>\n</body>\n</html>\n");
    Ok(html)
}

/// Maps the pictures' stand-in colours to the page's variables.
fn ink_rules() -> String {
    Ink::ALL.iter().fold(String::new(), |mut rules, ink| {
        let (hex, name) = (ink.hex(), ink.css_name());
        let _ =
            writeln!(rules, "svg [fill=\"{hex}\"]{{fill:var({name})}} svg [stroke=\"{hex}\"]{{stroke:var({name})}}");
        rules
    })
}

/// Ways of this VMM, and the peer.
fn modes(report: &Report) -> String {
    let peer = report.settings.peer.as_ref();
    let beside = peer.map(|peer| format!(" beside {} {}", peer.title, peer.version)).unwrap_or_default();
    format!("{}{beside}", our_modes(report))
}

fn our_modes(report: &Report) -> String {
    let mut names: Vec<&str> = Vec::new();
    for mode in report.modes.iter().filter(|mode| mode.is_ours()) {
        let name = mode_name(&mode.mode);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if let [one] = names[..] {
        return one.to_owned();
    }
    let short: Vec<_> = names.iter().map(|name| name.trim_end_matches(" migration")).collect();
    format!("{} migration", short.join(", "))
}

fn mode_name(mode: &str) -> &str {
    match mode {
        "postcopy" => "post-copy migration",
        "precopy" => "pre-copy migration",
        "hybrid" => "hybrid migration",
        "multifd" => "pre-copy with multifd",
        "postcopy-preempt" => "post-copy with preempt",
        "precopy-postcopy" => "pre-copy, then post-copy",
        other => other,
    }
}

fn header(html: &mut String, report: &Report) {
    let settings = &report.settings;
    let runs: usize = report.modes.iter().map(|mode| mode.runs.len()).sum();
    let (class, verdict) = if report.interrupted && report.verified {
        ("good", "interrupted; guest memory verified in every run that was made")
    } else if report.verified {
        ("good", "guest memory verified in every run")
    } else {
        ("bad", "NOT verified: see the runs below")
    };
    let _ = writeln!(
        html,
        "<h1>{}</h1>\n<p class=\"lead\">{runs} {} of the {} <b>{}</b> with {} and {} over {}{}, on {} × {}, Linux {}. \
         {}</p>\n<span class=\"verdict {class}\">{verdict}</span>",
        capitalised(&escape(&modes(report))),
        if runs == 1 { "run" } else { "runs" },
        if settings.guest.contains(", ") { "guests" } else { "guest" },
        escape(&settings.guest),
        escape(&bytes(ns_as(settings.memory, 1.0))),
        if settings.vcpus == 1 { "1 vCPU".to_owned() } else { format!("{} vCPUs", settings.vcpus) },
        escape(&settings.link),
        escape(&bandwidths(report)),
        report.host.cpus,
        escape(&report.host.cpu),
        escape(&report.host.kernel),
        escape(&report.created.replace('T', " ").replace('Z', " UTC")),
    );
}

/// ` at 1G, 5G and unlimited bit/s`; nothing where nothing was bounded.
fn bandwidths(report: &Report) -> String {
    let mut found: Vec<Bandwidth> = Vec::new();
    for bandwidth in report.modes.iter().map(|mode| Bandwidth::from(mode.bandwidth_bit_s)) {
        if !found.contains(&bandwidth) {
            found.push(bandwidth);
        }
    }
    if found.iter().all(|bandwidth| *bandwidth == Bandwidth::UNLIMITED) {
        return String::new();
    }
    let texts: Vec<_> = found
        .iter()
        .map(|bandwidth| match bandwidth.bits_per_second() {
            Some(_) => format!("{bandwidth}bit/s"),
            None => bandwidth.to_string(),
        })
        .collect();
    match texts.split_last() {
        Some((last, others)) if !others.is_empty() => format!(" at {} and {last}", others.join(", ")),
        _ => format!(" at {}", texts.join(", ")),
    }
}

fn mode(html: &mut String, report: &Report, aggregate: &Aggregate) -> Result<(), PlotError> {
    if report.modes.len() > 1 {
        let name = mode_name(&aggregate.report.mode);
        let title = match report.settings.peer.as_ref().filter(|_| !aggregate.report.is_ours()) {
            Some(peer) => format!("{} {}: {name}", peer.title, peer.version),
            None => capitalised(name),
        };
        let _ = writeln!(html, "<h2>{}</h2>", escape(&title));
    }
    precopy::endings(html, &aggregate.report);
    cards(html, aggregate);
    if let Some(typical) = aggregate.typical_run() {
        plots(html, report, aggregate, typical)?;
    }
    if let Some(typical) = aggregate.typical_run() {
        precopy::tables(html, typical);
    }
    figures_table(html, aggregate);
    latency_table(html, aggregate);
    if let Some(typical) = aggregate.typical_run() {
        lanes_table(html, typical);
    }
    runs_table(html, aggregate);
    Ok(())
}

fn cards(html: &mut String, aggregate: &Aggregate) {
    let summary = &aggregate.report.summary;
    html.push_str("<div class=\"cards\">\n");
    for (key, what) in [
        ("blackout_ns", "blackout, host clocks"),
        ("gap_ns", "longest gap the guest saw"),
        ("lost_s", "guest progress lost"),
        ("cost_s", "cost: lost + 0.1 × total"),
        ("precopy_bytes", "pre-copied"),
        ("drain_ns", "drain"),
        ("drain_gbit_s", "drain rate"),
        ("recovered_s", "back at 95 % of its rate after"),
        ("cpu_s_per_gib", "CPU of both processes for a GiB"),
    ] {
        let found = FIGURES.iter().find(|figure| figure.key == key).zip(summary.get(key));
        let Some((descriptor, spread)) = found else { continue };
        let (value, unit) = figure(spread.median, descriptor.unit);
        let mut range = range(spread, |value| figure(value, descriptor.unit).0);
        if let Some(before) = summary.get("gap_before_ns").filter(|_| key == "gap_ns") {
            let _ = write!(range, "; {} ms before the move", figure(before.median, descriptor.unit).0);
        }
        card(html, what, &value, unit, &range);
    }
    if let Some(total) = aggregate.report.latency.get("total").filter(|total| total.count > 0) {
        let tail = format!(
            "p99 {}, max {}; {} faults",
            micros(total.p99_ns),
            micros(total.max_ns),
            number(ns_as(total.count, 1.0))
        );
        card(html, "remote fault, median", &number(ns_as(total.p50_ns, 1e3)), "µs", &tail);
    }
    html.push_str("</div>\n");
}

fn card(html: &mut String, what: &str, value: &str, unit: &str, range: &str) {
    let _ = writeln!(
        html,
        "<div class=\"card\"><div class=\"what\">{what}</div><div class=\"value\">{value} <small>{unit}</small></div>\
         <div class=\"range\">{range}</div></div>"
    );
}

fn range(spread: &Spread, show: impl Fn(f64) -> String) -> String {
    match spread.runs {
        1 => "one run".to_owned(),
        runs => format!("median of {runs}; {} to {}", show(spread.min), show(spread.max)),
    }
}

fn plots(html: &mut String, report: &Report, aggregate: &Aggregate, typical: &RunReport) -> Result<(), PlotError> {
    let number = typical.run;
    let chosen = if aggregate.report.runs.len() > 1 && typical.figures.blackout_ns.is_some() {
        format!("Run {number}, the one with the median blackout.")
    } else if aggregate.report.runs.len() > 1 && typical.source.is_none() {
        format!("Run {number}, the one whose guest saw the median gap.")
    } else if aggregate.report.runs.len() > 1 {
        format!("Run {number}.")
    } else {
        String::new()
    };
    if let (Some(source), None) = (&typical.source, &typical.destination) {
        let caption = format!("{chosen} The guest was not moved. Shaded: the rounds of pre-copy.");
        section(html, "Phases on the source", timeline::draw_source(source)?, &caption);
    }
    if let (Some(source), Some(destination)) = (&typical.source, &typical.destination) {
        let rounds = if source.precopy.is_some() { " Shaded: the rounds of pre-copy." } else { "" };
        let caption = format!(
            "{chosen} Upper rows: migration status; lower rows: steps within it. The blackout reaches from the last \
             vCPU's exit on the source to the first one's entry on the destination.{rounds}"
        );
        section(html, "Phases on both sides", timeline::draw(source, destination)?, &caption);
        let floor = report.floor.as_ref().map(|floor| levels(floor, &report.settings.link)).unwrap_or_default();
        let caption = "All runs together. A fault's clock starts when the pager takes it from the kernel and stops \
                       when the vCPU has been woken; what the vCPU waited before and after shows only in the guest's \
                       own gaps. The floor is a no-op fault of a guest plus a 4 KiB request and response, each \
                       measured alone; it holds the way out of the guest and back, which the faults' figures do not.";
        let picture = aggregate.merged.values().any(|histogram| !histogram.is_empty());
        let picture = picture.then(|| latency::draw(&aggregate.merged, &floor)).transpose()?;
        section(html, "Fault latency by percentile", picture, caption);
        let caption =
            format!("{chosen} What the destination placed and what its vCPUs had to ask for, over the drain.");
        section(html, "Pushed pages and faults over time", rates::draw(destination)?, &caption);
    }
    let caption = "Visits that the guest counted in each of its periods, against its rate before the move. Shaded: from \
                   the handoff until both sides had completed; lighter: from migrate to the handoff.";
    section(html, "Guest progress", progress::draw(&aggregate.report.runs, typical)?, caption);
    Ok(())
}

fn levels(floor: &FloorReport, link: &str) -> Vec<FloorSum> {
    floor.sums.iter().filter(|sum| sum.link == link).cloned().collect()
}

fn section(html: &mut String, title: &str, svg: Option<String>, caption: &str) {
    if let Some(svg) = svg {
        let _ = writeln!(
            html,
            "<h2>{title}</h2>\n<figure role=\"img\" aria-label=\"{title}\">{svg}<figcaption>{}</figcaption></figure>",
            caption.trim()
        );
    }
}

fn figures_table(html: &mut String, aggregate: &Aggregate) {
    if aggregate.report.summary.is_empty() {
        return;
    }
    html.push_str("<h2>Figures</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>figure</th><th>median</th><th>where it is, 95 %</th><th>min</th><th>max</th><th class=\"text\">unit</th><th>runs</th></tr></thead>\n<tbody>\n");
    for descriptor in FIGURES {
        let Some(spread) = aggregate.report.summary.get(descriptor.key) else { continue };
        let shown = [spread.median, spread.min, spread.max].map(|value| figure(value, descriptor.unit));
        let [(median, unit), (min, _), (max, _)] = &shown;
        let show = |value| figure(value, descriptor.unit).0;
        let interval = spread.ci_low.zip(spread.ci_high).map(|(low, high)| format!("{} – {}", show(low), show(high)));
        let interval = interval.unwrap_or_else(|| "–".to_owned());
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{median}</td><td>{interval}</td><td>{min}</td><td>{max}</td><td class=\"text\">{unit}</td><td>{}</td></tr>",
            descriptor.label, spread.runs
        );
    }
    html.push_str("</tbody></table></div>\n");
}

fn latency_table(html: &mut String, aggregate: &Aggregate) {
    let rows: Vec<(&str, &Percentiles)> = PARTS
        .iter()
        .filter_map(|part| Some((part.label, aggregate.report.latency.get(part.key)?)))
        .filter(|(_, percentiles)| percentiles.count > 0)
        .collect();
    if rows.is_empty() {
        return;
    }
    html.push_str("<h2>Fault latency</h2>\n<p class=\"note\">All runs together, in microseconds. The parts are those of remote faults.</p>\n");
    percentile_table(html, "faults", rows.into_iter().map(|(label, p)| (label.to_owned(), Ok(*p))));
}

fn percentile_table(html: &mut String, what: &str, rows: impl Iterator<Item = (String, Result<Percentiles, String>)>) {
    let _ = writeln!(
        html,
        "<div class=\"scroll\"><table>\n<thead><tr><th></th><th>{what}</th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th><th>max</th></tr></thead>\n<tbody>"
    );
    for (label, row) in rows {
        match row {
            Ok(percentiles) => {
                let _ =
                    write!(html, "<tr><td>{}</td><td>{}</td>", escape(&label), count(ns_as(percentiles.count, 1.0)));
                for (_, ns) in percentiles.named() {
                    let _ = write!(html, "<td>{}</td>", number(ns_as(ns, 1e3)));
                }
                html.push_str("</tr>\n");
            }
            Err(reason) => {
                let _ = writeln!(
                    html,
                    "<tr><td>{}</td><td colspan=\"6\" class=\"text\">{}</td></tr>",
                    escape(&label),
                    escape(&reason)
                );
            }
        }
    }
    html.push_str("</tbody></table></div>\n");
}

fn lanes_table(html: &mut String, typical: &RunReport) {
    let Some(source) = &typical.source else { return };
    let _ = writeln!(
        html,
        "<h2>Lanes</h2>\n<p class=\"note\">Run {}, bytes with headers, as the source counted them.</p>\n<div class=\"scroll\"><table>\n<thead><tr><th>lane</th><th>source → destination</th><th>destination → source</th></tr></thead>\n<tbody>",
        typical.run
    );
    for lane in &source.lanes {
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&lane.lane),
            bytes(ns_as(lane.sent, 1.0)),
            bytes(ns_as(lane.received, 1.0))
        );
    }
    html.push_str("</tbody></table></div>\n");
}

fn runs_table(html: &mut String, aggregate: &Aggregate) {
    html.push_str("<h2>Runs</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>run</th><th>blackout, ms</th><th>guest's gap, ms</th><th>lost, s</th><th>cost, s</th><th>total, ms</th><th>drain, ms</th><th>Gbit/s</th><th>remote faults</th><th class=\"text\">guest memory</th></tr></thead>\n<tbody>\n");
    for run in &aggregate.report.runs {
        let figures = &run.figures;
        let ms = |ns: Option<u64>| ns.map_or_else(|| "–".to_owned(), millis);
        let plain = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), number);
        let (class, verdict) = match (&run.not_converged, run.verified) {
            (_, false) => ("text bad", escape(&run.doubts.join("; "))),
            (Some(why), true) => {
                ("text", format!("did not converge, goes on at the source, verified: {}", escape(why)))
            }
            (None, true) => ("text", "verified".to_owned()),
        };
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"{class}\">{verdict}</td></tr>",
            run.run,
            ms(figures.blackout_ns),
            ms(figures.progress.gap_ns),
            plain(figures.progress.lost_s),
            plain(figures.cost_s),
            ms(figures.total_ns),
            ms(figures.drain_ns),
            plain(figures.drain_gbit_s),
            figures.faults_remote.map_or_else(|| "–".to_owned(), |faults| count(ns_as(faults, 1.0))),
        );
    }
    html.push_str("</tbody></table></div>\n");
}

fn floor_table(html: &mut String, floor: &FloorReport) {
    html.push_str("<h2>Floor: what this machine can do at best</h2>\n<p class=\"note\">Round trips in microseconds, each measured alone just before the runs. F, a guest's fault plus a request and response, is the sum percentile by percentile: a yardstick, not a distribution.</p>\n");
    let parts = floor.parts().map(|(name, way, measured)| {
        let row = match measured {
            crate::floor::Measured::Round(percentiles) => Ok(*percentiles),
            crate::floor::Measured::Missing { unavailable } => Err(unavailable.clone()),
        };
        (format!("{name}, {way}"), row)
    });
    percentile_table(html, "round trips", parts.into_iter());
    html.push_str("<div class=\"scroll\"><table>\n<thead><tr><th>F</th><th>p50</th><th>p90</th><th>p99</th></tr></thead>\n<tbody>\n");
    for sum in &floor.sums {
        let _ = writeln!(
            html,
            "<tr><td>fault of a {} + 4 KiB over {}, {}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&sum.fault),
            escape(&sum.link),
            escape(&sum.way),
            number(ns_as(sum.p50_ns, 1e3)),
            number(ns_as(sum.p90_ns, 1e3)),
            number(ns_as(sum.p99_ns, 1e3)),
        );
    }
    html.push_str("</tbody></table></div>\n");
}

fn setting(html: &mut String, report: &Report) {
    let (settings, host) = (&report.settings, &report.host);
    let or_unknown = |text: &str| if text.is_empty() { "unknown".to_owned() } else { text.to_owned() };
    let mut cpu = format!("{} × {}, {}", host.cpus, host.cpu, host.architecture);
    if host.virtualised {
        cpu.push_str(", itself virtual");
    }
    let peer = settings.peer.as_ref();
    let peer =
        peer.map_or_else(|| "none".to_owned(), |peer| format!("{} {}, {}", peer.title, peer.version, peer.program));
    html.push_str("<h2>Setting</h2>\n<table>\n<tbody>\n");
    for (name, value) in [
        ("Guest", format!("{} {}", settings.guest, settings.append)),
        ("Machine", format!("{}, {} vCPU, link {}", bytes(ns_as(settings.memory, 1.0)), settings.vcpus, settings.link)),
        (
            "Runs",
            format!(
                "{} a mode; warm-up {} s, {} s after the move, guest period {} ms; seed of their order {}",
                settings.runs, settings.warmup_s, settings.after_s, settings.period_ms, settings.seed
            ),
        ),
        ("Peer", peer),
        ("CPU", cpu),
        ("Memory", bytes(ns_as(host.memory, 1.0))),
        ("Kernel", host.kernel.clone()),
        ("KVM", or_unknown(&host.kvm)),
        ("Frequency governor", or_unknown(&host.governor)),
        ("Huge pages for shared memory", or_unknown(&host.shmem_huge_pages)),
    ] {
        let _ = writeln!(html, "<tr><td>{name}</td><td class=\"text\">{}</td></tr>", escape(&value));
    }
    let _ = writeln!(
        html,
        "</tbody></table>\n<footer>switchover {} · <code>{}</code> · the full data is in <code>report.json</code>, the \
         distributions in <code>*.hgrm</code> and <code>*.hlog</code>; what each figure means and leaves out is said in \
         <code>docs/report.md</code></footer>",
        escape(&report.switchover),
        escape(&report.schema)
    );
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// Text as HTML: the host's and the guest's words are not ours.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use super::super::synthetic;
    use super::*;

    fn sample(runs: u32) -> (Report, Vec<Aggregate>) {
        let aggregate = Aggregate::of("hybrid", "switchover", synthetic::hybrid_runs(runs)).unwrap();
        (synthetic::report(vec![aggregate.report.clone()]), vec![aggregate])
    }

    /// For whoever wants to look at it.
    fn keep(name: &str, html: &str) {
        if let Some(directory) = std::env::var_os("SWITCHOVER_SAMPLE_REPORT") {
            std::fs::write(std::path::Path::new(&directory).join(name), html).unwrap();
        }
    }

    #[test]
    fn the_page_is_whole_and_needs_nothing_else() {
        let (report, aggregates) = sample(5);
        let html = page(&report, &aggregates).unwrap();
        keep("report.html", &html);
        assert_eq!(html.matches("<svg").count(), 4);
        assert!(html.ends_with("</html>\n"));
        for outside in ["<script", "<link", "src=", "url(", "@import"] {
            assert!(!html.contains(outside), "{outside}");
        }
        // A peer's alone.
        for figure in FIGURES.iter().filter(|figure| figure.key != "own_downtime_ns") {
            assert!(html.contains(figure.label), "{}", figure.label);
        }
    }

    #[test]
    fn modes_are_compared_and_each_has_its_section() {
        let (report, aggregates) = synthetic::three_modes(3);
        let html = page(&report, &aggregates).unwrap();
        keep("modes.html", &html);
        for text in [
            "Pre-copy, post-copy, hybrid migration",
            "The modes side by side",
            "did not converge",
            "Rounds of pre-copy",
            "What the monitor decided",
            "another round gains less than it costs",
        ] {
            assert!(html.contains(text), "{text}");
        }
        // Pre-copy's phases and progress; four pictures of each of the others.
        assert_eq!(html.matches("<svg").count(), 10);
    }

    #[test]
    fn a_peer_is_compared_before_everything_else() {
        let (report, aggregates) = synthetic::beside_a_peer(5);
        let html = page(&report, &aggregates).unwrap();
        keep("beside.html", &html);
        for text in [
            "Post-copy, hybrid migration beside QEMU 10.0.2",
            "<h2>Beside QEMU 10.0.2</h2>",
            "demands met",
            "QEMU 10.0.2: post-copy with preempt",
            "The best of both: post-copy",
            "seed of their order 7",
        ] {
            assert!(html.contains(text), "{text}");
        }
        // Two of both, four of each of ours, one of each of the peer's.
        assert_eq!(html.matches("<svg").count(), 2 + 2 * 4 + 3);
    }

    #[test]
    fn many_cells_are_a_table_and_a_summary_each() {
        let (mut report, mut aggregates) = synthetic::three_modes(2);
        for aggregate in aggregates.clone() {
            aggregates.push(aggregate.in_cell("idle".to_owned(), "1G".parse().unwrap()));
        }
        report.modes = aggregates.iter().map(|aggregate| aggregate.report.clone()).collect();
        report.matrix = super::super::matrix::Matrix::of(&report.modes);
        let html = page(&report, &aggregates).unwrap();
        keep("matrix.html", &html);
        assert!(html.contains("idle, 1Gbit/s") && html.contains("random, unlimited"));
        assert_eq!(html.matches("<svg").count(), 2);
        assert!(!html.contains("Fault latency by percentile"));
    }

    #[test]
    fn words_from_elsewhere_cannot_become_markup() {
        let (mut report, aggregates) = sample(1);
        report.host.cpu = "<b>\"cpu\" & co".to_owned();
        let html = page(&report, &aggregates).unwrap();
        assert!(html.contains("&lt;b&gt;&quot;cpu&quot; &amp; co") && !html.contains("<b>\"cpu\""));
    }

    #[test]
    fn a_bench_without_a_good_run_says_why() {
        let failed = RunReport { run: 1, doubts: vec!["the <guest> stands still".to_owned()], ..RunReport::default() };
        let aggregate = Aggregate::of("postcopy", "switchover", vec![failed]).unwrap();
        let report = synthetic::report(vec![aggregate.report.clone()]);
        let html = page(&report, &[aggregate]).unwrap();
        assert!(html.contains("the &lt;guest&gt; stands still") && html.contains("NOT verified"));
    }
}
