//! Migration parameters: QEMU's names, and which of them can be set here.

use serde_json::{Map, Value, json};
use switchover_hybrid::monitor::Mode;
use switchover_pager::lane::FAULT_LANES_LIMIT;
use switchover_precopy::pack::Compression;

use super::arguments::Arguments;
use super::given::Given;
use super::refusal::Refusal;

/// The parameters that change something. What each means to a migration is in [`super::settings`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parameters {
    /// Bound on bytes a second before the handoff; 0 means none.
    pub max_bandwidth: u64,
    /// Bound on pushed bytes a second after the handoff; 0 means none.
    pub max_postcopy_bandwidth: u64,
    /// The longest blackout, in milliseconds, that pre-copy may end with.
    pub downtime_limit_ms: u64,
    /// `fault` lanes of a migration.
    pub fault_lanes: u8,
    /// `bulk` lanes of a migration with `multifd`.
    pub multifd_channels: u8,
    /// What lanes compress with where `multifd` is on and nothing else was asked for.
    pub multifd_compression: MultifdCompression,
    /// zstd's level, 0 to 20; 0 means zstd's own default.
    pub multifd_zstd_level: u8,
    /// Bytes of sent pages kept to send differences against. A power of two.
    pub xbzrle_cache_size: u64,
    /// The first share, in percent, for which `auto-converge` keeps vCPUs from running.
    pub cpu_throttle_initial: u8,
    /// What each step adds to it, in percent.
    pub cpu_throttle_increment: u8,
    /// Its ceiling, in percent.
    pub max_cpu_throttle: u8,
    /// What `dirty-limit` lets each vCPU newly write, in MiB a second.
    pub vcpu_dirty_limit: u64,
    /// How the migration may end its pre-copy.
    pub mode: Mode,
    /// The longest blackout, in milliseconds, that the hybrid stops and copies for.
    pub blackout_ms: u64,
    /// Which compression.
    pub compression: Compression,
    /// Whether pages may go as "the same as page X".
    pub same_as: bool,
    /// Whether pages carry checksums on the way.
    pub checksums: bool,
    /// Whether guest memory is compared when it has arrived.
    pub verify_memory: bool,
    /// Rounds in all.
    pub max_rounds: u32,
    /// Time for all rounds together, in milliseconds.
    pub time_budget_ms: u64,
    /// Record each round's bitmap in the report.
    pub record_bitmaps: bool,
    /// Record each fault in the report; the destination's.
    pub record_faults: bool,
    /// Map memory as huge pages once it is complete; the destination's.
    pub collapse: bool,
    /// How long the other side may be silent, in milliseconds, before the link counts as lost.
    pub silence_ms: u64,
    /// The folder of this side's certificates and keys; empty for lanes without TLS.
    pub tls_creds: String,
    /// The name that the destination's certificate must be for; empty for the host of its address.
    pub tls_hostname: String,
    /// Lanes without TLS to and from other hosts.
    pub allow_plain: bool,
    /// Compress the memory of a guest that is saved to a file.
    pub compress_image: bool,
    /// Save a guest to a file while it runs, and let it go on.
    pub live_save: bool,
    /// Run a guest that is restored from a file before its memory is loaded.
    pub lazy_restore: bool,
}

/// QEMU's `multifd-compression`, as far as it is built.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum MultifdCompression {
    /// Left to `x-switchover-compression`.
    #[default]
    None,
    /// zstd.
    Zstd,
}

impl Default for Parameters {
    /// QEMU's defaults; but `max-bandwidth` is unlimited, where QEMU's 128 MiB a second would hold back every fast link.
    fn default() -> Self {
        Self {
            max_bandwidth: 0,
            max_postcopy_bandwidth: 0,
            downtime_limit_ms: 300,
            fault_lanes: 1,
            multifd_channels: 2,
            multifd_compression: MultifdCompression::None,
            multifd_zstd_level: 1,
            xbzrle_cache_size: 64 << 20,
            cpu_throttle_initial: 20,
            cpu_throttle_increment: 10,
            max_cpu_throttle: 99,
            vcpu_dirty_limit: 1,
            mode: Mode::Precopy,
            blackout_ms: 5,
            compression: Compression::Adaptive,
            same_as: true,
            checksums: true,
            verify_memory: false,
            max_rounds: 100,
            time_budget_ms: 120_000,
            record_bitmaps: false,
            record_faults: false,
            collapse: true,
            silence_ms: 5_000,
            tls_creds: String::new(),
            tls_hostname: String::new(),
            allow_plain: false,
            compress_image: false,
            lazy_restore: false,
            live_save: false,
        }
    }
}

/// One parameter that can be set.
struct Entry {
    name: &'static str,
    get: fn(&Parameters) -> Value,
    set: fn(&mut Parameters, &Given<'_>) -> Result<(), Refusal>,
}

/// The longest downtime that QEMU takes.
const MOST_DOWNTIME_MS: u64 = 2_000_000;
/// From a second, below which a busy host is taken for a dead one, to an hour: a link that says nothing for longer is of no use.
const SILENCES: std::ops::RangeInclusive<u64> = 1_000..=3_600_000;
/// Budgets that may be set: from none that would forbid the first round, to more than seven weeks.
const BUDGETS: std::ops::RangeInclusive<u64> = 1..=u32::MAX as u64;

const MODES: [(&str, Mode); 3] = [("precopy", Mode::Precopy), ("postcopy", Mode::Postcopy), ("hybrid", Mode::Hybrid)];
const COMPRESSIONS: [(&str, Compression); 4] = [
    ("off", Compression::Off),
    ("adaptive", Compression::Adaptive),
    ("lz4", Compression::Lz4),
    ("zstd", Compression::Zstd),
];
const MULTIFD_COMPRESSIONS: [(&str, MultifdCompression); 2] =
    [("none", MultifdCompression::None), ("zstd", MultifdCompression::Zstd)];

const SETTABLE: [Entry; 30] = [
    Entry {
        name: "max-bandwidth",
        get: |all| json!(all.max_bandwidth),
        set: |all, given| given.uint64().map(|value| all.max_bandwidth = value),
    },
    Entry {
        name: "max-postcopy-bandwidth",
        get: |all| json!(all.max_postcopy_bandwidth),
        set: |all, given| given.uint64().map(|value| all.max_postcopy_bandwidth = value),
    },
    Entry {
        name: "downtime-limit",
        get: |all| json!(all.downtime_limit_ms),
        set: |all, given| given.within(0..=MOST_DOWNTIME_MS, " ms").map(|value| all.downtime_limit_ms = value),
    },
    Entry {
        name: "multifd-channels",
        get: |all| json!(all.multifd_channels),
        set: |all, given| given.between(1..=255).map(|value| all.multifd_channels = value),
    },
    Entry {
        name: "multifd-compression",
        get: |all| json!(name_of(&MULTIFD_COMPRESSIONS, all.multifd_compression)),
        set: |all, given| {
            if let Some(other @ ("zlib" | "qatzip" | "qpl" | "uadk")) = given.value.as_str() {
                return Err(
                    given.cannot(format_args!("{other} is not built; pages can be compressed with zstd or LZ4"))
                );
            }
            given.one_of(&MULTIFD_COMPRESSIONS).map(|value| all.multifd_compression = value)
        },
    },
    Entry {
        name: "multifd-zstd-level",
        get: |all| json!(all.multifd_zstd_level),
        set: |all, given| given.between(0..=20).map(|value| all.multifd_zstd_level = value),
    },
    Entry {
        name: "xbzrle-cache-size",
        get: |all| json!(all.xbzrle_cache_size),
        set: |all, given| {
            let value = given.uint64()?;
            if value < switchover_wire::types::PAGE_SIZE_U64 || !value.is_power_of_two() {
                return Err(given.expects("a power of two no less than the target page size"));
            }
            all.xbzrle_cache_size = value;
            Ok(())
        },
    },
    Entry {
        name: "cpu-throttle-initial",
        get: |all| json!(all.cpu_throttle_initial),
        set: |all, given| given.percent().map(|value| all.cpu_throttle_initial = value),
    },
    Entry {
        name: "cpu-throttle-increment",
        get: |all| json!(all.cpu_throttle_increment),
        set: |all, given| given.percent().map(|value| all.cpu_throttle_increment = value),
    },
    Entry {
        name: "max-cpu-throttle",
        get: |all| json!(all.max_cpu_throttle),
        set: |all, given| given.percent().map(|value| all.max_cpu_throttle = value),
    },
    Entry {
        name: "vcpu-dirty-limit",
        get: |all| json!(all.vcpu_dirty_limit),
        set: |all, given| {
            let value = given.uint64()?;
            if value == 0 {
                return Err(Refusal::generic("Parameter 'vcpu-dirty-limit' must be greater than 1 MB/s"));
            }
            all.vcpu_dirty_limit = value;
            Ok(())
        },
    },
    Entry {
        name: "x-switchover-mode",
        get: |all| json!(name_of(&MODES, all.mode)),
        set: |all, given| given.one_of(&MODES).map(|value| all.mode = value),
    },
    Entry {
        name: "x-switchover-blackout",
        get: |all| json!(all.blackout_ms),
        set: |all, given| given.within(0..=MOST_DOWNTIME_MS, " ms").map(|value| all.blackout_ms = value),
    },
    Entry {
        name: "x-switchover-compression",
        get: |all| json!(name_of(&COMPRESSIONS, all.compression)),
        set: |all, given| given.one_of(&COMPRESSIONS).map(|value| all.compression = value),
    },
    Entry {
        name: "x-switchover-same-as",
        get: |all| json!(all.same_as),
        set: |all, given| given.boolean().map(|value| all.same_as = value),
    },
    Entry {
        name: "x-switchover-checksums",
        get: |all| json!(all.checksums),
        set: |all, given| given.boolean().map(|value| all.checksums = value),
    },
    Entry {
        name: "x-switchover-verify-memory",
        get: |all| json!(all.verify_memory),
        set: |all, given| given.boolean().map(|value| all.verify_memory = value),
    },
    Entry {
        name: "x-switchover-max-rounds",
        get: |all| json!(all.max_rounds),
        set: |all, given| {
            let value = given.within(BUDGETS, "")?;
            all.max_rounds = u32::try_from(value).unwrap_or(u32::MAX);
            Ok(())
        },
    },
    Entry {
        name: "x-switchover-time-budget",
        get: |all| json!(all.time_budget_ms),
        set: |all, given| given.within(BUDGETS, " ms").map(|value| all.time_budget_ms = value),
    },
    Entry {
        name: "x-switchover-fault-lanes",
        get: |all| json!(all.fault_lanes),
        set: |all, given| given.between(1..=FAULT_LANES_LIMIT).map(|value| all.fault_lanes = value),
    },
    Entry {
        name: "x-switchover-record-bitmaps",
        get: |all| json!(all.record_bitmaps),
        set: |all, given| given.boolean().map(|value| all.record_bitmaps = value),
    },
    Entry {
        name: "x-switchover-record-faults",
        get: |all| json!(all.record_faults),
        set: |all, given| given.boolean().map(|value| all.record_faults = value),
    },
    Entry {
        name: "x-switchover-collapse",
        get: |all| json!(all.collapse),
        set: |all, given| given.boolean().map(|value| all.collapse = value),
    },
    Entry {
        name: "x-switchover-silence",
        get: |all| json!(all.silence_ms),
        set: |all, given| given.within(SILENCES, " ms").map(|value| all.silence_ms = value),
    },
    Entry {
        name: "tls-creds",
        get: |all| json!(all.tls_creds),
        set: |all, given| given.string().map(|value| all.tls_creds = value),
    },
    Entry {
        name: "tls-hostname",
        get: |all| json!(all.tls_hostname),
        set: |all, given| given.string().map(|value| all.tls_hostname = value),
    },
    Entry {
        name: "x-switchover-allow-plain",
        get: |all| json!(all.allow_plain),
        set: |all, given| given.boolean().map(|value| all.allow_plain = value),
    },
    Entry {
        name: "x-switchover-compress-image",
        get: |all| json!(all.compress_image),
        set: |all, given| given.boolean().map(|value| all.compress_image = value),
    },
    Entry {
        name: "x-switchover-live-save",
        get: |all| json!(all.live_save),
        set: |all, given| given.boolean().map(|value| all.live_save = value),
    },
    Entry {
        name: "x-switchover-lazy-restore",
        get: |all| json!(all.lazy_restore),
        set: |all, given| given.boolean().map(|value| all.lazy_restore = value),
    },
];

/// Those that a migration takes along when it begins, and whose names are not QEMU's: changing one under way is refused.
/// QEMU's own are accepted at any time, as QEMU accepts them; where they cannot take effect at once, the next migration
/// has them.
const FIXED_UNDER_WAY: [&str; 11] = [
    "x-switchover-mode",
    "x-switchover-compression",
    "x-switchover-same-as",
    "x-switchover-checksums",
    "x-switchover-verify-memory",
    "x-switchover-fault-lanes",
    "x-switchover-record-bitmaps",
    "x-switchover-record-faults",
    "x-switchover-collapse",
    "x-switchover-compress-image",
    "x-switchover-live-save",
];

const NO_AUTHZ: &str = "every certificate of the CA is let in";
const NO_NETWORK: &str = "this machine has no network card to announce";
const NOT_THIS_COMPRESSION: &str = "pages can be compressed with zstd or LZ4";

/// QEMU's parameters that hold one value here: they may be set to it, and to nothing else.
fn fixed() -> [(&'static str, Value, &'static str); 7] {
    [
        ("mode", json!("normal"), "only normal migrations are built"),
        ("tls-authz", json!(""), NO_AUTHZ),
        ("avail-switchover-bandwidth", json!(0), "what the lanes carry is always measured"),
        ("cpu-throttle-tailslow", json!(false), "the last step is as large as the others"),
        ("throttle-trigger-threshold", json!(50), "vCPUs are slowed down when a round does not shrink"),
        ("x-vcpu-dirty-limit-period", json!(1000), "a limit is held all the time, not by the period"),
        ("zero-page-detection", json!("multifd"), "every lane always looks for zero pages"),
    ]
}

/// QEMU's parameters that cannot be set at all, and why.
const REFUSED: [(&str, &str); 10] = [
    ("announce-initial", NO_NETWORK),
    ("announce-max", NO_NETWORK),
    ("announce-rounds", NO_NETWORK),
    ("announce-step", NO_NETWORK),
    ("block-bitmap-mapping", "this machine has no block devices"),
    ("direct-io", "a file is written past the page cache wherever its file system allows that"),
    ("multifd-qatzip-level", NOT_THIS_COMPRESSION),
    ("multifd-zlib-level", NOT_THIS_COMPRESSION),
    ("x-checkpoint-delay", "COLO is not built"),
    ("x-rdma-chunk-size", "there is no RDMA transport"),
];

impl Parameters {
    /// These after `migrate-set-parameters` with these arguments: all of what it asks for, or nothing.
    ///
    /// # Errors
    /// When one is unknown, mistyped, out of bounds, or would change nothing if it were accepted.
    pub fn set(&self, arguments: Arguments) -> Result<Self, Refusal> {
        let mut after = self.clone();
        for (name, value) in arguments.rest() {
            let given = Given { name: &name, value: &value };
            match SETTABLE.iter().find(|entry| entry.name == name) {
                Some(entry) => (entry.set)(&mut after, &given)?,
                None => refuse_unless_unchanged(&given)?,
            }
        }
        if after.max_cpu_throttle < after.cpu_throttle_initial {
            let desc = "Parameter 'max-cpu-throttle' expects an integer in the range of cpu-throttle-initial to 99";
            return Err(Refusal::generic(desc));
        }
        Ok(after)
    }

    /// Refuses a change to `after` where a migration under way could not heed it and its client would not expect so.
    ///
    /// # Errors
    /// When there is such a change.
    pub fn check_under_way(&self, after: &Self) -> Result<(), Refusal> {
        let changed = |entry: &&Entry| FIXED_UNDER_WAY.contains(&entry.name) && (entry.get)(self) != (entry.get)(after);
        match SETTABLE.iter().find(changed) {
            None => Ok(()),
            Some(Entry { name, .. }) => Err(Refusal::generic(format_args!(
                "Parameter '{name}' cannot be changed while a migration is under way: it holds from its beginning"
            ))),
        }
    }

    /// Refuses a change to `after` that the link which is open now could not heed.
    ///
    /// # Errors
    /// When there is such a change.
    pub fn check_linked(&self, after: &Self) -> Result<(), Refusal> {
        if self.silence_ms == after.silence_ms {
            return Ok(());
        }
        Err(Refusal::generic(
            "Parameter 'x-switchover-silence' cannot be changed while a link is open: it holds from the link's beginning, and \
             can be set before the migration, or in state 'postcopy-paused' for the next one",
        ))
    }

    /// As `query-migrate-parameters` returns them. Those that mean nothing here are left out.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let settable = SETTABLE.iter().map(|entry| (entry.name.to_owned(), (entry.get)(self)));
        let fixed = fixed().into_iter().map(|(name, value, _)| (name.to_owned(), value));
        Value::Object(settable.chain(fixed).collect::<Map<_, _>>())
    }
}

fn name_of<T: PartialEq + Copy>(names: &[(&'static str, T)], value: T) -> &'static str {
    names.iter().find(|(_, known)| *known == value).map_or("", |(name, _)| name)
}

fn refuse_unless_unchanged(given: &Given<'_>) -> Result<(), Refusal> {
    if let Some((_, only, reason)) = fixed().into_iter().find(|(known, _, _)| *known == given.name) {
        // QEMU's way to clear a text.
        let cleared = given.value.is_null() && only == "";
        return if *given.value == only || cleared { Ok(()) } else { Err(given.cannot(reason)) };
    }
    match REFUSED.iter().find(|(known, _)| *known == given.name) {
        Some((_, reason)) => Err(given.cannot(reason)),
        None => Err(Refusal::generic(format_args!("Parameter '{}' is unexpected", given.name))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(value: &Value) -> Result<Parameters, String> {
        let arguments = Arguments::new(value.as_object().unwrap().clone());
        Parameters::default().set(arguments).map_err(|refusal| refusal.desc)
    }

    #[test]
    fn each_one_is_set_alone_and_told() {
        let other = json!({
            "max-bandwidth": u64::MAX, "max-postcopy-bandwidth": u64::MAX, "downtime-limit": 2_000_000,
            "multifd-channels": 255, "multifd-compression": "zstd", "multifd-zstd-level": 20,
            "xbzrle-cache-size": 4096, "cpu-throttle-initial": 99, "cpu-throttle-increment": 99,
            "max-cpu-throttle": 20, "vcpu-dirty-limit": 7, "x-switchover-mode": "hybrid",
            "x-switchover-blackout": 0, "x-switchover-compression": "lz4", "x-switchover-same-as": false,
            "x-switchover-checksums": false, "x-switchover-verify-memory": true,
            "x-switchover-max-rounds": 1, "x-switchover-time-budget": 4_294_967_295_u32,
            "x-switchover-record-bitmaps": true, "x-switchover-record-faults": true, "x-switchover-silence": 1000,
            "x-switchover-fault-lanes": 16, "tls-creds": "/etc/switchover", "tls-hostname": "b.example",
            "x-switchover-allow-plain": true,
            "x-switchover-collapse": false, "x-switchover-compress-image": true,
            "x-switchover-live-save": true, "x-switchover-lazy-restore": true,
        });
        let other = other.as_object().unwrap();
        assert_eq!(other.len(), SETTABLE.len());
        let before = Parameters::default().to_value();
        for (name, value) in other {
            let after = set(&json!({ name: value })).unwrap().to_value();
            for (told, now) in after.as_object().unwrap() {
                assert_eq!(now, if told == name { value } else { &before[told] }, "{told} after {name}");
            }
            assert_ne!(after, before, "{name}");
        }
    }

    #[test]
    fn every_parameter_that_is_told_can_be_set_to_what_was_told() {
        let told = Parameters::default().to_value();
        assert_eq!(set(&told), Ok(Parameters::default()));
    }

    #[test]
    fn what_is_not_there_can_be_cleared() {
        assert_eq!(set(&json!({"tls-creds": null, "tls-hostname": null})), Ok(Parameters::default()));
        assert!(set(&json!({"avail-switchover-bandwidth": null})).is_err());
    }

    #[test]
    fn defaults_are_those_of_a_migration() {
        use switchover_hybrid::monitor::Limits;
        use switchover_precopy::pack::PackSettings;
        let (own, limits, pack) = (Parameters::default(), Limits::default(), PackSettings::default());
        assert_eq!(u128::from(own.downtime_limit_ms), limits.downtime_limit.as_millis());
        assert_eq!(u128::from(own.blackout_ms), limits.blackout_target.as_millis());
        assert_eq!(u128::from(own.time_budget_ms), limits.time_budget.as_millis());
        assert_eq!(own.max_rounds, limits.round_budget);
        let silence = switchover_hybrid::settings::Settings::default().silence;
        assert_eq!(u128::from(own.silence_ms), silence.as_millis());
        assert_eq!(own.fault_lanes, switchover_hybrid::settings::Settings::default().fault_lanes);
        assert_eq!(own.same_as, pack.same_as);
        assert_eq!(own.checksums, switchover_hybrid::settings::Settings::default().checksums);
    }

    #[test]
    fn everything_else_is_refused_with_a_sentence() {
        for (arguments, desc) in [
            (json!({"zzz": 5}), "Parameter 'zzz' is unexpected"),
            (json!({"multifd-channels": 0}), "Parameter 'multifd-channels' expects a value between 1 and 255"),
            (json!({"multifd-channels": 1000}), "Parameter 'multifd-channels' expects uint8_t"),
            (
                json!({"x-switchover-fault-lanes": 0}),
                "Parameter 'x-switchover-fault-lanes' expects a value between 1 and 16",
            ),
            (
                json!({"x-switchover-fault-lanes": 17}),
                "Parameter 'x-switchover-fault-lanes' expects a value between 1 and 16",
            ),
            (json!({"max-postcopy-bandwidth": "5"}), "Parameter 'max-postcopy-bandwidth' expects uint64"),
            (json!({"max-bandwidth": -1}), "Parameter 'max-bandwidth' expects uint64"),
            (
                json!({"downtime-limit": 2_000_001}),
                "Parameter 'downtime-limit' expects an integer in the range of 0 to 2000000 ms",
            ),
            (
                json!({"cpu-throttle-initial": 0}),
                "Parameter 'cpu-throttle-initial' expects an integer in the range of 1 to 99",
            ),
            (
                json!({"cpu-throttle-increment": 100}),
                "Parameter 'cpu-throttle-increment' expects an integer in the range of 1 to 99",
            ),
            (
                json!({"max-cpu-throttle": 19}),
                "Parameter 'max-cpu-throttle' expects an integer in the range of cpu-throttle-initial to 99",
            ),
            (json!({"multifd-zstd-level": 21}), "Parameter 'multifd-zstd-level' expects a value between 0 and 20"),
            (
                json!({"xbzrle-cache-size": 5000}),
                "Parameter 'xbzrle-cache-size' expects a power of two no less than the target page size",
            ),
            (
                json!({"xbzrle-cache-size": 2048}),
                "Parameter 'xbzrle-cache-size' expects a power of two no less than the target page size",
            ),
            (json!({"vcpu-dirty-limit": 0}), "Parameter 'vcpu-dirty-limit' must be greater than 1 MB/s"),
            (
                json!({"multifd-compression": "zlib"}),
                "Parameter 'multifd-compression' cannot be set to \"zlib\": zlib is not built; pages can be compressed \
                 with zstd or LZ4",
            ),
            (json!({"multifd-compression": "rar"}), "Parameter 'multifd-compression' does not accept value 'rar'"),
            (json!({"x-switchover-mode": "magic"}), "Parameter 'x-switchover-mode' does not accept value 'magic'"),
            (json!({"x-switchover-mode": 1}), "Invalid parameter type for 'x-switchover-mode', expected: string"),
            (
                json!({"x-switchover-same-as": "on"}),
                "Invalid parameter type for 'x-switchover-same-as', expected: boolean",
            ),
            (
                json!({"x-switchover-max-rounds": 0}),
                "Parameter 'x-switchover-max-rounds' expects an integer in the range of 1 to 4294967295",
            ),
            (
                json!({"x-switchover-silence": 999}),
                "Parameter 'x-switchover-silence' expects an integer in the range of 1000 to 3600000 ms",
            ),
            (
                json!({"tls-authz": "authz0"}),
                "Parameter 'tls-authz' cannot be set to \"authz0\": every certificate of the CA is let in",
            ),
            (
                json!({"multifd-channels": 4, "throttle-trigger-threshold": 20}),
                "Parameter 'throttle-trigger-threshold' cannot be set to 20: vCPUs are slowed down when a round does \
                 not shrink",
            ),
        ] {
            assert_eq!(set(&arguments), Err(desc.to_owned()));
        }
    }

    #[test]
    fn what_holds_from_the_beginning_is_not_changed_under_way() {
        let before = Parameters::default();
        for (arguments, refused) in [
            (json!({"x-switchover-mode": "hybrid"}), true),
            (json!({"x-switchover-compression": "off"}), true),
            (json!({"x-switchover-same-as": false}), true),
            (json!({"x-switchover-checksums": false}), true),
            (json!({"x-switchover-verify-memory": true}), true),
            (json!({"x-switchover-fault-lanes": 2}), true),
            (json!({"x-switchover-record-bitmaps": true}), true),
            (json!({"x-switchover-record-faults": true}), true),
            (json!({"x-switchover-mode": "precopy", "x-switchover-compression": "adaptive"}), false),
            (json!({"max-bandwidth": 5, "downtime-limit": 5, "x-switchover-blackout": 6}), false),
            (json!({"multifd-channels": 5, "multifd-compression": "zstd", "cpu-throttle-initial": 30}), false),
        ] {
            let after = set(&arguments).unwrap();
            assert_eq!(before.check_under_way(&after).is_err(), refused, "{arguments}");
        }
    }
}
