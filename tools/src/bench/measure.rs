//! All runs of a plan, in an order that is fair to every mode.

use std::time::{Duration, SystemTime};

use indicatif::{ProgressBar, ProgressStyle};

use super::aggregate::Aggregate;
use super::args::{Cell, Plan};
use super::comparison::Comparison;
use super::driver::{Driver, Order};
use super::host_info::HostInfo;
use super::matrix::Matrix;
use super::modes::Mode;
use super::schema::{PeerInfo, Report, RunReport, SCHEMA, Settings};
use super::statistics::shuffle;
use super::vmm::Vmm;
use crate::calendar;
use crate::failure::Failure;
use crate::floor;
use crate::rng::Rng;
use crate::signals::EndRequests;

/// How often the line on the terminal moves.
const TICK: Duration = Duration::from_millis(100);

/// One way in which one VMM moves a guest.
#[derive(Clone, Copy)]
pub struct Entry<'a> {
    /// Whose machines.
    pub vmm: &'a dyn Vmm,
    /// How.
    pub mode: &'static dyn Mode,
}

/// Makes all runs of `plan` of each of `entries`, or as many as there is time for until the user ends it. `peer` is whose
/// some of them are.
///
/// # Errors
/// When there is nothing to run with, or a side reported a histogram that is none.
pub fn measure(
    plan: &Plan,
    entries: &[Entry<'_>],
    peer: Option<PeerInfo>,
    ends: &EndRequests,
) -> Result<(Report, Vec<Aggregate>), Failure> {
    let created = calendar::utc(SystemTime::now());
    let driver = Driver::new(plan, ends)?;
    let bar = progress_bar(u64::from(plan.runs) * entries.len() as u64 * plan.cells.len() as u64);
    bar.set_message("measuring the floor");
    let floor = floor::measure(Duration::from_secs_f64(plan.floor_s));
    let mut aggregates = Vec::new();
    let mut generator = Rng::new(u64::from(plan.seed));
    for cell in &plan.cells {
        driver.prepare(cell)?;
        let turns = Turns { plan, cell, driver: &driver, bar: &bar, ends };
        for (Entry { vmm, mode }, runs) in entries.iter().zip(turns.take(entries, &mut generator)) {
            if runs.is_empty() {
                continue;
            }
            let aggregate = Aggregate::of(mode.name(), vmm.name(), runs).map_err(Failure::failed)?;
            aggregates.push(aggregate.of_family(mode.family()).in_cell(cell.guest_name(), cell.bandwidth));
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
        comparison: peer.as_ref().and_then(|peer| Comparison::of(&modes, peer)),
        settings: settings(plan, peer),
        floor: Some(floor),
        matrix: Matrix::of(&modes),
        interrupted: ends.count() > 0,
        modes,
    };
    Ok((report, aggregates))
}

/// What the runs of one cell need.
struct Turns<'a> {
    plan: &'a Plan,
    cell: &'a Cell,
    driver: &'a Driver<'a>,
    bar: &'a ProgressBar,
    ends: &'a EndRequests,
}

impl Turns<'_> {
    /// Run 1 of every entry in random order, then run 2 of every entry in another, and so on: what the host does meanwhile
    /// hits them alike, and none always comes behind the same other. The runs of each entry, in the entries' order; none that
    /// the user interrupted.
    fn take(&self, entries: &[Entry<'_>], generator: &mut Rng) -> Vec<Vec<RunReport>> {
        let mut runs: Vec<Vec<RunReport>> = entries.iter().map(|_| Vec::new()).collect();
        for run in 1..=self.plan.runs {
            let mut round: Vec<_> = entries.iter().zip(&mut runs).collect();
            shuffle(&mut round, generator);
            for (entry, done) in round {
                self.make(*entry, run, done);
                self.bar.inc(1);
            }
        }
        runs
    }

    fn make(&self, Entry { vmm, mode }: Entry<'_>, run: u32, done: &mut Vec<RunReport>) {
        // What could not be carried out once will not be the next time.
        let hopeless = done.last().is_some_and(|last: &RunReport| last.marks.is_none());
        if hopeless || self.ends.count() > 0 {
            return;
        }
        let (cell, plan) = (self.cell, self.plan);
        let whose = if plan.peer.is_some() { format!("{} ", vmm.name()) } else { String::new() };
        let (guest, link) = (cell.guest_name(), cell.bandwidth);
        let place = format!("{guest} {link}, {whose}{} run {run} of {}", mode.name(), plan.runs);
        let tell = |what: &str| self.bar.set_message(format!("{place}: {what}"));
        let report = self.driver.run(vmm, Order { cell, mode, run, tell: &tell });
        if report.marks.is_some() || self.ends.count() == 0 {
            done.push(report);
        }
    }
}

fn settings(plan: &Plan, peer: Option<PeerInfo>) -> Settings {
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
        parameters: plan.parameters.clone(),
        seccomp: plan.seccomp.name().to_owned(),
        seed: plan.seed,
        peer,
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
