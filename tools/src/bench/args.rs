//! What `switchover bench` takes, and what it makes of it.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::modes::{self, Mode};
use crate::failure::Failure;
use crate::guests;
use crate::size::Size;

/// What `switchover bench` takes.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    /// The built-in guest to move; see below for what each does
    #[arg(long, value_name = "NAME", default_value = "random", conflicts_with = "kernel")]
    guest: String,

    /// A guest of your own instead: an ELF with a PVH note that prints the built-in guests' lines
    #[arg(long, value_name = "ELF")]
    kernel: Option<PathBuf>,

    /// Ways to move it, separated by commas: postcopy
    #[arg(long, value_name = "MODE,…", value_delimiter = ',', default_value = "postcopy")]
    modes: Vec<String>,

    /// Runs of each mode [default: 5, with --quick 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,

    /// Guest memory, with a unit: K, M, G or T. The built-in guests work on half of it
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: Size,

    /// Number of vCPUs, all of which work
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    vcpus: u8,

    /// Added to a built-in guest's command line (`ws=64M pace=1000`), or all of that of --kernel
    #[arg(long, value_name = "STRING", default_value = "", hide_default_value = true)]
    append: String,

    /// How often the guest reports, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(10..=10_000))]
    period: u64,

    /// What the two sides talk over, on this host
    #[arg(long, value_enum, default_value_t = Link::Tcp)]
    link: Link,

    /// Seconds that the guest works before it is moved [default: 2, with --quick 1]
    #[arg(long, value_name = "S", value_parser = seconds)]
    warmup: Option<f64>,

    /// Seconds that it goes on after it has arrived whole [default: 2, with --quick 1.5]
    #[arg(long, value_name = "S", value_parser = seconds)]
    after: Option<f64>,

    /// Another VMM to measure beside this one (not built yet)
    #[arg(long, value_name = "NAME")]
    peer: Option<String>,

    /// Directory for the report; made where it is missing
    #[arg(long, value_name = "DIR", default_value = "switchover-report")]
    out: PathBuf,

    /// A first look: few and short runs, well under a minute
    #[arg(long)]
    quick: bool,
}

const EXAMPLES: &str = "\
Each run starts a source and a destination of this same program as processes of their own, lets the guest work, moves
it, and checks every line that it printed: it is verified when no visit to any page found anything but what the guest
had written there, on both sides, and no report is missing.

Guests: random (writes pages chosen uniformly), sequential (writes them in order), hotset (90 % of the visits go to
10 % of the pages), reader (reads, and writes 5 %), idle (sleeps between two writes), once (writes each page once).

Examples:
  A first look:                        switchover bench --quick
  The reference case, ten times:       switchover bench --guest random --memory 512M --runs 10
  Two vCPUs over a unix socket:        switchover bench --vcpus 2 --link unix
  A small working set, paced:          switchover bench --append 'ws=32M pace=2000'

It writes report.html to look at, report.json (switchover.report/v1) with everything in it, and the fault latencies as
*.hgrm and *.hlog for HdrHistogram's tools.

Exit status: 0 when every run's guest memory was verified, 1 when not or when a run failed, 2 for bad usage.";

/// What the two sides talk over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Link {
    /// TCP on the loopback interface
    Tcp,
    /// A unix socket
    Unix,
}

impl Link {
    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
        }
    }
}

/// Where a guest comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Guest {
    /// One of our own: its name and its ELF file.
    Builtin(String, &'static [u8]),
    /// A file.
    File(PathBuf),
}

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The guest.
    pub guest: Guest,
    /// Its command line.
    pub append: String,
    /// The ways to move it.
    pub modes: Vec<&'static dyn Mode>,
    /// Runs of each.
    pub runs: u32,
    /// Guest memory.
    pub memory: Size,
    /// vCPUs.
    pub vcpus: u8,
    /// Milliseconds between the guest's reports.
    pub period_ms: u64,
    /// What the two sides talk over.
    pub link: Link,
    /// Seconds before the move.
    pub warmup_s: f64,
    /// Seconds after it.
    pub after_s: f64,
    /// Where the report goes.
    pub out: PathBuf,
    /// Seconds to spend on the floor.
    pub floor_s: f64,
}

impl BenchArgs {
    /// What the arguments ask for.
    ///
    /// # Errors
    /// When they ask for what there is not.
    pub fn plan(&self) -> Result<Plan, Failure> {
        if let Some(peer) = &self.peer {
            return Err(Failure::usage(format_args!(
                "--peer {peer} is not built yet: bench measures switchover alone for now; leave --peer out"
            )));
        }
        let modes = self.modes.iter().map(|name| modes::by_name(name)).collect::<Result<_, _>>()?;
        let (guest, append) = match &self.kernel {
            Some(path) => (Guest::File(path.clone()), self.append.clone()),
            None => (self.builtin()?, self.builtin_append()),
        };
        let (runs, warmup_s, after_s, floor_s) = if self.quick { (2, 1.0, 1.5, 1.0) } else { (5, 2.0, 2.0, 2.0) };
        Ok(Plan {
            guest,
            append,
            modes,
            runs: self.runs.unwrap_or(runs),
            memory: self.memory,
            vcpus: self.vcpus,
            period_ms: self.period,
            link: self.link,
            warmup_s: self.warmup.unwrap_or(warmup_s),
            after_s: self.after.unwrap_or(after_s),
            out: self.out.clone(),
            floor_s,
        })
    }

    fn builtin(&self) -> Result<Guest, Failure> {
        match guests::builtin(&self.guest) {
            Some(elf) => Ok(Guest::Builtin(self.guest.clone(), elf)),
            None => Err(Failure::usage(format_args!(
                "--guest {}: there is no such guest; choose one of {}, or give an ELF file with --kernel",
                self.guest,
                guests::NAMES.join(", ")
            ))),
        }
    }

    /// A guest takes the last of two values of a parameter: what the user says stands behind what follows from the
    /// other options.
    fn builtin_append(&self) -> String {
        let working_set = self.memory.0.bytes() / 2 / 4096 * 4096;
        let ours = format!("ws={working_set} vcpus={} period={}", self.vcpus, self.period);
        if self.append.is_empty() { ours } else { format!("{ours} {}", self.append) }
    }
}

/// A number of seconds, up to an hour.
fn seconds(text: &str) -> Result<f64, String> {
    let wanted = || "it is no number of seconds between 0 and 3600".to_owned();
    text.parse().ok().filter(|seconds| (0.0..=3600.0).contains(seconds)).ok_or_else(wanted)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    struct Cli {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn plan(arguments: &[&str]) -> Result<Plan, Failure> {
        Cli::try_parse_from([&["bench"], arguments].concat()).expect("the arguments parse").bench.plan()
    }

    #[test]
    fn the_defaults_are_the_reference_case() {
        let plan = plan(&[]).unwrap();
        assert!(matches!(&plan.guest, Guest::Builtin(name, _) if name == "random"));
        assert_eq!(plan.append, "ws=268435456 vcpus=1 period=100");
        assert_eq!((plan.runs, plan.modes.len(), plan.link), (5, 1, Link::Tcp));
    }

    #[test]
    fn quick_is_short_and_what_is_said_stands() {
        let plan = plan(&["--quick", "--runs", "3", "--append", "ws=1M"]).unwrap();
        assert_eq!((plan.runs, plan.warmup_s), (3, 1.0));
        assert!(plan.append.ends_with(" ws=1M"));
    }

    #[test]
    fn a_guest_of_ones_own_gets_only_ones_own_command_line() {
        let plan = plan(&["--kernel", "/g.elf", "--append", "a=1"]).unwrap();
        assert_eq!((plan.guest, plan.append.as_str()), (Guest::File("/g.elf".into()), "a=1"));
    }

    #[test]
    fn what_is_not_built_is_refused_with_a_sentence() {
        for (arguments, about) in [
            (&["--modes", "precopy"][..], "precopy is not built yet"),
            (&["--modes", "postcopy,hybrid"], "hybrid is not built yet"),
            (&["--modes", "teleport"], "no such mode"),
            (&["--peer", "qemu"], "--peer qemu is not built yet"),
            (&["--guest", "nobody"], "choose one of random"),
        ] {
            let failure = plan(arguments).unwrap_err();
            assert_eq!(failure.status, 2);
            assert!(failure.sentence.contains(about), "{}", failure.sentence);
        }
    }

    #[test]
    fn nonsense_does_not_parse() {
        for arguments in [["--runs", "0"], ["--warmup", "-1"], ["--after", "nan"], ["--period", "5"], ["--link", "ib"]]
        {
            let error = Cli::try_parse_from([&["bench"], &arguments[..]].concat()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{arguments:?}");
        }
    }
}
