//! What there is to say of a migration that is over.

use std::fmt::Write as _;

use indicatif::{HumanBytes, HumanCount};
use serde_json::Value;

/// Rounds told one by one; the middle ones of more are left out.
const ROUNDS_TOLD: usize = 6;

/// A migration that is complete: the last answer to `query-migrate`, and the source's report where there is one.
pub fn summary(look: &Value, report: Option<&Value>) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "{name:12} {value}");
    };
    line("moved in", format!("{} ms, {} ms of it set-up", number(look, "/total-time"), number(look, "/setup-time")));
    if let Some(rounds) = report.and_then(rounds) {
        line("rounds", rounds);
    }
    if let Some(decision) = report.and_then(last_decision) {
        line("decision", decision);
    }
    if let Some(blackout) = look.get("x-switchover-downtime-ns").and_then(Value::as_u64) {
        line(
            "blackout",
            format!(
                "{} as the source knows it (no vCPU ran); what the guest felt only the guest can say",
                ms(blackout)
            ),
        );
    }
    line("on the wire", HumanBytes(number(look, "/ram/transferred")).to_string());
    line(
        "pages",
        format!(
            "{} with their bytes, {} known to be zero, {} asked for by faults",
            HumanCount(number(look, "/ram/normal")),
            HumanCount(number(look, "/ram/duplicate")),
            HumanCount(number(look, "/ram/postcopy-requests"))
        ),
    );
    out
}

/// Whether pre-copy was given up because it did not converge.
pub fn gave_up(report: &Value) -> bool {
    decision(report).is_some_and(|decision| text(decision, "/choice") == "give-up")
}

/// How many rounds there were, and how many pages each had.
pub fn rounds(report: &Value) -> Option<String> {
    let rounds = report.pointer("/precopy/rounds")?.as_array()?;
    let pages: Vec<_> = rounds.iter().map(|round| HumanCount(number(round, "/pages")).to_string()).collect();
    let told = match pages.len() {
        0 => return None,
        count if count <= ROUNDS_TOLD => pages.join(", "),
        count => format!("{}, …, {}", pages[..ROUNDS_TOLD / 2].join(", "), pages[count - ROUNDS_TOLD / 2..].join(", ")),
    };
    let bytes = rounds.iter().map(|round| number(round, "/wire_bytes")).sum();
    Some(format!("{} of {told} pages; {}", pages.len(), HumanBytes(bytes)))
}

/// What the monitor chose in the end, why, and how its prediction turned out.
pub fn last_decision(report: &Value) -> Option<String> {
    let decision = decision(report)?;
    let choice = text(decision, "/choice");
    let (name, predicted) = match choice {
        "stop-and-copy" => ("stop and copy", Some("/prediction/stop_blackout_ns")),
        "postcopy" => ("post-copy", Some("/prediction/postcopy_blackout_ns")),
        "give-up" => ("give up", Some("/prediction/stop_blackout_ns")),
        "another-round" => ("another round", None),
        other => (other, None),
    };
    let mut told = format!("{name} in round {}: {}", number(decision, "/round"), text(decision, "/reason"));
    if let Some(expected) = predicted.and_then(|pointer| decision.pointer(pointer)).and_then(Value::as_u64) {
        let _ = write!(told, "; expected blackout {}", ms(expected));
        if let Some(actual) = decision.pointer("/actual_blackout_ns").and_then(Value::as_u64) {
            let _ = write!(told, ", actual {}", ms(actual));
        }
    }
    Some(told)
}

fn decision(report: &Value) -> Option<&Value> {
    report.pointer("/precopy/decisions")?.as_array()?.last()
}

fn ms(nanos: u64) -> String {
    format!("{}.{:03} ms", nanos / 1_000_000, nanos / 1_000 % 1_000)
}

/// The number at `pointer`, or 0.
pub fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

/// The text at `pointer`, or "none".
pub fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or("none")
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use switchover_hybrid::monitor::{Choice, Prediction, Verdict};
    use switchover_hybrid::report::{DecisionReport, PrecopyReport, RoundReport};

    use super::*;

    /// A source's report as the machine writes it, as far as it is looked at.
    fn report(pages: &[u64], choice: Choice) -> Value {
        let round = |(index, pages): (usize, &u64)| RoundReport {
            round: u32::try_from(index).unwrap() + 1,
            pages: *pages,
            wire_bytes: 1 << 20,
            ..RoundReport::default()
        };
        let prediction =
            Prediction { stop_blackout_ns: 4_100_000, postcopy_blackout_ns: 2_200_000, ..Prediction::default() };
        let decision = DecisionReport {
            at_ns: 5,
            round: u32::try_from(pages.len()).unwrap(),
            verdict: Verdict { choice, reason: "the rest fits".to_owned(), prediction },
            actual_round_pages: None,
            actual_round_ns: None,
            actual_blackout_ns: Some(4_500_000),
        };
        let precopy = PrecopyReport {
            rounds: pages.iter().enumerate().map(round).collect(),
            decisions: vec![DecisionReport { actual_blackout_ns: None, ..decision.clone() }, decision],
            ..PrecopyReport::default()
        };
        json!({ "precopy": precopy })
    }

    #[test]
    fn a_summary_shows_what_the_source_knows() {
        let look = json!({
            "status": "completed", "total-time": 283, "setup-time": 7, "downtime": 3,
            "x-switchover-downtime-ns": 3_210_987,
            "ram": {"transferred": 1_048_576, "normal": 65536, "duplicate": 12, "postcopy-requests": 34},
        });
        let text = summary(&look, Some(&report(&[65_536, 310], Choice::StopAndCopy)));
        for part in [
            "283 ms, 7 ms of it",
            "2 of 65,536, 310 pages; 2.00 MiB",
            "stop and copy in round 2: the rest fits; expected blackout 4.100 ms, actual 4.500 ms",
            "3.210 ms as the source knows it",
            "1.00 MiB",
            "65,536 with",
            "12 known",
            "34 asked",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn what_is_not_known_is_not_shown() {
        let text = summary(&json!({"status": "completed", "total-time": 1}), None);
        assert!(!text.contains("blackout") && !text.contains("rounds") && !text.contains("decision"), "{text}");
        let text = summary(&json!({"status": "completed"}), Some(&json!({"precopy": null})));
        assert!(!text.contains("rounds") && !text.contains("decision"), "{text}");
    }

    #[test]
    fn each_end_is_told_by_its_own_prediction() {
        let told = |choice| last_decision(&report(&[9], choice)).unwrap();
        assert!(told(Choice::Postcopy).starts_with("post-copy in round 1: the rest fits; expected blackout 2.200 ms"));
        assert!(told(Choice::GiveUp).starts_with("give up in round 1: the rest fits; expected blackout 4.100 ms"));
        assert!(gave_up(&report(&[9], Choice::GiveUp)) && !gave_up(&report(&[9], Choice::Postcopy)));
        assert!(!gave_up(&json!({})));
    }

    #[test]
    fn of_many_rounds_the_first_and_the_last_are_told() {
        let told = rounds(&report(&[9, 8, 7, 6, 5, 4, 3, 2], Choice::GiveUp)).unwrap();
        assert!(told.starts_with("8 of 9, 8, 7, …, 4, 3, 2 pages"), "{told}");
        assert_eq!(rounds(&report(&[], Choice::GiveUp)), None);
    }
}
