//! Bandwidths and times on the command line: `1G`, `50us`.

use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

/// A bandwidth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bandwidth {
    /// Not 0.
    pub bits_per_second: u64,
}

/// A length of time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Time(pub Duration);

/// Seeds: one, or the numbers from one to another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seeds(pub std::ops::RangeInclusive<u64>);

/// A text that is no such thing.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("`{text}` is no {thing}: write for example {example}")]
pub struct UnitError {
    text: String,
    thing: &'static str,
    example: &'static str,
}

/// Seeds at once, at most.
const MOST_SEEDS: u64 = 10_000;

/// The number in front of one of `units`, times what the unit stands for.
fn scaled(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let number = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let (_, factor) = units.iter().find(|(unit, _)| unit.eq_ignore_ascii_case(&text[number.len()..]))?;
    let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let value = plain.then(|| number.parse::<f64>().ok())?? * factor;
    (value.is_finite() && value <= 1e18).then_some(value)
}

impl FromStr for Bandwidth {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        scaled(text, &[("K", 1e3), ("M", 1e6), ("G", 1e9)])
            .map(super::bits::whole)
            // Less than a byte a second carries nothing.
            .filter(|bits| *bits >= 8)
            .map(|bits_per_second| Self { bits_per_second })
            .ok_or_else(|| UnitError {
                text: text.to_owned(),
                thing: "bandwidth in bits a second",
                example: "100M or 1G",
            })
    }
}

impl FromStr for Time {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        scaled(text, &[("ns", 1.0), ("us", 1e3), ("ms", 1e6), ("s", 1e9)])
            .map(|nanoseconds| Self(Duration::from_nanos(super::bits::whole(nanoseconds))))
            .filter(|time| time.0 <= Duration::from_secs(86_400))
            .ok_or_else(|| UnitError {
                text: text.to_owned(),
                thing: "length of time up to a day",
                example: "50us, 5ms or 1.5s",
            })
    }
}

impl FromStr for Seeds {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let seeds = first.parse().ok().zip(last.parse().ok()).map(|(first, last)| first..=last);
        seeds.filter(|seeds| !seeds.is_empty() && seeds.end() - seeds.start() < MOST_SEEDS).map(Self).ok_or_else(|| {
            UnitError { text: text.to_owned(), thing: "seed or range of at most 10000 seeds", example: "7 or 1-8" }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read() {
        for (text, bits) in [("100M", 100_000_000), ("1g", 1_000_000_000), ("2.5G", 2_500_000_000), ("64K", 64_000)] {
            assert_eq!(text.parse(), Ok(Bandwidth { bits_per_second: bits }), "{text}");
        }
        for (text, nanoseconds) in [("50us", 50_000), ("5ms", 5_000_000), ("1.5s", 1_500_000_000), ("0ms", 0)] {
            assert_eq!(text.parse(), Ok(Time(Duration::from_nanos(nanoseconds))), "{text}");
        }
        assert_eq!("7".parse(), Ok(Seeds(7..=7)));
        assert_eq!("1-8".parse(), Ok(Seeds(1..=8)));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_an_example() {
        for text in ["", "M", "0M", "-1M", "100", "1e3M", "1X", "1.2.3M", "9999999999999999999G", "infM"] {
            assert!(text.parse::<Bandwidth>().unwrap_err().to_string().ends_with("for example 100M or 1G"), "{text}");
        }
        for text in ["", "ms", "5", "-5ms", "1h", "90000s"] {
            assert!(text.parse::<Time>().is_err(), "{text}");
        }
        for text in ["", "a", "5-3", "1-", "0-10000"] {
            assert!(text.parse::<Seeds>().is_err(), "{text}");
        }
    }
}
