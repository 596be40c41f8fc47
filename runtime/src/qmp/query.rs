//! The answer to `query-migrate`.

use serde_json::{Map, Value, json};
use switchover_hybrid::comparison::Stretch;
use switchover_hybrid::progress::Progress;
use switchover_hybrid::report::{EncodingCounts, Interruption, PhaseSpan};
use switchover_hybrid::status::MigrationStatus;
use switchover_wire::address::Address;
use switchover_wire::types::PAGE_SIZE_U64;

use super::controller::MigrationView;

const NANOS_A_MILLISECOND: u64 = 1_000_000;

/// What the answer takes from elsewhere than the migration itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Surroundings {
    /// vCPUs of the machine.
    pub vcpus: u32,
    /// Why its guest cannot be moved away now.
    pub blockers: Vec<String>,
    /// `xbzrle-cache-size`, where the capability `xbzrle` is on.
    pub xbzrle_cache_size: Option<u64>,
}

/// `view` in QEMU's fields and units: times in milliseconds, counts of bytes and pages. What QEMU has no field for is
/// under a name of its own: `x-switchover-downtime-ns`, because a blackout may be shorter than a millisecond;
/// `x-switchover-phases` and `x-switchover-interruptions`, in nanoseconds of this side's `CLOCK_MONOTONIC`.
#[must_use]
pub fn migration(view: Option<&MigrationView>, around: &Surroundings) -> Value {
    let mut answer = Map::new();
    let mut put = |name: &str, value: Value| answer.insert(name.to_owned(), value);
    if !around.blockers.is_empty() && view.is_none_or(|view| view.listening_at.is_none()) {
        put("blocked-reasons", json!(around.blockers));
    }
    let Some(MigrationView { progress, listening_at }) = view else { return Value::Object(answer) };
    if progress.status == MigrationStatus::None {
        return Value::Object(answer);
    }
    put("status", json!(progress.status));
    if let Some(error) = &progress.error {
        put("error-desc", json!(error));
    }
    if let Some(address) = listening_at {
        put("socket-address", json!([socket_address(address)]));
    }
    if is_measured(progress) {
        put("total-time", milliseconds(progress.total_time_ns));
        if let Some(setup) = progress.setup_time_ns {
            put("setup-time", milliseconds(setup));
        }
        if let Some(downtime) = progress.downtime_ns {
            put("downtime", milliseconds(downtime));
            put("x-switchover-downtime-ns", json!(downtime));
        }
        if is_copying(progress.status) {
            if let Some(expected) = progress.expected_downtime_ns {
                put("expected-downtime", milliseconds(expected));
            }
            if progress.throttle_percent > 0 {
                put("cpu-throttle-percentage", json!(progress.throttle_percent));
            }
        }
        put("ram", ram(progress));
        if let (Some(size), Some(encodings)) = (around.xbzrle_cache_size, &progress.encodings) {
            put("xbzrle-cache", xbzrle(size, encodings));
        }
    }
    if let Some(waits) = &progress.waits {
        if let Some(mean) = waits.mean_ns() {
            put("postcopy-latency", json!(mean));
        }
        put("postcopy-latency-dist", json!(waits.buckets));
        // Of one vCPU alone it is known that its faults are all there are.
        if around.vcpus == 1 {
            put("postcopy-blocktime", milliseconds(waits.total_ns));
            put("postcopy-vcpu-blocktime", json!([waits.total_ns / NANOS_A_MILLISECOND]));
        }
    }
    put("x-switchover-phases", progress.phases.iter().map(phase).collect());
    if !progress.interruptions.is_empty() {
        put("x-switchover-interruptions", progress.interruptions.iter().map(interruption).collect());
    }
    if let Some(comparison) = &progress.comparison {
        put("x-switchover-memory-matches", json!(comparison.matches()));
        if !comparison.differing.is_empty() {
            put("x-switchover-memory-differs", comparison.differing.iter().map(stretch).collect());
        }
    }
    Value::Object(answer)
}

/// Where memory differs.
fn stretch(stretch: &Stretch) -> Value {
    json!({ "first-page": stretch.first_page, "pages": stretch.pages })
}

/// A stretch of time. One that lasts has no end.
fn phase(phase: &PhaseSpan) -> Value {
    let mut told = json!({ "name": phase.name, "start-ns": phase.start_ns });
    if let Some(end) = phase.end_ns {
        told["end-ns"] = json!(end);
    }
    told
}

/// A link that was lost after the handoff. One that was not joined again has no such instant.
fn interruption(interruption: &Interruption) -> Value {
    let Interruption { lost_ns, joined_ns, attempts, reason } = interruption;
    let mut told = json!({ "lost-ns": lost_ns, "failed-attempts": attempts, "reason": reason });
    if let Some(joined) = joined_ns {
        told["joined-ns"] = json!(joined);
    }
    told
}

/// QEMU's `XBZRLECacheStats`, over all of pre-copy.
fn xbzrle(cache_size: u64, encodings: &EncodingCounts) -> Value {
    let looked_for = encodings.delta + encodings.delta_misses + encodings.delta_overflows;
    let ratio = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    json!({
        "cache-size": cache_size,
        "bytes": encodings.delta_bytes,
        "pages": encodings.delta,
        "cache-miss": encodings.delta_misses,
        "cache-miss-rate": ratio(encodings.delta_misses, looked_for),
        "encoding-rate": ratio(encodings.delta.saturating_mul(PAGE_SIZE_U64), encodings.delta_bytes),
        "overflow": encodings.delta_overflows,
    })
}

/// Whether the migration has come far enough for its counts to mean something.
const fn is_measured(progress: &Progress) -> bool {
    !matches!(progress.status, MigrationStatus::Setup | MigrationStatus::Cancelled)
        && (!matches!(progress.status, MigrationStatus::Failed) || progress.transferred > 0)
}

/// Whether memory is copied while the guest runs here.
const fn is_copying(status: MigrationStatus) -> bool {
    matches!(status, MigrationStatus::Active | MigrationStatus::PreSwitchover | MigrationStatus::Device)
}

fn milliseconds(nanos: u64) -> Value {
    json!(nanos / NANOS_A_MILLISECOND)
}

/// QEMU's `MigrationStats`. What crossed while no vCPU ran is downtime's: the state of the guest, and what a stop-and-copy sends
/// last. Rates are of the guest here, while it is here.
fn ram(progress: &Progress) -> Value {
    let pages = progress.normal_pages.saturating_add(progress.zero_pages);
    json!({
        "transferred": progress.transferred,
        "remaining": progress.remaining,
        "total": progress.ram_total,
        "duplicate": progress.zero_pages,
        "normal": progress.normal_pages,
        "normal-bytes": progress.normal_pages.saturating_mul(PAGE_SIZE_U64),
        "dirty-pages-rate": if is_copying(progress.status) { progress.dirty_pages_per_second } else { 0 },
        "mbps": per_second(progress.transferred.saturating_mul(8), progress.total_time_ns) / 1e6,
        "dirty-sync-count": progress.rounds,
        "postcopy-requests": progress.postcopy_requests,
        "page-size": PAGE_SIZE_U64,
        "multifd-bytes": progress.bulk_bytes,
        // QEMU's is a whole number.
        "pages-per-second": u128::from(pages) * 1_000_000_000 / u128::from(progress.total_time_ns.max(1)),
        "precopy-bytes": progress.precopy_bytes,
        "downtime-bytes": progress.downtime_bytes,
        "postcopy-bytes": progress.postcopy_bytes,
        "dirty-sync-missed-zero-copy": 0,
    })
}

fn per_second(count: u64, nanos: u64) -> f64 {
    if nanos == 0 { 0.0 } else { count as f64 * 1e9 / nanos as f64 }
}

/// QEMU's `SocketAddress`. Its port is a string.
fn socket_address(address: &Address) -> Value {
    match address {
        Address::Tcp { host, port } => json!({ "type": "inet", "host": host, "port": port.to_string() }),
        Address::Unix(path) => json!({ "type": "unix", "path": path.to_string_lossy() }),
    }
}

#[cfg(test)]
mod tests {
    use switchover_pager::stats::WaitCounts;

    use super::*;

    fn view(status: MigrationStatus) -> MigrationView {
        let progress = Progress {
            status,
            error: None,
            failure: None,
            ram_total: 8 * PAGE_SIZE_U64,
            transferred: 20_000,
            remaining: 3 * PAGE_SIZE_U64,
            zero_pages: 1,
            normal_pages: 4,
            postcopy_requests: 2,
            total_time_ns: 2_000_000_000,
            setup_time_ns: Some(7_900_000),
            downtime_ns: Some(1_234_567),
            precopy_bytes: 15_000,
            downtime_bytes: 2_000,
            postcopy_bytes: 3_000,
            bulk_bytes: 19_000,
            rounds: 3,
            dirty_pages_per_second: 70,
            expected_downtime_ns: Some(8_900_000),
            throttle_percent: 30,
            waits: None,
            encodings: None,
            phases: vec![PhaseSpan { name: "setup".to_owned(), start_ns: 5, end_ns: Some(9) }],
            interruptions: Vec::new(),
            comparison: None,
        };
        MigrationView { progress, listening_at: None }
    }

    fn migration(view: Option<&MigrationView>) -> Value {
        super::migration(view, &Surroundings { vcpus: 2, ..Surroundings::default() })
    }

    #[test]
    fn before_anything_the_answer_is_empty() {
        assert_eq!(migration(None), json!({}));
        assert_eq!(migration(Some(&view(MigrationStatus::None))), json!({}));
    }

    #[test]
    fn units_are_qemus() {
        let answer = migration(Some(&view(MigrationStatus::PostcopyActive)));
        for (pointer, value) in [
            ("/status", json!("postcopy-active")),
            ("/total-time", json!(2000)),
            ("/setup-time", json!(7)),
            ("/downtime", json!(1)),
            ("/x-switchover-downtime-ns", json!(1_234_567)),
            ("/ram/normal-bytes", json!(16384)),
            ("/ram/duplicate", json!(1)),
            ("/ram/remaining", json!(12288)),
            ("/ram/postcopy-requests", json!(2)),
            ("/ram/pages-per-second", json!(2)),
            ("/ram/mbps", json!(0.08)),
            ("/ram/dirty-sync-count", json!(3)),
            ("/ram/precopy-bytes", json!(15000)),
            ("/ram/downtime-bytes", json!(2000)),
            ("/ram/postcopy-bytes", json!(3000)),
            ("/x-switchover-phases", json!([{"name": "setup", "start-ns": 5, "end-ns": 9}])),
            ("/ram/multifd-bytes", json!(19000)),
            ("/ram/dirty-pages-rate", json!(0)),
        ] {
            assert_eq!(answer.pointer(pointer), Some(&value), "{pointer}");
        }
        assert!(answer.get("expected-downtime").is_none() && answer.get("cpu-throttle-percentage").is_none());
    }

    #[test]
    fn what_is_expected_and_throttled_is_told_while_memory_is_copied() {
        let mut active = view(MigrationStatus::Active);
        let answer = migration(Some(&active));
        assert_eq!((&answer["expected-downtime"], &answer["cpu-throttle-percentage"]), (&json!(8), &json!(30)));
        assert_eq!(answer["ram"]["dirty-pages-rate"], 70);
        active.progress.throttle_percent = 0;
        assert!(migration(Some(&active)).get("cpu-throttle-percentage").is_none());
    }

    #[test]
    fn a_failure_has_its_reason() {
        let mut failed = view(MigrationStatus::Failed);
        failed.progress.error = Some("nobody there".to_owned());
        failed.progress.transferred = 0;
        failed.progress.phases.clear();
        let told = json!({"status": "failed", "error-desc": "nobody there", "x-switchover-phases": []});
        assert_eq!(migration(Some(&failed)), told);
    }

    #[test]
    fn latencies_are_the_destinations() {
        let mut waits = WaitCounts::default();
        waits.record(1_500_000);
        waits.record(3_000_000);
        let mut there = view(MigrationStatus::PostcopyActive);
        assert!(migration(Some(&there)).get("postcopy-latency-dist").is_none());
        there.progress.waits = Some(waits);
        let told = migration(Some(&there));
        assert_eq!(told["postcopy-latency"], 2_250_000);
        let mut dist = vec![0; 24];
        (dist[10], dist[11]) = (1, 1);
        assert_eq!(told["postcopy-latency-dist"], json!(dist));
        assert!(told.get("postcopy-blocktime").is_none(), "which vCPU it was is not known");
        let one = Surroundings { vcpus: 1, ..Surroundings::default() };
        let told = super::migration(Some(&there), &one);
        assert_eq!((&told["postcopy-blocktime"], &told["postcopy-vcpu-blocktime"]), (&json!(4), &json!([4])));
    }

    #[test]
    fn a_lost_link_and_what_blocks_a_migration_are_told() {
        let mut paused = view(MigrationStatus::PostcopyPaused);
        let lost = Interruption { lost_ns: 7, joined_ns: Some(9), attempts: 2, reason: "cut".to_owned() };
        paused.progress.interruptions = vec![lost.clone(), Interruption { joined_ns: None, attempts: 0, ..lost }];
        assert_eq!(
            migration(Some(&paused))["x-switchover-interruptions"],
            json!([
                {"lost-ns": 7, "joined-ns": 9, "failed-attempts": 2, "reason": "cut"},
                {"lost-ns": 7, "failed-attempts": 0, "reason": "cut"},
            ])
        );
        let around = Surroundings { blockers: vec!["held".to_owned()], ..Surroundings::default() };
        assert_eq!(super::migration(None, &around), json!({"blocked-reasons": ["held"]}));
        assert_eq!(super::migration(Some(&paused), &around)["blocked-reasons"], json!(["held"]));
    }

    #[test]
    fn differences_are_told_with_their_capability() {
        let mut source = view(MigrationStatus::Completed);
        source.progress.encodings = Some(EncodingCounts {
            delta: 6,
            delta_bytes: 4096,
            delta_misses: 3,
            delta_overflows: 3,
            ..EncodingCounts::default()
        });
        assert!(migration(Some(&source)).get("xbzrle-cache").is_none());
        let around = Surroundings { xbzrle_cache_size: Some(1 << 20), ..Surroundings::default() };
        assert_eq!(
            super::migration(Some(&source), &around)["xbzrle-cache"],
            json!({
                "cache-size": 1 << 20, "bytes": 4096, "pages": 6, "cache-miss": 3, "cache-miss-rate": 0.25,
                "encoding-rate": 6.0, "overflow": 3,
            })
        );
    }

    #[test]
    fn a_destination_says_where_it_listens() {
        let mut waiting = view(MigrationStatus::Setup);
        waiting.progress.phases.clear();
        waiting.listening_at = Some("tcp:[::1]:4444".parse().unwrap());
        assert_eq!(
            migration(Some(&waiting)),
            json!({
                "status": "setup", "socket-address": [{"type": "inet", "host": "::1", "port": "4444"}],
                "x-switchover-phases": [],
            })
        );
        waiting.listening_at = Some("unix:/run/m".parse().unwrap());
        assert_eq!(migration(Some(&waiting))["socket-address"], json!([{"type": "unix", "path": "/run/m"}]));
    }
}
