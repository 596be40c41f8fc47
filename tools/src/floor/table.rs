//! The floor as a table for a terminal.

use std::fmt::Write as _;

use super::loaded_report::{LoadedReport, StreamRate};
use super::report::{FloorReport, FloorSum, Measured};

/// Width of the first column.
const NAME: usize = 46;

/// `report` as text.
#[must_use]
pub fn text(report: &FloorReport) -> String {
    let mut text = heading("Round trips, µs", "");
    for (name, way, measured) in report.parts() {
        row(&mut text, &format!("{name}, {way}"), measured, None);
    }
    if let Some(remote) = &report.remote {
        row(&mut text, "fault + 4 KiB over TCP in one, sleeping", &remote.sleeping, None);
        row(&mut text, "fault + 4 KiB over TCP in one, spinning", &remote.spinning, None);
    }
    text.push('\n');
    sums(&mut text, "F", &report.sums);
    if let Some(loaded) = &report.loaded {
        loaded_text(&mut text, loaded);
    }
    text
}

fn loaded_text(text: &mut String, loaded: &LoadedReport) {
    let limit = loaded.stream_limit_bit_s.map(|bits| format!(" of {} Gbit/s", gigabits(bits))).unwrap_or_default();
    let vcpu = if loaded.vcpu == "guest" { "a busy vCPU" } else { "a busy thread (no KVM)" };
    let _ = writeln!(
        text,
        "\nBeside a TCP stream{limit} of 64-page frames and {vcpu}; it works {} µs between two faults\n",
        micros(loaded.work_ns)
    );
    *text += &heading("Round trips, µs", "   Gbit/s beside");
    for (name, way, part) in loaded.parts() {
        row(text, &format!("{name}, {way}"), &part.round, part.stream_bit_s);
    }
    text.push('\n');
    sums(text, "loaded F", &loaded.sums);
    text.push('\n');
    for StreamRate { connections, beside, bit_s } in &loaded.streams {
        let plural = if *connections == 1 { "" } else { "s" };
        let beside = match beside.as_str() {
            "nothing" => "alone",
            "guest" => "beside a busy vCPU",
            _ => "beside a busy thread",
        };
        let name = format!("stream, {connections} connection{plural}, {beside}");
        let _ = writeln!(text, "{name:<NAME$} {:>8} Gbit/s", gigabits(*bit_s));
    }
}

fn heading(name: &str, last: &str) -> String {
    format!("{name:<NAME$} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9}{last}\n", "count", "p50", "p90", "p99", "p99.9", "max")
}

fn row(text: &mut String, name: &str, measured: &Measured, stream_bit_s: Option<u64>) {
    let _ = write!(text, "{name:<NAME$} ");
    match measured {
        Measured::Round(percentiles) => {
            let _ = write!(text, "{:>8}", percentiles.count);
            for (_, ns) in percentiles.named() {
                let _ = write!(text, " {:>9}", micros(ns));
            }
            if let Some(bits) = stream_bit_s {
                let _ = write!(text, " {:>15}", gigabits(bits));
            }
            text.push('\n');
        }
        Measured::Missing { unavailable } => {
            let _ = writeln!(text, "{unavailable}");
        }
    }
}

fn sums(text: &mut String, of: &str, sums: &[FloorSum]) {
    for sum in sums {
        let name = format!("{of}: {} fault + 4 KiB {}, {}", sum.fault, sum.link, sum.way);
        let [p50, p90, p99, p99_9] = [sum.p50_ns, sum.p90_ns, sum.p99_ns, sum.p99_9_ns].map(micros);
        let _ = writeln!(text, "{name:<NAME$} {:>8} {p50:>9} {p90:>9} {p99:>9} {p99_9:>9}", "");
    }
}

/// Bits a second as gigabits a second with one decimal.
fn gigabits(bits: u64) -> String {
    let tenths = bits.saturating_add(50_000_000) / 100_000_000;
    format!("{}.{}", tenths / 10, tenths % 10)
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
        let loaded = 3 + 1 + 6 + 1 + 2 + 1 + 2;
        assert_eq!(text.lines().count(), 1 + 8 + 2 + 1 + 4 + loaded, "{text}");
        assert!(text.contains("8900.0") && text.contains("beside a busy vCPU"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 130), "{text}");
        assert!(text.contains("122.0") && text.contains("cannot open /dev/kvm"), "{text}");
    }

    #[test]
    fn microseconds_are_rounded() {
        assert_eq!([0, 49, 50, 999, 1_249, 68_000].map(micros), ["0.0", "0.0", "0.1", "1.0", "1.2", "68.0"]);
    }
}
