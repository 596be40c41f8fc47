//! What the lanes carry, measured while they are busy.

use std::time::Duration;

use switchover_precopy::rounds::SentSoFar;
use switchover_wire::clock::Nanos;

use super::nanos;

/// How long the lanes are measured before their rate is believed.
const MEASURE_FOR: Duration = Duration::from_millis(20);

/// What of a round is measured at its end, where it was shorter than that.
const LEAST_MEASURED: Duration = Duration::from_millis(1);

/// Data pages of a round from which on it is measured by itself. Of fewer, what was found is what it takes to begin.
const LEAST_PAGES: u64 = 256;

/// The weight of a new measurement of the rate against all before it.
const NEW_RATE_WEIGHT: f64 = 0.4;

/// The lanes' rate, measured while they are busy.
#[derive(Debug)]
pub struct Meter {
    /// Until when the lanes' time has been counted.
    since: Nanos,
    /// Time that counts, since the last measurement.
    busy_ns: u64,
    /// Bytes that the destination had taken at the last measurement.
    taken: u64,
    rate: f64,
    /// Nothing was measured of this round yet. Rounds may differ in what bounds them, link or processor, as their encodings do:
    /// what one measures counts nothing in the next.
    fresh: bool,
    /// The rate was taken from less time than it should be, and is taken again at the next look.
    preliminary: bool,
    /// Bytes and data pages handed to the lanes at the last measurement.
    sent: (u64, u64),
    /// Bytes of a data page over the last stretches; 0 before anything was measured.
    pub page_bytes: f64,
}

impl Meter {
    pub fn new(now: Nanos) -> Self {
        let (taken, sent) = (0, (0, 0));
        Self { since: now, busy_ns: 0, taken, rate: 0.0, fresh: true, preliminary: false, sent, page_bytes: 0.0 }
    }

    pub fn begin(&mut self, now: Nanos, sent: &SentSoFar) {
        (self.since, self.busy_ns, self.taken, self.fresh) = (now, 0, sent.taken_bytes, true);
        self.sent = (sent.wire_bytes, sent.data_pages);
    }

    /// Within a round, or at its end: the time since the last call was spent sending. Of a round that was too short to be
    /// acknowledged, what was sent counts. `round` is what had been sent when it began.
    pub fn measure(&mut self, now: Nanos, so_far: &SentSoFar, round: &SentSoFar, over: bool) {
        let taken = so_far.taken_bytes;
        let (sent, pages) = (so_far.wire_bytes - round.wire_bytes, so_far.data_pages - round.data_pages);
        if self.fresh && self.rate > 0.0 && pages < LEAST_PAGES {
            return;
        }
        self.busy_ns += now.since(self.since);
        self.since = now;
        let bytes = if over && self.fresh { sent } else { taken.saturating_sub(self.taken) };
        let due = self.busy_ns >= nanos(MEASURE_FOR) || (self.fresh && over && self.busy_ns >= nanos(LEAST_MEASURED));
        // Spans are milliseconds to seconds, and bytes below 2^52.
        let rate = bytes as f64 * 1e9 / self.busy_ns.max(1) as f64;
        if !due {
            // Better than nothing, until there is a measurement.
            if (self.rate == 0.0 || self.preliminary) && bytes > 0 {
                (self.rate, self.preliminary) = (rate, true);
            }
            return;
        }
        (self.busy_ns, self.taken, self.preliminary) = (0, taken, false);
        self.rate = if self.fresh { rate } else { self.rate + NEW_RATE_WEIGHT * (rate - self.rate) };
        let (bytes, data_pages) = (so_far.wire_bytes - self.sent.0, so_far.data_pages - self.sent.1);
        self.sent = (so_far.wire_bytes, so_far.data_pages);
        // Frames of zero pages are a few bytes long, and not counted apart. Of a few pages nothing can be told.
        if data_pages >= LEAST_PAGES {
            let page = bytes as f64 / data_pages as f64;
            let old = if self.fresh || self.page_bytes == 0.0 { page } else { self.page_bytes };
            self.page_bytes = old + NEW_RATE_WEIGHT * (page - old);
        }
        self.fresh = false;
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is positive and below 2^63")]
    pub fn bytes_per_second(&self) -> u64 {
        self.rate as u64
    }
}
