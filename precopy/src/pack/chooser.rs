//! Which encoding a lane uses for its next page: the one with the least time from memory to wire.

use std::time::Duration;

use switchover_wire::types::PAGE_SIZE;

use super::cost::{Cost, smoothed};
use super::link::Link;
use super::{Compression, PackSettings};

const PAGE: f64 = PAGE_SIZE as f64;

/// What is taken for a time until it is measured: reading a page, and hashing it (one core of 2020, roughly).
const COPY_NS: f64 = 400.0;
const HASH_NS: f64 = 1500.0;

/// Packing must gain at least this share of the time, or the lane would go to and fro.
const WORTH_IT: f64 = 0.95;

/// One chunk in so many is captured even where that does not pay, to see whether it would.
const PROBE: u64 = 128;

/// The first round whose pages are captured.
const CAPTURE_FROM: u32 = 1;

/// How many times what capturing costs a page must take as it is, for capturing to be tried. Most of what the first round sends
/// is not sent again, so there it must be worth more.
const MARGIN: f64 = 2.0;
const FIRST_MARGIN: f64 = 4.0;

/// Weight of a page in what capturing has gained, and in the share of duplicates. Both come in clusters.
const CAPTURE_WEIGHT: f64 = 1.0 / 256.0;
const DUPLICATE_WEIGHT: f64 = 1.0 / 64.0;

/// One of so many contents is looked up even where that does not pay, to see whether it would.
const CONTENT_CLASSES: u64 = 16;

/// A way to make a page smaller by itself, or from its last version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Method {
    Lz4,
    Zstd,
    Delta,
}

impl Method {
    const COMPRESSORS: [Self; 2] = [Self::Lz4, Self::Zstd];
}

/// Why a page is encoded in a certain way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Why {
    /// It is the best known.
    Best,
    /// To see whether it is better by now.
    Sample,
}

/// What a lane has measured, and what follows from it.
#[derive(Debug)]
pub(super) struct Chooser {
    settings: PackSettings,
    link: Link,
    costs: [Cost; 3],
    copy_ns: f64,
    hash_ns: f64,
    /// Share of pages that another page has the content of.
    duplicates: f64,
    /// Nanoseconds that having captured pages gains, for each page that is captured; `None` before anything is known.
    captured: Option<f64>,
}

impl Chooser {
    pub fn new(settings: PackSettings) -> Self {
        Self {
            settings,
            link: Link::default(),
            costs: [Cost::default(); 3],
            copy_ns: COPY_NS,
            hash_ns: HASH_NS,
            duplicates: 0.0,
            captured: None,
        }
    }

    fn adapts(&self) -> bool {
        self.settings.compression == Compression::Adaptive
    }

    fn cost(&self, method: Method) -> &Cost {
        &self.costs[method as usize]
    }

    fn page_as_it_is(&self) -> f64 {
        self.link.time(PAGE)
    }

    /// The time of a page that has been read, without its last version or another like it.
    fn best(&self) -> f64 {
        let compressed = Method::COMPRESSORS.map(|method| self.cost(method).time(&self.link));
        compressed.into_iter().fold(self.page_as_it_is(), f64::min)
    }

    /// Whether a chunk of this round could gain anything by being packed.
    pub fn wants(&self, round: u32) -> bool {
        match self.settings.compression {
            Compression::Off => false,
            Compression::Lz4 | Compression::Zstd => true,
            Compression::Adaptive => self.packing_pays() || self.sample_is_due() || self.may_capture(round),
        }
    }

    /// Whether pages are best read and compressed.
    pub fn packing_pays(&self) -> bool {
        let best = self.best();
        let best = if self.looks_for_duplicates() { self.hash_ns + (1.0 - self.duplicates) * best } else { best };
        !self.adapts() || self.copy_ns + best < self.page_as_it_is() * WORTH_IT
    }

    /// The compressor to use, if any.
    pub fn compressor(&self) -> Option<Method> {
        match self.settings.compression {
            Compression::Off => None,
            Compression::Lz4 => Some(Method::Lz4),
            Compression::Zstd => Some(Method::Zstd),
            Compression::Adaptive => {
                let best = self.best();
                Method::COMPRESSORS
                    .into_iter()
                    .find(|&method| self.cost(method).time(&self.link) <= best && best < self.page_as_it_is())
            }
        }
    }

    /// A compressor other than the one in use that should be tried on the next page.
    pub fn sample(&self) -> Option<Method> {
        let in_use = self.compressor();
        let most = self.best();
        let due = |method: &Method| Some(*method) != in_use && self.cost(*method).is_due(most);
        (self.adapts() && self.link.is_known()).then(|| Method::COMPRESSORS.into_iter().find(due))?
    }

    /// Whether the next page should be tried.
    pub fn sample_is_due(&self) -> bool {
        self.sample().is_some()
    }

    /// Whether, and why, to send the difference to the last version, and the length from which that would not pay.
    pub fn delta(&self) -> Option<(Why, usize)> {
        let best = self.best();
        let cost = self.cost(Method::Delta);
        let why = match () {
            () if cost.time(&self.link) < best => Why::Best,
            () if cost.is_due(best) => Why::Sample,
            () => return None,
        };
        // A float that is too large becomes the largest integer.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Some((why, (self.link.bytes_in(best) as usize).min(PAGE_SIZE)))
    }

    /// Whether to keep what is sent of this chunk, to send differences to it later.
    pub fn captures(&self, round: u32, chunk: u64) -> bool {
        let pays = self.captured.is_none_or(|gain| gain > self.copy_ns);
        self.may_capture(round) && (pays || scattered(chunk).is_multiple_of(PROBE))
    }

    /// Whether it could pay at all: if every page were sent again and its difference were nothing. It must pay well, since
    /// the first pages are captured on the chance that it does.
    fn may_capture(&self, round: u32) -> bool {
        let cost = self.cost(Method::Delta).ns() + 2.0 * self.copy_ns;
        let margin = if round <= CAPTURE_FROM { FIRST_MARGIN } else { MARGIN };
        round >= CAPTURE_FROM && self.settings.delta_cache_bytes > 0 && self.adapts() && margin * cost < self.best()
    }

    /// A page of a captured chunk was encoded: from its last version in so many nanoseconds and bytes, or that was not
    /// known, or no help.
    pub fn note_captured(&mut self, round: u32, delta: Option<(f64, f64)>) {
        // Nothing was captured before.
        if round <= CAPTURE_FROM {
            return;
        }
        let best = self.best();
        let gain = delta.map_or(0.0, |(ns, bytes)| (best - ns - self.link.time(bytes)).max(0.0));
        let before = self.captured.unwrap_or(best);
        self.captured = Some(before + (gain - before) * CAPTURE_WEIGHT);
    }

    /// Whether to look for a page with the same content, where `class` is a number made of the content.
    pub fn hashes(&self, class: u64) -> bool {
        self.settings.same_as
            && self.adapts()
            && self.best() > self.hash_ns
            && (self.looks_for_duplicates() || is_of_the_class(class))
    }

    fn looks_for_duplicates(&self) -> bool {
        self.duplicates * self.best() > self.hash_ns
    }

    /// A page was looked for in so many nanoseconds, and found or not.
    pub fn note_hashed(&mut self, class: u64, ns: f64, found: bool) {
        self.hash_ns = smoothed(self.hash_ns, ns, DUPLICATE_WEIGHT);
        // Of other classes, some pages were sent without being noted.
        if is_of_the_class(class) {
            self.duplicates += (f64::from(u8::from(found)) - self.duplicates) * DUPLICATE_WEIGHT;
        }
    }

    /// A page was encoded in so many nanoseconds and bytes.
    pub fn note(&mut self, method: Method, why: Why, ns: f64, bytes: f64) {
        let best = self.best();
        let cost = &mut self.costs[method as usize];
        match why {
            Why::Best => cost.used(ns, bytes),
            Why::Sample => cost.sampled(ns, bytes, &self.link, best),
        }
    }

    /// A page was read in so many nanoseconds.
    pub fn note_read(&mut self, ns: f64) {
        self.copy_ns = smoothed(self.copy_ns, ns, DUPLICATE_WEIGHT);
    }

    /// Pages went by, however they were sent.
    pub fn passed(&mut self, pages: u32) {
        self.costs.iter_mut().for_each(|cost| cost.passed(pages));
    }

    /// Bytes were handed to the socket.
    pub fn sent(&mut self, bytes: u64, elapsed: Duration) {
        if self.link.note(bytes as f64, elapsed.as_secs_f64() * 1e9) {
            self.costs.iter_mut().for_each(Cost::reconsider);
        }
    }

    /// Whether so many saved bytes are worth going on with a chunk of which so many pages are not yet read.
    pub fn is_worth_finishing(&self, saved: usize, left: usize) -> bool {
        !self.adapts() || self.packing_pays() || self.link.time(saved as f64) > self.copy_ns * left as f64
    }

    /// The time of a page that took so many nanoseconds and came out at so many bytes.
    pub fn time(&self, ns: f64, bytes: usize) -> f64 {
        ns + self.link.time(bytes as f64)
    }
}

fn is_of_the_class(class: u64) -> bool {
    class.is_multiple_of(CONTENT_CLASSES)
}

/// A number that looks random, made of another.
fn scattered(number: u64) -> u64 {
    number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32
}
