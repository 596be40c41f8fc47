//! Migration parameters: QEMU's names, and which of them can be set here.

use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use super::refusal::Refusal;

/// The parameters that change something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parameters {
    /// Bound on pushed bytes a second after the handoff; 0 means none.
    pub max_postcopy_bandwidth: u64,
    /// `bulk` lanes of a migration with `multifd`.
    pub multifd_channels: u8,
}

impl Default for Parameters {
    /// QEMU's defaults.
    fn default() -> Self {
        Self { max_postcopy_bandwidth: 0, multifd_channels: 2 }
    }
}

const NO_PRECOPY: &str = "it bounds pre-copy, which is not built yet";
const NO_THROTTLE: &str = "vCPUs are never throttled";
const NO_ENCODING: &str = "pages are sent as they are, or not at all where they are zero";
const NO_TLS: &str = "lanes are not encrypted yet";
const NO_NETWORK: &str = "this machine has no network card to announce";

/// QEMU's parameters that hold one value here: they may be set to it, and to nothing else.
fn fixed() -> [(&'static str, Value, &'static str); 5] {
    [
        ("mode", json!("normal"), "only normal migrations are built"),
        ("multifd-compression", json!("none"), NO_ENCODING),
        ("tls-creds", json!(""), NO_TLS),
        ("tls-hostname", json!(""), NO_TLS),
        ("tls-authz", json!(""), NO_TLS),
    ]
}

/// QEMU's parameters that cannot be set at all, and why.
const REFUSED: [(&str, &str); 24] = [
    ("announce-initial", NO_NETWORK),
    ("announce-max", NO_NETWORK),
    ("announce-rounds", NO_NETWORK),
    ("announce-step", NO_NETWORK),
    ("avail-switchover-bandwidth", NO_PRECOPY),
    ("block-bitmap-mapping", "this machine has no block devices"),
    ("cpu-throttle-increment", NO_THROTTLE),
    ("cpu-throttle-initial", NO_THROTTLE),
    ("cpu-throttle-tailslow", NO_THROTTLE),
    ("direct-io", "there is no migration to a file yet"),
    ("downtime-limit", "a handoff to post-copy does not wait for a limit to be met, and pre-copy is not built yet"),
    (
        "max-bandwidth",
        "it bounds pre-copy, which is not built yet; max-postcopy-bandwidth bounds what follows a handoff",
    ),
    ("max-cpu-throttle", NO_THROTTLE),
    ("multifd-qatzip-level", NO_ENCODING),
    ("multifd-zlib-level", NO_ENCODING),
    ("multifd-zstd-level", NO_ENCODING),
    ("throttle-trigger-threshold", NO_THROTTLE),
    ("vcpu-dirty-limit", NO_THROTTLE),
    ("x-checkpoint-delay", "COLO is not built"),
    ("x-rdma-chunk-size", "there is no RDMA transport"),
    ("x-switchover-mode", "only post-copy is built yet, and `migrate-start-postcopy` hands off"),
    ("x-vcpu-dirty-limit-period", NO_THROTTLE),
    ("xbzrle-cache-size", "pages are not encoded as differences yet"),
    ("zero-page-detection", "every lane always looks for zero pages"),
];

impl Parameters {
    /// These after `migrate-set-parameters` with these arguments: all of what it asks for, or nothing.
    ///
    /// # Errors
    /// When one is unknown, mistyped, out of bounds, or would change nothing if it were accepted.
    pub fn set(&self, arguments: Arguments) -> Result<Self, Refusal> {
        let mut after = *self;
        for (name, value) in arguments.rest() {
            match name.as_str() {
                "max-postcopy-bandwidth" => {
                    after.max_postcopy_bandwidth = value.as_u64().ok_or_else(|| expects(&name, "uint64"))?;
                }
                "multifd-channels" => {
                    let count = value.as_u64().and_then(|count| u8::try_from(count).ok());
                    after.multifd_channels = count.ok_or_else(|| expects(&name, "uint8_t"))?;
                    if after.multifd_channels == 0 {
                        return Err(expects(&name, "a value between 1 and 255"));
                    }
                }
                _ => refuse_unless_unchanged(&name, &value)?,
            }
        }
        Ok(after)
    }

    /// As `query-migrate-parameters` returns them. Those that mean nothing here are left out.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let mut members: Map<String, Value> =
            fixed().into_iter().map(|(name, value, _)| (name.to_owned(), value)).collect();
        members.insert("max-postcopy-bandwidth".to_owned(), self.max_postcopy_bandwidth.into());
        members.insert("multifd-channels".to_owned(), self.multifd_channels.into());
        Value::Object(members)
    }
}

fn expects(name: &str, what: &str) -> Refusal {
    Refusal::generic(format_args!("Parameter '{name}' expects {what}"))
}

fn refuse_unless_unchanged(name: &str, value: &Value) -> Result<(), Refusal> {
    let refused = |reason| Err(Refusal::generic(format_args!("Parameter '{name}' cannot be set to {value}: {reason}")));
    if let Some((_, only, reason)) = fixed().into_iter().find(|(known, _, _)| *known == name) {
        return if *value == only { Ok(()) } else { refused(reason) };
    }
    match REFUSED.iter().find(|(known, _)| *known == name) {
        Some((_, reason)) => refused(reason),
        None => Err(Refusal::generic(format_args!("Parameter '{name}' is unexpected"))),
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
    fn what_is_honoured_is_set_and_told() {
        let after = set(&json!({"max-postcopy-bandwidth": u64::MAX, "multifd-channels": 255})).unwrap();
        assert_eq!(after, Parameters { max_postcopy_bandwidth: u64::MAX, multifd_channels: 255 });
        assert_eq!(after.to_value()["max-postcopy-bandwidth"], json!(u64::MAX));
        assert_eq!(Parameters::default().to_value()["multifd-channels"], 2);
    }

    #[test]
    fn every_parameter_that_is_told_can_be_set_to_what_was_told() {
        let told = Parameters::default().to_value();
        assert_eq!(set(&told), Ok(Parameters::default()));
    }

    #[test]
    fn everything_else_is_refused_with_a_sentence() {
        for (arguments, desc) in [
            (json!({"zzz": 5}), "Parameter 'zzz' is unexpected"),
            (json!({"multifd-channels": 0}), "Parameter 'multifd-channels' expects a value between 1 and 255"),
            (json!({"multifd-channels": 1000}), "Parameter 'multifd-channels' expects uint8_t"),
            (json!({"max-postcopy-bandwidth": "5"}), "Parameter 'max-postcopy-bandwidth' expects uint64"),
            (json!({"max-postcopy-bandwidth": -1}), "Parameter 'max-postcopy-bandwidth' expects uint64"),
            (
                json!({"tls-creds": "tls0"}),
                "Parameter 'tls-creds' cannot be set to \"tls0\": lanes are not encrypted yet",
            ),
            (
                json!({"multifd-channels": 4, "cpu-throttle-initial": 20}),
                "Parameter 'cpu-throttle-initial' cannot be set to 20: vCPUs are never throttled",
            ),
        ] {
            assert_eq!(set(&arguments), Err(desc.to_owned()));
        }
    }
}
