//! Rates on the command line: `100M`, `1G`, `10Gbit`.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Bytes a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate(pub u64);

/// A text that is no rate.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("`{text}` is no rate: {reason}; write for example 500M (MiB a second), 10Gbit, or 0 for no limit")]
pub struct RateError {
    text: String,
    reason: &'static str,
}

/// Units, in bits: bytes in powers of two, as sizes of memory are; bits in powers of ten, as links are sold.
const UNITS: [(&str, u128); 6] =
    [("k", 8 << 10), ("m", 8 << 20), ("g", 8 << 30), ("kbit", 1_000), ("mbit", 1_000_000), ("gbit", 1_000_000_000)];

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        let wrong = |reason| RateError { text: text.to_owned(), reason };
        let lower = text.trim().to_ascii_lowercase();
        if lower == "0" {
            return Ok(Self(0));
        }
        let short = lower.strip_suffix("/s").unwrap_or(&lower);
        let digits = short.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(wrong("it is not a whole number with a unit behind it"));
        }
        let unit = short.strip_prefix(digits).unwrap_or_default();
        let plain = unit.strip_suffix("ib").unwrap_or(unit);
        let found = UNITS.iter().find(|(name, _)| *name == plain);
        let (_, bits) = found.ok_or_else(|| wrong("its unit is none of K, M, G, Kbit, Mbit and Gbit"))?;
        let number: u64 = digits.parse().map_err(|_| wrong("it is too large"))?;
        let bytes = u128::from(number) * bits / 8;
        u64::try_from(bytes).map(Self).map_err(|_| wrong("it is too large"))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes/s", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_in_bytes_and_in_bits() {
        for (text, bytes) in [
            ("0", 0),
            ("100M", 100 << 20),
            ("100MiB/s", 100 << 20),
            ("64k", 64 << 10),
            ("2g", 2 << 30),
            ("10Gbit", 1_250_000_000),
            ("100mbit/s", 12_500_000),
            ("0G", 0),
        ] {
            assert_eq!(text.parse(), Ok(Rate(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_an_example() {
        for (text, reason) in [
            ("", "not a whole number"),
            ("fast", "not a whole number"),
            ("-1M", "not a whole number"),
            ("1.5G", "not a whole number"),
            ("512", "none of K, M, G"),
            ("512X", "none of K, M, G"),
            ("99999999999999999999G", "too large"),
            ("99999999999999999G", "too large"),
        ] {
            let error = text.parse::<Rate>().unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("write for example 500M"), "{text}: {error}");
        }
    }
}
