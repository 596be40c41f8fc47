//! `switchover simulate`: plays recorded or made-up guests through the convergence monitor, and says what it decided and how
//! much dearer that was than the best. With `--faults`, through push orders ([`faults`]).

pub mod bits;
pub mod drain;
pub mod faults;
pub mod guest;
pub mod oracle;
pub mod replay;
pub mod synthetic;
pub mod table;
pub mod units;

#[cfg(test)]
mod tests;

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use switchover_hybrid::monitor::{self, Limits};
use switchover_hybrid::trace::Trace;
use switchover_pager::source::order::Policy;

use crate::failure::Failure;
use crate::size::Size;

use self::faults::guest::Toucher;
use self::faults::model::Model;
use self::faults::patterns;

use self::guest::Guest;
use self::oracle::Judged;
use self::replay::Link;
use self::synthetic::{JUDGING_SEEDS, Pattern};
use self::units::{Bandwidth, Seeds, Time};

/// The schema of `--json`.
const SCHEMA: &str = "switchover.simulation/v1";
/// Migrations of one command, at most.
const MOST: usize = 100_000;
/// The schema of `--faults --json`.
const DRAINS_SCHEMA: &str = "switchover.drains/v1";
/// Bytes of a file that are read; a trace has no more.
const MOST_BYTES: u64 = 1 << 30;

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

    /// Play the faults after the handoff through push orders, instead of the rounds before it through the monitor
    #[arg(long)]
    faults: bool,

    /// Push orders to play: some of around, latest, bubbles, trend, aim, in-turn, joined by +; or sweep [default: those
    /// that docs/prefetch.md compares]
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "faults")]
    orders: Vec<Policy>,

    /// Time between two visits of a made-up guest that is played with --faults
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "500ns,20us,100us", requires = "faults")]
    pace: Vec<Time>,

    /// From a touch until its answer is on its way, with an idle link, without its delay
    #[arg(long, value_name = "TIME", requires = "faults")]
    ask: Option<Time>,

    /// From a page's arrival until its vCPU is woken, with an idle link
    #[arg(long, value_name = "TIME", requires = "faults")]
    wake: Option<Time>,

    /// How many times as long both take beside a push
    #[arg(long, value_name = "N", requires = "faults")]
    loaded: Option<f64>,

    /// What a fault costs the vCPU besides what the pager sees
    #[arg(long, value_name = "TIME", requires = "faults")]
    outside: Option<Time>,

    /// Frames handed to a bulk lane before they arrive
    #[arg(long, value_name = "N", requires = "faults", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    ahead: Option<u32>,

    /// Play made-up guests as well: idle, read-mostly, sequential, uniform, zipf, phases, bursts; with --faults random,
    /// hotset, hotset-hybrid, zipf, runs, sequential, strided, two-streams, phases, two-vcpus
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
The cost of a migration is the guest-seconds lost and a tenth of the seconds in all. The oracle tries each end at every \
sample (10 ms apart, and at each round's end) and knows what follows; the regret is how much dearer the monitor's end was.

Examples:
  A recorded run at three bandwidths:
    switchover simulate run.trace --bandwidth 100M,1G,5G
  The same with a longer delay, and a shorter blackout:
    switchover simulate run.trace --delay 50us,10ms --blackout 2ms
  Whether pre-copy alone would have converged:
    switchover simulate run.trace --mode precopy --downtime-limit 100ms
  Which push order leaves the guest to wait least; over a slower link, these two:
    switchover simulate --faults run.trace --bandwidth 10G
    switchover simulate --faults run.trace --bandwidth 1G --orders around,trend+bubbles+aim
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
    if args.faults {
        return drains(args);
    }
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

/// Plays drains through push orders.
fn drains(args: &SimulateArgs) -> Result<(), Failure> {
    let models = args.models()?;
    let seeds = if args.seeds.is_empty() { patterns::JUDGING_SEEDS.collect() } else { args.seeds() };
    let synthetic = if args.synthetic { seeds.len() * patterns::Pattern::ALL.len() * args.pace.len() } else { 0 };
    let orders = if args.orders.is_empty() { Policy::COMPARED.to_vec() } else { args.orders.clone() };
    let drains = (args.files.len() + synthetic).saturating_mul(models.len());
    if drains > MOST {
        return Err(Failure::usage(format_args!(
            "cannot play {drains} drains at once: name fewer seeds, paces, bandwidths or delays, for at most {MOST}"
        )));
    }
    let mut judged = Vec::with_capacity(drains);
    let mut play = |guest: &Toucher| judged.extend(models.iter().map(|model| faults::judge(guest, model, &orders)));
    for file in &args.files {
        let trace = read(file)?;
        let outside = models.first().map_or(0, |model| model.outside_ns);
        play(&Toucher::from_trace(&trace, outside).map_err(|error| unplayable(file, &error))?);
    }
    if args.synthetic {
        for pattern in patterns::Pattern::ALL {
            for (seed, pace) in seeds.iter().flat_map(|seed| args.pace.iter().map(move |pace| (*seed, pace))) {
                let mut guest = patterns::guest(pattern, seed, args.memory.0.0, nanoseconds(pace.0));
                guest.name = format!("{} {:?}", guest.name, pace.0);
                play(&guest);
            }
        }
    }
    let text = if args.json {
        let document = serde_json::json!({ "schema": DRAINS_SCHEMA, "drains": judged });
        serde_json::to_string_pretty(&document)
            .map_err(|error| Failure::failed(format_args!("cannot write the result as JSON: {error}")))?
            + "\n"
    } else {
        faults::table::text(&judged)
    };
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    Ok(())
}

fn load(path: &Path) -> Result<Guest, Failure> {
    let trace = read(path)?;
    if trace.epochs.is_empty() {
        return Err(unplayable(path, &"it holds no rounds of pre-copy; play its faults with --faults"));
    }
    Guest::from_trace(&trace).map_err(|error| unplayable(path, &error))
}

fn read(path: &Path) -> Result<Trace, Failure> {
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| unplayable(path, &error))?;
    // One byte more than is allowed: then the trace says that it is too long.
    file.take(MOST_BYTES + 1).read_to_string(&mut text).map_err(|error| unplayable(path, &error))?;
    Trace::from_json(&text).map_err(|error| unplayable(path, &error))
}

fn unplayable(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::failed(format_args!("cannot play the trace {}: {error}", path.display()))
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
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
        let link = |bandwidth: &Bandwidth, delay: &Time| Link {
            bytes_per_second: bandwidth.bits_per_second / 8,
            delay_ns: nanoseconds(delay.0),
        };
        self.bandwidth.iter().flat_map(|bandwidth| self.delay.iter().map(move |delay| link(bandwidth, delay))).collect()
    }

    fn models(&self) -> Result<Vec<Model>, Failure> {
        let here = Model::HERE;
        let loaded = self.loaded.unwrap_or(here.loaded);
        if !(1.0..=1000.0).contains(&loaded) {
            return Err(Failure::usage(format_args!("--loaded {loaded}: give a number from 1 to 1000")));
        }
        let given = |time: Option<Time>, default| time.map_or(default, |time| nanoseconds(time.0));
        let model = |link: Link| Model {
            bytes_per_second: link.bytes_per_second,
            delay_ns: link.delay_ns,
            ask_ns: given(self.ask, here.ask_ns),
            wake_ns: given(self.wake, here.wake_ns),
            outside_ns: given(self.outside, here.outside_ns),
            loaded,
            ahead: self.ahead.and_then(|ahead| usize::try_from(ahead).ok()).unwrap_or(here.ahead),
            ..here
        };
        Ok(self.links().into_iter().map(model).collect())
    }

    fn seeds(&self) -> Vec<u64> {
        if self.seeds.is_empty() {
            return JUDGING_SEEDS.collect();
        }
        self.seeds.iter().flat_map(|seeds| seeds.0.clone()).collect()
    }
}
