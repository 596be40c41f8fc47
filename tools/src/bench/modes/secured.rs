//! A mode over TLS, beside the same mode without.

use super::hybrid::Hybrid;
use super::postcopy::Postcopy;
use super::precopy::Precopy;
use super::{Family, Mode, Moved, Pair};
use crate::bench::run_error::RunError;
use crate::qmp_client::QmpClient;

/// Another mode, between machines that have credentials.
#[derive(Debug)]
struct Secured {
    name: &'static str,
    inner: &'static dyn Mode,
}

static ALL: [Secured; 3] = [
    Secured { name: "precopy-tls", inner: &Precopy },
    Secured { name: "postcopy-tls", inner: &Postcopy },
    Secured { name: "hybrid-tls", inner: &Hybrid },
];

/// `mode` over TLS, where it is one of this VMM's.
pub fn secured(mode: &dyn Mode) -> Option<&'static dyn Mode> {
    ALL.iter().find(|secured| secured.inner.name() == mode.name()).map(|secured| secured as &dyn Mode)
}

impl Mode for Secured {
    fn name(&self) -> &'static str {
        self.name
    }

    fn precopies(&self) -> bool {
        self.inner.precopies()
    }

    fn family(&self) -> Family {
        self.inner.family()
    }

    fn prepare(&self, source: &mut QmpClient, destination: &mut QmpClient) -> Result<(), RunError> {
        self.inner.prepare(source, destination)
    }

    fn migrate(&self, pair: &mut Pair<'_>) -> Result<Moved, RunError> {
        self.inner.migrate(pair)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{NAMES, by_name};
    use super::*;

    #[test]
    fn every_mode_has_its_twin() {
        for name in NAMES {
            let mode = by_name(name).unwrap();
            let twin = secured(mode).unwrap();
            assert_eq!(twin.name(), format!("{name}-tls"));
            assert_eq!((twin.family(), twin.precopies()), (mode.family(), mode.precopies()));
        }
    }
}
