//! Following what most of the latest faults have in common: the distance from one to the next.
//!
//! After Leap (Al Maruf and Chowdhury, *Effectively prefetching remote memory with Leap*, 2020): the majority of the latest
//! distances, by Boyer and Moore's vote, in a window that is widened until there is one. Two things differ, because here what was
//! prefetched faults no more and so cannot be seen. The distance is taken to the nearest of the latest faults, and three equal
//! ones on the way from one nearest fault to the next are a trend too, so that streams that take turns are told apart. And a
//! trend that was found is a *stream*, which a fault at its end carries on, twice as far.

use switchover_wire::frame::bulk::CHUNK_PAGES;
use switchover_wire::types::PageCount;

use super::{Fault, Left, Looks, Step, part};
use crate::sent::ChunkIndex;

/// Fault lanes whose faults are looked at apart; further ones share these.
const LANES: usize = 8;
/// Faults of a lane that are remembered.
const HISTORY: usize = 16;
/// Distances that the first vote is held among.
const FIRST_VOTE: usize = 4;
/// Of the latest faults, those that a distance may be taken to.
const NEIGHBOURS: usize = 4;
/// Equal distances, each from a fault to the nearest before it, that are a trend without a vote.
const IN_A_ROW: u8 = 3;
/// Distances in pages that are a trend: 64 MiB.
const FARTHEST: u64 = 1 << 14;
/// Streams at once.
const STREAMS: usize = 8;
/// Pages that a stream goes ahead at first.
const FIRST_WINDOW: u64 = 16;
/// And at most: 4 MiB of neighbours. More kept others' pages waiting behind a stream that was none any more.
const MOST_WINDOW: u64 = 1 << 10;
/// How many steps behind a stream's end a fault may be, and how many ahead of it, that carries it on.
const SLACK: u64 = 8;

/// Pages at equal distances.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stream {
    /// The next page to be offered.
    next: u64,
    stride: i64,
    /// Pages that may still be offered.
    budget: u64,
    window: u64,
}

/// The latest faults of one lane, the latest first.
#[derive(Clone, Copy, Debug)]
struct History {
    pages: [u64; HISTORY],
    distances: [i64; HISTORY],
    /// How many distances in a row were the same, from each fault to the nearest before it.
    rows: [u8; HISTORY],
    count: usize,
}

/// Trends of all lanes.
#[derive(Debug)]
pub struct Trend {
    pages: u64,
    lanes: [History; LANES],
    /// The one that was carried on last is the first.
    streams: [Option<Stream>; STREAMS],
}

impl Trend {
    /// No faults.
    pub const fn new(pages: PageCount) -> Self {
        let history = History { pages: [0; HISTORY], distances: [0; HISTORY], rows: [0; HISTORY], count: 0 };
        Self { pages: pages.0, lanes: [history; LANES], streams: [None; STREAMS] }
    }

    /// A fault: says whether it follows a trend.
    pub fn note(&mut self, fault: Fault) -> bool {
        let page = fault.page.0;
        let history = &mut self.lanes[usize::from(fault.lane) % LANES];
        history.note(page);
        let trend = history.trend();
        if let Some(index) = self.streams.iter().position(|stream| stream.is_some_and(|stream| stream.has(page))) {
            let stream = self.streams[index].map(|stream| stream.carried_on(page));
            self.put_first(index, stream);
            return true;
        }
        let Some(stride) = trend else { return false };
        let Some(next) = page.checked_add_signed(stride).filter(|next| *next < self.pages) else { return false };
        let stream = Stream { next, stride, budget: FIRST_WINDOW, window: FIRST_WINDOW };
        self.put_first(STREAMS - 1, Some(stream));
        true
    }

    fn put_first(&mut self, from: usize, stream: Option<Stream>) {
        self.streams.copy_within(..from, 1);
        self.streams[0] = stream;
    }

    /// The next pages of a stream that has some to offer.
    pub fn step(&mut self, looks: &mut Looks<'_, impl Left>) -> Option<Step> {
        let pages = self.pages;
        for stream in self.streams.iter_mut().flatten() {
            while looks.more() {
                let Some(offered) = stream.offer(pages) else { break };
                let step = looks.wanted(offered);
                if step.is_some() {
                    return step;
                }
            }
        }
        None
    }
}

impl History {
    fn note(&mut self, page: u64) {
        let others = self.pages.iter().zip(&self.distances).zip(&self.rows).take(self.count.min(NEIGHBOURS));
        let distances = others.filter_map(|((other, before), row)| {
            let distance = distance(*other, page).filter(|distance| *distance != 0)?;
            Some((distance, if distance == *before { row.saturating_add(1) } else { 1 }))
        });
        let (nearest, row) = distances.min_by_key(|(distance, _)| distance.unsigned_abs()).unwrap_or((0, 0));
        self.pages.copy_within(..HISTORY - 1, 1);
        self.distances.copy_within(..HISTORY - 1, 1);
        self.rows.copy_within(..HISTORY - 1, 1);
        (self.pages[0], self.distances[0], self.rows[0]) = (page, nearest, row);
        self.count = (self.count + 1).min(HISTORY);
    }

    /// What the latest fault follows: see the top of this file.
    fn trend(&self) -> Option<i64> {
        if self.rows[0] >= IN_A_ROW { Some(self.distances[0]) } else { self.majority() }
    }

    /// The distance that more than half of the latest have, in the smallest window that has one.
    fn majority(&self) -> Option<i64> {
        let mut window = FIRST_VOTE;
        while window <= self.count {
            if let Some(distance) = vote(&self.distances[..window]).filter(|distance| *distance != 0) {
                return Some(distance);
            }
            window *= 2;
        }
        None
    }
}

/// From `one` to `other`, where that is near enough to be a trend.
fn distance(one: u64, other: u64) -> Option<i64> {
    let span = i64::try_from(one.abs_diff(other)).ok().filter(|span| span.unsigned_abs() <= FARTHEST)?;
    Some(if other < one { -span } else { span })
}

/// What more than half of `distances` are. Boyer and Moore's vote finds the only candidate; then it is counted.
fn vote(distances: &[i64]) -> Option<i64> {
    let (mut candidate, mut lead) = (0, 0_usize);
    for distance in distances {
        if lead == 0 {
            (candidate, lead) = (*distance, 1);
        } else if *distance == candidate {
            lead += 1;
        } else {
            lead -= 1;
        }
    }
    let votes = distances.iter().filter(|distance| **distance == candidate).count();
    (votes * 2 > distances.len()).then_some(candidate)
}

impl Stream {
    /// Whether a fault on `page` is at its end: on one of its pages, a little behind or ahead.
    fn has(&self, page: u64) -> bool {
        let stride = self.stride.unsigned_abs();
        let steps = page.abs_diff(self.next) / stride.max(1);
        let ahead = (page >= self.next) == (self.stride > 0) || page == self.next;
        // A guest that goes by single pages may skip some; one that goes by larger steps is on them.
        let on_it = stride == 1 || page.abs_diff(self.next).is_multiple_of(stride.max(1));
        let near = steps <= if ahead { SLACK } else { self.window + SLACK };
        on_it && near
    }

    /// The guest has come to `page`: goes twice as far ahead of it.
    fn carried_on(mut self, page: u64) -> Self {
        self.window = (self.window * 2).min(MOST_WINDOW);
        let ahead = (page >= self.next) == (self.stride > 0);
        let steps = page.abs_diff(self.next) / self.stride.unsigned_abs().max(1);
        if ahead {
            if let Some(next) = page.checked_add_signed(self.stride) {
                self.next = next;
            }
            self.budget = self.window;
        } else {
            // What was offered already counts.
            self.budget = self.window.saturating_sub(steps).max(self.budget);
        }
        self
    }

    /// Its next pages, within one chunk.
    fn offer(&mut self, pages: u64) -> Option<Step> {
        if self.budget == 0 || self.next >= pages {
            return None;
        }
        if self.stride == 1 {
            let step = part(self.next, (self.next + self.budget).min(pages));
            let count = u64::from(step.pages.count_ones());
            self.next += count;
            self.budget -= count;
            return Some(step);
        }
        let chunk = ChunkIndex(self.next / CHUNK_PAGES);
        let mut mask = 0;
        while self.budget > 0 && self.next < pages && self.next / CHUNK_PAGES == chunk.0 {
            mask |= 1 << (self.next % CHUNK_PAGES);
            self.budget -= 1;
            match self.next.checked_add_signed(self.stride) {
                Some(next) => self.next = next,
                None => self.budget = 0,
            }
        }
        Some(Step { chunk, pages: mask })
    }
}

#[cfg(test)]
mod tests {
    use switchover_wire::types::PageIndex;

    use super::super::tests::Pages;
    use super::*;

    fn fault(page: u64) -> Fault {
        Fault { page: PageIndex(page), lane: 0 }
    }

    /// Faults until a trend is found, if one is found in 40.
    fn found_after(faults: impl Iterator<Item = Fault>) -> Option<usize> {
        let mut trend = Trend::new(PageCount(1 << 20));
        faults.take(40).position(|fault| trend.note(fault)).map(|index| index + 1)
    }

    #[test]
    fn a_trend_is_found_within_a_few_faults() {
        for stride in [1_i64, -1, 3, 64, -70, 1000] {
            let page = |index: i64| u64::try_from(500_000 + index * stride).unwrap();
            assert_eq!(found_after((0..).map(|index| fault(page(index)))), Some(4), "{stride}");
            // Every fifth fault is somewhere else.
            let noisy = (0..).map(|index| if index % 5 == 2 { page(index) * 7 % 1_000_000 } else { page(index) });
            assert!(found_after(noisy.map(fault)).is_some_and(|faults| faults <= 9), "{stride}");
        }
    }

    #[test]
    fn two_streams_that_take_turns_are_told_apart() {
        let pages = (0..).flat_map(|index| [1000 + index, 3000 + index * 5]);
        assert!(found_after(pages.map(fault)).is_some_and(|faults| faults <= 8));
        let lanes = (0..).flat_map(|index| {
            [Fault { page: PageIndex(1000 + index), lane: 0 }, Fault { page: PageIndex(900_000 - 9 * index), lane: 1 }]
        });
        assert!(found_after(lanes).is_some_and(|faults| faults <= 8));
    }

    #[test]
    fn what_has_no_trend_is_given_none() {
        let mut state = 1_u64;
        let random = std::iter::repeat_with(move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            fault(state >> 44)
        });
        assert_eq!(found_after(random), None);
        assert_eq!(found_after(std::iter::repeat(fault(7))), None, "the same page again is no trend");
    }

    #[test]
    fn the_vote_needs_more_than_half() {
        assert_eq!(vote(&[1, 1, 2, 3]), None);
        assert_eq!(vote(&[1, 2, 1, 3, 1]), Some(1));
        assert_eq!(vote(&[5, 5, 5]), Some(5));
    }

    #[test]
    fn a_stream_goes_twice_as_far_with_each_fault_at_its_end() {
        for stride in [1_u64, 70] {
            let (mut trend, mut pages) = (Trend::new(PageCount(1 << 20)), Pages::new(1 << 20));
            let mut at = 0;
            let mut bursts = Vec::new();
            for _ in 0..12 {
                trend.note(fault(at));
                pages.mark(at);
                let mut offered = Vec::new();
                loop {
                    let mut looks = Looks { left: &pages, spent: 0 };
                    let Some(step) = trend.step(&mut looks) else { break };
                    offered.extend(pages.send(step));
                }
                assert!(offered.iter().all(|page| page % stride == 0), "{stride}");
                bursts.push(offered.len() as u64);
                at = offered.last().map_or(at, |last| *last) + stride;
            }
            assert_eq!(bursts[..3], [0, 0, 0]);
            assert_eq!(bursts[3..7], [16, 32, 64, 128].map(|burst| burst * FIRST_WINDOW / 16), "{stride}");
        }
    }

    #[test]
    fn a_stream_ends_with_ram() {
        for (from, stride) in [(60_u64, 1_i64), (40, -5), (10, 30)] {
            let (mut trend, mut pages) = (Trend::new(PageCount(100)), Pages::new(100));
            for index in 0..4 {
                let page = from.saturating_add_signed(stride * index);
                trend.note(fault(page.min(99)));
            }
            let mut looks = Looks { left: &pages, spent: 0 };
            let steps: Vec<_> = std::iter::from_fn(|| trend.step(&mut looks)).collect();
            steps.into_iter().for_each(|step| assert!(pages.send(step).iter().all(|page| *page < 100)));
        }
    }
}
