//! A guest that is played: what it writes and reads, in the order of time, again and again.

use switchover_hybrid::monitor::costs::RAW_PAGE;
use switchover_hybrid::trace::{Trace, TraceError};

use super::bits::{at_instants, whole};
use crate::rng::Rng;

/// The length that a recorded round is cut into, if that is not too many pieces.
const PIECE_NS: u64 = 5_000_000;
/// Pieces of one recorded round, at most: each holds a bitmap.
const PIECES: u64 = 64;

/// A stretch of the guest's time. Each of its pages is touched once, at an instant of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Epoch {
    /// Its length, not 0.
    pub ns: u64,
    /// The pages written.
    pub written: Vec<u64>,
    /// The pages written or read.
    pub touched: Vec<u64>,
}

/// A guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// For tables.
    pub name: String,
    /// Pages of RAM.
    pub pages: u64,
    /// Those that are zero, and stay it.
    pub zero: Vec<u64>,
    /// Wire bytes of the others.
    pub bytes_per_page: f64,
    /// What a handoff costs besides pages and round trips.
    pub handoff_ns: u64,
    /// What it does. Not empty.
    pub epochs: Vec<Epoch>,
}

/// An instant of the guest's own time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Position {
    epoch: usize,
    lap: u64,
    ns: u64,
}

/// A stretch of time within one epoch.
#[derive(Clone, Copy, Debug)]
pub struct Stretch<'a> {
    epoch: &'a Epoch,
    salt: u64,
    from: u64,
    to: u64,
}

impl Stretch<'_> {
    /// Pages of a word that are written in it.
    #[must_use]
    pub fn written(&self, word: usize) -> u64 {
        self.of(self.epoch.written[word], word)
    }

    /// Pages of a word that are written or read in it.
    #[must_use]
    pub fn touched(&self, word: usize) -> u64 {
        self.of(self.epoch.touched[word], word)
    }

    fn of(&self, pages: u64, word: usize) -> u64 {
        if pages == 0 || self.from == self.to { 0 } else { pages & at_instants(self.salt, word, self.from, self.to) }
    }
}

impl Guest {
    /// A guest of these epochs; `zero_pages` of its pages, if it has as many that it never touches, are zero.
    ///
    /// `epochs` must not be empty, and none of them without length.
    #[must_use]
    pub fn new(name: String, pages: u64, zero_pages: u64, epochs: Vec<Epoch>) -> Self {
        let zero = spread_zeros(pages, zero_pages, &epochs);
        Self { name, pages, zero, bytes_per_page: RAW_PAGE, handoff_ns: 0, epochs }
    }

    /// The guest of a trace.
    ///
    /// # Errors
    /// When a bitmap of it cannot be read.
    pub fn from_trace(trace: &Trace) -> Result<Self, TraceError> {
        let mut epochs = Vec::new();
        let mut rng = Rng::new(trace.ram_pages);
        for epoch in &trace.epochs {
            let (written, read) = (trace.written(epoch)?, trace.read(epoch)?);
            let Some(rate) = epoch.writes_per_second else {
                epochs.push(Epoch::new(epoch.duration_ns, written, &read));
                continue;
            };
            let pieces = (epoch.duration_ns / PIECE_NS).clamp(1, PIECES);
            let ns = (epoch.duration_ns / pieces).max(1);
            let chance = -(-rate * ns as f64 / 1e9).exp_m1();
            for _ in 0..pieces {
                let of_piece =
                    written.iter().map(|word| if *word == 0 { 0 } else { word & rng.bits(chance) }).collect();
                epochs.push(Epoch::new(ns, of_piece, &read));
            }
        }
        Ok(Self {
            bytes_per_page: trace.bytes_per_data_page,
            handoff_ns: trace.handoff_ns,
            ..Self::new(trace.name.clone(), trace.ram_pages, trace.zero_pages, epochs)
        })
    }

    /// Words of a bitmap.
    #[must_use]
    pub fn words(&self) -> usize {
        self.zero.len()
    }

    /// Every page.
    #[must_use]
    pub fn all(&self) -> Vec<u64> {
        let mut words = vec![u64::MAX; self.words()];
        if let (Some(last), 1..) = (words.last_mut(), self.pages % 64) {
            *last = (1 << (self.pages % 64)) - 1;
        }
        words
    }

    /// The stretch from `at` on, of `ns` or to the epoch's end; and how long it is.
    #[must_use]
    pub fn stretch(&self, at: Position, ns: u64) -> (Stretch<'_>, u64) {
        let epoch = &self.epochs[at.epoch];
        let length = ns.min(epoch.ns - at.ns);
        let instant = |ns: u64| whole(ns as f64 * 256.0 / epoch.ns as f64);
        let salt = (at.epoch as u64) << 20 ^ at.lap;
        (Stretch { epoch, salt, from: instant(at.ns), to: instant(at.ns + length) }, length)
    }

    /// `at`, and `ns` later; these must not go past the epoch's end.
    #[must_use]
    pub fn after(&self, at: Position, ns: u64) -> Position {
        let ns = at.ns + ns;
        if ns < self.epochs[at.epoch].ns {
            return Position { ns, ..at };
        }
        if at.epoch + 1 < self.epochs.len() {
            Position { epoch: at.epoch + 1, lap: at.lap, ns: 0 }
        } else {
            Position { epoch: 0, lap: at.lap + 1, ns: 0 }
        }
    }
}

impl Epoch {
    /// An epoch in which `written` is written and `read`, where that is known, is read.
    #[must_use]
    pub fn new(ns: u64, written: Vec<u64>, read: &[u64]) -> Self {
        let touched =
            written.iter().enumerate().map(|(word, pages)| pages | read.get(word).copied().unwrap_or(0)).collect();
        Self { ns, written, touched }
    }
}

/// `wanted` pages among those never touched, spread evenly.
fn spread_zeros(pages: u64, wanted: u64, epochs: &[Epoch]) -> Vec<u64> {
    let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
    let mut touched = vec![0_u64; words];
    for epoch in epochs {
        for (all, word) in touched.iter_mut().zip(&epoch.touched) {
            *all |= word;
        }
    }
    let free: Vec<u64> = (0..pages).filter(|page| touched[index(*page)] >> (page % 64) & 1 == 0).collect();
    let mut zero = vec![0; words];
    let mut owed = 0;
    for page in &free {
        owed += wanted;
        if owed >= free.len() as u64 {
            owed -= free.len() as u64;
            zero[index(*page)] |= 1 << (page % 64);
        }
    }
    zero
}

fn index(page: u64) -> usize {
    usize::try_from(page / 64).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::bits::count;
    use super::*;

    #[test]
    fn an_epoch_touches_each_page_once_however_it_is_cut() {
        let guest = Guest::new("g".into(), 128, 0, vec![Epoch::new(1000, vec![0b1111, u64::MAX], &[])]);
        let mut at = Position::default();
        let (mut seen, mut writes) = (vec![0; 2], 0);
        for step in [1, 300, 299, 400] {
            let (stretch, length) = guest.stretch(at, step);
            assert_eq!(length, step);
            for (word, all) in seen.iter_mut().enumerate() {
                writes += u64::from(stretch.written(word).count_ones());
                *all |= stretch.written(word);
            }
            at = guest.after(at, length);
        }
        assert_eq!((seen, writes), (vec![0b1111, u64::MAX], 68));
        assert_eq!(at, Position { epoch: 0, lap: 1, ns: 0 }, "it begins again");
    }

    #[test]
    fn zero_pages_are_never_touched_ones() {
        let epochs = vec![Epoch::new(1, vec![u64::MAX, 0], &[0, 0xff])];
        let guest = Guest::new("g".into(), 100, 20, epochs.clone());
        assert_eq!(count(&guest.zero), 20);
        assert_eq!((guest.zero[0], guest.zero[1] & 0xff), (0, 0));
        let all = Guest::new("g".into(), 100, 90, epochs);
        assert_eq!(count(&all.zero), 28, "no more than there are");
        assert_eq!(count(&all.all()), 100);
    }

    #[test]
    fn a_recorded_round_is_cut_into_pieces_that_write_as_often() {
        use switchover_hybrid::trace;
        let mut recorded = Trace::new("t", 640);
        recorded.epochs.push(trace::Epoch::new(100_000_000, &[u64::MAX; 10], &[], Some(20.0)));
        let guest = Guest::from_trace(&recorded).unwrap();
        assert_eq!(guest.epochs.len(), 20);
        assert_eq!(guest.epochs.iter().map(|epoch| epoch.ns).sum::<u64>(), 100_000_000);
        let writes: u64 = guest.epochs.iter().map(|epoch| count(&epoch.written)).sum();
        assert!((1100..1350).contains(&writes), "20 a second for 0.1 s are 2 a page, some at once: {writes}");
    }
}
