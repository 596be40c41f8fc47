//! Random numbers and permutations, cheap enough for every visit.

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Scrambles a word (the finaliser of splitmix64).
#[inline]
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A splitmix64 generator.
pub struct Rng(u64);

impl Rng {
    /// The generator of a seed.
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// The next word.
    #[inline]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }
}

/// Maps a random word to a number below `n`, by its upper bits.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the result is below n, which is a usize")]
pub fn below(random: u64, n: usize) -> usize {
    ((u128::from(random) * n as u128) >> 64) as usize
}

/// Whether a random word falls into `percent` of all words. Uses bits that [`below`] hardly depends on.
#[inline]
pub fn percent(random: u64, percent: u64) -> bool {
    ((random & 0xffff) * 100) >> 16 < percent
}

/// A permutation of the numbers below n that keeps no neighbours together: invertible steps on the next power of two,
/// repeated while they lead out of the range.
pub struct Shuffle {
    n: usize,
    mask: usize,
    shift: u32,
    add: usize,
}

impl Shuffle {
    /// The permutation of the numbers below `n` (at least 1) that `seed` selects.
    #[expect(clippy::cast_possible_truncation, reason = "64-bit guests only")]
    pub fn new(n: usize, seed: u64) -> Self {
        let bits = usize::BITS - (n - 1).leading_zeros();
        let mask = (1_usize << bits) - 1;
        Self { n, mask, shift: bits.div_ceil(2).max(1), add: mix(seed) as usize & mask }
    }

    /// Where `i`, below n, goes.
    #[inline]
    pub fn apply(&self, i: usize) -> usize {
        let mut x = i;
        loop {
            for factor in [0x9e37_79b1, 0x85eb_ca6b] {
                x = x.wrapping_add(self.add).wrapping_mul(factor) & self.mask;
                x ^= x >> self.shift;
            }
            if x < self.n {
                return x;
            }
        }
    }
}
