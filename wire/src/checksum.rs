//! Checksums of what crosses a lane: a bit that is flipped on the way is noticed before it counts.
//!
//! CRC-32 (IEEE 802.3), which the processor's carry-less multiplication computes faster than a page is copied. It finds every
//! change of one or two bits in a frame of any length, and every one within 32 bits in a row; of all others, all but one in 2³².
//! It is no protection against somebody who wants a change not to be found: that is what TLS is for.

use std::fmt;

use crate::frame::FrameError;

/// The checksum of a frame's payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checksum(u32);

impl Checksum {
    /// Bytes on the wire.
    pub const LEN: usize = 4;

    /// That of nothing: what a frame without a payload says, and one whose lane carries no checksums.
    pub const NONE: Self = Self(0);

    /// Of these parts, one behind the other.
    #[must_use]
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = crc32fast::Hasher::new();
        parts.into_iter().for_each(|part| hasher.update(part));
        Self(hasher.finalize())
    }

    /// Whether `parts`, one behind the other, are what the other side computed this of.
    ///
    /// # Errors
    /// When they are not: something was damaged on the way, of a frame of this name.
    pub fn check<'a>(self, frame: &'static str, parts: impl IntoIterator<Item = &'a [u8]>) -> Result<(), FrameError> {
        let actual = Self::of(parts);
        if actual == self {
            return Ok(());
        }
        Err(FrameError::new(frame, "the CRC-32 of the payload", &actual, format!("{self}, which its header says,")))
    }

    /// As bytes.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; Self::LEN] {
        self.0.to_le_bytes()
    }

    /// From bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(u32::from_le_bytes(bytes))
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_has_the_checksum_of_nothing() {
        assert_eq!(Checksum::of([]), Checksum::NONE);
        assert_eq!(Checksum::of([&b""[..]]), Checksum::NONE);
        // The check value of CRC-32/ISO-HDLC in every catalogue.
        assert_eq!(Checksum::of([&b"1234"[..], b"56789"]), Checksum(0xCBF4_3926));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let mut bytes = [0x5A; 512];
        let sum = Checksum::of([&bytes[..]]);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = sum.check("chunk", [&bytes[..100], &bytes[100..]]).unwrap_err();
            assert!(error.to_string().contains("CRC-32"), "{error}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        sum.check("chunk", [&bytes[..]]).unwrap();
    }
}
