//! A run as a file, to be replayed; and how it is made so that it shows the guest's own pace.

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use switchover_hybrid::trace::{Trace, TraceError};

use super::hdr_files::{WriteError, write_file};
use super::schema::{RunReport, Settings};
use crate::qmp_client::{QmpClient, QmpError};
use crate::signals::EndRequests;

/// A bound on what is pushed, in bytes a second, under which nothing is; 0 would be none.
pub const HELD: u64 = 1;
/// How often first touches are counted.
const LOOK: Duration = Duration::from_millis(500);
/// The guest has touched most of its pages for the first time when it touches this part of what it did at most, in [`LOOK`].
const FEW: u64 = 50;
/// The longest that it is watched.
const LONGEST: Duration = Duration::from_secs(30);

/// Writes the trace of `run` to `path`, for `switchover simulate`. False where nothing of it can be replayed.
///
/// # Errors
/// When the file cannot be written.
pub fn write_trace(settings: &Settings, run: &RunReport, path: &Path) -> Result<bool, WriteError> {
    let failed = |error: TraceError| WriteError { path: path.to_owned(), source: io::Error::other(error) };
    let Some(source) = &run.source else { return Ok(false) };
    let name = format!("{} {}", settings.guest, settings.append);
    let trace = match Trace::from_migration(name, source, run.destination.as_ref(), u32::from(settings.vcpus)) {
        Ok(trace) => trace,
        Err(TraceError::NoPrecopy | TraceError::NoBitmaps) => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    let json = trace.to_json().map_err(failed)?;
    write_file(path, json.as_bytes()).map(|()| true)
}

/// Watches a guest whose pages are not pushed, until it asks for few any more.
///
/// # Errors
/// When the source does not answer.
pub fn watch_first_touches(source: &mut QmpClient, ends: &EndRequests) -> Result<(), QmpError> {
    let until = Instant::now() + LONGEST;
    let mut watched = Watched::default();
    while Instant::now() < until && ends.count() == 0 {
        let answer = source.execute("query-migrate", json!({}))?;
        let requests = answer.pointer("/ram/postcopy-requests").and_then(Value::as_u64).unwrap_or(0);
        let over = answer.get("status").and_then(Value::as_str) != Some("postcopy-active");
        if over || watched.few(requests) {
            break;
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// How many pages a guest had asked for at the last look, and the most between two.
#[derive(Default)]
struct Watched {
    last: Option<u64>,
    most: u64,
}

impl Watched {
    fn few(&mut self, requests: u64) -> bool {
        let Some(last) = self.last.replace(requests) else { return false };
        let new = requests.saturating_sub(last);
        self.most = self.most.max(new);
        new * FEW <= self.most
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD as BASE64;

    use switchover_hybrid::report::{FaultAnswer, FaultRecord};

    use super::super::synthetic;
    use super::*;

    fn settings() -> Settings {
        synthetic::report(vec![]).settings
    }

    #[test]
    fn a_guest_is_watched_until_it_asks_for_few() {
        let mut watched = Watched::default();
        assert!(!watched.few(0));
        assert!(!watched.few(5_000) && !watched.few(9_000) && !watched.few(9_101));
        assert!(watched.few(9_201), "a fiftieth of the most");
        assert!(Watched { last: Some(7), most: 0 }.few(7), "a guest that asks for nothing is not waited for");
    }

    #[test]
    fn a_run_of_postcopy_is_its_faults() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace.json");
        let mut run = synthetic::runs(1).remove(0);
        let fault = FaultRecord { page: 5, taken_ns: 7, woken_ns: Some(9), answer: FaultAnswer::Remote };
        run.destination.as_mut().unwrap().fault_trace = vec![fault];
        assert!(write_trace(&settings(), &run, &path).unwrap());
        let read = Trace::from_json(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!((read.epochs.len(), read.drain.unwrap().faults), (0, vec![fault]));
    }

    #[test]
    fn a_trace_can_be_replayed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace.json");
        let mut run = synthetic::hybrid_runs(1).remove(0);
        assert!(!write_trace(&settings(), &run, &path).unwrap(), "no bitmaps were recorded");
        let source = run.source.as_mut().unwrap();
        let words = usize::try_from(source.ram_pages.div_ceil(64)).unwrap();
        let set = BASE64.encode(switchover_wire::bitmap::encode(&vec![1; words]));
        source.precopy.as_mut().unwrap().rounds.iter_mut().for_each(|round| round.dirtied = Some(set.clone()));
        assert!(write_trace(&settings(), &run, &path).unwrap());
        let read = Trace::from_json(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!((read.ram_pages, read.epochs.len()), (131_072, run.source.unwrap().precopy.unwrap().rounds.len()));
    }

    #[test]
    fn a_run_without_precopy_has_no_trace() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace.json");
        assert!(!write_trace(&settings(), &synthetic::runs(1)[0], &path).unwrap());
        assert!(!path.exists());
    }
}
