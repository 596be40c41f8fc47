//! `switchover simulate`: plays recorded or made-up guests through the convergence monitor, and says what it decided and how
//! much dearer that was than the best.

pub mod bits;
pub mod drain;
pub mod guest;
pub mod oracle;
pub mod replay;
pub mod synthetic;
pub mod table;
pub mod units;

#[cfg(test)]
mod tests;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use switchover_hybrid::monitor::{self, Limits};
use switchover_hybrid::trace::Trace;

use crate::failure::Failure;
use crate::size::Size;

use self::guest::Guest;
use self::oracle::Judged;
use self::replay::Link;
use self::synthetic::{JUDGING_SEEDS, Pattern};
use self::units::{Bandwidth, Seeds, Time};

/// The schema of `--json`.
const SCHEMA: &str = "switchover.simulation/v1";
/// Migrations of one command, at most.
const MOST: usize = 100_000;

/// What `switchover simulate` takes.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct SimulateArgs {
    /// Traces: what `switchover bench --trace FILE` wrote
    #[arg(value_name = "FILE", required_unless_present = "synthetic")]
    files: Vec<PathBuf>,

    /// Bandwidths to play at, in bits a second
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1G")]
    bandwidth: Vec<Bandwidth>,

    /// Delays of the link to play at, one way
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "50us")]
    delay: Vec<Time>,

    /// How the migration may end
    #[arg(long, value_enum, default_value_t = Mode::Hybrid)]
    mode: Mode,

    /// Longest blackout that `--mode precopy` may end with
    #[arg(long, value_name = "TIME", default_value = "300ms")]
    downtime_limit: Time,

    /// Longest blackout that `--mode hybrid` may stop and copy for
    #[arg(long, value_name = "TIME", default_value = "5ms")]
    blackout: Time,

    /// Longest time for all rounds together
    #[arg(long, value_name = "TIME", default_value = "120s")]
    time_budget: Time,

    /// Play made-up guests as well: idle, read-mostly, sequential, uniform, zipf, phases, bursts
    #[arg(long)]
    synthetic: bool,

    /// Seeds of the made-up guests [default: those that the monitor is judged by]
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "synthetic")]
    seeds: Vec<Seeds>,

    /// RAM of the made-up guests
    #[arg(long, value_name = "SIZE", default_value = "64M", requires = "synthetic")]
    memory: Size,

    /// Print JSON, with the monitor's reasons
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
The cost of a migration is the guest-seconds lost and a tenth of the seconds in all. The oracle tries each end at every
sample (10 ms apart, and at each round's end) and knows what follows; the regret is how much dearer the monitor's end was.

Examples:
  A recorded run at three bandwidths:
    switchover simulate run.trace --bandwidth 100M,1G,5G
  The same with a longer delay, and a shorter blackout:
    switchover simulate run.trace --delay 50us,10ms --blackout 2ms
  Whether pre-copy alone would have converged:
    switchover simulate run.trace --mode precopy --downtime-limit 100ms
  The guests that the monitor is judged by; then those that it was tuned on:
    switchover simulate --synthetic --bandwidth 100M,1G,5G,20G
    switchover simulate --synthetic --seeds 1-8 --bandwidth 100M,1G,5G,20G

Exit status: 0 when all was played, 1 when a file cannot be read or is no trace, 2 for bad usage.";

/// The ways to end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mode {
    /// Rounds until the rest fits into the downtime limit
    Precopy,
    /// Rounds for as long as they pay, then the cheaper end
    Hybrid,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    migrations: &'a [Judged],
    summary: table::Summary,
}

/// Plays what was asked for.
///
/// # Errors
/// When a file cannot be read or is no trace, or there is too much to play.
pub fn main(args: &SimulateArgs) -> Result<(), Failure> {
    let limits = args.limits();
    let links = args.links();
    let seeds = args.seeds();
    let synthetic = if args.synthetic { seeds.len() * Pattern::ALL.len() } else { 0 };
    let migrations = (args.files.len() + synthetic).saturating_mul(links.len());
    if migrations > MOST {
        return Err(Failure::usage(format_args!(
            "cannot play {migrations} migrations at once: name fewer seeds, bandwidths or delays, for at most {MOST}"
        )));
    }
    let mut judged = Vec::with_capacity(migrations);
    let mut play = |guest: &Guest| judged.extend(links.iter().map(|link| oracle::judge(guest, *link, &limits)));
    for file in &args.files {
        play(&load(file)?);
    }
    if args.synthetic {
        for pattern in Pattern::ALL {
            for seed in &seeds {
                play(&synthetic::guest(pattern, *seed, args.memory.0.0));
            }
        }
    }
    let text = if args.json { json(&judged)? } else { table::text(&judged) };
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    Ok(())
}

fn json(judged: &[Judged]) -> Result<String, Failure> {
    let document = Document { schema: SCHEMA, migrations: judged, summary: table::summary(judged) };
    let text = serde_json::to_string_pretty(&document)
        .map_err(|error| Failure::failed(format_args!("cannot write the result as JSON: {error}")))?;
    Ok(text + "\n")
}

fn load(path: &Path) -> Result<Guest, Failure> {
    let failed = |error: &dyn std::fmt::Display| {
        Failure::failed(format_args!("cannot play the trace {}: {error}", path.display()))
    };
    let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
    let trace = Trace::from_json(&text).map_err(|error| failed(&error))?;
    Guest::from_trace(&trace).map_err(|error| failed(&error))
}

impl SimulateArgs {
    fn limits(&self) -> Limits {
        Limits {
            mode: match self.mode {
                Mode::Precopy => monitor::Mode::Precopy,
                Mode::Hybrid => monitor::Mode::Hybrid,
            },
            downtime_limit: self.downtime_limit.0,
            blackout_target: self.blackout.0,
            time_budget: self.time_budget.0,
            ..Limits::default()
        }
    }

    fn links(&self) -> Vec<Link> {
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let link = |bandwidth: &Bandwidth, delay: &Time| Link {
            bytes_per_second: bandwidth.bits_per_second / 8,
            delay_ns: nanoseconds(delay.0),
        };
        self.bandwidth.iter().flat_map(|bandwidth| self.delay.iter().map(move |delay| link(bandwidth, delay))).collect()
    }

    fn seeds(&self) -> Vec<u64> {
        if self.seeds.is_empty() {
            return JUDGING_SEEDS.collect();
        }
        self.seeds.iter().flat_map(|seeds| seeds.0.clone()).collect()
    }
}
