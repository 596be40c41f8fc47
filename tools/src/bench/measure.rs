//! All runs of a plan, in an order that is fair to every mode.

use std::time::{Duration, SystemTime};

use indicatif::{ProgressBar, ProgressStyle};

use super::aggregate::Aggregate;
use super::args::{Cell, Plan};
use super::calendar;
use super::driver::{Driver, Order};
use super::host_info::HostInfo;
use super::matrix::Matrix;
use super::schema::{Report, RunReport, SCHEMA, Settings};
use super::vmm::Vmm;
use crate::failure::Failure;
use crate::floor;
use crate::signals::EndRequests;

/// How often the line on the terminal moves.
const TICK: Duration = Duration::from_millis(100);

/// Makes all runs of `plan`, or as many as there is time for until the user ends it.
///
/// # Errors
/// When there is nothing to run with, or a side reported a histogram that is none.
pub fn measure(plan: &Plan, vmm: &dyn Vmm, ends: &EndRequests) -> Result<(Report, Vec<Aggregate>), Failure> {
    let created = calendar::utc(SystemTime::now());
    let driver = Driver::new(plan, ends)?;
    let bar = progress_bar(u64::from(plan.runs) * plan.modes.len() as u64 * plan.cells.len() as u64);
    bar.set_message("measuring the floor");
    let floor = floor::measure(Duration::from_secs_f64(plan.floor_s));
    let mut aggregates = Vec::new();
    for cell in &plan.cells {
        driver.prepare(cell)?;
        for (mode, runs) in plan.modes.iter().zip(take_turns(plan, cell, &driver, vmm, &bar, ends)) {
            if runs.is_empty() {
                continue;
            }
            let aggregate = Aggregate::of(mode.name(), vmm.name(), runs).map_err(Failure::failed)?;
            aggregates.push(aggregate.in_cell(cell.guest_name(), cell.bandwidth));
        }
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
        matrix: Matrix::of(&modes),
        interrupted: ends.count() > 0,
        modes,
    };
    Ok((report, aggregates))
}

/// Run 1 of every mode, then run 2 of every mode, and so on: what the host does meanwhile hits them alike. The runs of
/// each mode, in the plan's order of modes; none that the user interrupted.
fn take_turns(
    plan: &Plan,
    cell: &Cell,
    driver: &Driver<'_>,
    vmm: &dyn Vmm,
    bar: &ProgressBar,
    ends: &EndRequests,
) -> Vec<Vec<RunReport>> {
    let mut runs: Vec<Vec<RunReport>> = plan.modes.iter().map(|_| Vec::new()).collect();
    for run in 1..=plan.runs {
        for (mode, done) in plan.modes.iter().zip(&mut runs) {
            // What could not be carried out once will not be the next time.
            let hopeless = done.last().is_some_and(|last: &RunReport| last.marks.is_none());
            if hopeless || ends.count() > 0 {
                bar.inc(1);
                continue;
            }
            let place = format!("{} {}, {} run {run} of {}", cell.guest_name(), cell.bandwidth, mode.name(), plan.runs);
            let tell = |what: &str| bar.set_message(format!("{place}: {what}"));
            let report = driver.run(vmm, Order { cell, mode: *mode, run, tell: &tell });
            if report.marks.is_some() || ends.count() == 0 {
                done.push(report);
            }
            bar.inc(1);
        }
    }
    runs
}

fn settings(plan: &Plan) -> Settings {
    let mut guests: Vec<String> = plan.cells.iter().map(Cell::guest_name).collect();
    guests.dedup();
    Settings {
        guest: guests.join(", "),
        append: plan.cells.first().map(|cell| cell.append.clone()).unwrap_or_default(),
        memory: plan.memory.0.bytes(),
        vcpus: plan.vcpus,
        link: plan.link.name().to_owned(),
        runs: plan.runs,
        period_ms: plan.period_ms,
        warmup_s: plan.warmup_s,
        after_s: plan.after_s,
        patience_s: plan.patience_s,
        hold_push_s: plan.hold_push_s,
    }
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
