//! `switchover bench`: moves real guests between two processes of this program, proves that no byte was lost, and
//! reports how it went.
//!
//! ```text
//!   args → Plan ──▶ measure: cells, runs, modes in turn                    ┌──▶ table on stdout
//!                    ▼                                                     │──▶ report.json    (schema)
//!                   driver ── one run ──▶ RunReport ──▶ aggregate, matrix ──▶ Report ──▶ report.html (html, plots)
//!                    │  process: two children,   ▲                         └──▶ *.hgrm, *.hlog (hdr_files), trace
//!                    │  their serial ports       │
//!                    │  modes: QMP commands      │        comparison
//!                    │  network: what is between │
//!                    ▼  vmm: whose machines      │
//!              serial_log → guest_lines → guest_trace: doubts, progress
//! ```
//!
//! A further mode is a file in `modes`; a further VMM is one in `vmm`, and brings its own modes. What every figure means is said in
//! `docs/report.md`.

pub mod aggregate;
pub mod args;
pub mod bandwidth;
pub mod comparison;
mod cpu_time;
mod driver;
pub mod felt;
pub mod figures;
pub mod format;
pub mod guest_lines;
pub mod guest_trace;
pub mod hdr_files;
pub mod host_info;
pub mod html;
pub mod latency;
pub mod matrix;
mod measure;
pub mod modes;
pub mod network;
pub mod plots;
pub mod process;
pub mod run_error;
pub mod schema;
pub mod serial_log;
mod statistics;
#[cfg(test)]
mod synthetic;
pub mod table;
pub mod trace;
pub mod vmm;

use std::io::Write as _;
use std::path::Path;

use self::aggregate::Aggregate;
pub use self::args::BenchArgs;
use self::hdr_files::{write_all, write_file};
use self::measure::Entry;
use self::schema::{PeerInfo, Report, RunReport};
use self::vmm::{Lanes, Switchover};
use crate::certs;
use crate::failure::{Failure, say};
use crate::signals::EndRequests;

/// Of the runs that were not verified, the report names all and the error these.
const MOST_NAMED: usize = 5;

/// Measures, and writes the report.
///
/// # Errors
/// When the arguments make no sense, the report cannot be written, or a run was not verified.
pub fn main(args: &BenchArgs) -> Result<(), Failure> {
    let plan = args.plan()?;
    let peer = plan.peer.map(|peer| (peer.find)().map(|found| (peer, found))).transpose()?;
    let ends = EndRequests::take(|number| {
        if number > 1 {
            // The machines' processes end with this one.
            std::process::exit(1);
        }
    })?;
    // Before anything is measured: it would be a pity to find out afterwards.
    std::fs::create_dir_all(&plan.out).map_err(|error| {
        let path = plan.out.display();
        Failure::failed(format_args!("cannot make the directory {path}: {error}; choose another with --out"))
    })?;
    let executable = std::env::current_exe().map_err(|error| {
        Failure::failed(format_args!("cannot find out which program this is: {error}; is /proc there?"))
    })?;
    let ours = Switchover { executable: executable.clone(), lanes: Lanes::Plain, seccomp: plan.seccomp };
    let credentials = plan.tls.then(credentials).transpose()?;
    let over_tls = credentials.as_ref().map(|folder| Switchover {
        executable,
        lanes: Lanes::Tls(folder.path().to_owned()),
        seccomp: plan.seccomp,
    });
    let mut entries: Vec<_> = plan.modes.iter().map(|mode| Entry { vmm: &ours, mode: *mode }).collect();
    if let Some(vmm) = &over_tls {
        entries.extend(plan.modes.iter().filter_map(|mode| Some(Entry { vmm, mode: modes::secured(*mode)? })));
    }
    if let Some((_, found)) = &peer {
        entries.extend(plan.peer_modes.iter().map(|mode| Entry { vmm: &*found.vmm, mode: *mode }));
    }
    let info = peer.as_ref().map(|(peer, found)| PeerInfo {
        name: peer.name.to_owned(),
        title: peer.title.to_owned(),
        version: found.version.clone(),
        program: found.program.display().to_string(),
    });
    let (report, aggregates) = measure::measure(&plan, &entries, info, &ends)?;
    write(&report, &aggregates, &plan.out)?;
    if let Some(path) = &plan.trace {
        match traced(&aggregates) {
            Some(run) if trace::write_trace(&report.settings, run, path).map_err(Failure::failed)? => {}
            _ => say(format_args!("no run tells of its rounds or faults: {} is not written", path.display())),
        }
    }
    let shown = format!("{}\nThe report is {}\n", table::text(&report), plan.out.join("report.html").display());
    // A closed stdout is no reason to fail: the report is written.
    let _ = std::io::stdout().lock().write_all(shown.as_bytes());
    judge(&report)
}

/// Certificates for the machines of this bench, gone when it is over.
fn credentials() -> Result<tempfile::TempDir, Failure> {
    let failed = |error| Failure::failed(format_args!("cannot make a temporary directory: {error}; set TMPDIR"));
    let folder = tempfile::Builder::new().prefix("switchover-bench-creds").tempdir().map_err(failed)?;
    let names = ["localhost", "127.0.0.1", network::DESTINATION_ADDRESS].map(str::to_owned);
    certs::write_set(folder.path(), &names)?;
    Ok(folder)
}

/// The run that is written down: the hybrid's first where there is one, else one that tells of its pre-copy, else of its faults.
fn traced(aggregates: &[Aggregate]) -> Option<&RunReport> {
    let rounds = |run: &&RunReport| run.source.as_ref().is_some_and(|source| source.precopy.is_some());
    let faults = |run: &&RunReport| run.destination.as_ref().is_some_and(|there| !there.fault_trace.is_empty());
    let first = |hybrid: bool| {
        let mut modes = aggregates.iter().filter(move |aggregate| (aggregate.report.mode == "hybrid") == hybrid);
        modes.find_map(|aggregate| aggregate.report.carried_out().find(rounds))
    };
    let last = || aggregates.iter().find_map(|aggregate| aggregate.report.carried_out().find(faults));
    first(true).or_else(|| first(false)).or_else(last)
}

fn write(report: &Report, aggregates: &[Aggregate], directory: &Path) -> Result<(), Failure> {
    let json = serde_json::to_vec_pretty(report)
        .map_err(|error| Failure::failed(format_args!("cannot write the report as JSON: {error}")))?;
    write_file(&directory.join("report.json"), &json).map_err(Failure::failed)?;
    let cells = cells(report);
    // The matrix' histograms are in the JSON: hundreds of files would help nobody.
    if cells == 1 {
        // A peer has none, and would overwrite ours.
        let mut ours = aggregates.iter().filter(|aggregate| aggregate.report.is_ours());
        ours.try_for_each(|aggregate| write_all(aggregate, directory)).map_err(Failure::failed)?;
    }
    let page = html::page(report, aggregates).map_err(Failure::failed)?;
    write_file(&directory.join("report.html"), page.as_bytes()).map_err(Failure::failed)
}

/// How many combinations of guest and bandwidth there are.
fn cells(report: &Report) -> usize {
    let mut cells: Vec<_> = report.modes.iter().map(|mode| (&mode.guest, mode.bandwidth_bit_s)).collect();
    cells.dedup();
    cells.len()
}

/// A bench is done when every run was verified.
fn judge(report: &Report) -> Result<(), Failure> {
    if report.interrupted {
        return Err(Failure::failed("interrupted: the report holds the runs that had been made"));
    }
    if report.verified {
        return Ok(());
    }
    let doubtful = |run: &&RunReport| !run.verified;
    let why: Vec<_> = report
        .modes
        .iter()
        .flat_map(|mode| mode.runs.iter().filter(doubtful).map(move |run| (mode, run)))
        .map(|(mode, run)| format!("{} run {}: {}", mode.name(), run.run, run.doubts.join("; ")))
        .take(MOST_NAMED)
        .collect();
    Err(Failure::failed(format_args!("not every run was verified: {}", why.join(" | "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_written_and_says_the_same() {
        let aggregate = Aggregate::of("postcopy", "switchover", synthetic::runs(2)).unwrap();
        let report = synthetic::report(vec![aggregate.report.clone()]);
        let directory = tempfile::tempdir().unwrap();
        write(&report, &[aggregate], directory.path()).unwrap();
        let json = std::fs::read(directory.path().join("report.json")).unwrap();
        assert!(serde_json::from_slice::<Report>(&json).unwrap() == report);
        for name in
            ["report.html", "postcopy-fault-total.hgrm", "postcopy-fault-local-total.hgrm", "postcopy-faults.hlog"]
        {
            assert!(directory.path().join(name).metadata().unwrap().len() > 100, "{name}");
        }
    }

    #[test]
    fn an_unverified_run_fails_the_bench_by_name() {
        let mut runs = synthetic::runs(2);
        let good = Aggregate::of("postcopy", "switchover", runs.clone()).unwrap().report;
        assert_eq!(judge(&synthetic::report(vec![good])), Ok(()));
        runs[1].verified = false;
        runs[1].doubts = vec!["corrupt visits: 3".to_owned()];
        let bad = Aggregate::of("postcopy", "switchover", runs).unwrap().report;
        let failure = judge(&synthetic::report(vec![bad])).unwrap_err();
        assert_eq!(failure.status, 1);
        assert!(failure.sentence.contains("postcopy run 2: corrupt visits: 3"), "{}", failure.sentence);
    }

    #[test]
    fn the_hybrids_first_run_is_traced_wherever_it_stands() {
        let (_, mut aggregates) = synthetic::three_modes(2);
        let session =
            |aggregates: &[Aggregate]| traced(aggregates)?.source.as_ref().map(|source| source.session.clone());
        let hybrid = aggregates[2].report.runs[0].source.as_ref().map(|source| source.session.clone());
        assert!(hybrid.is_some());
        assert_eq!(session(&aggregates), hybrid);
        aggregates.reverse();
        assert_eq!(session(&aggregates), hybrid);
        assert!(session(&aggregates[1..]).is_some_and(|precopy| Some(precopy) != hybrid));
        assert_eq!(session(&aggregates[1..2]), None);
    }

    #[test]
    fn an_interrupted_bench_says_so() {
        let mut report = synthetic::three_modes(1).0;
        assert_eq!(judge(&report), Ok(()));
        report.interrupted = true;
        assert!(judge(&report).unwrap_err().sentence.contains("interrupted"));
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_named() {
        let report = synthetic::report(vec![]);
        let failure = write(&report, &[], Path::new("/proc/nowhere")).unwrap_err();
        assert!(failure.sentence.contains("/proc/nowhere/report.json"), "{}", failure.sentence);
    }
}
