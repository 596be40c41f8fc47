//! What one side knows of a migration when it is over, for `switchover bench` and `x-switchover-report`.
//!
//! Every instant is of the side's `CLOCK_MONOTONIC`, in nanoseconds. Instants of two sides compare only where
//! [`SideReport::clock`] says that both read the same host's clock.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2Serializer};
use serde::{Deserialize, Serialize};
use switchover_pager::cpu::CpuTime;
use switchover_pager::destination::DestinationPager;
use switchover_pager::stats::{self, FaultStats, SLICE_NS};
use switchover_pager::trace::{Answer, TracedFault};
use switchover_wire::clock::{HostClock, Nanos};
use thiserror::Error;

use crate::comparison::Comparison;
use crate::failure::FailureView;
use crate::monitor::{Sample, Verdict};
use crate::status::MigrationStatus;

/// Which side a report is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Where the guest came from.
    Source,
    /// Where it went.
    Destination,
}

/// A named stretch of time on one side. `end_ns` is absent for what was cut short.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PhaseSpan {
    /// `setup`, `active`, `device`, `postcopy-active` and so on; `pause`, `save-state`, `load-state` inside them.
    pub name: String,
    /// Its first instant.
    pub start_ns: u64,
    /// Its last.
    pub end_ns: Option<u64>,
}

/// The instants that figures are taken between. All of `CLOCK_MONOTONIC`, in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Instants {
    /// Source: the last vCPU left the guest.
    pub last_exit_ns: Option<u64>,
    /// Source: just before the commit was submitted to the socket. Destination: when it had arrived.
    pub commit_ns: Option<u64>,
    /// Destination: just before the first vCPU entered the guest.
    pub first_entry_ns: Option<u64>,
    /// Destination: the last page was placed.
    pub last_page_ns: Option<u64>,
    /// Source: `Drained` arrived. Destination: its acknowledgement did.
    pub drained_ns: Option<u64>,
}

/// Bytes that crossed one lane, headers included.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LaneBytes {
    /// "control lane 0" and so on.
    pub lane: String,
    /// Written to the socket by this side.
    pub sent: u64,
    /// Read from it by this side.
    pub received: u64,
}

/// The destination's pages by how they came. They add up to all of RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PageClasses {
    /// Here at the handoff, zero or not, and not sent again.
    #[serde(default)]
    pub precopied: u64,
    /// Known to be zero: no bytes crossed the wire.
    pub zero: u64,
    /// Arrived on a bulk lane.
    pub pushed: u64,
    /// Arrived on a fault lane, because a fault asked for them.
    pub requested: u64,
    /// Arrived a second time and were thrown away. Not part of the sum.
    pub discarded: u64,
}

/// Latencies in nanoseconds, as a `HdrHistogram` in V2 format, base64.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EncodedHistogram(pub String);

/// A histogram could not be written or read.
#[derive(Debug, Error)]
#[error("cannot {attempted} a latency histogram: {reason}")]
pub struct HistogramError {
    attempted: &'static str,
    reason: String,
}

impl EncodedHistogram {
    /// `histogram` as text.
    ///
    /// # Errors
    /// When it is too large to be encoded, which none of ours is.
    pub fn encode(histogram: &Histogram<u64>) -> Result<Self, HistogramError> {
        let mut bytes = Vec::new();
        V2Serializer::new()
            .serialize(histogram, &mut bytes)
            .map_err(|error| HistogramError { attempted: "encode", reason: error.to_string() })?;
        Ok(Self(BASE64.encode(bytes)))
    }

    /// The histogram that the text holds.
    ///
    /// # Errors
    /// When the text is not such a histogram.
    pub fn decode(&self) -> Result<Histogram<u64>, HistogramError> {
        let failed = |reason: String| HistogramError { attempted: "decode", reason };
        let bytes = BASE64.decode(&self.0).map_err(|error| failed(error.to_string()))?;
        Deserializer::new().deserialize(&mut bytes.as_slice()).map_err(|error| failed(format!("{error:?}")))
    }
}

/// What the destination's faults cost, as the pager saw them.
///
/// The clock of a fault starts when the pager takes it from the userfaultfd. What came before (the vCPU's exit, the
/// kernel's queueing, the pager's own waking) is not in it: only the guest's own gaps show the whole.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FaultReport {
    /// Faults whose page was asked for over a lane and came as the answer.
    pub remote: u64,
    /// Faults whose page was asked for, but whose pushed copy won.
    pub raced: u64,
    /// Faults whose page was here, or landing, already.
    pub local: u64,
    /// Faults on a page that another fault had asked for already: its arrival woke both. Not timed.
    pub joined: u64,
    /// Remote and raced faults, from taken to woken.
    pub total: EncodedHistogram,
    /// Remote faults, from taken to the request's submission.
    pub queue: EncodedHistogram,
    /// Remote faults, from submission until the last byte of the page had arrived.
    pub wire: EncodedHistogram,
    /// Remote faults, from there until the page was mapped.
    pub place: EncodedHistogram,
    /// Remote faults, the wake-up call.
    pub wake: EncodedHistogram,
    /// Local faults, from taken to woken.
    pub local_total: EncodedHistogram,
}

/// One fault. Written down as an array, for there may be a quarter of a million.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(into = "(u64, u64, Option<u64>, FaultAnswer)", from = "(u64, u64, Option<u64>, FaultAnswer)")]
pub struct FaultRecord {
    /// The number of the page.
    pub page: u64,
    /// When the pager took the fault.
    pub taken_ns: u64,
    /// When it had woken whoever waited, where that is known.
    pub woken_ns: Option<u64>,
    /// How it was answered.
    pub answer: FaultAnswer,
}

/// How a fault was answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultAnswer {
    /// Its page was asked for and came as the answer.
    Remote,
    /// Its page was asked for, but the pushed copy won.
    Raced,
    /// Its page was here, and only had to be mapped.
    Local,
}

impl From<FaultRecord> for (u64, u64, Option<u64>, FaultAnswer) {
    fn from(record: FaultRecord) -> Self {
        (record.page, record.taken_ns, record.woken_ns, record.answer)
    }
}

impl From<(u64, u64, Option<u64>, FaultAnswer)> for FaultRecord {
    fn from((page, taken_ns, woken_ns, answer): (u64, u64, Option<u64>, FaultAnswer)) -> Self {
        Self { page, taken_ns, woken_ns, answer }
    }
}

impl From<TracedFault> for FaultRecord {
    fn from(fault: TracedFault) -> Self {
        let answer = match fault.answer {
            Answer::Remote => FaultAnswer::Remote,
            Answer::Raced => FaultAnswer::Raced,
            Answer::Local => FaultAnswer::Local,
        };
        Self { page: fault.page.0, taken_ns: fault.taken.0, woken_ns: fault.woken.map(|at| at.0), answer }
    }
}

/// Counts per slice of time.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RateSeries {
    /// The first slice's start.
    pub start_ns: u64,
    /// Each slice's length.
    pub slice_ns: u64,
    /// Remote and raced faults taken in each slice.
    pub faults: Vec<u32>,
    /// Non-zero pushed pages placed in each slice.
    pub pushed: Vec<u32>,
}

/// CPU time of the threads that the migration itself ran, the vCPUs' left out.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct CpuSeconds {
    /// In user space.
    pub user: f64,
    /// In the kernel on their behalf.
    pub system: f64,
}

impl From<CpuTime> for CpuSeconds {
    fn from(time: CpuTime) -> Self {
        Self { user: time.user.as_secs_f64(), system: time.system.as_secs_f64() }
    }
}

impl std::ops::AddAssign for CpuSeconds {
    fn add_assign(&mut self, other: Self) {
        self.user += other.user;
        self.system += other.system;
    }
}

/// What pre-copy did; the source's.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct PrecopyReport {
    /// When its first round began.
    pub start_ns: u64,
    /// The rounds that were begun.
    pub rounds: Vec<RoundReport>,
    /// What the monitor decided: at the end of each round, and where it ended one early.
    pub decisions: Vec<DecisionReport>,
    /// What the monitor saw, in the order of time.
    pub samples: Vec<Sample>,
    /// How pages were encoded.
    pub encodings: EncodingCounts,
    /// The highest share of time for which vCPUs were kept from running, in percent.
    pub throttle_percent: u8,
    /// Pages that the handoff left to be sent.
    pub handoff_pages: u64,
    /// Those pages, where the settings ask for the rounds': [`switchover_wire::bitmap`], base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing: Option<String>,
}

/// One round of pre-copy.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RoundReport {
    /// Counted from 1.
    pub round: u32,
    /// Its start.
    pub start_ns: u64,
    /// Its end: every page had been handed to a lane, or the migration went over to the handoff.
    pub end_ns: u64,
    /// Pages that it began with.
    pub pages: u64,
    /// Those that it sent with bytes.
    pub data_pages: u64,
    /// Those that it sent as zero.
    pub zero_pages: u64,
    /// Pages put off to the next round, because an earlier version was still under way.
    pub deferred_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Pages that were written during it.
    pub dirtied_pages: u64,
    /// Those pages, where the settings ask for them: [`switchover_wire::bitmap`], base64.
    pub dirtied: Option<String>,
}

/// A decision of the monitor, and what then happened.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DecisionReport {
    /// When.
    pub at_ns: u64,
    /// In, or at the end of, which round.
    pub round: u32,
    /// What it chose, why, and what it expected.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// Distinct pages that the next round really had.
    pub actual_round_pages: Option<u64>,
    /// How long it really took.
    pub actual_round_ns: Option<u64>,
    /// The blackout that there really was, where this decision led to the handoff and both sides read one clock.
    pub actual_blackout_ns: Option<u64>,
}

/// How many pages went in which encoding before the handoff.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct EncodingCounts {
    /// As they are.
    pub raw: u64,
    /// LZ4.
    pub lz4: u64,
    /// zstd.
    pub zstd: u64,
    /// As a difference to the version that the destination held.
    pub delta: u64,
    /// The bytes of those differences.
    #[serde(default)]
    pub delta_bytes: u64,
    /// Pages whose version at the destination was not kept here, where differences were wanted.
    #[serde(default)]
    pub delta_misses: u64,
    /// Pages whose difference would have saved too little.
    #[serde(default)]
    pub delta_overflows: u64,
    /// As a reference to another page.
    pub same: u64,
    /// Bytes of all these before encoding.
    pub bytes_in: u64,
    /// And after it.
    pub bytes_out: u64,
}

/// One side's report.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SideReport {
    /// Which side.
    pub side: Side,
    /// The migration's name, in hexadecimal.
    pub session: String,
    /// Where it ended, or where it stands.
    pub status: MigrationStatus,
    /// Why it failed, or why its link is lost.
    pub error: Option<String>,
    /// The same, as a caller acts on it.
    #[serde(default)]
    pub failure: Option<FailureView>,
    /// Whose clock the instants are of.
    pub clock: HostClock,
    /// The stretches of time, in order of their start.
    pub phases: Vec<PhaseSpan>,
    /// The instants that figures are taken between.
    pub instants: Instants,
    /// Bytes by lane.
    pub lanes: Vec<LaneBytes>,
    /// Bytes of vCPU and device state.
    pub state_bytes: u64,
    /// Pages of RAM.
    pub ram_pages: u64,
    /// Pages by class; the destination's.
    pub pages: Option<PageClasses>,
    /// Faults; the destination's.
    pub faults: Option<FaultReport>,
    /// Each fault, in the order in which they were answered, where that was asked for; the destination's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fault_trace: Vec<FaultRecord>,
    /// Faults and pushed pages over time; the destination's.
    pub rates: Option<RateSeries>,
    /// CPU time of the migration's threads.
    pub cpu: CpuSeconds,
    /// What pre-copy did, where it ran; the source's.
    #[serde(default)]
    pub precopy: Option<PrecopyReport>,
    /// Where the link was lost after the commit, in order.
    #[serde(default)]
    pub interruptions: Vec<Interruption>,
    /// The guest is complete here, but the link was lost, for this reason, before its source could say that it knows; the
    /// destination's.
    #[serde(default)]
    pub unacknowledged: Option<String>,
    /// What came of comparing guest memory, where that was asked for.
    #[serde(default)]
    pub comparison: Option<Comparison>,
}

/// A link that was lost after the commit.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Interruption {
    /// When this side noticed.
    pub lost_ns: u64,
    /// When pages flowed again; `None` where they never did.
    pub joined_ns: Option<u64>,
    /// Attempts to join it again that failed.
    pub attempts: u32,
    /// Why it was lost.
    pub reason: String,
}

/// The pager's books as a report shows them.
///
/// # Errors
/// When a histogram cannot be encoded.
pub fn fault_report(stats: &FaultStats) -> Result<FaultReport, HistogramError> {
    Ok(FaultReport {
        remote: stats.remote,
        raced: stats.raced,
        local: stats.local,
        joined: stats.joined,
        total: EncodedHistogram::encode(&stats.total)?,
        queue: EncodedHistogram::encode(&stats.queue)?,
        wire: EncodedHistogram::encode(&stats.wire)?,
        place: EncodedHistogram::encode(&stats.place)?,
        wake: EncodedHistogram::encode(&stats.wake)?,
        local_total: EncodedHistogram::encode(&stats.local_total)?,
    })
}

/// Faults and pushed pages over time, from `start` on.
#[must_use]
pub fn rate_series(stats: &FaultStats, pager: &DestinationPager, start: Nanos) -> RateSeries {
    RateSeries {
        start_ns: start.0,
        slice_ns: SLICE_NS,
        faults: stats::RateSeries::merged(std::iter::once(&stats.rate), start),
        pushed: pager.pushed_rate(start),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use switchover_wire::types::PageIndex;

    #[test]
    fn a_histogram_survives_being_written_down() {
        let mut histogram = Histogram::<u64>::new(3).unwrap();
        histogram.record(12_345).unwrap();
        histogram.record(678_901_234).unwrap();
        let read = EncodedHistogram::encode(&histogram).unwrap().decode().unwrap();
        assert_eq!(read, histogram);
    }

    #[test]
    fn a_fault_is_four_words() {
        let fault = TracedFault { page: PageIndex(7), taken: Nanos(8), woken: Some(Nanos(9)), answer: Answer::Remote };
        let written = serde_json::to_string(&FaultRecord::from(fault)).unwrap();
        assert_eq!(written, r#"[7,8,9,"remote"]"#);
        assert_eq!(serde_json::from_str::<FaultRecord>(&written).unwrap(), FaultRecord::from(fault));
    }

    #[test]
    fn what_is_no_histogram_is_refused() {
        assert!(EncodedHistogram("AAAA".to_owned()).decode().is_err());
        assert!(EncodedHistogram("*".to_owned()).decode().is_err());
    }
}
