//! How much the link between the two sides may carry.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use thiserror::Error;

/// A bound on what crosses the link, in bit/s; or none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Bandwidth(Option<NonZeroU64>);

/// A text that is no bandwidth.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("`{0}` is no bandwidth; write bits a second with a unit, for example 100M, 1G or 2.5G, or `unlimited`")]
pub struct BandwidthError(String);

/// Unit letters, as networks count: powers of ten.
const UNITS: [(char, f64); 3] = [('K', 1e3), ('M', 1e6), ('G', 1e9)];
/// Below this a page takes seconds, and a bench for ever.
const LEAST: f64 = 1e6;
/// Above this nothing is bounded any more.
const MOST: f64 = 1e13;

impl Bandwidth {
    /// No bound.
    pub const UNLIMITED: Self = Self(None);

    /// In bit/s; `None` where there is no bound.
    #[must_use]
    pub fn bits_per_second(self) -> Option<u64> {
        self.0.map(NonZeroU64::get)
    }

    /// In bytes a second, as QMP's parameters take it: 0 where there is no bound.
    #[must_use]
    pub fn for_qmp(self) -> u64 {
        self.0.map_or(0, |bits| bits.get() / 8)
    }
}

impl From<Option<u64>> for Bandwidth {
    /// Bits a second; 0 is no bound.
    fn from(bits: Option<u64>) -> Self {
        Self(bits.and_then(NonZeroU64::new))
    }
}

impl FromStr for Bandwidth {
    type Err = BandwidthError;

    fn from_str(text: &str) -> Result<Self, BandwidthError> {
        let wrong = || BandwidthError(text.to_owned());
        let text = text.trim();
        if text.eq_ignore_ascii_case("unlimited") {
            return Ok(Self::UNLIMITED);
        }
        let upper = text.to_ascii_uppercase();
        let (unit, scale) = UNITS.into_iter().find(|(unit, _)| upper.ends_with(*unit)).ok_or_else(wrong)?;
        let digits = upper.strip_suffix(unit).unwrap_or_default();
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            return Err(wrong());
        }
        let bits = digits.parse::<f64>().map_err(|_| wrong())? * scale;
        if !(LEAST..=MOST).contains(&bits) {
            return Err(wrong());
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "just bounded")]
        let bits = bits.round() as u64;
        Ok(Self(NonZeroU64::new(bits)))
    }
}

impl fmt::Display for Bandwidth {
    /// As it is written on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(bits) = self.bits_per_second() else { return f.write_str("unlimited") };
        #[expect(clippy::cast_precision_loss, reason = "at most 10^13")]
        let bits = bits as f64;
        let (unit, scale) = UNITS.into_iter().rev().find(|(_, scale)| bits >= *scale).unwrap_or(('K', 1e3));
        write!(f, "{}{unit}", bits / scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_a_second_are_read_and_written_back() {
        for (text, bits) in
            [("100M", 100_000_000), ("1G", 1_000_000_000), ("2.5G", 2_500_000_000), ("1500K", 1_500_000)]
        {
            let read: Bandwidth = text.parse().unwrap();
            assert_eq!(read.bits_per_second(), Some(bits), "{text}");
            assert_eq!(read.to_string().parse(), Ok(read));
        }
        assert_eq!("1g".parse::<Bandwidth>().unwrap().to_string(), "1G");
        assert_eq!("Unlimited".parse(), Ok(Bandwidth::UNLIMITED));
        assert_eq!(Bandwidth::UNLIMITED.to_string(), "unlimited");
    }

    #[test]
    fn qmp_takes_bytes_and_0_for_no_bound() {
        assert_eq!("1G".parse::<Bandwidth>().unwrap().for_qmp(), 125_000_000);
        assert_eq!(Bandwidth::UNLIMITED.for_qmp(), 0);
    }

    #[test]
    fn what_is_no_bandwidth_is_refused() {
        for text in ["", "1", "G", "-1G", "1e3G", "nanG", "0G", "1K", "99999999G", "1GB", "1.2.3M"] {
            assert!(text.parse::<Bandwidth>().is_err(), "{text}");
        }
    }
}
