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
//! each with both ways of waiting: sleeping in the kernel, and asking again and again. Their sum is F. Then both in one, as a
//! pager does them; and all of it once more beside a bulk stream and a busy vCPU, which is the *loaded* floor.

mod busy;
mod fault;
mod guest_fault;
mod handler;
mod loaded;
mod loaded_report;
mod percentiles;
mod region;
mod report;
mod request;
mod stream;
mod table;
mod user_fault;

use std::io::Write as _;
use std::time::{Duration, Instant};

use clap::Args;
use hdrhistogram::Histogram;
use thiserror::Error;

use self::fault::{Touches, Vcpu};
pub use self::loaded_report::{Loaded, LoadedReport, LoadedWays, StreamRate};
pub use self::percentiles::Percentiles;
#[cfg(test)]
pub use self::report::synthetic;
pub use self::report::{FloorReport, FloorSum, Measured, Ways};
use crate::bench::bandwidth::Bandwidth;
use crate::failure::Failure;

/// Samples beyond this make no percentile shown any better.
const MOST_SAMPLES: u64 = 100_000;
/// One minute: whatever takes longer is as bad.
const HIGHEST_NS: u64 = 60_000_000_000;
/// Round trips that are thrown away first, but for no more than a quarter of the time: page tables, caches and the scheduler
/// settle.
const WARM_UP: u64 = 200;
const WARM_UP_SHARE: u32 = 4;
/// Pages touched before they are unmapped again: 2 MiB, and less where each takes longer.
const FAULT_PAGES: usize = guest_fault::MOST_PAGES;
const REMOTE_PAGES: usize = 128;
/// Measurements that share the time: two parts of a fault, two links, and a fault and TCP in one, each waited for in two ways.
const IDLE_PARTS: u32 = 10;

/// What `switchover floor` takes.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct FloorArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,

    /// Seconds to spend, divided among twenty measurements
    #[arg(long, value_name = "S", default_value_t = 12.0, value_parser = seconds)]
    budget: f64,

    /// Hold the stream of the loaded floor to so many bits a second, as in 5G [default: what it can]
    #[arg(long, value_name = "RATE", default_value = "unlimited", hide_default_value = true)]
    stream_rate: Bandwidth,
}

const EXAMPLES: &str = "\
Measure on an idle machine. F, a guest's fault plus a 4 KiB request and response, is the least that a guest can feel of a \
remote fault with that way of waiting; a pager's own figures leave out the way out of the guest and back. `switchover \
bench` measures F before its runs and draws it into its latency plot.

The loaded floor is the same beside a TCP stream of 64-page frames and a vCPU that works: what a fault can meet at best while \
memory is drained. The stream's own rate beside a busy vCPU is the yardstick for a drain.

Examples:
  switchover floor
  switchover floor --json --budget 60 > floor.json
  As beside a drain of 5 Gbit/s:  switchover floor --stream-rate 5G

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
    let report = measure_beside(Duration::from_secs_f64(args.budget), args.stream_rate);
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
    measure_beside(budget, Bandwidth::UNLIMITED)
}

/// The same; the stream beside the loaded parts is held to `stream_rate`.
fn measure_beside(budget: Duration, stream_rate: Bandwidth) -> FloorReport {
    let each = budget / (IDLE_PARTS + loaded::PARTS);
    let touches = |by, pages| Touches { by, pages, work_ns: 0 };
    let mut report = FloorReport::new(
        ways(|way| fault::no_op(touches(Vcpu::User, FAULT_PAGES), way, each)),
        ways(|way| fault::no_op(touches(Vcpu::Guest, FAULT_PAGES), way, each)),
        ways(|way| request::over_tcp(way, each)),
        ways(|way| request::over_unix(way, each)),
    );
    let vcpu = Vcpu::available();
    report.remote = Some(ways(|way| fault::remote(touches(vcpu, REMOTE_PAGES), way, each)));
    report.loaded = Some(loaded::measure(vcpu, each, stream_rate.bits_per_second()));
    report
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
    settled: Instant,
    until: Instant,
}

impl Samples {
    fn new(budget: Duration) -> Result<Self, FloorError> {
        let histogram = Histogram::new_with_bounds(1, HIGHEST_NS, 3).map_err(FloorError::on("make a histogram"))?;
        let now = Instant::now();
        Ok(Self { histogram, skip: WARM_UP, settled: now + budget / WARM_UP_SHARE, until: now + budget })
    }

    fn record(&mut self, ns: u64) {
        if self.skip > 0 && Instant::now() < self.settled {
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
        let mut samples = Samples::new(Duration::from_secs(3600)).unwrap();
        for _ in 0..WARM_UP {
            samples.record(1_000_000);
        }
        assert!(samples.histogram.is_empty());
        samples.record(7);
        assert_eq!(samples.histogram.max(), 7);
        assert!(samples.wants_more());
    }

    #[test]
    fn there_is_a_round_trip_even_when_the_time_is_over() {
        let mut samples = Samples::new(Duration::ZERO).unwrap();
        assert!(samples.wants_more());
        samples.record(7);
        assert_eq!(samples.histogram.len(), 1, "the warm-up has its share of the time, and no more");
        assert!(!samples.wants_more());
    }

    #[test]
    fn a_whole_floor_is_measured_or_says_why_not() {
        let report = measure(Duration::from_millis(1000));
        for (name, way, measured) in report.parts() {
            match measured {
                Measured::Round(percentiles) => {
                    assert!(percentiles.count > 0 && percentiles.p50_ns > 100, "{name} {way}: {percentiles:?}");
                    assert!(percentiles.p50_ns <= percentiles.p99_ns && percentiles.p99_ns <= percentiles.max_ns);
                }
                Measured::Missing { unavailable } => println!("SKIP {name}, {way}: {unavailable}"),
            }
        }
        let loaded = report.loaded.as_ref().unwrap();
        for (name, way, Loaded { round, stream_bit_s }) in loaded.parts() {
            match round {
                Measured::Round(percentiles) => {
                    assert!(percentiles.count > 0 && percentiles.p50_ns > 100, "{name} {way}: {percentiles:?}");
                    assert!(stream_bit_s.is_some());
                }
                Measured::Missing { unavailable } => println!("SKIP {name}, {way}, loaded: {unavailable}"),
            }
        }
        if loaded.fault.sleeping.round.round().is_some() {
            assert_eq!(loaded.streams.len(), 4, "{loaded:?}");
        }
        // Sockets need nothing special.
        assert!(report.tcp.sleeping.round().is_some() && report.unix.spinning.round().is_some(), "{report:?}");
    }
}
