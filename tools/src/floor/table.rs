//! The floor as a table for a terminal.

use std::fmt::Write as _;

use super::report::{FloorReport, Measured};

/// `report` as text.
#[must_use]
pub fn text(report: &FloorReport) -> String {
    let mut text = format!(
        "{:<36} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9}\n",
        "Round trips, µs", "count", "p50", "p90", "p99", "p99.9", "max"
    );
    for (name, way, measured) in report.parts() {
        let _ = write!(text, "{:<36} ", format!("{name}, {way}"));
        match measured {
            Measured::Round(percentiles) => {
                let _ = write!(text, "{:>8}", percentiles.count);
                for (_, ns) in percentiles.named() {
                    let _ = write!(text, " {:>9}", micros(ns));
                }
                text.push('\n');
            }
            Measured::Missing { unavailable } => {
                let _ = writeln!(text, "{unavailable}");
            }
        }
    }
    text.push('\n');
    for sum in &report.sums {
        let name = format!("F: {} fault + 4 KiB {}, {}", sum.fault, sum.link, sum.way);
        let _ = writeln!(
            text,
            "{name:<36} {:>8} {:>9} {:>9} {:>9}",
            "",
            micros(sum.p50_ns),
            micros(sum.p90_ns),
            micros(sum.p99_ns)
        );
    }
    text
}

/// Nanoseconds as microseconds with one decimal.
fn micros(ns: u64) -> String {
    let tenths = ns.saturating_add(50) / 100;
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::super::report::synthetic;
    use super::*;

    #[test]
    fn every_part_and_every_sum_has_a_line() {
        let mut report = synthetic();
        report.guest_fault.spinning = Measured::Missing { unavailable: "cannot open /dev/kvm".to_owned() };
        let text = text(&report);
        assert_eq!(text.lines().count(), 1 + 8 + 1 + 4, "{text}");
        assert!(text.contains("122.0") && text.contains("cannot open /dev/kvm"), "{text}");
    }

    #[test]
    fn microseconds_are_rounded() {
        assert_eq!([0, 49, 50, 999, 1_249, 68_000].map(micros), ["0.0", "0.0", "0.1", "1.0", "1.2", "68.0"]);
    }
}
