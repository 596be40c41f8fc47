//! The answer to `query-migrate`.

use serde_json::{Map, Value, json};
use switchover_hybrid::progress::Progress;
use switchover_hybrid::status::MigrationStatus;
use switchover_wire::address::Address;
use switchover_wire::types::PAGE_SIZE_U64;

use super::controller::MigrationView;

const NANOS_A_MILLISECOND: u64 = 1_000_000;

/// `view` in QEMU's fields and units: times in milliseconds, counts of bytes and pages. What QEMU has no field for is
/// under a name of its own: `x-switchover-downtime-ns`, because a blackout may be shorter than a millisecond.
#[must_use]
pub fn migration(view: Option<&MigrationView>) -> Value {
    let mut answer = Map::new();
    let mut put = |name: &str, value: Value| answer.insert(name.to_owned(), value);
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
    }
    Value::Object(answer)
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

/// QEMU's `MigrationStats`. What crossed before the handoff counts as pre-copy's, everything else as post-copy's: the
/// state of the guest and what a stop-and-copy sends last, too. Rates are of the guest here, while it is here.
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
        "downtime-bytes": 0,
        "postcopy-bytes": progress.transferred.saturating_sub(progress.precopy_bytes),
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
            bulk_bytes: 19_000,
            rounds: 3,
            dirty_pages_per_second: 70,
            expected_downtime_ns: Some(8_900_000),
            throttle_percent: 30,
        };
        MigrationView { progress, listening_at: None }
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
            ("/ram/postcopy-bytes", json!(5000)),
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
        assert_eq!(migration(Some(&failed)), json!({"status": "failed", "error-desc": "nobody there"}));
    }

    #[test]
    fn a_destination_says_where_it_listens() {
        let mut waiting = view(MigrationStatus::Setup);
        waiting.listening_at = Some("tcp:[::1]:4444".parse().unwrap());
        assert_eq!(
            migration(Some(&waiting)),
            json!({"status": "setup", "socket-address": [{"type": "inet", "host": "::1", "port": "4444"}]})
        );
        waiting.listening_at = Some("unix:/run/m".parse().unwrap());
        assert_eq!(migration(Some(&waiting))["socket-address"], json!([{"type": "unix", "path": "/run/m"}]));
    }
}
