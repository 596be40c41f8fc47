//! The sweep, in spans that lanes take one by one.

use std::ops::Range;

use crate::sent::ChunkIndex;

/// How many chunks a lane takes from the sweep at a time: 4 MiB, so that lanes work on memory of their own without
/// one being left with much at the end.
pub const SPAN_CHUNKS: u64 = 16;

/// Which spans were given.
#[derive(Debug)]
pub struct Spans {
    chunks: u64,
    /// A bit a span that is left.
    left: Box<[u64]>,
    /// The span that is wanted next, if it is left; else the next one after it, or the first of all.
    at: u64,
}

impl Spans {
    /// None given; the first next.
    pub fn new(chunks: u64) -> Self {
        let spans = chunks.div_ceil(SPAN_CHUNKS);
        let word = |first: u64| match spans - first {
            left @ ..64 => (1 << left) - 1,
            _ => u64::MAX,
        };
        Self { chunks, left: (0..spans).step_by(64).map(word).collect(), at: 0 }
    }

    /// Goes on at `chunk`.
    pub fn aim(&mut self, chunk: ChunkIndex) {
        self.at = chunk.0.min(self.chunks) / SPAN_CHUNKS;
    }

    /// The next span, or `None` when all were given.
    pub fn next(&mut self) -> Option<Range<u64>> {
        let span = self.first_from(self.at).or_else(|| self.first_from(0))?;
        if let Some(word) = usize::try_from(span / 64).ok().and_then(|index| self.left.get_mut(index)) {
            *word &= !(1 << (span % 64));
        }
        self.at = span + 1;
        let start = span * SPAN_CHUNKS;
        Some(start..(start + SPAN_CHUNKS).min(self.chunks))
    }

    fn first_from(&self, span: u64) -> Option<u64> {
        let first = usize::try_from(span / 64).ok()?;
        let mut below = u64::MAX << (span % 64);
        for (index, word) in self.left.iter().enumerate().skip(first) {
            let found = word & std::mem::replace(&mut below, u64::MAX);
            if found != 0 {
                return Some(index as u64 * 64 + u64::from(found.trailing_zeros()));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_in_one_span_wherever_the_sweep_is_aimed_at() {
        let chunks = SPAN_CHUNKS * 200 + 5;
        let mut spans = Spans::new(chunks);
        let mut given = Vec::new();
        for turn in 0.. {
            if turn % 3 == 0 {
                spans.aim(ChunkIndex(turn * 7919 % (chunks + 40)));
            }
            match spans.next() {
                Some(span) => given.extend(span),
                None => break,
            }
        }
        given.sort_unstable();
        assert_eq!(given, (0..chunks).collect::<Vec<_>>());
    }

    #[test]
    fn it_goes_on_from_where_it_is_aimed_at() {
        let mut spans = Spans::new(SPAN_CHUNKS * 4);
        assert_eq!(spans.next(), Some(0..SPAN_CHUNKS));
        spans.aim(ChunkIndex(SPAN_CHUNKS * 2 + 3));
        assert_eq!(spans.next(), Some(SPAN_CHUNKS * 2..SPAN_CHUNKS * 3));
        assert_eq!(spans.next(), Some(SPAN_CHUNKS * 3..SPAN_CHUNKS * 4));
        assert_eq!(spans.next(), Some(SPAN_CHUNKS..SPAN_CHUNKS * 2));
        assert_eq!(spans.next(), None);
    }
}
