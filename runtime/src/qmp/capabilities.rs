//! Migration capabilities: QEMU's names, and which of them mean something here.

use serde_json::{Value, json};

use super::arguments::{Arguments, objects};
use super::refusal::Refusal;

/// What becomes of a capability that is switched on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Meaning {
    /// It changes something.
    Honoured,
    /// It asks for what is always done.
    Always,
    /// It asks for what is not there; the sentence says what is.
    Refused(&'static str),
}

const NOT_BUILT: &str = "it is not built yet";
const NO_BLOCK_DEVICES: &str = "this machine has no block devices";

/// Every capability that QEMU 10 knows, in its order.
const TABLE: [(&str, Meaning); 22] = [
    ("xbzrle", Meaning::Honoured),
    ("rdma-pin-all", Meaning::Refused("there is no RDMA transport; migrate over tcp: or unix:")),
    ("auto-converge", Meaning::Honoured),
    ("zero-blocks", Meaning::Refused(NO_BLOCK_DEVICES)),
    ("events", Meaning::Honoured),
    ("postcopy-ram", Meaning::Honoured),
    ("x-colo", Meaning::Refused("COLO is not built")),
    ("release-ram", Meaning::Refused("the source keeps every page until the destination has all of them")),
    ("return-path", Meaning::Always),
    ("pause-before-switchover", Meaning::Honoured),
    ("multifd", Meaning::Honoured),
    ("dirty-bitmaps", Meaning::Refused(NO_BLOCK_DEVICES)),
    // Faults are always timed, and `query-migrate` on the destination tells what they took.
    ("postcopy-blocktime", Meaning::Always),
    ("late-block-activate", Meaning::Refused(NO_BLOCK_DEVICES)),
    ("x-ignore-shared", Meaning::Refused(NOT_BUILT)),
    ("validate-uuid", Meaning::Refused("machines have no UUID yet")),
    ("background-snapshot", Meaning::Refused(NOT_BUILT)),
    ("zero-copy-send", Meaning::Refused(NOT_BUILT)),
    // Pages that a fault asked for always have a lane of their own.
    ("postcopy-preempt", Meaning::Always),
    // The source never pauses before the destination has said that it is prepared.
    ("switchover-ack", Meaning::Always),
    ("dirty-limit", Meaning::Honoured),
    ("mapped-ram", Meaning::Refused(NOT_BUILT)),
];

/// Which capabilities are on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Capabilities {
    on: [bool; TABLE.len()],
}

impl Capabilities {
    /// Whether the capability called `name` is on.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        position(name).and_then(|index| self.on.get(index)).copied().unwrap_or(false)
    }

    /// These after `migrate-set-capabilities` with these arguments: all of what it asks for, or nothing.
    ///
    /// # Errors
    /// When the arguments are malformed, name a capability that does not exist, or switch on one that means nothing
    /// here.
    pub fn set(&self, mut arguments: Arguments) -> Result<Self, Refusal> {
        let list = objects("capabilities", arguments.required("capabilities")?)?;
        arguments.finish()?;
        let mut after = *self;
        for mut entry in list {
            let name: String = entry.required("capability")?;
            let state: bool = entry.required("state")?;
            entry.finish()?;
            let unknown = || Refusal::generic(format_args!("Parameter 'capability' does not accept value '{name}'"));
            let index = position(&name).ok_or_else(unknown)?;
            if let (true, Some((_, Meaning::Refused(reason)))) = (state, TABLE.get(index)) {
                return Err(Refusal::generic(format_args!("Capability '{name}' cannot be switched on: {reason}")));
            }
            if let Some(on) = after.on.get_mut(index) {
                *on = state;
            }
        }
        if after.has("postcopy-preempt") && !after.has("postcopy-ram") {
            return Err(Refusal::generic("Postcopy preempt requires postcopy-ram"));
        }
        if after.has("dirty-limit") && after.has("auto-converge") {
            let desc = "dirty-limit conflicts with auto-converge either of then available currently";
            return Err(Refusal::generic(desc));
        }
        Ok(after)
    }

    /// As `query-migrate-capabilities` returns them.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let entry = |((name, _), on): (&(&str, Meaning), &bool)| json!({ "capability": name, "state": on });
        TABLE.iter().zip(&self.on).map(entry).collect()
    }
}

fn position(name: &str) -> Option<usize> {
    TABLE.iter().position(|(known, _)| *known == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(before: Capabilities, list: &Value) -> Result<Capabilities, String> {
        let arguments = json!({ "capabilities": list }).as_object().unwrap().clone();
        before.set(Arguments::new(arguments)).map_err(|refusal| refusal.desc)
    }

    fn one(name: &str, state: bool) -> Value {
        json!([{ "capability": name, "state": state }])
    }

    #[test]
    fn capabilities_are_switched_on_and_off_and_told() {
        let none = Capabilities::default();
        let on =
            set(none, &json!([{"capability": "postcopy-ram", "state": true}, {"capability": "events", "state": true}]))
                .unwrap();
        assert!(on.has("postcopy-ram") && on.has("events") && !on.has("multifd"));
        let told = on.to_value();
        assert!(told.as_array().unwrap().contains(&json!({"capability": "postcopy-ram", "state": true})));
        assert_eq!(told.as_array().unwrap().len(), 22);
        assert!(!set(on, &one("events", false)).unwrap().has("events"));
    }

    #[test]
    fn one_that_means_nothing_here_is_taken_only_as_off() {
        for (name, meaning) in TABLE {
            let refused = matches!(meaning, Meaning::Refused(_));
            let before = set(Capabilities::default(), &one("postcopy-ram", true)).unwrap();
            assert_eq!(set(before, &one(name, true)).is_err(), refused, "{name}");
            if name != "postcopy-ram" {
                assert_eq!(set(before, &one(name, false)), Ok(before), "{name}");
            }
        }
    }

    #[test]
    fn a_list_with_an_error_changes_nothing_and_the_error_is_named() {
        let none = Capabilities::default();
        for (list, desc) in [
            (one("foo", true), "Parameter 'capability' does not accept value 'foo'"),
            (json!([{"capability": "events"}]), "Parameter 'capabilities[0].state' is missing"),
            (
                json!([{"capability": "events", "state": 1}]),
                "Invalid parameter type for 'capabilities[0].state', expected: boolean",
            ),
            (json!(5), "Invalid parameter type for 'capabilities', expected: array"),
            (json!([{"capability": "events", "state": true, "x": 1}]), "Parameter 'capabilities[0].x' is unexpected"),
            (one("postcopy-preempt", true), "Postcopy preempt requires postcopy-ram"),
            (
                json!([{"capability": "postcopy-ram", "state": true}, {"capability": "zero-copy-send", "state": true}]),
                "Capability 'zero-copy-send' cannot be switched on: it is not built yet",
            ),
            (
                json!([{"capability": "dirty-limit", "state": true}, {"capability": "auto-converge", "state": true}]),
                "dirty-limit conflicts with auto-converge either of then available currently",
            ),
        ] {
            assert_eq!(set(none, &list), Err(desc.to_owned()));
        }
    }
}
