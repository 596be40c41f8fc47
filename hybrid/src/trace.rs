//! A recorded migration, for playing it again at other bandwidths, delays and limits.
//!
//! Of its pre-copy, a trace is the guest seen through its dirty log: a sequence of epochs, each with its length and the set of
//! pages that were written in it. Those of a recorded run are its rounds. What the monitor saw and decided then goes along, for
//! comparison. Of its post-copy, a trace is the guest's faults ([`drain`]). One of the two may be missing.
//!
//! It is one JSON object:
//!
//! | field | |
//! |---|---|
//! | `schema` | [`SCHEMA`] |
//! | `name` | what was recorded, for tables |
//! | `ram_pages` | pages of RAM |
//! | `zero_pages` | pages that were zero in the first round |
//! | `bytes_per_data_page` | wire bytes of a page that was not |
//! | `handoff_ns` | what a handoff cost besides pages |
//! | `epochs` | `duration_ns`; `written`, and `read` where it is known: [`switchover_wire::bitmap`] as base64, of `ram_pages` bits in whole words; `writes_per_second`: how often each of the pages was written |
//! | `recorded` | `rounds`, `samples`, `decisions` as in the report |
//! | `drain` | where there was post-copy: `vcpus`, `held`, `missing` (a bitmap as above; absent: all of RAM), `zero_pages`, `entry_ns`, `faults` as in the report |
//!
//! The first version had no `drain`; its traces are read too.
//!
//! # Example
//! ```
//! use switchover_hybrid::trace::{Epoch, Trace};
//!
//! let mut trace = Trace::new("two pages of 128, again and again", 128);
//! trace.epochs.push(Epoch::new(5_000_000, &[0b11, 0], &[], None));
//! let text = trace.to_json().unwrap();
//! assert_eq!(Trace::from_json(&text).unwrap(), trace);
//! ```

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use switchover_wire::bitmap;
use thiserror::Error;

pub mod drain;

use self::drain::Drain;
use crate::monitor::Sample;
use crate::report::{DecisionReport, PrecopyReport, RoundReport, SideReport};

/// The format's name and version.
pub const SCHEMA: &str = "switchover.trace/v2";
/// The version before, which is read as well.
const FIRST_SCHEMA: &str = "switchover.trace/v1";

/// Text that is read: a day of rounds, and as many faults as are kept.
const MOST_TEXT: usize = 1 << 30;
/// RAM that a trace may be of: 16 TiB.
const MOST_PAGES: u64 = 1 << 32;
/// Writes a second of one page that are told apart: more are as good as always.
const MOST_WRITES: f64 = 10_000.0;

/// A guest as its dirty log shows it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Trace {
    /// [`SCHEMA`].
    pub schema: String,
    /// What was recorded.
    pub name: String,
    /// Pages of RAM.
    pub ram_pages: u64,
    /// Pages that were zero in the first round: they cost a bit each.
    pub zero_pages: u64,
    /// Wire bytes of a page that was not zero, on average.
    pub bytes_per_data_page: f64,
    /// What a handoff cost besides pages.
    pub handoff_ns: u64,
    /// What the guest wrote, in the order of time. It begins again where a replay outlasts them.
    pub epochs: Vec<Epoch>,
    /// What was seen and decided when it was recorded.
    #[serde(default)]
    pub recorded: Option<Recorded>,
    /// Its post-copy.
    #[serde(default)]
    pub drain: Option<Drain>,
}

/// What tells whether the rest can be read.
#[derive(Deserialize)]
struct Header {
    schema: Option<String>,
}

/// A stretch of the guest's time.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Epoch {
    /// Its length.
    pub duration_ns: u64,
    /// The pages written in it: a bitmap in base64.
    pub written: String,
    /// The pages read in it, where that is known: a dirty log does not tell.
    #[serde(default)]
    pub read: Option<String>,
    /// How often each of the pages was written. Absent: once.
    #[serde(default)]
    pub writes_per_second: Option<f64>,
}

/// The run that a trace was made from.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Recorded {
    /// Its rounds, without their bitmaps: those are the epochs.
    pub rounds: Vec<RoundReport>,
    /// What its monitor saw.
    pub samples: Vec<Sample>,
    /// What it decided.
    pub decisions: Vec<DecisionReport>,
}

/// No trace could be made, read or written.
#[derive(Debug, Error)]
pub enum TraceError {
    /// The report is of a migration without pre-copy, or of the destination.
    #[error("there is no pre-copy in this report: record a migration in mode precopy or hybrid, at its source")]
    NoPrecopy,
    /// The report is of a migration without post-copy, of the source, or of faults that were not recorded.
    #[error(
        "there are no faults in this report: record a migration in mode postcopy or hybrid, with faults switched on"
    )]
    NoFaults,
    /// The text is too long to be read.
    #[error("this trace has {0} bytes, and no more than {MOST_TEXT} are read")]
    TooLong(usize),
    /// The rounds have no bitmaps.
    #[error("the report's rounds have no bitmaps: record the migration with bitmaps switched on")]
    NoBitmaps,
    /// The text is no JSON, or not of these fields.
    #[error("this is no trace: {0}; `switchover bench --trace FILE` writes one")]
    Json(#[from] serde_json::Error),
    /// It is of another format.
    #[error("this trace is in the format `{0}`, and `{SCHEMA}` is the one that can be read")]
    Schema(String),
    /// Its fields do not go together.
    #[error("this trace cannot be played: {0}")]
    Unsound(String),
}

impl Trace {
    /// A trace of a guest with `ram_pages`, none of them zero, without epochs.
    #[must_use]
    pub fn new(name: impl Into<String>, ram_pages: u64) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            name: name.into(),
            ram_pages,
            zero_pages: 0,
            bytes_per_data_page: crate::monitor::costs::RAW_PAGE,
            handoff_ns: 0,
            epochs: Vec::new(),
            recorded: None,
            drain: None,
        }
    }

    /// The trace of a migration: of what its source told of its rounds, and its destination of its faults. `vcpus`: the guest's.
    ///
    /// # Errors
    /// When neither was recorded.
    pub fn from_migration(
        name: impl Into<String>,
        source: &SideReport,
        destination: Option<&SideReport>,
        vcpus: u32,
    ) -> Result<Self, TraceError> {
        let name = name.into();
        let rounds = Self::from_report(name.clone(), source);
        let drain = destination.map_or(Err(TraceError::NoFaults), |there| Drain::from_reports(source, there, vcpus));
        let mut trace = match (rounds, &drain) {
            (Err(TraceError::NoPrecopy | TraceError::NoBitmaps), Ok(_)) => Self::new(name, source.ram_pages),
            (rounds, _) => rounds?,
        };
        trace.drain = match drain {
            Err(TraceError::NoFaults) => None,
            drain => Some(drain?),
        };
        trace.check()?;
        Ok(trace)
    }

    /// The trace of a source's migration.
    ///
    /// # Errors
    /// When it had no pre-copy, or its rounds' bitmaps were not recorded.
    pub fn from_report(name: impl Into<String>, report: &SideReport) -> Result<Self, TraceError> {
        let precopy = report.precopy.as_ref().ok_or(TraceError::NoPrecopy)?;
        Self::from_precopy(name, report.ram_pages, precopy)
    }

    /// The trace of a pre-copy of `ram_pages`.
    ///
    /// # Errors
    /// When its rounds' bitmaps were not recorded, or are none.
    pub fn from_precopy(name: impl Into<String>, ram_pages: u64, report: &PrecopyReport) -> Result<Self, TraceError> {
        let mut trace = Self::new(name, ram_pages);
        for round in &report.rounds {
            // A round that the handoff cut short has no bitmap.
            let Some(written) = &round.dirtied else { continue };
            let duration_ns = round.end_ns.saturating_sub(round.start_ns);
            if duration_ns > 0 {
                let writes_per_second = Some(writes_per_second(round.round, duration_ns, &report.samples));
                trace.epochs.push(Epoch { duration_ns, written: written.clone(), read: None, writes_per_second });
            }
        }
        if trace.epochs.is_empty() {
            return Err(TraceError::NoBitmaps);
        }
        trace.zero_pages = report.rounds.first().map_or(0, |round| round.zero_pages).min(ram_pages);
        let (bytes, pages) = report.rounds.iter().fold((0_u64, 0_u64), |(bytes, pages), round| {
            (bytes.saturating_add(round.wire_bytes), pages.saturating_add(round.data_pages))
        });
        if pages > 0 {
            trace.bytes_per_data_page = bytes as f64 / pages as f64;
        }
        trace.handoff_ns = report.samples.last().map_or(0, |sample| sample.handoff_ns);
        trace.recorded = Some(Recorded {
            rounds: report.rounds.iter().map(|round| RoundReport { dirtied: None, ..round.clone() }).collect(),
            samples: report.samples.clone(),
            decisions: report.decisions.clone(),
        });
        trace.check()?;
        Ok(trace)
    }

    /// The trace that a file holds.
    ///
    /// # Errors
    /// When the text is no trace, or not one that can be played.
    pub fn from_json(text: &str) -> Result<Self, TraceError> {
        if text.len() > MOST_TEXT {
            return Err(TraceError::TooLong(text.len()));
        }
        match serde_json::from_str::<Header>(text)?.schema.as_deref() {
            Some(SCHEMA | FIRST_SCHEMA) => {}
            other => return Err(TraceError::Schema(other.unwrap_or("none").to_owned())),
        }
        let trace: Self = serde_json::from_str(text)?;
        trace.check()?;
        Ok(trace)
    }

    /// The text for a file.
    ///
    /// # Errors
    /// When a number in it cannot be written.
    pub fn to_json(&self) -> Result<String, TraceError> {
        Ok(serde_json::to_string(self)?)
    }

    /// Words of each bitmap.
    #[must_use]
    pub fn words(&self) -> usize {
        usize::try_from(self.ram_pages.div_ceil(64)).unwrap_or(usize::MAX)
    }

    /// The pages written in `epoch`.
    ///
    /// # Errors
    /// When its text is no bitmap of this RAM.
    pub fn written(&self, epoch: &Epoch) -> Result<Vec<u64>, TraceError> {
        self.decode(&epoch.written)
    }

    /// The pages read in `epoch`, as far as is known.
    ///
    /// # Errors
    /// When its text is no bitmap of this RAM.
    pub fn read(&self, epoch: &Epoch) -> Result<Vec<u64>, TraceError> {
        epoch.read.as_deref().map_or_else(|| Ok(vec![0; self.words()]), |text| self.decode(text))
    }

    fn decode(&self, text: &str) -> Result<Vec<u64>, TraceError> {
        let unsound = |reason: String| TraceError::Unsound(format!("a bitmap of it: {reason}"));
        let bytes = BASE64.decode(text).map_err(|error| unsound(error.to_string()))?;
        let mut words = bitmap::decode(&bytes, self.words()).map_err(|error| unsound(error.to_string()))?;
        let used = self.ram_pages % 64;
        if let (Some(last), 1..) = (words.last_mut(), used) {
            *last &= (1 << used) - 1;
        }
        Ok(words)
    }

    fn check(&self) -> Result<(), TraceError> {
        let unsound = |reason: &str| Err(TraceError::Unsound(reason.to_owned()));
        if self.ram_pages == 0 || self.ram_pages > MOST_PAGES {
            return unsound("its RAM has no pages, or more than 16 TiB of them");
        }
        if self.zero_pages > self.ram_pages {
            return unsound("it has more zero pages than pages");
        }
        if !self.bytes_per_data_page.is_finite() || self.bytes_per_data_page <= 0.0 {
            return unsound("its pages have no bytes");
        }
        if self.epochs.is_empty() && self.drain.is_none() {
            return unsound("it has neither epochs nor faults");
        }
        if let Some(drain) = &self.drain {
            drain.check(self)?;
        }
        for epoch in &self.epochs {
            if epoch.duration_ns == 0 {
                return unsound("an epoch of it has no length");
            }
            if epoch.writes_per_second.is_some_and(|rate| !rate.is_finite() || rate < 0.0) {
                return unsound("an epoch of it has an impossible rate of writes");
            }
            self.written(epoch)?;
            self.read(epoch)?;
        }
        Ok(())
    }
}

impl Epoch {
    /// An epoch of these bitmaps' words; `read` is empty where it is not known.
    #[must_use]
    pub fn new(duration_ns: u64, written: &[u64], read: &[u64], writes_per_second: Option<f64>) -> Self {
        let encode = |words: &[u64]| BASE64.encode(bitmap::encode(words));
        Self {
            duration_ns,
            written: encode(written),
            read: (!read.is_empty()).then(|| encode(read)),
            writes_per_second,
        }
    }
}

/// How often each page that `round` found dirty was written, from the form of its dirty pages over time.
///
/// Pages sent evenly over the round, each written at rate r since, are t − (1 − e^(−rt))/r of them dirty at time t: those of
/// half the round are a quarter of all where r is small, and half where it is large.
fn writes_per_second(round: u32, duration_ns: u64, samples: &[Sample]) -> f64 {
    let seconds = duration_ns as f64 / 1e9;
    let of_round: Vec<_> = samples.iter().filter(|sample| sample.round == round).collect();
    let half = of_round.iter().rev().find(|sample| sample.round_ns <= duration_ns / 2 && sample.round_ns > 0);
    let (Some(half), Some(last)) = (half, of_round.last()) else { return 1.0 / seconds };
    if last.dirty_pages == 0 || last.round_ns <= half.round_ns {
        return 1.0 / seconds;
    }
    let (at, end) = (half.round_ns as f64 / 1e9, last.round_ns as f64 / 1e9);
    let seen = half.dirty_pages as f64 / last.dirty_pages as f64;
    let dirty = |rate: f64, time: f64| time + (-rate * time).exp_m1() / rate;
    let (mut low, mut high) = (0.1 / seconds, MOST_WRITES.max(1.0 / seconds));
    for _ in 0..60 {
        let middle = (low * high).sqrt();
        if dirty(middle, at) / dirty(middle, end) < seen { low = middle } else { high = middle }
    }
    high
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> PrecopyReport {
        let bitmap = BASE64.encode(bitmap::encode(&[0b1011, 1]));
        let rounds = vec![
            RoundReport {
                round: 1,
                start_ns: 1_000,
                end_ns: 100_001_000,
                pages: 70,
                data_pages: 40,
                zero_pages: 30,
                wire_bytes: 40 * 4100,
                dirtied_pages: 4,
                dirtied: Some(bitmap),
                ..RoundReport::default()
            },
            RoundReport { round: 2, start_ns: 100_001_000, end_ns: 100_002_000, ..RoundReport::default() },
        ];
        let samples = vec![Sample { round: 1, handoff_ns: 77, ..Sample::default() }];
        PrecopyReport { rounds, samples, ..PrecopyReport::default() }
    }

    #[test]
    fn a_run_becomes_a_trace_and_survives_being_written_down() {
        let trace = Trace::from_precopy("run", 70, &report()).unwrap();
        assert_eq!(trace.epochs.len(), 1, "the round cut short has no bitmap");
        assert_eq!(trace.epochs[0].duration_ns, 100_000_000);
        assert_eq!(trace.written(&trace.epochs[0]).unwrap(), [0b1011, 1]);
        assert_eq!((trace.zero_pages, trace.handoff_ns), (30, 77));
        assert!((trace.bytes_per_data_page - 4100.0).abs() < 1e-9);
        assert!(trace.recorded.as_ref().unwrap().rounds.iter().all(|round| round.dirtied.is_none()));
        assert_eq!(Trace::from_json(&trace.to_json().unwrap()).unwrap(), trace);
    }

    #[test]
    fn a_run_without_bitmaps_is_refused() {
        let mut report = report();
        report.rounds[0].dirtied = None;
        assert!(matches!(Trace::from_precopy("run", 70, &report), Err(TraceError::NoBitmaps)));
    }

    #[test]
    fn what_cannot_be_played_is_refused() {
        let sound = Trace::from_precopy("run", 70, &report()).unwrap();
        type Break = (&'static str, fn(&mut Trace));
        let broken: [Break; 7] = [
            ("16 TiB", |trace| trace.ram_pages = u64::MAX),
            ("bitmap", |trace| trace.ram_pages = 500),
            ("zero pages", |trace| trace.zero_pages = 71),
            ("no bytes", |trace| trace.bytes_per_data_page = 0.0),
            ("epochs", |trace| trace.epochs.clear()),
            ("no length", |trace| trace.epochs[0].duration_ns = 0),
            ("bitmap", |trace| trace.epochs[0].written = "*".to_owned()),
        ];
        for (word, breaks) in broken {
            let mut trace = sound.clone();
            breaks(&mut trace);
            let error = Trace::from_json(&trace.to_json().unwrap()).unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
        assert!(matches!(Trace::from_json(r#"{"schema":"switchover.trace/v9"}"#), Err(TraceError::Schema(_))));
        assert!(matches!(Trace::from_json("[]"), Err(TraceError::Json(_) | TraceError::Schema(_))));
        assert!(matches!(Trace::from_json("{"), Err(TraceError::Json(_))));
    }

    #[test]
    fn a_trace_of_the_first_version_is_read() {
        let trace = Trace::from_precopy("run", 70, &report()).unwrap();
        let old = trace.to_json().unwrap().replace(SCHEMA, FIRST_SCHEMA).replace(",\"drain\":null", "");
        assert!(old.contains("trace/v1") && !old.contains("drain"));
        assert_eq!(Trace::from_json(&old).unwrap().epochs, trace.epochs);
    }

    #[test]
    fn pages_past_the_end_of_ram_are_not_there() {
        let mut trace = Trace::new("tail", 65);
        trace.epochs.push(Epoch::new(1, &[0, u64::MAX], &[], None));
        assert_eq!(trace.written(&trace.epochs[0]).unwrap(), [0, 1]);
    }

    #[test]
    fn the_rate_of_writes_is_found_again() {
        let (end, rate) = (2.0_f64, 3.0_f64);
        let dirty = |time: f64| 1e6 * (time + (-rate * time).exp_m1() / rate) / end;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let sample = |step: u32| Sample {
            round: 1,
            round_ns: u64::from(step) * 100_000_000,
            dirty_pages: dirty(f64::from(step) / 10.0) as u64,
            ..Sample::default()
        };
        let samples: Vec<_> = (1..=20).map(sample).collect();
        let found = writes_per_second(1, 2_000_000_000, &samples);
        assert!((found - rate).abs() < 0.1, "{found}");
    }
}
