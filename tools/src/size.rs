//! Sizes of memory on the command line: `512M`, `2G`.

use std::fmt;
use std::str::FromStr;

use switchover_wire::types::PageCount;
use thiserror::Error;

/// An amount of memory, a whole number of pages and not none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Size(pub PageCount);

/// A text that is no amount of memory.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("`{text}` is no size: {reason}; write for example 512M or 2G")]
pub struct SizeError {
    text: String,
    reason: &'static str,
}

/// Unit letters and the power of two that each stands for.
const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let wrong = |reason| SizeError { text: text.to_owned(), reason };
        let upper = text.trim().to_ascii_uppercase();
        let short = upper.strip_suffix("IB").or_else(|| upper.strip_suffix('B')).unwrap_or(&upper);
        let digits = short.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(wrong("it is not a whole number with a unit behind it"));
        }
        let mut letters = short.strip_prefix(digits).unwrap_or_default().chars();
        let shift = match (letters.next(), letters.next()) {
            (None, _) => return Err(wrong("it has no unit")),
            (Some(letter), None) => UNITS.iter().find(|(unit, _)| *unit == letter).map(|(_, shift)| *shift),
            _ => None,
        };
        let shift = shift.ok_or_else(|| wrong("its unit is none of K, M, G and T"))?;
        let number: u64 = digits.parse().map_err(|_| wrong("it is too large"))?;
        let bytes = number.checked_mul(1 << shift).ok_or_else(|| wrong("it is too large"))?;
        if bytes == 0 {
            return Err(wrong("a machine needs some memory"));
        }
        PageCount::from_bytes(bytes).map(Self).ok_or_else(|| wrong("it is not a multiple of 4K, the size of a page"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.bytes();
        let (unit, shift) =
            UNITS.into_iter().rev().find(|(_, shift)| bytes.is_multiple_of(1 << shift)).unwrap_or(('K', 10));
        write!(f, "{}{unit}", bytes >> shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_the_spellings_that_people_use() {
        for (text, bytes, shown) in [
            ("512M", 512 << 20, "512M"),
            ("512MiB", 512 << 20, "512M"),
            ("512mb", 512 << 20, "512M"),
            ("2g", 2 << 30, "2G"),
            ("2048M", 2 << 30, "2G"),
            ("8K", 8192, "8K"),
            ("1T", 1 << 40, "1T"),
        ] {
            let size: Size = text.parse().unwrap();
            assert_eq!(size.0.bytes(), bytes, "{text}");
            assert_eq!(size.to_string(), shown);
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_an_example() {
        for (text, reason) in [
            ("", "not a whole number"),
            ("M", "not a whole number"),
            ("-1M", "not a whole number"),
            ("1.5G", "not a whole number"),
            ("512", "no unit"),
            ("512X", "none of K, M, G and T"),
            ("512MM", "none of K, M, G and T"),
            ("0M", "needs some memory"),
            ("5K", "multiple of 4K"),
            ("99999999999999999999G", "too large"),
            ("99999999T", "too large"),
        ] {
            let error = text.parse::<Size>().unwrap_err().to_string();
            assert!(error.contains(reason) && error.ends_with("write for example 512M or 2G"), "{text}: {error}");
        }
    }
}
