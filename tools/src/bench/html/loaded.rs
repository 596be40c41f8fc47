//! The floor beside a drain, and what the guest felt against the floor.

use std::fmt::Write as _;

use super::{escape, micros};
use crate::bench::felt;
use crate::bench::format::{ns_as, number};
use crate::bench::schema::Report;
use crate::floor::{Loaded, LoadedReport, Measured};

/// Both, as far as they are there.
pub fn section(html: &mut String, report: &Report) {
    if let Some(loaded) = report.floor.as_ref().and_then(|floor| floor.loaded.as_ref()) {
        table(html, loaded);
    }
    for line in felt::against_floor(report) {
        let _ = writeln!(html, "<p>{}</p>", escape(&line));
    }
}

fn table(html: &mut String, loaded: &LoadedReport) {
    let busy = if loaded.vcpu == "guest" { "vCPU" } else { "thread" };
    let _ = writeln!(
        html,
        "<h2>The floor beside a TCP stream and a busy {busy}</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>part</th>\
         <th>count</th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th><th>max</th><th>stream, Gbit/s</th></tr></thead>\n<tbody>"
    );
    for (name, way, Loaded { round, stream_bit_s }) in loaded.parts() {
        let _ = write!(html, "<tr><td>{}, {way}</td>", escape(&name));
        match round {
            Measured::Round(percentiles) => {
                let _ = write!(html, "<td>{}</td>", percentiles.count);
                for (_, ns) in percentiles.named() {
                    let _ = write!(html, "<td>{}</td>", micros(ns));
                }
            }
            Measured::Missing { unavailable } => {
                let _ = write!(html, "<td class=\"text\" colspan=\"6\">{}</td>", escape(unavailable));
            }
        }
        let rate = stream_bit_s.map(|bits| number(ns_as(bits, 1e9))).unwrap_or_default();
        let _ = writeln!(html, "<td>{rate}</td></tr>");
    }
    html.push_str("</tbody></table></div>\n");
    for stream in &loaded.streams {
        let _ = writeln!(
            html,
            "<p>A plain stream over {} TCP connection{}, beside {}: {} Gbit/s.</p>",
            stream.connections,
            if stream.connections == 1 { "" } else { "s" },
            match stream.beside.as_str() {
                "nothing" => "nothing else".to_owned(),
                _ => format!("a busy {busy}"),
            },
            number(ns_as(stream.bit_s, 1e9))
        );
    }
}
