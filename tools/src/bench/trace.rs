//! A run's pre-copy as a file, to be replayed.

use std::io;
use std::path::Path;

use switchover_hybrid::trace::{Trace, TraceError};

use super::hdr_files::{WriteError, write_file};
use super::schema::RunReport;

/// Writes the trace of `run` to `path`, for `switchover simulate`. False where no round of it can be replayed.
///
/// # Errors
/// When the file cannot be written.
pub fn write_trace(name: &str, run: &RunReport, path: &Path) -> Result<bool, WriteError> {
    let failed = |error: TraceError| WriteError { path: path.to_owned(), source: io::Error::other(error) };
    let Some(source) = &run.source else { return Ok(false) };
    let trace = match Trace::from_report(name, source) {
        Ok(trace) => trace,
        Err(TraceError::NoPrecopy | TraceError::NoBitmaps) => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    let json = trace.to_json().map_err(failed)?;
    write_file(path, json.as_bytes()).map(|()| true)
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD as BASE64;

    use super::super::synthetic;
    use super::*;

    #[test]
    fn a_trace_can_be_replayed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace.json");
        let mut run = synthetic::hybrid_runs(1).remove(0);
        assert!(!write_trace("run", &run, &path).unwrap(), "no bitmaps were recorded");
        let source = run.source.as_mut().unwrap();
        let words = usize::try_from(source.ram_pages.div_ceil(64)).unwrap();
        let set = BASE64.encode(switchover_wire::bitmap::encode(&vec![1; words]));
        source.precopy.as_mut().unwrap().rounds.iter_mut().for_each(|round| round.dirtied = Some(set.clone()));
        assert!(write_trace("run", &run, &path).unwrap());
        let read = Trace::from_json(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!((read.ram_pages, read.epochs.len()), (131_072, run.source.unwrap().precopy.unwrap().rounds.len()));
    }

    #[test]
    fn a_run_without_precopy_has_no_trace() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace.json");
        assert!(!write_trace("run", &synthetic::runs(1)[0], &path).unwrap());
        assert!(!path.exists());
    }
}
