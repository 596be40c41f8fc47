//! How many distinct pages the guest writes while a round lasts.
//!
//! What a round of some length finds dirty is one point of a curve. A second one, far to its left, comes from the pages sent
//! since the sample before: how many of them are dirty again after some milliseconds, as if all of the round had been sent in
//! that time. Between the two, and beyond, the curve is taken to be a power of the time: flat for a working set written over
//! and over, straight for a guest that writes ever new pages. The next round is shorter if all goes well, so the prediction
//! rests on the left end.
//!
//! Before the first round has sent enough to tell, a sample of RAM does that was armed when it began: the share of it that
//! was written since is that of all RAM, and of what was not sent yet it goes on to tell.
//!
//! Pages sent in a round have had half of it, on average, to be written again; pages that were clean when it began have had
//! all of it. That makes a difference of up to two where the curve is straight: see `whole_time`.

use super::Sample;

/// Points kept of a round: thinned by half whenever they are more.
const POINTS: usize = 32;
/// Pages that must have been sent before a share of them means anything.
const EVIDENCE: f64 = 256.0;
/// Samples within a round that it takes to see a form: 30 ms of it. The first round is looked at more often in the beginning.
const LOOKS: [usize; 2] = [5, 3];
/// Share of a round's dirty pages that it had sent itself, where no round has told yet. The first round sends all.
const REWRITTEN_UNKNOWN: f64 = 0.7;
/// How much the two points must lie apart for the curve between them to mean anything.
const APART: f64 = 1.5;
/// The power where nothing tells it: between a working set and ever new pages.
const POWER_UNKNOWN: f64 = 0.5;
/// Share of a round after which its own points count, and not those of the round before.
const YOUNG: f64 = 0.15;
/// Share of a round's pages whose weight the guess has that is made before any of them was sent. Tuned.
const GUESS_WEIGHT: f64 = 0.2;
/// That guess: the share of pages sent that will be written again, in the first round, and in later ones, whose pages were
/// written before. Tuned.
const GUESS: [f64; 2] = [0.15, 0.5];
/// How far the share of pages written again may grow until the round ends.
const MOST_GROWTH: f64 = 4.0;

/// Pages of the sample that it takes for a share of them to mean anything: 48 are 7 points in a hundred.
const PROBED: u64 = 48;
/// The share of the sample below which what it stands for is cold: one page in fifty.
const COLD: f64 = 0.02;
/// How long, in seconds, a sample must have been watched for its cold to be believed: guests pause for less.
const WATCHED: f64 = 0.2;
/// Looks at the sample that are remembered.
const PROBES: usize = 64;

/// The sample of RAM, at one look.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
struct Probe {
    /// Since it was armed.
    seconds: f64,
    /// Its pages that no lane had taken.
    pages: f64,
    /// The share of those that was written since.
    written: f64,
    /// The share of those that was zero.
    zero: f64,
}

#[derive(Clone, Copy, PartialEq, Debug, Default)]
struct Point {
    seconds: f64,
    sent: f64,
    dirty: f64,
}

/// The curve of one round: so many distinct pages found after this time, growing with this power of it.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Power {
    seconds: f64,
    pages: f64,
    power: Option<f64>,
}

/// Pages sent between two samples, and those of them dirty at the second.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
struct Fresh {
    pages: f64,
    dirty: f64,
    /// The sum of pages times the time between the samples.
    page_seconds: f64,
}

/// The curve as far as it is known.
#[derive(Clone, Debug, Default)]
pub(super) struct Curve {
    ram: f64,
    round: u32,
    round_pages: f64,
    points: Vec<Point>,
    probes: Vec<Probe>,
    fresh: Fresh,
    last_ns: u64,
    rewritten: Option<f64>,
    now: Option<Power>,
    before: Option<Power>,
}

impl Curve {
    /// Takes in a sample.
    pub fn observe(&mut self, sample: &Sample) {
        let pages = sample.round_pages as f64;
        self.ram = self.ram.max(pages);
        if sample.round != self.round {
            self.before =
                self.now.take().map(|now| Power { power: now.power.or_else(|| self.power()), ..now }).or(self.before);
            self.round = sample.round;
            self.points.clear();
            self.probes.clear();
            self.points.push(Point::default());
            self.fresh = Fresh::default();
            self.last_ns = 0;
        }
        self.round_pages = pages;
        let between = sample.round_ns.saturating_sub(self.last_ns) as f64 / 1e9;
        self.last_ns = sample.round_ns;
        self.fresh.pages += sample.fresh_pages as f64;
        self.fresh.dirty += sample.fresh_dirty_pages.min(sample.fresh_pages) as f64;
        self.fresh.page_seconds += sample.fresh_pages as f64 * between;
        self.probe(sample);
        self.note(Point {
            seconds: sample.round_ns as f64 / 1e9,
            sent: sample.round_pages.saturating_sub(sample.left_pages) as f64,
            dirty: sample.dirty_pages as f64,
        });
        if sample.round_over && sample.round > 1 && sample.dirty_pages > 0 {
            self.rewritten = Some((sample.rewritten_pages as f64 / sample.dirty_pages as f64).min(1.0));
        }
        self.now = self.read();
    }

    fn probe(&mut self, sample: &Sample) {
        if sample.probe_pages < PROBED || sample.probe_ns == 0 || self.round > 1 {
            self.probes.clear();
            return;
        }
        if self.probes.len() >= PROBES {
            self.probes.remove(0);
        }
        let pages = sample.probe_pages as f64;
        self.probes.push(Probe {
            seconds: sample.probe_ns as f64 / 1e9,
            pages,
            written: (sample.probe_dirty_pages as f64 / pages).min(1.0),
            zero: (sample.probe_zero_pages as f64 / pages).min(1.0),
        });
    }

    fn note(&mut self, point: Point) {
        match self.points.last_mut() {
            // Two looks at one instant: the later one counts.
            Some(last) if last.seconds >= point.seconds && last.seconds > 0.0 => *last = point,
            _ => self.points.push(point),
        }
        if self.points.len() > POINTS {
            let last = self.points.len() - 1;
            let mut index = 0;
            self.points.retain(|_| {
                index += 1;
                (index - 1) % 2 == 0 || index - 1 == last
            });
        }
    }

    /// Enough was seen in this round to leave it: a sample of what it has not sent, or what became of what it has.
    pub fn is_evident(&self) -> bool {
        !self.probes.is_empty() || self.is_seasoned()
    }

    /// Enough was sent in this round to tell what it does, and how fast.
    pub fn is_seasoned(&self) -> bool {
        let sent = self.points.last().map_or(0.0, |point| point.sent);
        let looks = self.points.len() > LOOKS[usize::from(self.round > 1)];
        sent >= self.round_pages || (looks && sent >= EVIDENCE.max(self.round_pages * YOUNG))
    }

    /// Share of the pages sent lately that adds to the dirty ones.
    pub fn marginal(&self) -> f64 {
        let Some(last) = self.points.last() else { return 0.0 };
        let window = self
            .points
            .iter()
            .rev()
            .find(|point| point.seconds <= last.seconds * 0.75 && last.sent - point.sent >= EVIDENCE)
            .copied()
            .unwrap_or_default();
        let sent = last.sent - window.sent;
        if sent <= 0.0 { 0.0 } else { ((last.dirty - window.dirty) / sent).clamp(0.0, 1.0) }
    }

    /// Dirty pages at this round's end, which is `seconds` and `left` pages away.
    pub fn at_round_end(&self, left: f64, seconds: f64) -> f64 {
        let Some(last) = self.points.last() else { return 0.0 };
        (last.dirty + left * self.share_of_left(seconds)).min(self.ram.max(last.dirty))
    }

    /// Share of the pages left in this round that will be written again within the `seconds` that it takes to send them.
    ///
    /// What was seen so far says little of the rest of RAM while little was sent, so it is mixed with a guess; and a part of
    /// RAM that was hot lately says no more than all that was sent.
    /// The sample of what is left is a better guess.
    pub fn share_of_left(&self, seconds: f64) -> f64 {
        let Some(last) = self.points.last() else { return 0.0 };
        let overall = if last.sent > 0.0 { (last.dirty / last.sent).min(1.0) } else { 0.0 };
        // The share grows as the pages sent first get their time to be written.
        let growth = if last.seconds > 0.0 {
            (1.0 + self.power().unwrap_or(POWER_UNKNOWN) * seconds / (2.0 * last.seconds)).min(MOST_GROWTH)
        } else {
            1.0
        };
        let seen = (f64::midpoint(self.marginal(), overall) * growth).min(1.0);
        let guess = self.probed_share(seconds).filter(|_| !self.is_seasoned());
        let share = self.guessed(seen, guess.unwrap_or(GUESS[usize::from(self.round > 1)]));
        share.min(self.most_of_left(seconds))
    }

    /// What the sample shows of the pages left: at least the share that was written already, where there will be more time for
    /// them than it has had. How much more will be written is not known so early, and it is the least that is hoped for.
    fn probed_share(&self, seconds: f64) -> Option<f64> {
        let probe = self.probes.last()?;
        // Half of the time, on average, is what a page has after it was sent.
        let shorter = (seconds / 2.0 / probe.seconds).min(1.0);
        Some(probe.written * shorter.powf(self.probed_power().unwrap_or(POWER_UNKNOWN)))
    }

    /// What was `seen` of the pages sent in this round, mixed with the `guess` that was made before any was.
    pub fn guessed(&self, seen: f64, guess: f64) -> f64 {
        let sent = self.points.last().map_or(0.0, |point| point.sent);
        let weight = GUESS_WEIGHT * self.round_pages;
        if sent + weight <= 0.0 { guess } else { (seen * sent + guess * weight) / (sent + weight) }
    }

    /// Dirty pages at the end of another round, of `seconds`, hoping for the best: a round that disappoints can be left
    /// early, and one never begun teaches nothing.
    pub fn after_round(&self, seconds: f64) -> f64 {
        self.like_the_last(seconds, 1.0)
    }

    /// Distinct pages written within `seconds`, all pages being clean at their start.
    pub fn distinct(&self, seconds: f64) -> f64 {
        self.like_the_last(seconds, self.whole_time())
    }

    /// Share of the written pages that the guest comes back to soon.
    ///
    /// Rounds after the first tell which of their own pages they found written again. Before that, all of them.
    pub fn comes_back(&self) -> f64 {
        self.rewritten.unwrap_or(1.0)
    }

    /// What a round like the last one would find, if it took `seconds`, times `more`.
    fn like_the_last(&self, seconds: f64, more: f64) -> f64 {
        let Some(known) = self.known() else { return 0.0 };
        let power = self.power().unwrap_or(POWER_UNKNOWN);
        (known.pages * more * (seconds / known.seconds).powf(power)).clamp(0.0, self.ram)
    }

    /// How many more pages are found where each had all of the time, and not the half of it.
    fn whole_time(&self) -> f64 {
        1.0 + self.power().unwrap_or(POWER_UNKNOWN)
    }

    /// The most that can be expected, where the sample has been watched for as long as the round will take and shows the pages left
    /// to be cold: no more of them will be written after they are sent. Where it shows more, it says less than what became of the
    /// pages sent.
    fn most_of_left(&self, seconds: f64) -> f64 {
        let long = |probe: &&Probe| probe.seconds >= seconds.max(WATCHED) && self.is_seasoned();
        let cold = self.probes.last().filter(long).filter(|probe| probe.written <= COLD);
        // One page more than was seen: of few, none is no proof.
        cold.map_or(1.0, |probe| probe.written + 1.0 / probe.pages)
    }

    /// Share of the pages left in this round that are zero, where a sample tells.
    pub fn zero_share_of_left(&self) -> Option<f64> {
        self.probes.last().map(|probe| probe.zero)
    }

    fn is_young(&self) -> bool {
        self.points.last().map_or(0.0, |point| point.sent) < self.round_pages * YOUNG
    }

    fn known(&self) -> Option<Power> {
        if self.is_young() { self.before.or(self.probed()).or(self.now) } else { self.now.or(self.before) }
    }

    /// The power of the time with which the curve grows.
    fn power(&self) -> Option<f64> {
        let of = |known: Option<Power>| known.and_then(|known| known.power);
        let probed = if self.is_young() { of(self.probed()) } else { None };
        probed.or(of(self.now)).or(of(self.before))
    }

    /// What the sample tells of all RAM.
    fn probed(&self) -> Option<Power> {
        let probe = self.probes.last()?;
        Some(Power { seconds: probe.seconds, pages: probe.written * self.ram, power: self.probed_power() })
    }

    /// The power of the time with which the written share of the sample grew over the last half of its age, or more.
    fn probed_power(&self) -> Option<f64> {
        let late = self.probes.last()?;
        let early = self.probes.iter().rev().find(|early| early.seconds <= late.seconds / 2.0)?;
        // One page more on both sides: where few are written, few more are no news.
        let of = |probe: &Probe| probe.written + 1.0 / probe.pages;
        Some(((of(late) / of(early)).ln() / (late.seconds / early.seconds).ln()).clamp(0.0, 1.0))
    }

    /// What this round tells.
    fn read(&self) -> Option<Power> {
        let last = self.points.last().filter(|point| point.seconds > 0.0 && point.sent > 0.0)?;
        let rewritten = if self.round <= 1 { 1.0 } else { self.rewritten.unwrap_or(REWRITTEN_UNKNOWN) };
        let all = |point: &Point| {
            (point.dirty * (rewritten * self.round_pages / point.sent + (1.0 - rewritten))).min(self.ram)
        };
        let (seconds, pages) = (last.seconds, all(last));
        let left_end = if self.fresh.pages > 0.0 {
            let share = self.fresh.dirty / self.fresh.pages;
            Some((self.fresh.page_seconds / self.fresh.pages, share * self.round_pages))
        } else {
            let half = self.points.iter().rev().find(|point| point.seconds <= seconds / 2.0 && point.sent > 0.0);
            half.map(|half| (half.seconds, all(half)))
        };
        let power = left_end.filter(|(early, _)| *early > 0.0 && seconds >= early * APART).map(|(early, few)| {
            // One page more on both sides: where few are written, few more are no news.
            let power = ((pages + 1.0) / (few + 1.0)).ln() / (seconds / early).ln();
            power.clamp(0.0, 1.0)
        });
        Some(Power { seconds, pages, power })
    }
}
