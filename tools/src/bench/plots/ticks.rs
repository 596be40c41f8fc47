//! Where an axis has its marks.

/// A mark: where, and what it says.
#[derive(Clone, PartialEq, Debug)]
pub struct Tick {
    /// The value marked.
    pub at: f64,
    /// Its label.
    pub label: String,
}

/// About `count` marks at round values (1, 2 or 5 times a power of ten) within `from..=to`.
#[must_use]
pub fn round(from: f64, to: f64, count: u32) -> Vec<Tick> {
    let span = to - from;
    if !(span.is_finite() && span > 0.0) {
        return Vec::new();
    }
    let rough = span / f64::from(count.max(1));
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let decimals = decimals_of(step);
    let mut ticks = Vec::new();
    let mut index = (from / step - 1e-9).ceil();
    while index * step <= to + step * 1e-9 {
        // Never "-0".
        let at = index * step + 0.0;
        ticks.push(Tick { at, label: format!("{at:.decimals$}").replace('-', "−") });
        index += 1.0;
    }
    ticks
}

/// Marks at the powers of ten within `from..=to`, which are exponents, labelled by `label` with the value.
#[must_use]
pub fn decades(from: f64, to: f64, label: impl Fn(f64) -> String) -> Vec<Tick> {
    let mut ticks = Vec::new();
    let mut at = (from - 1e-9).ceil();
    while at <= to + 1e-9 {
        ticks.push(Tick { at, label: label(10_f64.powf(at)) });
        at += 1.0;
    }
    ticks
}

/// The least round value (1, 1.5, 2, 3, 4, 5, 6 or 8 times a power of ten) that is not below `value`.
#[must_use]
pub fn ceiling(value: f64) -> f64 {
    if !(value.is_finite() && value > 0.0) {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    let steps = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0];
    steps.map(|step| step * power).into_iter().find(|step| *step >= value * (1.0 - 1e-9)).unwrap_or(value)
}

fn decimals_of(step: f64) -> usize {
    (0..6)
        .find(|decimals| (step * 10_f64.powi(*decimals)).fract().abs() < 1e-6)
        .map_or(6, |decimals| usize::try_from(decimals).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(ticks: &[Tick]) -> Vec<&str> {
        ticks.iter().map(|tick| tick.label.as_str()).collect()
    }

    #[test]
    fn marks_are_round_and_inside() {
        assert_eq!(labels(&round(-0.3, 1.1, 5)), ["0.0", "0.5", "1.0"]);
        assert_eq!(labels(&round(-400.0, 400.0, 4)), ["−400", "−200", "0", "200", "400"]);
        assert_eq!(labels(&round(0.0, 0.003, 3)), ["0.000", "0.001", "0.002", "0.003"]);
        assert!(round(1.0, 1.0, 4).is_empty() && round(f64::NAN, 1.0, 4).is_empty());
    }

    #[test]
    fn decades_are_labelled_with_their_values() {
        assert_eq!(labels(&decades(0.5, 3.0, |v| format!("{v}"))), ["10", "100", "1000"]);
    }

    #[test]
    fn a_ceiling_is_round_and_not_below() {
        assert_eq!(ceiling(7.3), 8.0);
        assert_eq!(ceiling(1.0), 1.0);
        assert_eq!(ceiling(0.0), 1.0);
        assert!((ceiling(0.0123) - 0.015).abs() < 1e-12);
    }
}
