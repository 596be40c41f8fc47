//! Guests made up: patterns of writes, each drawn from a seed.

use std::fmt;

use super::bits::whole;
use super::guest::{Epoch, Guest};
use crate::rng::Rng;

/// Seeds that the monitor's constants were tuned on, or that were looked at while its rules were made.
pub const TUNING_SEEDS: [std::ops::Range<u64>; 2] = [1..9, 101..109];
/// Seeds that it is judged by. No constant and no rule was chosen by looking at them. Whoever changes the monitor because of
/// one of them moves it above and takes a new one.
pub const JUDGING_SEEDS: std::ops::Range<u64> = 201..209;

/// The length of an epoch of a synthetic guest.
const EPOCH_NS: u64 = 5_000_000;
const EPOCH_SECONDS: f64 = EPOCH_NS as f64 / 1e9;
/// Epochs until it begins again: 6 s.
const EPOCHS: usize = 1200;
/// What a handoff of a synthetic guest costs besides pages and round trips.
const HANDOFF_NS: u64 = 2_000_000;

/// A way to write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// A few pages now and then.
    Idle,
    /// A large set is read all the time, and few pages of it are written.
    ReadMostly,
    /// One page after the other, over and over.
    Sequential,
    /// Pages of a working set at random.
    Uniform,
    /// Few pages often and many seldom.
    Zipf,
    /// One pattern for a while, then another.
    Phases,
    /// Long silence, then many writes at once.
    Bursts,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Idle, Self::ReadMostly, Self::Sequential, Self::Uniform, Self::Zipf, Self::Phases, Self::Bursts];
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Idle => "idle",
            Self::ReadMostly => "read-mostly",
            Self::Sequential => "sequential",
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
            Self::Phases => "phases",
            Self::Bursts => "bursts",
        })
    }
}

/// The guest of `pattern` and `seed`, with `pages` of RAM. The same every time.
#[must_use]
pub fn guest(pattern: Pattern, seed: u64, pages: u64) -> Guest {
    let mut rng = Rng::new(seed.wrapping_mul(0x1000_0001).wrapping_add(pattern as u64));
    let words = usize::try_from(pages / 64).unwrap_or(usize::MAX).max(1);
    let mut readers = Writer::reader(words, &mut rng);
    let mut epochs = match pattern {
        Pattern::Phases => phases(words, &mut rng),
        Pattern::Bursts => bursts(words, &mut rng),
        simple => {
            let mut writer = Writer::draw(simple, words, &mut rng);
            (0..EPOCHS).map(|_| writer.epoch(words, &mut rng)).collect()
        }
    };
    for epoch in &mut epochs {
        for (all, read) in epoch.touched.iter_mut().zip(readers.epoch(words, &mut rng).touched) {
            *all |= read;
        }
    }
    let zeros = whole(rng.between(0.0, 0.4) * pages as f64);
    let name = format!("{pattern} {seed}");
    Guest { handoff_ns: HANDOFF_NS, ..Guest::new(name, words as u64 * 64, zeros, epochs) }
}

fn phases(words: usize, rng: &mut Rng) -> Vec<Epoch> {
    const KINDS: [Pattern; 4] = [Pattern::Idle, Pattern::Sequential, Pattern::Uniform, Pattern::Zipf];
    let mut epochs = Vec::with_capacity(EPOCHS);
    while epochs.len() < EPOCHS {
        let kind = KINDS[usize::try_from(rng.word() % 4).unwrap_or(0)];
        let mut writer = Writer::draw(kind, words, rng);
        let length = whole(rng.log_between(0.5, 3.0) / EPOCH_SECONDS);
        for _ in 0..length {
            if epochs.len() < EPOCHS {
                epochs.push(writer.epoch(words, rng));
            }
        }
    }
    epochs
}

fn bursts(words: usize, rng: &mut Rng) -> Vec<Epoch> {
    let mut idle = Writer::draw(Pattern::Idle, words, rng);
    let mut burst = Writer::draw(Pattern::Uniform, words, rng);
    let period = whole(rng.between(0.3, 1.0) / EPOCH_SECONDS);
    let length = whole(rng.between(0.02, 0.2) / EPOCH_SECONDS);
    (0..EPOCHS as u64)
        .map(|epoch| if epoch % period >= period - length { &mut burst } else { &mut idle }.epoch(words, rng))
        .collect()
}

/// Something that writes.
enum Writer {
    /// Each word of pages with a chance of its own in an epoch; the second chance is that of being read.
    Random(Vec<(usize, f64, f64)>),
    /// This many pages an epoch, in this region of words.
    Sequential { first: usize, words: usize, at: f64, step: f64 },
}

impl Writer {
    fn draw(pattern: Pattern, words: usize, rng: &mut Rng) -> Self {
        let (first, size) = region(words, rng);
        let chance = |writes_per_second: f64| -(-writes_per_second * EPOCH_SECONDS).exp_m1();
        match pattern {
            Pattern::Idle => {
                let rate = rng.log_between(1.0, 50.0) / 64.0;
                let some = 1 + rng.word() % 8;
                let pick = |_| (usize::try_from(rng.word() % words as u64).unwrap_or(0), chance(rate), 0.0);
                Self::Random((0..some).map(pick).collect())
            }
            Pattern::ReadMostly => {
                let read = chance(rng.log_between(20.0, 400.0));
                let rate = chance(rng.log_between(1.0, 50.0));
                let share = rng.log_between(0.01, 0.08);
                let written = |rng: &mut Rng| if rng.unit() < share { rate } else { 0.0 };
                Self::Random((first..first + size).map(|word| (word, written(rng), read)).collect())
            }
            Pattern::Zipf => {
                let slope = rng.between(0.7, 1.3);
                let top = rng.log_between(20.0, 2000.0);
                let mut order: Vec<usize> = (first..first + size).collect();
                for index in (1..order.len()).rev() {
                    order.swap(index, usize::try_from(rng.word() % (index as u64 + 1)).unwrap_or(0));
                }
                let rate = |rank: usize| chance(top / ((rank + 1) as f64).powf(slope));
                Self::Random(order.into_iter().enumerate().map(|(rank, word)| (word, rate(rank), 0.0)).collect())
            }
            Pattern::Sequential => {
                let pages = size as f64 * 64.0;
                // From a sweep in ten seconds to one in a few milliseconds.
                Self::Sequential {
                    first,
                    words: size,
                    at: 0.0,
                    step: pages * EPOCH_SECONDS * rng.log_between(0.1, 200.0),
                }
            }
            Pattern::Uniform | Pattern::Phases | Pattern::Bursts => {
                let rate = chance(rng.log_between(0.05, 200.0));
                Self::Random((first..first + size).map(|word| (word, rate, 0.0)).collect())
            }
        }
    }

    /// What every guest reads besides: programs and data, here and there.
    fn reader(words: usize, rng: &mut Rng) -> Self {
        let (share, rate) = (rng.between(0.05, 0.3), rng.log_between(0.5, 20.0));
        let chance = -(-rate * EPOCH_SECONDS).exp_m1();
        Self::Random((0..words).filter(|_| rng.unit() < share).map(|word| (word, 0.0, chance)).collect())
    }

    fn epoch(&mut self, words: usize, rng: &mut Rng) -> Epoch {
        let mut written = vec![0; words];
        let mut read = Vec::new();
        match self {
            Self::Random(chances) => {
                if chances.iter().any(|(.., read)| *read > 0.0) {
                    read = vec![0; words];
                }
                for (word, writes, reads) in chances {
                    if *writes > 0.0 {
                        written[*word] |= rng.bits(*writes);
                    }
                    if *reads > 0.0 {
                        read[*word] |= rng.bits(*reads);
                    }
                }
            }
            Self::Sequential { first, words: size, at, step } => {
                let pages = *size as u64 * 64;
                let (from, to) = (whole(*at), whole(*at + *step));
                for page in from..to.min(from + pages) {
                    let page = page % pages;
                    written[*first + usize::try_from(page / 64).unwrap_or(0)] |= 1 << (page % 64);
                }
                *at = (*at + *step) % pages as f64;
            }
        }
        Epoch::new(EPOCH_NS, written, &read)
    }
}

/// A working set: first word and number of words.
fn region(words: usize, rng: &mut Rng) -> (usize, usize) {
    let size = usize::try_from(whole(words as f64 * rng.between(0.1, 0.8))).unwrap_or(1).clamp(1, words);
    let room = (words - size) as u64;
    (usize::try_from(rng.word() % (room + 1)).unwrap_or(0), size)
}

#[cfg(test)]
mod tests {
    use super::super::bits::count;
    use super::*;

    #[test]
    fn a_seed_gives_the_same_guest_every_time_and_another_seed_another() {
        for pattern in Pattern::ALL {
            let one = guest(pattern, 5, 4096);
            assert_eq!(one.epochs, guest(pattern, 5, 4096).epochs, "{pattern}");
            assert_ne!(one.epochs, guest(pattern, 6, 4096).epochs, "{pattern}");
        }
    }

    #[test]
    fn tuning_and_judging_share_no_seed() {
        assert!(!TUNING_SEEDS.into_iter().flatten().any(|seed| JUDGING_SEEDS.contains(&seed)));
    }

    #[test]
    fn patterns_are_what_they_are_called() {
        let writes =
            |guest: &Guest| guest.epochs.iter().map(|epoch| count(&epoch.written)).sum::<u64>() / EPOCHS as u64;
        let touches =
            |guest: &Guest| guest.epochs.iter().map(|epoch| count(&epoch.touched)).sum::<u64>() / EPOCHS as u64;
        for seed in 1..5 {
            assert!(writes(&guest(Pattern::Idle, seed, 4096)) < 20);
            let read_mostly = guest(Pattern::ReadMostly, seed, 4096);
            assert!(touches(&read_mostly) > 4 * writes(&read_mostly), "{seed}");
            let bursts = guest(Pattern::Bursts, seed, 4096);
            let silent = bursts.epochs.iter().filter(|epoch| count(&epoch.written) < 50).count();
            assert!(silent > EPOCHS / 3, "{silent}");
        }
    }
}
