//! Pre-copy of a guest that is played, sample after sample.

use std::collections::VecDeque;

use switchover_hybrid::monitor::Sample;
use switchover_hybrid::monitor::costs::{PRECOPY_BROWNOUT, ROUND_OVERHEAD, WRITE_FAULT};
use switchover_precopy::rounds::probe::spread;
use switchover_wire::types::PageCount;

use super::bits::{count, lowest, whole};
use super::guest::{Guest, Position};

/// How often the monitor is asked.
pub const SAMPLE_NS: u64 = 10_000_000;
/// When it is asked first; then whenever the first round is twice as old, until that is [`SAMPLE_NS`].
const FIRST_SAMPLE_NS: u64 = 2_500_000;
/// Pages of the sample that is armed before the first round.
const PROBE_PAGES: u64 = 512;
/// What is sent and what is written take turns of this length.
const STEP_NS: u64 = 2_500_000;
/// Wire bytes of 64 pages besides their contents.
const CHUNK_BYTES: f64 = 24.0;

/// The network that a guest is played over.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Link {
    /// What all bulk lanes carry together.
    pub bytes_per_second: u64,
    /// One way.
    pub delay_ns: u64,
}

impl Link {
    /// Seconds for a page of `guest` that is not zero.
    #[must_use]
    pub fn page_seconds(&self, guest: &Guest) -> f64 {
        guest.bytes_per_page / self.bytes_per_second as f64
    }

    /// Seconds there and back.
    #[must_use]
    pub fn round_trip(&self) -> f64 {
        2.0 * self.delay_ns as f64 / 1e9
    }

    /// What a handoff takes besides pages: the guest's own, and a round trip and a half.
    #[must_use]
    pub const fn handoff_ns(&self, guest: &Guest) -> u64 {
        guest.handoff_ns + 3 * self.delay_ns
    }
}

/// Pre-copy, somewhere in the middle of it.
#[derive(Clone, Debug)]
pub struct Replay<'a> {
    guest: &'a Guest,
    link: Link,
    now_ns: u64,
    next_sample_ns: u64,
    position: Position,
    /// Guest-seconds lost so far.
    lost: f64,
    /// Seconds that the guest still owes for faults.
    owed: f64,
    round: u32,
    round_start_ns: u64,
    round_set: Vec<u64>,
    round_pages: u64,
    left: Vec<u64>,
    left_pages: u64,
    /// Sent since the last sample.
    fresh: Vec<u64>,
    cursor: usize,
    /// The sample that was armed before the first round, and its pages that were written before they were sent.
    probe: Vec<u64>,
    probe_written: Vec<u64>,
    dirty: Vec<u64>,
    dirty_pages: u64,
    in_flight: VecDeque<(u64, usize, u64)>,
    round_bytes: f64,
    round_data: u64,
    unspent: f64,
}

impl<'a> Replay<'a> {
    /// Pre-copy that is about to begin.
    #[must_use]
    pub fn new(guest: &'a Guest, link: Link) -> Self {
        let all = guest.all();
        Self {
            guest,
            link,
            now_ns: 0,
            next_sample_ns: FIRST_SAMPLE_NS,
            position: Position::default(),
            lost: 0.0,
            owed: 0.0,
            round: 1,
            round_start_ns: 0,
            round_set: all.clone(),
            round_pages: guest.pages,
            left: all,
            left_pages: guest.pages,
            fresh: vec![0; guest.words()],
            cursor: 0,
            probe: spread(PageCount(guest.pages), PROBE_PAGES).words().to_vec(),
            probe_written: vec![0; guest.words()],
            dirty: vec![0; guest.words()],
            dirty_pages: 0,
            in_flight: VecDeque::new(),
            round_bytes: 0.0,
            round_data: 0,
            unspent: 0.0,
        }
    }

    /// Goes on until the next sample is due or the round is over, and gives that sample.
    ///
    /// After a sample that says so, the next round begins.
    pub fn sample(&mut self) -> Sample {
        if self.left_pages == 0 {
            self.begin_round();
        }
        while self.left_pages > 0 && self.now_ns < self.next_sample_ns {
            self.step(STEP_NS.min(self.next_sample_ns - self.now_ns));
        }
        if self.now_ns >= self.next_sample_ns {
            self.next_sample_ns = self.now_ns + self.now_ns.min(SAMPLE_NS);
        }
        let sample = self.look();
        self.fresh.fill(0);
        sample
    }

    /// Guest-seconds lost so far.
    #[must_use]
    pub const fn lost(&self) -> f64 {
        self.lost
    }

    /// Seconds so far.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.now_ns as f64 / 1e9
    }

    /// Where the guest is in its own time.
    #[must_use]
    pub const fn position(&self) -> Position {
        self.position
    }

    /// What a handoff now leaves to be copied, zero pages left out. What is in flight arrives before the guest is paused.
    #[must_use]
    pub fn rest(&self) -> Vec<u64> {
        let mut rest: Vec<u64> = self.left.iter().zip(&self.dirty).map(|(left, dirty)| left | dirty).collect();
        for (pages, zero) in rest.iter_mut().zip(&self.guest.zero) {
            *pages &= !zero;
        }
        rest
    }

    /// The pages that are known to be hot: those written since they were sent.
    #[must_use]
    pub fn hot(&self) -> &[u64] {
        &self.dirty
    }

    fn look(&self) -> Sample {
        let in_flight = |(_, word, pages): &(u64, usize, u64)| u64::from((pages & !self.dirty[*word]).count_ones());
        let over = self.left_pages == 0;
        let sent = self.round_pages - self.left_pages;
        let first = self.round == 1;
        let left = |pages: &[u64]| if first { both(pages, &self.left) } else { 0 };
        let zeros: Vec<u64> = self.probe.iter().zip(&self.guest.zero).map(|(probe, zero)| probe & zero).collect();
        Sample {
            at_ns: self.now_ns,
            round: self.round,
            round_ns: self.now_ns - self.round_start_ns,
            round_over: over,
            round_pages: self.round_pages,
            left_pages: self.left_pages,
            unacknowledged_pages: self.in_flight.iter().map(in_flight).sum(),
            dirty_pages: self.dirty_pages,
            rewritten_pages: if over { both(&self.dirty, &self.round_set) } else { 0 },
            fresh_pages: count(&self.fresh),
            fresh_dirty_pages: both(&self.fresh, &self.dirty),
            bytes_per_second: self.link.bytes_per_second,
            bytes_per_page: if sent > 0 { self.round_bytes / sent as f64 } else { 0.0 },
            bytes_per_data_page: if self.round_data > 0 { self.guest.bytes_per_page } else { 0.0 },
            probe_pages: left(&self.probe),
            probe_dirty_pages: left(&self.probe_written),
            probe_zero_pages: left(&zeros),
            probe_ns: if first { self.now_ns } else { 0 },
            handoff_ns: self.link.handoff_ns(self.guest),
            ..Sample::default()
        }
    }

    fn begin_round(&mut self) {
        self.round += 1;
        self.round_set.clone_from(&self.dirty);
        self.left = std::mem::replace(&mut self.dirty, vec![0; self.guest.words()]);
        self.left_pages = std::mem::take(&mut self.dirty_pages);
        self.round_pages = self.left_pages;
        self.cursor = 0;
        self.round_start_ns = self.now_ns;
        (self.round_bytes, self.round_data, self.unspent) = (0.0, 0, 0.0);
        self.run_guest(whole(ROUND_OVERHEAD * 1e9));
    }

    fn step(&mut self, ns: u64) {
        let rate = self.link.bytes_per_second as f64 / 1e9;
        let budget = self.unspent + rate * ns as f64;
        self.unspent = budget - self.send(budget);
        let ns = if self.left_pages == 0 {
            let early = whole((self.unspent / rate).max(0.0));
            self.unspent = 0.0;
            ns.saturating_sub(early).max(1)
        } else {
            ns
        };
        self.run_guest(ns);
    }

    /// Sends up to `budget` bytes and says how many it took.
    fn send(&mut self, budget: f64) -> f64 {
        let page = self.guest.bytes_per_page;
        let mut used = 0.0;
        while self.left_pages > 0 {
            let pages = self.left[self.cursor];
            if pages == 0 {
                self.cursor += 1;
                continue;
            }
            let data = pages & !self.guest.zero[self.cursor];
            let cost = CHUNK_BYTES + f64::from(data.count_ones()) * page;
            let taken = if used + cost <= budget {
                used += cost;
                pages
            } else {
                let fit = lowest(data, whole((budget - used) / page));
                used += f64::from(fit.count_ones()) * page;
                fit
            };
            self.left[self.cursor] &= !taken;
            self.fresh[self.cursor] |= taken;
            self.left_pages -= u64::from(taken.count_ones());
            self.round_data += u64::from((taken & data).count_ones());
            if self.link.delay_ns > 0 {
                self.in_flight.push_back((self.now_ns, self.cursor, taken & data));
            }
            if taken != pages {
                break;
            }
        }
        self.round_bytes += used;
        used
    }

    fn run_guest(&mut self, ns: u64) {
        let seconds = ns as f64 / 1e9;
        self.now_ns += ns;
        while self.in_flight.front().is_some_and(|(sent, ..)| sent + 2 * self.link.delay_ns < self.now_ns) {
            self.in_flight.pop_front();
        }
        let paid = self.owed.min(seconds * (1.0 - PRECOPY_BROWNOUT));
        self.owed -= paid;
        self.lost += seconds * PRECOPY_BROWNOUT + paid;
        let mut run_ns = whole((seconds * (1.0 - PRECOPY_BROWNOUT) - paid).max(0.0) * 1e9);
        let (mut newly, mut faults) = (0, 0);
        while run_ns > 0 {
            let (stretch, length) = self.guest.stretch(self.position, run_ns);
            for word in 0..self.dirty.len() {
                let new = stretch.written(word) & !self.left[word] & !self.dirty[word];
                self.dirty[word] |= new;
                newly += u64::from(new.count_ones());
                if self.round == 1 && self.probe[word] != 0 {
                    let probed = stretch.written(word) & self.probe[word] & self.left[word] & !self.probe_written[word];
                    self.probe_written[word] |= probed;
                    faults += u64::from(probed.count_ones());
                }
            }
            self.position = self.guest.after(self.position, length);
            run_ns -= length;
        }
        self.dirty_pages += newly;
        self.owed += (newly + faults) as f64 * WRITE_FAULT;
    }
}

/// Pages of both sets.
fn both(one: &[u64], other: &[u64]) -> u64 {
    one.iter().zip(other).map(|(one, other)| u64::from((one & other).count_ones())).sum()
}
