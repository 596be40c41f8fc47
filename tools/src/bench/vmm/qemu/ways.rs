//! The ways in which QEMU moves a guest.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::event;
use crate::bench::bandwidth::Bandwidth;
use crate::bench::modes::{
    BANDWIDTH, DESTINATION, Family, Mode, Moved, POSTCOPY_BANDWIDTH, Pair, SETUP_TIMEOUT, SOURCE,
};
use crate::bench::run_error::RunError;
use crate::qmp_client::{QmpClient, QmpError};

/// For QEMU 0 is no bandwidth before the handoff, and its default is 128 MiB/s: this is more than any link here carries.
const UNLIMITED: u64 = 100 << 30;
/// QEMU's default, and as many as this project's reference host has processors.
const MULTIFD_CHANNELS: u64 = 2;
/// Time for a first pass over half a gigabyte, as a manager that switches by a timer would give it.
const PRECOPY_FIRST: Duration = Duration::from_millis(600);

/// One of them.
#[derive(Debug)]
struct Way {
    name: &'static str,
    /// Set on both ends, with those that all ways have.
    capabilities: &'static [&'static str],
    handoff: Handoff,
}

/// When the source is told to hand off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Handoff {
    /// When QEMU expects what is left to fit into its downtime limit, which is left at its default.
    ByItself,
    /// At once.
    Now,
    /// After some time, unless it has moved by then.
    After(Duration),
}

/// Told of both ends in every way.
const ALWAYS: [&str; 2] = ["events", "return-path"];

/// All of them, in the order in which they are compared.
pub const ALL: &[&dyn Mode] = &[
    &Way { name: "precopy", capabilities: &[], handoff: Handoff::ByItself },
    &Way { name: "multifd", capabilities: &["multifd"], handoff: Handoff::ByItself },
    &Way { name: "postcopy", capabilities: &["postcopy-ram"], handoff: Handoff::Now },
    &Way { name: "postcopy-preempt", capabilities: &["postcopy-ram", "postcopy-preempt"], handoff: Handoff::Now },
    &Way { name: "precopy-postcopy", capabilities: &["postcopy-ram"], handoff: Handoff::After(PRECOPY_FIRST) },
];

impl Mode for Way {
    fn name(&self) -> &'static str {
        self.name
    }

    fn precopies(&self) -> bool {
        self.handoff != Handoff::Now
    }

    fn family(&self) -> Family {
        if self.handoff == Handoff::ByItself { Family::PreCopy } else { Family::PostCopy }
    }

    /// Unlike this project's, QEMU's ends do not negotiate.
    fn prepare(&self, source: &mut QmpClient, destination: &mut QmpClient) -> Result<(), RunError> {
        for (who, side) in [(SOURCE, source), (DESTINATION, destination)] {
            let mut set = |command: &str, arguments| side.execute(command, arguments).map_err(RunError::on(who));
            set("migrate-set-capabilities", self.capabilities())?;
            set("migrate-set-parameters", json!({ "multifd-channels": MULTIFD_CHANNELS }))?;
        }
        Ok(())
    }

    fn migrate(&self, pair: &mut Pair<'_>) -> Result<Moved, RunError> {
        let bounds = bounds(pair.bandwidth);
        pair.source.execute("migrate-set-parameters", bounds).map_err(RunError::on(SOURCE))?;
        match self.handoff {
            Handoff::ByItself => {
                let moved = pair.precopy()?;
                let stopped = event::at(&pair.source.take_events(), |event| event::is(event, "STOP"));
                let handoff = stopped.and_then(event::as_monotonic).filter(|_| moved.stayed.is_none());
                Ok(Moved { handoff, ..moved })
            }
            Handoff::Now => {
                let migrate = pair.begin()?;
                pair.wait_source(&["active"], SETUP_TIMEOUT)?;
                let handoff = pair.start_postcopy()?;
                Ok(Moved { migrate, handoff: Some(handoff), ended: pair.complete()?, stayed: None })
            }
            Handoff::After(time) => {
                let migrate = pair.begin()?;
                let handoff = match pair.wait_source(&["completed"], time) {
                    Err(RunError::Qmp { source: QmpError::Timeout { .. }, .. }) => Some(pair.start_postcopy()?),
                    moved => moved.map(|_| None)?,
                };
                Ok(Moved { migrate, handoff, ended: pair.complete()?, stayed: None })
            }
        }
    }
}

impl Way {
    fn capabilities(&self) -> Value {
        let on = |name: &&str| json!({ "capability": name, "state": true });
        let all: Vec<_> = ALWAYS.iter().chain(self.capabilities).map(on).collect();
        json!({ "capabilities": all })
    }
}

/// QMP's bounds on what is sent before and after the handoff. For the latter 0 is none.
fn bounds(bandwidth: Bandwidth) -> Value {
    let before = if bandwidth == Bandwidth::UNLIMITED { UNLIMITED } else { bandwidth.for_qmp() };
    let bounds = [(BANDWIDTH, before), (POSTCOPY_BANDWIDTH, bandwidth.for_qmp())];
    Value::Object(bounds.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_bandwidth_is_lifted_and_a_bound_holds_before_and_after_the_handoff() {
        let unlimited = bounds(Bandwidth::UNLIMITED);
        assert_eq!(unlimited, json!({ "max-bandwidth": 107_374_182_400_u64, "max-postcopy-bandwidth": 0 }));
        let bounded = bounds("1G".parse().unwrap());
        assert_eq!(bounded, json!({ "max-bandwidth": 125_000_000, "max-postcopy-bandwidth": 125_000_000 }));
    }

    #[test]
    fn each_way_is_known_by_name_and_family() {
        let found: Vec<_> = ALL.iter().map(|way| (way.name(), way.family(), way.precopies())).collect();
        assert_eq!(
            found,
            [
                ("precopy", Family::PreCopy, true),
                ("multifd", Family::PreCopy, true),
                ("postcopy", Family::PostCopy, false),
                ("postcopy-preempt", Family::PostCopy, false),
                ("precopy-postcopy", Family::PostCopy, true),
            ]
        );
    }

    #[test]
    fn capabilities_are_those_of_all_ways_and_its_own() {
        let way = Way { name: "x", capabilities: &["multifd"], handoff: Handoff::ByItself };
        let said = way.capabilities().to_string();
        for name in ["events", "return-path", "multifd"] {
            assert!(said.contains(&format!(r#""capability":"{name}","state":true"#)), "{said}");
        }
        assert!(!said.contains("postcopy"), "{said}");
    }
}
