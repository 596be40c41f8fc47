//! Numbers as people read them.

use super::figures::Unit;

/// `value` with about four significant digits and no exponent.
#[must_use]
pub fn number(value: f64) -> String {
    let magnitude = value.abs();
    let decimals = match magnitude {
        m if m >= 100.0 || m == 0.0 => 0,
        m if m >= 10.0 => 1,
        m if m >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{magnitude:.decimals$}");
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        // A thin space between groups of three: "131 072".
        if index > 0 && (whole.len() - index).is_multiple_of(3) && whole.len() > 4 {
            grouped.push('\u{202f}');
        }
        grouped.push(digit);
    }
    let sign = if value < 0.0 && text.bytes().any(|byte| (b'1'..=b'9').contains(&byte)) { "−" } else { "" };
    let point = if fraction.is_empty() { "" } else { "." };
    format!("{sign}{grouped}{point}{fraction}")
}

/// A whole number.
#[must_use]
pub fn count(value: f64) -> String {
    if value.abs() < 100.0 { format!("{value:.0}") } else { number(value) }
}

/// Nanoseconds in microseconds, with the unit.
#[must_use]
pub fn micros(ns: u64) -> String {
    format!("{} µs", number(ns_as(ns, 1e3)))
}

/// Nanoseconds in milliseconds, without the unit.
#[must_use]
pub fn millis(ns: u64) -> String {
    number(ns_as(ns, 1e6))
}

/// Bytes in the binary multiple that suits them.
#[must_use]
pub fn bytes(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes;
    let mut unit = "B";
    for larger in units {
        unit = larger;
        if value.abs() < 1024.0 {
            break;
        }
        if larger != "TiB" {
            value /= 1024.0;
        }
    }
    let shown = if unit == "B" { count(value) } else { number(value) };
    format!("{shown} {unit}")
}

/// A figure's value without its unit, and the unit to put beside or above it.
#[must_use]
pub fn figure(value: f64, unit: Unit) -> (String, &'static str) {
    match unit {
        Unit::Milliseconds => (number(value / 1e6), "ms"),
        Unit::Seconds => (number(value), "s"),
        Unit::GigabitsPerSecond => (number(value), "Gbit/s"),
        Unit::PerSecond => (number(value), "/s"),
        Unit::Bytes => (bytes(value), ""),
        Unit::Percent => (number(value), "%"),
        Unit::Count => (count(value), ""),
    }
}

/// Nanoseconds over `per`, as a float.
#[expect(clippy::cast_precision_loss, reason = "shown to four digits; exact below 52 days")]
#[must_use]
pub fn ns_as(ns: u64, per: f64) -> f64 {
    ns as f64 / per
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_about_four_digits() {
        assert_eq!(number(0.0), "0");
        assert_eq!(number(0.03456), "0.035");
        assert_eq!(number(4.5678), "4.57");
        assert_eq!(number(45.678), "45.7");
        assert_eq!(number(-0.0001), "0.000");
        assert_eq!(number(-4.5), "−4.50");
        assert_eq!(number(1234.0), "1234");
        assert_eq!(number(1_234_567.0), "1\u{202f}234\u{202f}567");
    }

    #[test]
    fn units_fit_their_values() {
        assert_eq!(figure(61.0, Unit::Count), ("61".to_owned(), ""));
        assert_eq!(bytes(55.0), "55 B");
        assert_eq!(bytes(268_435_456.0), "256 MiB");
        assert_eq!(bytes(5e15), "4547 TiB");
        assert_eq!(micros(83_400), "83.4 µs");
        assert_eq!(figure(4_512_000.0, Unit::Milliseconds), ("4.51".to_owned(), "ms"));
    }
}
