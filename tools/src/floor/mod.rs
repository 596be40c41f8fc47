//! `switchover floor`: what this machine can do at best, to read all else against.
//!
//! A remote fault is a fault that a thread answers, and a request and its page over a socket. Here each is measured
//! alone, with nothing to do but that, and nothing of the pager in it:
//!
//! ```text
//!   user_fault    a thread touches a page ──▶ userfaultfd ──▶ handler: CONTINUE ──▶ it goes on
//!   guest_fault   a KVM guest does         ──▶     "       ──▶     "              ──▶ it goes on
//!   request       16 bytes ──▶ TCP loopback or unix socket ──▶ 4 KiB back
//! ```
//!
//! each with both ways of waiting: sleeping in the kernel, and asking again and again. Their sum is F.

mod guest_fault;
mod handler;
mod percentiles;
mod region;
mod report;
mod request;
mod table;
mod user_fault;

use std::io::Write as _;
use std::time::{Duration, Instant};

use clap::Args;
use hdrhistogram::Histogram;
use thiserror::Error;

pub use self::percentiles::Percentiles;
#[cfg(test)]
pub use self::report::synthetic;
pub use self::report::{FloorReport, FloorSum, Measured, Ways};
use crate::failure::Failure;

/// Samples beyond this make no percentile shown any better.
const MOST_SAMPLES: u64 = 100_000;
/// One minute: whatever takes longer is as bad.
const HIGHEST_NS: u64 = 60_000_000_000;
/// Round trips that are thrown away first: page tables, caches and the scheduler settle.
const WARM_UP: u64 = 200;
/// Measurements that share the time: two parts of a fault and two links, each waited for in two ways.
const PARTS: u32 = 8;

/// What `switchover floor` takes.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct FloorArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,

    /// Seconds to spend, divided among eight measurements
    #[arg(long, value_name = "S", default_value_t = 4.0, value_parser = seconds)]
    budget: f64,
}

const EXAMPLES: &str = "\
Measure on an idle machine. F, a guest's fault plus a 4 KiB request and response, is the least that a guest can feel of a
remote fault with that way of waiting; a pager's own figures leave out the way out of the guest and back. `switchover
bench` measures F before its runs and draws it into its latency plot.

Examples:
  switchover floor
  switchover floor --json --budget 20 > floor.json

Exit status: 0 when something could be measured, 1 when nothing could (stderr says why), 2 for bad usage.";

/// A part could not be measured.
#[derive(Debug, Error)]
#[error("cannot {attempted}: {reason}")]
pub struct FloorError {
    attempted: &'static str,
    reason: String,
}

impl FloorError {
    fn on<E: std::fmt::Display>(attempted: &'static str) -> impl Fn(E) -> Self {
        move |error| Self { attempted, reason: error.to_string() }
    }
}

/// How whoever waits for the other side does it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Sleeping,
    Spinning,
}

/// Measures and prints.
///
/// # Errors
/// When nothing at all could be measured.
pub fn main(args: &FloorArgs) -> Result<(), Failure> {
    let report = measure(Duration::from_secs_f64(args.budget));
    let text = if args.json {
        serde_json::to_string_pretty(&report)
            .map_err(|error| Failure::failed(format_args!("cannot write the floor as JSON: {error}")))?
            + "\n"
    } else {
        table::text(&report)
    };
    // A closed stdout is no reason to fail.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    if report.parts().iter().all(|(_, _, measured)| measured.round().is_none()) {
        return Err(Failure::failed("nothing could be measured; `switchover check` says what this host lacks"));
    }
    Ok(())
}

/// Measures every part, within about `budget`.
#[must_use]
pub fn measure(budget: Duration) -> FloorReport {
    let each = budget / PARTS;
    FloorReport::new(
        ways(|way| user_fault::measure(way, each)),
        ways(|way| guest_fault::measure(way, each)),
        ways(|way| request::over_tcp(way, each)),
        ways(|way| request::over_unix(way, each)),
    )
}

fn ways(measure: impl Fn(Way) -> Result<Samples, FloorError>) -> Ways {
    let one = |way| match measure(way) {
        Ok(samples) => Measured::Round(Percentiles::of(&samples.histogram)),
        Err(error) => Measured::Missing { unavailable: error.to_string() },
    };
    Ways { sleeping: one(Way::Sleeping), spinning: one(Way::Spinning) }
}

/// Round trips as they come in, until there are enough.
struct Samples {
    histogram: Histogram<u64>,
    skip: u64,
    until: Instant,
}

impl Samples {
    fn new(budget: Duration) -> Result<Self, FloorError> {
        let histogram = Histogram::new_with_bounds(1, HIGHEST_NS, 3).map_err(FloorError::on("make a histogram"))?;
        Ok(Self { histogram, skip: WARM_UP, until: Instant::now() + budget })
    }

    fn record(&mut self, ns: u64) {
        if self.skip > 0 {
            self.skip -= 1;
        } else {
            self.histogram.saturating_record(ns);
        }
    }

    /// Whether another round trip is wanted. There is always at least one, however short the time.
    fn wants_more(&self) -> bool {
        self.histogram.is_empty() || (self.histogram.len() < MOST_SAMPLES && Instant::now() < self.until)
    }
}

/// A number of seconds, up to ten minutes.
fn seconds(text: &str) -> Result<f64, String> {
    let wanted = || "it is no number of seconds between 0.1 and 600".to_owned();
    text.parse().ok().filter(|seconds| (0.1..=600.0).contains(seconds)).ok_or_else(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_round_trips_do_not_count() {
        let mut samples = Samples::new(Duration::ZERO).unwrap();
        for _ in 0..WARM_UP {
            samples.record(1_000_000);
        }
        assert!(samples.wants_more(), "even when the time is over");
        samples.record(7);
        assert_eq!(samples.histogram.max(), 7);
        assert!(!samples.wants_more());
    }

    #[test]
    fn a_whole_floor_is_measured_or_says_why_not() {
        let report = measure(Duration::from_millis(800));
        for (name, way, measured) in report.parts() {
            match measured {
                Measured::Round(percentiles) => {
                    assert!(percentiles.count > 0 && percentiles.p50_ns > 100, "{name} {way}: {percentiles:?}");
                    assert!(percentiles.p50_ns <= percentiles.p99_ns && percentiles.p99_ns <= percentiles.max_ns);
                }
                Measured::Missing { unavailable } => println!("SKIP {name}, {way}: {unavailable}"),
            }
        }
        // Sockets need nothing special.
        assert!(report.tcp.sleeping.round().is_some() && report.unix.spinning.round().is_some(), "{report:?}");
    }
}
