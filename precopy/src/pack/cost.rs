//! What a way to encode costs and gives, and when to look again.

use super::link::Link;

/// Weight of a page in the averages of a way that is in use: they follow the data within a chunk.
const IN_USE: f64 = 0.125;

/// Weight of a sampled page: few are sampled, and what is known is old.
const SAMPLED: f64 = 0.5;

/// Pages between a way's first samples, and the most: 64 MiB, so that samples of a few microseconds vanish.
const FIRST_INTERVAL: u32 = 16;
const LONGEST_INTERVAL: u32 = 16_384;

/// Tries after which the least time seen is believed no longer: the first ones find nothing in the caches, and may have
/// to allocate.
const WARMING_UP: u32 = 4;

/// A time this much over the average has seen the thread interrupted.
const INTERRUPTED: f64 = 4.0;

/// One way to encode pages, as a lane has come to know it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    tried: u32,
    ns: f64,
    bytes: f64,
    /// Pages until the next sample is due, and how many it was.
    wait: u32,
    interval: u32,
}

impl Default for Cost {
    fn default() -> Self {
        Self { tried: 0, ns: 0.0, bytes: 0.0, wait: 0, interval: FIRST_INTERVAL }
    }
}

impl Cost {
    /// Nanoseconds of work on a page; 0 where none was tried.
    pub const fn ns(&self) -> f64 {
        self.ns
    }

    /// Nanoseconds from page to wire: work, and the time on the link.
    pub fn time(&self, link: &Link) -> f64 {
        if self.tried == 0 { f64::INFINITY } else { self.ns + link.time(self.bytes) }
    }

    /// A page was encoded so, because that is the best that is known.
    pub fn used(&mut self, ns: f64, bytes: f64) {
        self.note(ns, bytes, IN_USE);
        (self.interval, self.wait) = (FIRST_INTERVAL, FIRST_INTERVAL);
    }

    /// A page was encoded so to see whether that is better by now; a page usually takes `best` nanoseconds.
    pub fn sampled(&mut self, ns: f64, bytes: f64, link: &Link, best: f64) {
        self.note(ns, bytes, SAMPLED);
        if ns + link.time(bytes) < best {
            // It is worth looking at the next page at once.
            (self.interval, self.wait) = (FIRST_INTERVAL, 1);
        } else {
            self.wait = self.interval;
            self.interval = (self.interval * 2).min(LONGEST_INTERVAL);
        }
    }

    /// Whether the next page should be a sample, where the work alone must not take longer than `most` nanoseconds.
    pub fn is_due(&self, most: f64) -> bool {
        self.wait == 0 && (self.tried < WARMING_UP || self.ns < most)
    }

    /// Pages went by.
    pub fn passed(&mut self, pages: u32) {
        self.wait = self.wait.saturating_sub(pages);
    }

    /// What was learnt may no longer hold: look again soon.
    pub fn reconsider(&mut self) {
        self.interval = FIRST_INTERVAL;
        self.wait = self.wait.min(FIRST_INTERVAL);
    }

    fn note(&mut self, ns: f64, bytes: f64, weight: f64) {
        self.tried = self.tried.saturating_add(1);
        if self.tried == 1 {
            (self.ns, self.bytes) = (ns, bytes);
            return;
        }
        self.bytes += (bytes - self.bytes) * weight;
        self.ns = if self.tried <= WARMING_UP { self.ns.min(ns) } else { smoothed(self.ns, ns, weight) };
    }
}

/// An average with a new value in it, of times that interruptions make too long but nothing makes too short.
pub(super) fn smoothed(average: f64, ns: f64, weight: f64) -> f64 {
    average + (ns.min(average * INTERRUPTED + 100.0) - average) * weight
}
