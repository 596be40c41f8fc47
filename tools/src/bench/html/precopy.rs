//! What pre-copy did: its rounds, and what the monitor decided.

use std::fmt::Write as _;

use switchover_hybrid::monitor::Choice;
use switchover_hybrid::report::{DecisionReport, EncodingCounts, PrecopyReport};

use super::super::figures::predicted_blackout;
use super::super::format::{bytes, count, millis, ns_as, number};
use super::super::schema::{ModeReport, RunReport};
use super::super::table;
use super::escape;

/// Of more rounds the first and the last are shown.
const MOST_ROWS: usize = 24;

/// How the mode's runs ended, in a sentence.
pub fn endings(html: &mut String, mode: &ModeReport) {
    let stayed = mode.not_converged();
    if stayed > 0 {
        let why = mode.runs.iter().find_map(|run| run.not_converged.as_deref()).unwrap_or_default();
        let _ = writeln!(
            html,
            "<p><span class=\"verdict bad\">did not converge in {stayed} of {} runs</span> The guest went on at the source: \
             {}</p>",
            mode.runs.len(),
            escape(why)
        );
    }
    if let Some(endings) = table::endings(mode) {
        let _ = writeln!(html, "<p class=\"note\">Pre-copy ended by {}.</p>", escape(&endings));
    }
}

/// The rounds and the decisions of one run; nothing where it had no pre-copy.
pub fn tables(html: &mut String, run: &RunReport) {
    let Some(precopy) = run.source.as_ref().and_then(|source| source.precopy.as_ref()) else { return };
    if !precopy.rounds.is_empty() {
        rounds(html, run, precopy);
    }
    if !precopy.decisions.is_empty() {
        decisions(html, run, precopy);
    }
}

fn rounds(html: &mut String, run: &RunReport, precopy: &PrecopyReport) {
    let whole = |value: u64| count(ns_as(value, 1.0));
    let _ = writeln!(
        html,
        "<h2>Rounds of pre-copy</h2>\n<p class=\"note\">Run {}. {} pages were left {}{}.{}</p>\n\
         <div class=\"scroll\"><table>\n<thead><tr><th>round</th><th>pages</th><th>with bytes</th><th>zero</th>\
         <th>put off</th><th>dirtied meanwhile</th><th>bytes</th><th>time, ms</th><th>Gbit/s</th></tr></thead>\n<tbody>",
        run.run,
        whole(precopy.handoff_pages),
        if run.not_converged.is_some() { "when it ended" } else { "at the handoff" },
        match precopy.throttle_percent {
            0 => String::new(),
            percent => format!("; vCPUs were throttled by up to {percent} %"),
        },
        encodings(&precopy.encodings)
    );
    for index in shown(precopy.rounds.len()) {
        let Some(round) = index.and_then(|index| precopy.rounds.get(index)) else {
            html.push_str("<tr><td>…</td><td colspan=\"8\"></td></tr>\n");
            continue;
        };
        let ns = round.end_ns.saturating_sub(round.start_ns);
        // Bits in a nanosecond are gigabits in a second.
        let rate = if ns > 0 { number(ns_as(round.wire_bytes, 1.0) * 8.0 / ns_as(ns, 1.0)) } else { "–".to_owned() };
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{rate}</td></tr>",
            round.round,
            whole(round.pages),
            whole(round.data_pages),
            whole(round.zero_pages),
            whole(round.deferred_pages),
            whole(round.dirtied_pages),
            bytes(ns_as(round.wire_bytes, 1.0)),
            millis(ns),
        );
    }
    html.push_str("</tbody></table></div>\n");
}

/// ` 90 000 pages went raw, 14 000 as LZ4: 88 % of their bytes.`; empty where none was counted.
fn encodings(encodings: &EncodingCounts) -> String {
    let parts: Vec<_> = [
        (encodings.raw, "raw"),
        (encodings.lz4, "as LZ4"),
        (encodings.zstd, "as zstd"),
        (encodings.delta, "as differences"),
        (encodings.same, "as references"),
    ]
    .into_iter()
    .filter(|(pages, _)| *pages > 0)
    .map(|(pages, how)| format!("{} {how}", count(ns_as(pages, 1.0))))
    .collect();
    if parts.is_empty() {
        return String::new();
    }
    let share = match encodings.bytes_in {
        0 => String::new(),
        before => format!(
            ", at {} % of their bytes",
            number(ns_as(encodings.bytes_out, 100.0_f64.recip()) / ns_as(before, 1.0))
        ),
    };
    format!(" Pages by encoding: {}{share}.", parts.join(", "))
}

fn decisions(html: &mut String, run: &RunReport, precopy: &PrecopyReport) {
    html.push_str(
        "<h2>What the monitor decided</h2>\n<p class=\"note\">What it expected, and behind the arrow what happened. Times in \
         ms since pre-copy began.</p>\n<div class=\"scroll\"><table>\n<thead><tr><th>at, ms</th><th>round</th>\
         <th class=\"text\">choice</th><th>next round, pages</th><th>next round, ms</th><th>blackout, ms</th>\
         <th class=\"text\">because</th></tr></thead>\n<tbody>\n",
    );
    for index in shown(precopy.decisions.len()) {
        let Some(decision) = index.and_then(|index| precopy.decisions.get(index)) else {
            html.push_str("<tr><td>…</td><td colspan=\"6\"></td></tr>\n");
            continue;
        };
        let prediction = &decision.verdict.prediction;
        let (pages, time) = if decision.verdict.choice == Choice::AnotherRound {
            (
                beside(Some(prediction.next_round_pages), decision.actual_round_pages, |pages| {
                    count(ns_as(pages, 1.0))
                }),
                beside(Some(prediction.next_round_ns), decision.actual_round_ns, millis),
            )
        } else {
            ("–".to_owned(), "–".to_owned())
        };
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{}</td><td class=\"text\">{}</td><td>{pages}</td><td>{time}</td><td>{}</td>\
             <td class=\"text\">{}</td></tr>",
            millis(decision.at_ns.saturating_sub(precopy.start_ns)),
            decision.round,
            escape(&decision.verdict.choice.to_string()),
            beside(predicted_blackout(decision), actual_blackout(decision, run), millis),
            escape(&decision.verdict.reason),
        );
    }
    html.push_str("</tbody></table></div>\n");
}

/// The blackout that a decision led to, as the side told or else as the run's figures have it.
fn actual_blackout(decision: &DecisionReport, run: &RunReport) -> Option<u64> {
    predicted_blackout(decision)?;
    decision.actual_blackout_ns.or(run.figures.blackout_ns)
}

/// `predicted → real`.
fn beside(predicted: Option<u64>, real: Option<u64>, show: impl Fn(u64) -> String) -> String {
    match (predicted, real) {
        (None, _) => "–".to_owned(),
        (Some(predicted), None) => show(predicted),
        (Some(predicted), Some(real)) => format!("{} → {}", show(predicted), show(real)),
    }
}

/// The rows to show of `count`; `None` stands for those left out.
fn shown(count: usize) -> Vec<Option<usize>> {
    if count <= MOST_ROWS {
        return (0..count).map(Some).collect();
    }
    let half = MOST_ROWS / 2;
    (0..half).map(Some).chain([None]).chain((count - half..count).map(Some)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::super::synthetic;
    use super::*;

    #[test]
    fn predictions_stand_beside_what_happened() {
        let mut html = String::new();
        let run = synthetic::hybrid_runs(1).remove(0);
        tables(&mut html, &run);
        // Round 1 dirtied 24 100 pages, nine tenths of which were expected.
        assert!(html.contains("21\u{202f}690 → 24\u{202f}100"), "{html}");
        assert!(html.contains("4.00 → 4.30") && html.contains("post-copy"), "{html}");
        assert!(html.contains("Pages by encoding: 90\u{202f}000 raw, 14\u{202f}000 as LZ4, at 92.3 % of"), "{html}");
    }

    #[test]
    fn a_run_without_precopy_has_no_tables() {
        let mut html = String::new();
        tables(&mut html, &synthetic::runs(1)[0]);
        assert_eq!(html, "");
    }

    #[test]
    fn of_many_rounds_the_first_and_the_last_are_shown() {
        assert_eq!(shown(2), [Some(0), Some(1)]);
        let rows = shown(100);
        assert_eq!((rows.len(), rows[12], rows[13]), (MOST_ROWS + 1, None, Some(88)));
    }
}
