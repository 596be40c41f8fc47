//! Guests made up: ways of going through memory, each drawn from a seed.

use std::fmt;

use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::heat::Heat;
use switchover_wire::types::PageCount;

use super::super::bits::whole;
use super::guest::{Touch, Toucher, index};
use crate::rng::Rng;

/// Seeds that the policies' constants were tuned on.
pub const TUNING_SEEDS: std::ops::Range<u64> = 1..5;
/// Seeds that they are judged by. None was looked at while a constant was chosen.
pub const JUDGING_SEEDS: std::ops::Range<u64> = 201..205;

/// Visits of a made-up guest, for each page of its working set.
const VISITS_A_PAGE: u64 = 12;
/// Rounds before the handoff of a guest that was pre-copied.
const ROUNDS: usize = 6;

/// A way of going through memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// Pages chosen uniformly.
    Random,
    /// Nine in ten visits to a tenth of the pages, which lie here and there.
    HotSet,
    /// The same after pre-copy: what its last round left, and what is known of heat.
    HotSetHybrid,
    /// Few pages often and many seldom, with neighbours alike.
    Zipf,
    /// Stretches of neighbouring pages, each somewhere else.
    Runs,
    /// One page after the other.
    Sequential,
    /// Every so-manieth page, up or down.
    Strided,
    /// Two sequences that take turns.
    TwoStreams,
    /// One of these for a while, then another.
    Phases,
    /// Two vCPUs, one sequential, one random.
    TwoVcpus,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Random,
        Self::HotSet,
        Self::HotSetHybrid,
        Self::Zipf,
        Self::Runs,
        Self::Sequential,
        Self::Strided,
        Self::TwoStreams,
        Self::Phases,
        Self::TwoVcpus,
    ];
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Random => "random",
            Self::HotSet => "hotset",
            Self::HotSetHybrid => "hotset-hybrid",
            Self::Zipf => "zipf",
            Self::Runs => "runs",
            Self::Sequential => "sequential",
            Self::Strided => "strided",
            Self::TwoStreams => "two-streams",
            Self::Phases => "phases",
            Self::TwoVcpus => "two-vcpus",
        })
    }
}

/// The guest of `pattern` and `seed` with `pages` of RAM, of which a vCPU visits one every `pace_ns`. The same every time.
#[must_use]
pub fn guest(pattern: Pattern, seed: u64, pages: u64, pace_ns: u64) -> Toucher {
    let mut rng = Rng::new(seed.wrapping_mul(0x2000_0003).wrapping_add(pattern as u64));
    let words = usize::try_from(pages / 64).unwrap_or(1).max(4);
    let pages = words as u64 * 64;
    let size = whole(pages as f64 * rng.between(0.4, 0.8));
    let area = Area { first: rng.word() % (pages - size), size };
    let mut missing = vec![u64::MAX; words];
    let mut hints = Vec::new();
    let visits = size * VISITS_A_PAGE;
    let mut walks = match pattern {
        Pattern::TwoVcpus => {
            let (one, other) = (Area { size: size / 2, ..area }, Area { first: area.first + size / 2, size: size / 2 });
            vec![Walk::draw(Pattern::Sequential, one, &mut rng), Walk::draw(Pattern::Random, other, &mut rng)]
        }
        simple => vec![Walk::draw(simple, area, &mut rng)],
    };
    if pattern == Pattern::HotSetHybrid {
        let mut heat = Heat::new(PageCount(pages));
        let mut left = size;
        for _ in 0..ROUNDS {
            // Each round is as long as its pages take, and so many visits: 3.3 µs a page.
            let mut written = PageBitmap::new(PageCount(pages));
            for _ in 0..(left * 3_300 / pace_ns.max(1)).min(visits * 4) {
                written.insert(switchover_wire::types::PageIndex(walks[0].next(&mut rng)));
            }
            heat.note_round(&written);
            left = written.count().0;
            missing = written.words().to_vec();
        }
        hints = heat.hottest(&PageBitmap::from_words(&missing, PageCount(pages)), usize::MAX >> 1);
    }
    let touched: Vec<Vec<Touch>> = walks
        .iter_mut()
        .map(|walk| {
            let mut rng = Rng::new(rng.word());
            first_touches((0..visits).map(|_| walk.next(&mut rng)), &missing, pace_ns)
        })
        .collect();
    let mut zero = vec![0; words];
    if pattern != Pattern::HotSetHybrid {
        // What lies outside the working set, by chunks, now and then.
        let outside = |word: usize| !(area.first / 64..=(area.first + size) / 64).contains(&(word as u64));
        (0..words).filter(|word| outside(*word) && word % 2 == 0).for_each(|word| zero[word] = u64::MAX);
    }
    Toucher { name: format!("{pattern} {seed}"), pages, missing, zero, hints, vcpus: touched }
}

/// Leaves of all visits the first to each missing page, and in between the time of the others.
fn first_touches(visits: impl Iterator<Item = u64>, missing: &[u64], pace_ns: u64) -> Vec<Touch> {
    let mut left = missing.to_vec();
    let (mut touches, mut think_ns) = (Vec::new(), 0);
    for page in visits {
        think_ns += pace_ns;
        let (word, bit) = (index(page), 1 << (page % 64));
        if left[word] & bit != 0 {
            left[word] &= !bit;
            touches.push(Touch { think_ns: std::mem::take(&mut think_ns), page });
        }
    }
    touches
}

#[derive(Clone, Copy)]
struct Area {
    first: u64,
    size: u64,
}

/// Somebody who visits pages.
enum Walk {
    Random(Area),
    /// Hot pages in an order of their own.
    HotSet(Area, Vec<u64>),
    Zipf {
        area: Area,
        slope: f64,
        object: u64,
    },
    Runs {
        area: Area,
        length: f64,
        at: u64,
        left: u64,
    },
    Strided {
        area: Area,
        at: u64,
        stride: u64,
        down: bool,
    },
    Two(Box<[Walk; 2]>, bool),
    Phases {
        walks: Vec<Walk>,
        length: u64,
        visits: u64,
    },
}

impl Walk {
    fn draw(pattern: Pattern, area: Area, rng: &mut Rng) -> Self {
        let at = rng.word() % area.size;
        match pattern {
            Pattern::Random | Pattern::TwoVcpus => Self::Random(area),
            Pattern::HotSet | Pattern::HotSetHybrid => {
                let mut order: Vec<u64> = (0..area.size).collect();
                for last in (1..order.len()).rev() {
                    order.swap(last, usize::try_from(rng.word() % (last as u64 + 1)).unwrap_or(0));
                }
                Self::HotSet(area, order)
            }
            Pattern::Zipf => Self::Zipf { area, slope: rng.between(0.7, 1.2), object: 1 + rng.word() % 32 },
            Pattern::Runs => Self::Runs { area, length: rng.log_between(6.0, 200.0), at, left: 0 },
            Pattern::Sequential => Self::Strided { area, at, stride: 1, down: false },
            Pattern::Strided => {
                // One that shares a factor with the area would never come to most of it.
                let mut stride = 2 + rng.word() % 150;
                while gcd(area.size, stride) > 1 {
                    stride += 1;
                }
                Self::Strided { area, at, stride, down: rng.word() & 1 == 1 }
            }
            Pattern::TwoStreams => {
                let half = |first| Area { first, size: area.size / 2 };
                let walk = |area| Self::Strided { area, at: at % area.size, stride: 1, down: false };
                Self::Two(Box::new([walk(half(area.first)), walk(half(area.first + area.size / 2))]), false)
            }
            Pattern::Phases => {
                const KINDS: [Pattern; 4] = [Pattern::Random, Pattern::Sequential, Pattern::Strided, Pattern::Runs];
                let walks = (0..12).map(|_| KINDS[usize::try_from(rng.word() % 4).unwrap_or(0)]);
                let kinds: Vec<_> = walks.collect();
                let walks = kinds.into_iter().map(|kind| Self::draw(kind, area, rng)).collect();
                Self::Phases { walks, length: area.size / 3, visits: 0 }
            }
        }
    }

    fn next(&mut self, rng: &mut Rng) -> u64 {
        match self {
            Self::Random(area) => area.first + rng.word() % area.size,
            Self::HotSet(area, order) => {
                let hot = (area.size / 10).max(1);
                let rank = if rng.unit() < 0.9 { rng.word() % hot } else { hot + rng.word() % (area.size - hot) };
                area.first + usize::try_from(rank).ok().and_then(|rank| order.get(rank)).copied().unwrap_or(0)
            }
            Self::Zipf { area, slope, object } => {
                // By the inverse of its distribution over objects, which are scattered.
                let objects = (area.size / *object).max(1);
                let power = 1.0 - *slope;
                let last = objects as f64;
                let rank = if power.abs() < 0.01 {
                    last.powf(rng.unit())
                } else {
                    (1.0 + rng.unit() * (last.powf(power) - 1.0)).powf(1.0 / power)
                };
                let place = whole(rank).min(objects - 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) % objects;
                area.first + place * *object + rng.word() % *object
            }
            Self::Runs { area, length, at, left } => {
                if *left == 0 {
                    *at = rng.word() % area.size;
                    *left = 1 + whole(-rng.unit().max(1e-9).ln() * *length);
                }
                *left -= 1;
                *at = (*at + 1) % area.size;
                area.first + *at
            }
            Self::Strided { area, at, stride, down } => {
                let step = if *down { area.size - *stride % area.size } else { *stride };
                *at = (*at + step) % area.size;
                area.first + *at
            }
            Self::Two(walks, second) => {
                *second = !*second;
                walks[usize::from(*second)].next(rng)
            }
            Self::Phases { walks, length, visits } => {
                *visits += 1;
                let phase = usize::try_from(*visits / (*length).max(1)).unwrap_or(0) % walks.len();
                walks[phase].next(rng)
            }
        }
    }
}

const fn gcd(one: u64, other: u64) -> u64 {
    if other == 0 { one } else { gcd(other, one % other) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_guest_every_time_and_another_seed_another() {
        for pattern in Pattern::ALL {
            let one = guest(pattern, 5, 4096, 1000);
            assert_eq!(one, guest(pattern, 5, 4096, 1000), "{pattern}");
            assert_ne!(one.vcpus, guest(pattern, 6, 4096, 1000).vcpus, "{pattern}");
        }
    }

    #[test]
    fn tuning_and_judging_share_no_seed() {
        assert!(!TUNING_SEEDS.into_iter().any(|seed| JUDGING_SEEDS.contains(&seed)));
    }

    #[test]
    fn pages_are_touched_first_once_by_a_vcpu_and_only_missing_ones() {
        for pattern in Pattern::ALL {
            let guest = guest(pattern, 3, 4096, 1000);
            for touches in &guest.vcpus {
                let mut pages: Vec<_> = touches.iter().map(|touch| touch.page).collect();
                assert!(pages.iter().all(|page| guest.missing[index(*page)] >> (page % 64) & 1 == 1), "{pattern}");
                assert!(pages.iter().all(|page| guest.zero[index(*page)] >> (page % 64) & 1 == 0), "{pattern}");
                pages.sort_unstable();
                pages.dedup();
                assert_eq!(pages.len(), touches.len(), "{pattern}");
                assert!(pages.len() > 100, "{pattern}: {}", pages.len());
            }
        }
    }

    #[test]
    fn what_pre_copy_left_is_known_by_its_heat() {
        let guest = guest(Pattern::HotSetHybrid, 2, 16_384, 1000);
        let missing = guest.missing.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        assert_eq!(guest.hints.len() as u64, missing);
        assert!(missing < 16_384 / 2, "{missing}");
    }
}
