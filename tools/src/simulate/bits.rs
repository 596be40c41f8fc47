//! Sets of pages as words, and random ones that come out the same every time.

use crate::rng::{Rng, mix};

impl Rng {
    /// A word whose bits are each set with this chance, in steps of 1/65536.
    pub fn bits(&mut self, chance: f64) -> u64 {
        let bound = whole(chance.clamp(0.0, 1.0) * 65_536.0);
        if bound >= 65_536 {
            return u64::MAX;
        }
        let first = bound.trailing_zeros().min(16);
        (first..16).fold(0, |below, bit| less(below, bound >> bit & 1 == 1, self.word()))
    }
}

/// One step of comparing 64 numbers with a bound, from the lowest bit up.
const fn less(below: u64, bound_bit: bool, bits: u64) -> u64 {
    if bound_bit { below | !bits } else { below & !bits }
}

/// The bits whose instant, a fixed random one of 256 for each bit of each word, is of `from..to`.
#[must_use]
pub fn at_instants(salt: u64, word: usize, from: u64, to: u64) -> u64 {
    if from == 0 && to >= 256 {
        return u64::MAX;
    }
    let mut rng = Rng::new(mix(salt ^ (word as u64).wrapping_mul(0xd6e8_feb8_6659_fd93)));
    let (mut below_from, mut below_to) = (0, 0);
    for bit in 0..8 {
        let bits = rng.word();
        below_from = less(below_from, from >> bit & 1 == 1, bits);
        below_to = less(below_to, to >> bit & 1 == 1, bits);
    }
    if to >= 256 { !below_from } else { below_to & !below_from }
}

/// The lowest `count` bits of `word` that are set.
#[must_use]
pub const fn lowest(mut word: u64, count: u64) -> u64 {
    let all = word;
    let mut left = count;
    while left > 0 && word != 0 {
        word &= word - 1;
        left -= 1;
    }
    all & !word
}

/// Bits set.
#[must_use]
pub fn count(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// `value` without its fraction; 0 where it is negative or none.
#[must_use]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub const fn whole(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_share_out_every_page_once() {
        let parts: Vec<_> = [(0, 40), (40, 41), (41, 200), (200, 256)]
            .into_iter()
            .map(|(from, to)| at_instants(7, 3, from, to))
            .collect();
        assert_eq!(parts.iter().fold(0, |all, part| all | part), u64::MAX);
        assert_eq!(parts.iter().map(|part| part.count_ones()).sum::<u32>(), 64);
    }

    #[test]
    fn bits_have_the_chance_that_was_asked_for() {
        let mut rng = Rng::new(1);
        for chance in [0.0, 0.001, 0.3, 0.5, 1.0] {
            let set: u32 = (0..4000).map(|_| rng.bits(chance).count_ones()).sum();
            let found = f64::from(set) / 256_000.0;
            assert!((found - chance).abs() < 0.005, "{chance}: {found}");
        }
    }

    #[test]
    fn the_lowest_bits_are_taken() {
        assert_eq!(lowest(0b1011_0100, 2), 0b0001_0100);
        assert_eq!(lowest(0b1, 9), 0b1);
        assert_eq!(lowest(u64::MAX, 0), 0);
    }
}
