//! `switchover bench`: moves real guests between two processes of this program, proves that no byte was lost, and
//! reports how it went.
//!
//! ```text
//!   args → Plan ──▶ driver ── one run ──▶ RunReport ──▶ aggregate ──▶ Report ──▶ table on stdout
//!                    │  process: two children,   ▲                       │──▶ report.json    (schema)
//!                    │  their serial ports       │                       │──▶ report.html    (html, plots)
//!                    │  modes: QMP commands      │                       └──▶ *.hgrm, *.hlog (hdr_files)
//!                    ▼  vmm: whose machines      │
//!              serial_log → guest_lines → guest_trace: doubts, progress
//! ```
//!
//! A further mode is a file in `modes`, a further VMM one in `vmm`. What every figure means is said in
//! `docs/report.md`.

pub mod aggregate;
pub mod args;
mod calendar;
mod driver;
pub mod figures;
pub mod format;
pub mod guest_lines;
pub mod guest_trace;
pub mod hdr_files;
pub mod host_info;
pub mod html;
pub mod latency;
pub mod modes;
pub mod plots;
pub mod process;
pub mod run_error;
pub mod schema;
pub mod serial_log;
#[cfg(test)]
mod synthetic;
pub mod table;
pub mod vmm;

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use indicatif::{ProgressBar, ProgressStyle};

use self::aggregate::Aggregate;
pub use self::args::BenchArgs;
use self::args::{Guest, Plan};
use self::driver::Driver;
use self::hdr_files::{write_all, write_file};
use self::host_info::HostInfo;
use self::schema::{Report, RunReport, SCHEMA, Settings};
use self::vmm::{Switchover, Vmm};
use crate::failure::Failure;
use crate::floor;
use crate::signals::EndRequests;

/// How often the line on the terminal moves.
const TICK: Duration = Duration::from_millis(100);

/// Measures, and writes the report.
///
/// # Errors
/// When the arguments make no sense, the report cannot be written, or a run was not verified.
pub fn main(args: &BenchArgs) -> Result<(), Failure> {
    let plan = args.plan()?;
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
    let (report, aggregates) = measure(&plan, &Switchover { executable }, &ends)?;
    write(&report, &aggregates, &plan.out)?;
    let shown = format!("{}\nThe report is {}\n", table::text(&report), plan.out.join("report.html").display());
    // A closed stdout is no reason to fail: the report is written.
    let _ = std::io::stdout().lock().write_all(shown.as_bytes());
    judge(&report)
}

/// Makes all runs of `plan`.
fn measure(plan: &Plan, vmm: &dyn Vmm, ends: &EndRequests) -> Result<(Report, Vec<Aggregate>), Failure> {
    let created = calendar::utc(SystemTime::now());
    let driver = Driver::new(plan, ends)?;
    let bar = progress_bar(u64::from(plan.runs) * plan.modes.len() as u64);
    bar.set_message("measuring the floor");
    let floor = floor::measure(Duration::from_secs_f64(plan.floor_s));
    let mut aggregates = Vec::new();
    for mode in &plan.modes {
        let mut runs = Vec::new();
        for run in 1..=plan.runs {
            let tell = |what: &str| bar.set_message(format!("{}, run {run} of {}: {what}", mode.name(), plan.runs));
            let report = driver.run(vmm, *mode, run, &tell);
            let failed = report.marks.is_none();
            runs.push(report);
            bar.inc(1);
            // What could not be carried out once will not be the next time.
            if failed {
                break;
            }
        }
        let aggregate = Aggregate::of(mode.name(), vmm.name(), runs).map_err(Failure::failed)?;
        aggregates.push(aggregate);
    }
    bar.finish_and_clear();
    let modes: Vec<_> = aggregates.iter().map(|aggregate| aggregate.report.clone()).collect();
    let report = Report {
        schema: SCHEMA.to_owned(),
        created,
        switchover: env!("CARGO_PKG_VERSION").to_owned(),
        verified: !modes.is_empty() && modes.iter().all(|mode| mode.verified),
        host: HostInfo::here(),
        settings: settings(plan),
        floor: Some(floor),
        modes,
    };
    Ok((report, aggregates))
}

fn settings(plan: &Plan) -> Settings {
    Settings {
        guest: match &plan.guest {
            Guest::Builtin(name, _) => name.clone(),
            Guest::File(path) => path.display().to_string(),
        },
        append: plan.append.clone(),
        memory: plan.memory.0.bytes(),
        vcpus: plan.vcpus,
        link: plan.link.name().to_owned(),
        runs: plan.runs,
        period_ms: plan.period_ms,
        warmup_s: plan.warmup_s,
        after_s: plan.after_s,
    }
}

fn write(report: &Report, aggregates: &[Aggregate], directory: &Path) -> Result<(), Failure> {
    let json = serde_json::to_vec_pretty(report)
        .map_err(|error| Failure::failed(format_args!("cannot write the report as JSON: {error}")))?;
    write_file(&directory.join("report.json"), &json).map_err(Failure::failed)?;
    aggregates.iter().try_for_each(|aggregate| write_all(aggregate, directory)).map_err(Failure::failed)?;
    let page = html::page(report, aggregates).map_err(Failure::failed)?;
    write_file(&directory.join("report.html"), page.as_bytes()).map_err(Failure::failed)
}

/// A bench is done when every run was verified.
fn judge(report: &Report) -> Result<(), Failure> {
    if report.verified {
        return Ok(());
    }
    let doubtful = |run: &&RunReport| !run.verified;
    let why: Vec<_> = report
        .modes
        .iter()
        .flat_map(|mode| mode.runs.iter().filter(doubtful).map(|run| (&mode.mode, run)))
        .map(|(mode, run)| format!("{mode} run {}: {}", run.run, run.doubts.join("; ")))
        .collect();
    Err(Failure::failed(format_args!("not every run was verified: {}", why.join(" | "))))
}

/// A line on the terminal; nothing where stderr is none.
fn progress_bar(runs: u64) -> ProgressBar {
    let bar = ProgressBar::new(runs);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_bar} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(TICK);
    bar
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
    fn a_directory_that_cannot_be_written_is_named() {
        let report = synthetic::report(vec![]);
        let failure = write(&report, &[], Path::new("/proc/nowhere")).unwrap_err();
        assert!(failure.sentence.contains("/proc/nowhere/report.json"), "{}", failure.sentence);
    }
}
