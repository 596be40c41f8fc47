//! How far a migration has come, for those who watch it.

use switchover_pager::stats::WaitCounts;

use crate::comparison::Comparison;
use crate::failure::FailureView;
use crate::report::{EncodingCounts, Interruption, PhaseSpan};
use crate::status::MigrationStatus;

/// A look at a migration. Byte counts are those of this side.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Where it stands.
    pub status: MigrationStatus,
    /// Why it failed or why its link is lost, and where that leaves the guest, as sentences.
    pub error: Option<String>,
    /// The same, as a caller acts on it.
    pub failure: Option<FailureView>,
    /// Bytes of RAM.
    pub ram_total: u64,
    /// Bytes that crossed all lanes, headers included.
    pub transferred: u64,
    /// Bytes of RAM that the source has not sent, or the destination not received.
    pub remaining: u64,
    /// Pages that went as zero.
    pub zero_pages: u64,
    /// Pages that went with their bytes.
    pub normal_pages: u64,
    /// Pages that the destination asked for.
    pub postcopy_requests: u64,
    /// From the start until now, or until the end.
    pub total_time_ns: u64,
    /// From the start until the destination was prepared.
    pub setup_time_ns: Option<u64>,
    /// Bytes that crossed all lanes before the guest was paused for the handoff.
    pub precopy_bytes: u64,
    /// Bytes that crossed them while no vCPU ran, as far as this side can tell: from the pause, or the news of it, until the guest
    /// ran on the destination, or the news of that.
    pub downtime_bytes: u64,
    /// Bytes that crossed them since then.
    pub postcopy_bytes: u64,
    /// Bytes that crossed the bulk lanes, both ways.
    pub bulk_bytes: u64,
    /// Rounds of pre-copy begun.
    pub rounds: u32,
    /// Pages that the guest newly wrote a second, over the last round.
    pub dirty_pages_per_second: u64,
    /// The blackout that the monitor expects of a handoff now.
    pub expected_downtime_ns: Option<u64>,
    /// The share of time for which vCPUs are kept from running, in percent.
    pub throttle_percent: u8,
    /// The blackout as this side can know it: from the last source exit to the first destination entry where the
    /// two are known on one clock; else, on the source, until it was told that the guest runs.
    pub downtime_ns: Option<u64>,
    /// Destination: how long faults whose pages were asked for took, once there can be any.
    pub waits: Option<WaitCounts>,
    /// Source: how pages were encoded before the handoff, once that is known of all lanes.
    pub encodings: Option<EncodingCounts>,
    /// Statuses and steps so far, in order of their start, in nanoseconds of this side's `CLOCK_MONOTONIC`.
    pub phases: Vec<PhaseSpan>,
    /// Where the link was lost after the commit, in order.
    pub interruptions: Vec<Interruption>,
    /// What came of comparing guest memory, where that was asked for.
    pub comparison: Option<Comparison>,
}
