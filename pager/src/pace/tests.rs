//! Lanes that draw from one bucket under a clock that is only counted.

use super::*;

const SECOND: u64 = 1_000_000_000;
const MS: u64 = 1_000_000;

/// A lane that sends frames one after the other.
struct Lane {
    ticket: Ticket,
    /// When it asks next.
    at: u64,
    frame: u64,
}

/// Lanes of one pacer, all of them busy always.
struct Lanes<'a> {
    pacer: &'a Pacer,
    lanes: Vec<Lane>,
    start: u64,
    /// Latest a lane wakes after it was to.
    lateness: u64,
    random: u64,
    /// When frames were sent, after the start, and their bytes.
    sent: Vec<(u64, u64)>,
}

impl<'a> Lanes<'a> {
    fn new(pacer: &'a Pacer, frames: &[u64], lateness: u64) -> Self {
        let start = Nanos::now();
        let lane = |frame: &u64| Lane { ticket: pacer.take(*frame, start), at: start.0, frame: *frame };
        let lanes = frames.iter().map(lane).collect();
        Self { pacer, lanes, start: start.0, lateness, random: 1, sent: Vec::new() }
    }

    /// Lets them send until `end` nanoseconds after the start.
    fn run_until(&mut self, end: u64) {
        while let Some(lane) =
            self.lanes.iter_mut().min_by_key(|lane| lane.at).filter(|lane| lane.at < self.start + end)
        {
            let now = Nanos(lane.at);
            let wait = self.pacer.wait(lane.ticket, now);
            assert!(wait <= Duration::from_millis(50), "{wait:?}");
            if wait.is_zero() {
                self.sent.push((lane.at - self.start, lane.frame));
                lane.ticket = self.pacer.take(lane.frame, now);
            } else {
                self.random =
                    self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                lane.at += u64::try_from(wait.as_nanos()).unwrap() + (self.random >> 33) % (self.lateness + 1);
            }
        }
    }

    /// The least and the most bytes of any second that begins with a frame or just after it, from `from` to `to`.
    fn seconds(&self, from: u64, to: u64) -> (u64, u64) {
        let (mut least, mut most) = (u64::MAX, 0);
        let mut sums = vec![0];
        self.sent.iter().for_each(|(_, bytes)| sums.push(sums[sums.len() - 1] + bytes));
        // Frames are noted in the order in which they were sent.
        let before = |end: u64| sums[self.sent.partition_point(|(at, _)| *at < end)];
        for (begin, _) in self.sent.iter().filter(|(at, _)| *at >= from && at + SECOND < to) {
            most = most.max(before(begin + SECOND) - before(*begin));
            least = least.min(before(begin + 1 + SECOND) - before(begin + 1));
        }
        assert!(most > 0, "no second from {from} to {to}");
        (least, most)
    }

    /// That any second from `from` to `to` carried `rate`, give or take two percent.
    fn assert_rate(&self, rate: u64, from: u64, to: u64) {
        let (least, most) = self.seconds(from, to);
        assert!(least >= rate / 100 * 98 && most <= rate / 100 * 102, "{least} to {most} bytes a second for {rate}");
    }
}

/// A chunk and its header.
const FRAME: u64 = 16 + CHUNK_PAGES * PAGE_SIZE_U64;

#[test]
fn any_second_carries_the_rate() {
    // 10, 100 and 333 Mbit/s, 1 and 5 Gbit/s.
    for rate in [1_250_000, 12_500_000, 41_600_000, 125_000_000, 625_000_000] {
        for lanes in [1, 2, 5] {
            let pacer = Pacer::new(rate);
            let frame = 16 + u64::from(pacer.frame_pages()) * PAGE_SIZE_U64;
            let mut lanes = Lanes::new(&pacer, &vec![frame; lanes], 2 * MS);
            lanes.run_until(3 * SECOND);
            lanes.assert_rate(rate, 0, 3 * SECOND);
        }
    }
}

#[test]
fn whole_chunks_hold_a_low_rate_too() {
    for lanes in 1..4 {
        let pacer = Pacer::new(12_500_000);
        let mut lanes = Lanes::new(&pacer, &vec![FRAME; lanes], 0);
        lanes.run_until(4 * SECOND);
        lanes.assert_rate(12_500_000, 0, 4 * SECOND);
    }
}

#[test]
fn lanes_with_frames_of_any_size_share_it() {
    let pacer = Pacer::new(125_000_000);
    let mut lanes = Lanes::new(&pacer, &[FRAME, 16, 4112, 70_000], MS);
    lanes.run_until(3 * SECOND);
    lanes.assert_rate(125_000_000, 0, 3 * SECOND);
    // A lane with small frames may use up what was saved up; none is passed over. All together would have 1099 turns.
    let turns = [FRAME, 16, 4112, 70_000].map(|frame| lanes.sent.iter().filter(|(_, bytes)| *bytes == frame).count());
    assert!(turns.iter().all(|turns| *turns > 1000), "{turns:?}");
}

#[test]
fn a_changed_rate_holds_from_then_on() {
    let (low, high) = (1_250_000, 125_000_000);
    let pacer = Pacer::new(high);
    let mut lanes = Lanes::new(&pacer, &[16 * 1024; 3], MS);
    for (second, rate) in [(2, low), (4, high), (6, low * 10), (8, high)] {
        lanes.run_until(second * SECOND);
        pacer.set_rate_at(rate, Nanos(lanes.start + second * SECOND));
    }
    lanes.run_until(10 * SECOND);
    // Nobody sleeps longer than 50 ms, then the new rate holds. What was taken before the change is 3 frames.
    for (from, rate) in [(0, high), (2, low), (4, high), (6, low * 10), (8, high)] {
        let (least, most) = lanes.seconds(from * SECOND + 50 * MS, (from + 2) * SECOND);
        let frame = 16 * 1024;
        assert!(least + frame >= rate / 100 * 98, "{least} bytes in a second for {rate}");
        assert!(most <= rate / 100 * 102 + frame, "{most} bytes in a second for {rate}");
    }
}

#[test]
fn who_waits_profits_from_a_raised_rate_and_from_none() {
    let start = Nanos::now();
    let pacer = Pacer::new(1000);
    // Over a quarter of an hour.
    let (first, second) = (pacer.take(1_000_000, start), pacer.take(1_000_000, start));
    assert_eq!(pacer.wait(second, start), LONGEST_WAIT);
    let later = Nanos(start.0 + 50 * MS);
    pacer.set_rate_at(1_000_000_000, later);
    assert!(pacer.wait(first, later) <= Duration::from_millis(1));
    assert!((Duration::from_micros(1900)..=Duration::from_millis(2)).contains(&pacer.wait(second, later)));
    assert_eq!(pacer.wait(second, Nanos(later.0 + 2 * MS)), Duration::ZERO);
    let third = pacer.take(u64::MAX, later);
    pacer.set_rate_at(0, later);
    assert_eq!(pacer.wait(third, later), Duration::ZERO);
}

#[test]
fn a_limit_that_is_set_later_forgives_nothing_and_owes_nothing() {
    let start = Nanos::now();
    let pacer = Pacer::new(0);
    let before = pacer.take(u64::MAX, start);
    let later = Nanos(start.0 + 10 * SECOND);
    pacer.set_rate_at(100_000_000, later);
    assert_eq!(pacer.wait(before, later), Duration::ZERO);
    assert_eq!(pacer.wait(pacer.take(1_000_000, later), later), Duration::from_millis(10));
    // What was owed under an earlier limit went out while there was none.
    assert!(!pacer.wait(pacer.take(1_000_000_000, later), later).is_zero());
    pacer.set_rate_at(0, later);
    pacer.set_rate_at(100_000_000, later);
    assert_eq!(pacer.wait(pacer.take(1_000_000, later), later), Duration::from_millis(10));
}

#[test]
fn no_limit_never_waits() {
    let pacer = Pacer::new(0);
    assert_eq!(pacer.wait(pacer.take(u64::MAX, Nanos::now()), Nanos::now()), Duration::ZERO);
    assert!(!pacer.stopped_before(u64::MAX, |_| true));
    assert_eq!(u64::from(pacer.frame_pages()), CHUNK_PAGES);
}

#[test]
fn a_long_pause_earns_no_more_than_a_burst() {
    let pacer = Pacer::new(100_000_000);
    let later = Nanos(Nanos::now().0 + 60 * SECOND);
    assert_eq!(pacer.wait(pacer.take(1_000_000, later), later), Duration::ZERO);
    assert_eq!(pacer.wait(pacer.take(1_000_000, later), later), Duration::from_millis(10));
    // Nor does one that ends with a lower rate.
    let pacer = Pacer::new(100_000_000);
    pacer.set_rate_at(10_000_000, later);
    assert_eq!(pacer.wait(pacer.take(200_000, later), later), Duration::from_millis(10));
}

#[test]
fn frames_are_as_small_as_the_rate_needs() {
    let pages = |rate| Pacer::new(rate).frame_pages();
    assert_eq!([1, 1_250_000, 12_500_000, 50_000_000, 60_000_000, u64::MAX].map(pages), [1, 1, 15, 61, 64, 64]);
}

#[test]
fn whoever_waits_can_be_stopped() {
    let pacer = Pacer::new(1);
    let mut spans = Vec::new();
    assert!(pacer.stopped_before(1000, |span| {
        spans.push(span);
        spans.len() == 3
    }));
    assert_eq!(spans, [LONGEST_WAIT; 3]);
    // It goes on as soon as there is no limit.
    assert!(!pacer.stopped_before(1000, |_| {
        pacer.set_rate(0);
        false
    }));
}
