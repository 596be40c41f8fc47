//! A run's pre-copy as a file, to be replayed.

use std::path::Path;

use super::hdr_files::{WriteError, write_file};
use super::schema::RunReport;

/// Writes what `run`'s source tells of its pre-copy to `path`, as JSON. False where it tells nothing.
///
/// # Errors
/// When the file cannot be written.
pub fn write_trace(run: &RunReport, path: &Path) -> Result<bool, WriteError> {
    let Some(precopy) = run.source.as_ref().and_then(|source| source.precopy.as_ref()) else { return Ok(false) };
    let json = serde_json::to_vec_pretty(precopy)
        .map_err(|error| WriteError { path: path.to_owned(), source: error.into() })?;
    write_file(path, &json).map(|()| true)
}

#[cfg(test)]
mod tests {
    use switchover_hybrid::report::PrecopyReport;

    use super::super::synthetic;
    use super::*;

    #[test]
    fn a_trace_holds_the_rounds_and_reads_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace.json");
        let run = synthetic::hybrid_runs(1).remove(0);
        assert!(write_trace(&run, &path).unwrap());
        let read: PrecopyReport = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(Some(read), run.source.unwrap().precopy);
    }

    #[test]
    fn a_run_without_precopy_has_no_trace() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace.json");
        assert!(!write_trace(&synthetic::runs(1)[0], &path).unwrap());
        assert!(!path.exists());
    }
}
