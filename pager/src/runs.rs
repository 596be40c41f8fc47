//! The runs of set bits in a chunk's mask.

/// How many pages a mask has bits for ([`switchover_wire::frame::bulk::CHUNK_PAGES`]), as the length of an array.
pub const CHUNK_LEN: usize = u64::BITS as usize;

/// The runs of ones in `mask`, lowest first: the first bit of each, and how many.
pub fn runs(mask: u64) -> impl Iterator<Item = (u32, u32)> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let first = rest.trailing_zeros();
        let count = (rest >> first).trailing_ones();
        // A run that reaches the top bit ends the walk; shifting by 64 would be undefined.
        rest = if first + count == u64::BITS { 0 } else { rest & (u64::MAX << (first + count)) };
        Some((first, count))
    })
}

/// The ones in `mask`, lowest first.
pub fn bits(mask: u64) -> impl Iterator<Item = u32> {
    runs(mask).flat_map(|(first, count)| first..first + count)
}

/// The lowest ones of `mask`, `most` of them at most.
pub fn lowest(mask: u64, most: u32) -> u64 {
    if mask.count_ones() <= most {
        return mask;
    }
    let rest = (0..most).fold(mask, |rest, _| rest & (rest - 1));
    mask & !rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_bits_are_as_many_as_asked_for() {
        let cases = [(0, 1, 0), (0b1101_1000, 2, 0b1_1000), (0b1101, 3, 0b1101), (u64::MAX, 64, u64::MAX), (6, 0, 0)];
        for (mask, most, expected) in cases {
            assert_eq!(lowest(mask, most), expected, "{most} of {mask:#b}");
        }
        assert_eq!(lowest(u64::MAX, 15), (1 << 15) - 1);
    }

    #[test]
    fn runs_cover_exactly_the_set_bits() {
        let masks = [0, 1, u64::MAX, 0x8000_0000_0000_0000, 0b1101_1000, 0x5555_5555_5555_5555, u64::MAX << 3];
        for mask in masks {
            let rebuilt = runs(mask).fold(0, |all, (first, count)| {
                all | (if count == 64 { u64::MAX } else { ((1_u64 << count) - 1) << first })
            });
            assert_eq!(rebuilt, mask, "{mask:#x}");
        }
        assert_eq!(runs(0b1101_1000).collect::<Vec<_>>(), vec![(3, 2), (6, 2)]);
    }
}
