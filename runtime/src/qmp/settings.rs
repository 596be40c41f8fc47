//! What capabilities and parameters mean to a migration.
//!
//! | `x-switchover-mode` | `postcopy-ram` | the migration |
//! |---|---|---|
//! | `precopy` (default) | off | rounds until the rest fits into `downtime-limit`; it fails where that never happens |
//! | `precopy` | on | the same rounds, until they converge or `migrate-start-postcopy` hands off |
//! | `postcopy` | either | no rounds; it waits in `active` for `migrate-start-postcopy` |
//! | `hybrid` | either | rounds while they pay, then whichever handoff costs the guest less |
//!
//! `x-switchover-compression` says what pages are packed with. Where it is `adaptive`, its default, `multifd` with
//! `multifd-compression: zstd` means zstd. Differences to what was sent before are used with `xbzrle`, whatever the
//! compression, and without it where the compression is adaptive; both in a cache of `xbzrle-cache-size`. References to
//! pages already sent are used unless the compression is off, or `x-switchover-same-as` is.

use std::time::Duration;

use switchover_hybrid::monitor::{Limits, Mode};
use switchover_hybrid::settings::{Bandwidth, Settings, Throttling};
use switchover_precopy::pack::{Compression, PackSettings};

use super::capabilities::Capabilities;
use super::parameters::{MultifdCompression, Parameters};

/// zstd's own default level.
const ZSTD_DEFAULT_LEVEL: i32 = 3;

/// The settings of a migration that begins now. What is the machine's own its controller knows.
#[must_use]
pub fn settings(capabilities: &Capabilities, parameters: &Parameters) -> Settings {
    Settings {
        limits: limits(parameters),
        postcopy: capabilities.has("postcopy-ram") || parameters.mode != Mode::Precopy,
        fault_lanes: parameters.fault_lanes,
        bulk_lanes: if capabilities.has("multifd") { parameters.multifd_channels } else { 1 },
        bandwidth: bandwidth(parameters),
        packing: packing(capabilities, parameters),
        throttling: throttling(capabilities, parameters),
        pause_before_switchover: capabilities.has("pause-before-switchover"),
        checksums: parameters.checksums,
        verify_memory: parameters.verify_memory,
        record_bitmaps: parameters.record_bitmaps,
        record_faults: parameters.record_faults,
        collapse: parameters.collapse,
        silence: silence(parameters),
        ..Settings::default()
    }
}

/// The limits that the parameters set.
#[must_use]
pub fn limits(parameters: &Parameters) -> Limits {
    Limits {
        mode: parameters.mode,
        downtime_limit: Duration::from_millis(parameters.downtime_limit_ms),
        blackout_target: Duration::from_millis(parameters.blackout_ms),
        time_budget: Duration::from_millis(parameters.time_budget_ms),
        round_budget: parameters.max_rounds,
    }
}

/// The bounds that the parameters set.
#[must_use]
pub const fn bandwidth(parameters: &Parameters) -> Bandwidth {
    Bandwidth { precopy: parameters.max_bandwidth, postcopy: parameters.max_postcopy_bandwidth }
}

/// How long the other side may be silent.
#[must_use]
pub const fn silence(parameters: &Parameters) -> Duration {
    Duration::from_millis(parameters.silence_ms)
}

fn packing(capabilities: &Capabilities, parameters: &Parameters) -> PackSettings {
    let by_multifd = capabilities.has("multifd") && parameters.multifd_compression == MultifdCompression::Zstd;
    let compression = match parameters.compression {
        Compression::Adaptive if by_multifd => Compression::Zstd,
        chosen => chosen,
    };
    let delta_cache_bytes = if capabilities.has("xbzrle") {
        parameters.xbzrle_cache_size
    } else if compression == Compression::Adaptive {
        PackSettings::AS_RAM_ALLOWS
    } else {
        0
    };
    PackSettings {
        compression,
        zstd_level: match parameters.multifd_zstd_level {
            0 => ZSTD_DEFAULT_LEVEL,
            level => level.into(),
        },
        delta_cache_bytes,
        same_as: parameters.same_as && compression != Compression::Off,
    }
}

fn throttling(capabilities: &Capabilities, parameters: &Parameters) -> Throttling {
    if capabilities.has("auto-converge") {
        Throttling::AutoConverge {
            initial: parameters.cpu_throttle_initial,
            increment: parameters.cpu_throttle_increment,
            most: parameters.max_cpu_throttle,
        }
    } else if capabilities.has("dirty-limit") {
        Throttling::DirtyLimit { bytes_per_second: parameters.vcpu_dirty_limit.saturating_mul(1 << 20) }
    } else {
        Throttling::Off
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::arguments::Arguments;
    use super::*;

    fn with(on: &[&str], parameters: &Parameters) -> Settings {
        let list: Vec<_> = on.iter().map(|name| json!({"capability": name, "state": true})).collect();
        let arguments = json!({ "capabilities": list }).as_object().unwrap().clone();
        settings(&Capabilities::default().set(Arguments::new(arguments)).unwrap(), parameters)
    }

    #[test]
    fn mode_and_capability_together_say_what_may_end_it() {
        for (mode, on, postcopy) in [
            (Mode::Precopy, &[][..], false),
            (Mode::Precopy, &["postcopy-ram"], true),
            (Mode::Postcopy, &[], true),
            (Mode::Postcopy, &["postcopy-ram"], true),
            (Mode::Hybrid, &[], true),
            (Mode::Hybrid, &["postcopy-ram"], true),
        ] {
            let settings = with(on, &Parameters { mode, ..Parameters::default() });
            assert_eq!((settings.limits.mode, settings.postcopy), (mode, postcopy), "{mode:?} {on:?}");
        }
    }

    #[test]
    fn bounds_keep_their_units() {
        let parameters = Parameters {
            max_bandwidth: 11,
            max_postcopy_bandwidth: 12,
            downtime_limit_ms: 13,
            blackout_ms: 14,
            time_budget_ms: 15,
            max_rounds: 16,
            ..Parameters::default()
        };
        let settings = with(&[], &parameters);
        assert_eq!(settings.bandwidth, Bandwidth { precopy: 11, postcopy: 12 });
        let limits = settings.limits;
        assert_eq!(
            [limits.downtime_limit, limits.blackout_target, limits.time_budget].map(|time| time.as_millis()),
            [13, 14, 15]
        );
        assert_eq!(limits.round_budget, 16);
    }

    #[test]
    fn differences_come_with_xbzrle_or_with_choosing_freely() {
        for (compression, on, cache, same_as) in [
            (Compression::Adaptive, &[][..], PackSettings::AS_RAM_ALLOWS, true),
            (Compression::Adaptive, &["xbzrle"], 8192, true),
            (Compression::Off, &[], 0, false),
            (Compression::Off, &["xbzrle"], 8192, false),
            (Compression::Lz4, &[], 0, true),
            (Compression::Zstd, &["xbzrle"], 8192, true),
        ] {
            let parameters = Parameters { compression, xbzrle_cache_size: 8192, ..Parameters::default() };
            let packing = with(on, &parameters).packing;
            assert_eq!(packing.compression, compression);
            assert_eq!((packing.delta_cache_bytes, packing.same_as), (cache, same_as), "{compression:?} {on:?}");
        }
    }

    #[test]
    fn multifds_compression_counts_with_multifd_where_nothing_else_was_asked_for() {
        for (compression, on, then) in [
            (Compression::Adaptive, &["multifd"][..], Compression::Zstd),
            (Compression::Adaptive, &[], Compression::Adaptive),
            (Compression::Lz4, &["multifd"], Compression::Lz4),
        ] {
            let multifd_compression = MultifdCompression::Zstd;
            let parameters = Parameters { compression, multifd_compression, ..Parameters::default() };
            assert_eq!(with(on, &parameters).packing.compression, then, "{compression:?} {on:?}");
        }
        let level = |multifd_zstd_level| {
            with(&[], &Parameters { multifd_zstd_level, ..Parameters::default() }).packing.zstd_level
        };
        assert_eq!((level(0), level(20)), (3, 20));
    }

    #[test]
    fn vcpus_are_slowed_down_in_one_way_or_none() {
        let parameters = Parameters { vcpu_dirty_limit: 3, max_cpu_throttle: 50, ..Parameters::default() };
        assert_eq!(with(&[], &parameters).throttling, Throttling::Off);
        assert_eq!(
            with(&["auto-converge"], &parameters).throttling,
            Throttling::AutoConverge { initial: 20, increment: 10, most: 50 }
        );
        let limited = Throttling::DirtyLimit { bytes_per_second: 3 << 20 };
        assert_eq!(with(&["dirty-limit"], &parameters).throttling, limited);
        let most = Parameters { vcpu_dirty_limit: u64::MAX, ..parameters };
        assert_eq!(with(&["dirty-limit"], &most).throttling, Throttling::DirtyLimit { bytes_per_second: u64::MAX });
    }

    #[test]
    fn pausing_lanes_and_bitmaps_are_as_asked() {
        let parameters = Parameters {
            record_bitmaps: true,
            record_faults: true,
            collapse: false,
            multifd_channels: 7,
            fault_lanes: 3,
            silence_ms: 1_500,
            ..Parameters::default()
        };
        let settings = with(&["pause-before-switchover", "multifd"], &parameters);
        assert!(settings.pause_before_switchover && settings.record_bitmaps && settings.record_faults);
        assert_eq!((settings.bulk_lanes, settings.fault_lanes, settings.collapse), (7, 3, false));
        assert_eq!(settings.silence, Duration::from_millis(1_500));
        let settings = with(&[], &Parameters::default());
        assert!(!settings.pause_before_switchover && !settings.record_bitmaps && !settings.record_faults);
        assert_eq!((settings.bulk_lanes, settings.fault_lanes, settings.collapse), (1, 1, true));
        assert_eq!(settings.silence, Settings::default().silence);
    }
}
