//! What `switchover bench` takes, and what it makes of it.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use super::bandwidth::Bandwidth;
use super::modes::{self, Mode};
use super::vmm::{self, Peer};
use crate::confine::filter;
use crate::failure::Failure;
use crate::guests;
use crate::size::Size;

/// What `switchover bench` takes.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    /// The built-in guest to move; see below for what each does
    #[arg(long, value_name = "NAME", default_value = "random", conflicts_with_all = ["kernel", "matrix"])]
    guest: String,

    /// A guest of your own instead: an ELF with a PVH note that prints the built-in guests' lines
    #[arg(long, value_name = "ELF", conflicts_with = "matrix")]
    kernel: Option<PathBuf>,

    /// Ways to move it, separated by commas: precopy, postcopy, hybrid, or with --peer also those of the peer. Their runs
    /// take turns [default: postcopy, with --matrix all, with --peer all of both]
    #[arg(long, value_name = "MODE,…", value_delimiter = ',')]
    modes: Vec<String>,

    /// What the link may carry, separated by commas: bits a second, as in 100M, 1G, 2.5G, or unlimited [default: unlimited,
    /// with --matrix 1G,5G,unlimited]
    #[arg(long, value_name = "RATE,…", value_delimiter = ',')]
    bandwidth: Vec<Bandwidth>,

    /// Compare the modes on the guests hotset, sequential, random and idle at each bandwidth, and judge the hybrid
    #[arg(long)]
    matrix: bool,

    /// Runs of each mode [default: 5, with --peer 10, with --quick 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,

    /// Guest memory, with a unit: K, M, G or T. The built-in guests work on half of it [default: 512M, with --matrix 256M]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,

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

    /// Seconds that the guest works before it is moved [default: 2, with --peer 5, with --matrix 1.5, with --quick 1]
    #[arg(long, value_name = "S", value_parser = seconds)]
    warmup: Option<f64>,

    /// Seconds that it goes on after it has arrived whole [default: 2, with --peer 5.5, with --quick and --matrix 1.5]
    #[arg(long, value_name = "S", value_parser = seconds)]
    after: Option<f64>,

    /// Seconds after which a pre-copy that has not ended is cancelled; it did not converge then [default: what the source's
    /// own budget allows, with --matrix and --peer 15]
    #[arg(long, value_name = "S", value_parser = seconds)]
    patience: Option<f64>,

    /// Seconds after the handoff for which nothing is pushed, so that every page that the guest touches is a remote fault
    #[arg(long, value_name = "S", value_parser = seconds, conflicts_with = "matrix")]
    hold_push: Option<f64>,

    /// Set a migration parameter on both sides, to see what it costs: x-switchover-checksums=false. May be given again
    #[arg(long, value_name = "NAME=VALUE", value_parser = parameter, conflicts_with = "peer")]
    set: Vec<(String, Value)>,

    /// Write the first run's rounds and faults, for `switchover simulate`; hybrid's where it is among the modes. After the
    /// handoff nothing is pushed until the guest has touched most of its pages, so these runs' figures say little
    #[arg(long, value_name = "FILE", conflicts_with = "matrix")]
    trace: Option<PathBuf>,

    /// Move it over TLS too, in turn with the same modes as they are: their names end in -tls
    #[arg(long)]
    tls: bool,

    /// Whether the machines are confined to their system calls (`switchover run --help`): on, log or off, to see what that costs
    #[arg(long, value_name = "on|log|off", default_value = "on", hide_possible_values = true)]
    seccomp: filter::Mode,

    /// Another VMM to measure beside this one, in the same runs and by the same guest: qemu
    #[arg(long, value_name = "NAME")]
    peer: Option<String>,

    /// What the order of the runs follows from, to have the same again [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u32>,

    /// Directory for the report; made where it is missing
    #[arg(long, value_name = "DIR", default_value = "switchover-report")]
    out: PathBuf,

    /// A first look: few and short runs, well under a minute
    #[arg(long)]
    quick: bool,
}

const EXAMPLES: &str = "\
Each run starts a source and a destination of this same program as processes of their own, lets the guest work, moves \
it, and checks every line that it printed: it is verified when no visit to any page found anything but what the guest \
had written there, on both sides, and no report is missing.

Guests: random (writes pages chosen uniformly), sequential (writes them in order), hotset (90 % of the visits go to \
10 % of the pages), reader (reads, and writes 5 %), idle (sleeps between two writes), once (writes each page once).

Examples:
  A first look:                    switchover bench --quick
  The reference case, ten times:   switchover bench --guest random --memory 512M --runs 10
  Two vCPUs over a unix socket:    switchover bench --vcpus 2 --link unix
  A small working set, paced:      switchover bench --append 'ws=32M pace=2000'
  All modes over a slow link:      switchover bench --modes precopy,postcopy,hybrid --bandwidth 1G
  The same, shaped by the kernel:  switchover bench --bandwidth 1G --link veth
  Remote faults as they are felt:  switchover bench --guest once --warmup 1 --hold-push 1.5 \\
                                     --append 'gaps=fine pace=50000'
  What TLS costs:                  switchover bench --tls --modes postcopy,hybrid
  Is the hybrid the best of both:  switchover bench --matrix
  Beside QEMU, ten runs a mode:    switchover bench --peer qemu
  Only what one asks about:        switchover bench --peer qemu --modes postcopy,postcopy-preempt

A bandwidth is held by the source (max-bandwidth before the handoff, max-postcopy-bandwidth after it, which does not bound \
the answers to faults); over --link veth by the kernel instead, for everything that either side sends. \
A pre-copy that cannot keep up with the guest ends without moving it: it did not converge, and its cost is infinite.

--peer qemu moves the same guest with the same memory and vCPUs over the same link between two processes of QEMU (8.0 or \
later) by its modes precopy, multifd, postcopy, postcopy-preempt and precopy-postcopy (0.6 s of pre-copy, then post-copy). \
The guest itself says how it fared, alike for both. All runs of one round are made in random order. It takes a quarter of an \
hour.

It writes report.html to look at, report.json (switchover.report/v1) with everything in it, and the fault latencies as \
*.hgrm and *.hlog for HdrHistogram's tools.

Exit status: 0 when every run's guest memory was verified, 1 when not or when a run failed, 2 for bad usage.";

/// What the two sides talk over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Link {
    /// TCP on the loopback interface
    Tcp,
    /// A unix socket
    Unix,
    /// TCP between two network namespaces, over a virtual Ethernet that --bandwidth shapes; needs root
    Veth,
}

impl Link {
    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Veth => "veth",
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

/// What is moved over what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cell {
    /// The guest.
    pub guest: Guest,
    /// Its command line.
    pub append: String,
    /// What the link may carry.
    pub bandwidth: Bandwidth,
}

impl Cell {
    /// The guest's name in reports.
    #[must_use]
    pub fn guest_name(&self) -> String {
        match &self.guest {
            Guest::Builtin(name, _) => name.clone(),
            Guest::File(path) => path.display().to_string(),
        }
    }
}

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Each is measured in every mode.
    pub cells: Vec<Cell>,
    /// Whether the cells are those of the matrix.
    pub matrix: bool,
    /// The ways to move it.
    pub modes: Vec<&'static dyn Mode>,
    /// The VMM to measure beside this one.
    pub peer: Option<&'static Peer>,
    /// Its ways to move it.
    pub peer_modes: Vec<&'static dyn Mode>,
    /// What the order of the runs follows from.
    pub seed: u32,
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
    /// Whether each of this VMM's modes is measured over TLS too.
    pub tls: bool,
    /// Whether this VMM's machines are confined to their system calls.
    pub seccomp: filter::Mode,
    /// Seconds before the move.
    pub warmup_s: f64,
    /// Seconds after it.
    pub after_s: f64,
    /// Seconds after which a pre-copy is cancelled.
    pub patience_s: Option<f64>,
    /// Seconds after the handoff for which nothing is pushed.
    pub hold_push_s: Option<f64>,
    /// Parameters that both sides are given besides.
    pub parameters: Map<String, Value>,
    /// Where a run's trace goes.
    pub trace: Option<PathBuf>,
    /// Where the report goes.
    pub out: PathBuf,
    /// Seconds to spend on the floor.
    pub floor_s: f64,
}

/// What follows from `--quick` and `--matrix` for everything that is not said.
struct Defaults {
    modes: &'static [&'static str],
    bandwidths: &'static [&'static str],
    runs: u32,
    memory: &'static str,
    warmup_s: f64,
    after_s: f64,
    patience_s: Option<f64>,
    floor_s: f64,
}

const REFERENCE: Defaults = Defaults {
    modes: &["postcopy"],
    bandwidths: &["unlimited"],
    runs: 5,
    memory: "512M",
    warmup_s: 2.0,
    after_s: 2.0,
    patience_s: None,
    floor_s: 8.0,
};
const QUICK: Defaults = Defaults { runs: 2, warmup_s: 1.0, after_s: 1.5, floor_s: 4.0, ..REFERENCE };
/// 180 runs: each is kept to seconds.
const MATRIX: Defaults = Defaults {
    modes: &modes::NAMES,
    bandwidths: &["1G", "5G", "unlimited"],
    memory: "256M",
    warmup_s: 1.5,
    after_s: 1.5,
    patience_s: Some(15.0),
    ..REFERENCE
};
/// The guest is watched for five seconds on either side of the move.
const BESIDE_A_PEER: Defaults =
    Defaults { modes: &modes::NAMES, runs: 10, warmup_s: 5.0, after_s: 5.5, patience_s: Some(15.0), ..REFERENCE };
/// The guests of the matrix: what pre-copy likes best, and what it likes least.
const MATRIX_GUESTS: [&str; 4] = ["hotset", "sequential", "random", "idle"];

/// A parameter's name and value; what is no JSON is a string.
fn parameter(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("a name and a value, as in x-switchover-checksums=false")?;
    Ok((name.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| Value::from(value))))
}

impl BenchArgs {
    /// What the arguments ask for.
    ///
    /// # Errors
    /// When they ask for what there is not.
    pub fn plan(&self) -> Result<Plan, Failure> {
        let peer = self.peer.as_deref().map(vmm::peer).transpose()?;
        let defaults = match (self.matrix, self.quick, peer) {
            (false, false, None) => REFERENCE,
            (false, true, None) => QUICK,
            (true, false, None) => MATRIX,
            (true, false, Some(_)) => Defaults { runs: BESIDE_A_PEER.runs, ..MATRIX },
            (true, true, _) => Defaults { runs: QUICK.runs, floor_s: QUICK.floor_s, ..MATRIX },
            (false, false, Some(_)) => BESIDE_A_PEER,
            (false, true, Some(_)) => {
                Defaults { modes: BESIDE_A_PEER.modes, patience_s: BESIDE_A_PEER.patience_s, ..QUICK }
            }
        };
        let [modes, peer_modes] = self.modes(&defaults, peer)?;
        let memory = self.memory.map_or_else(|| defaults.memory.parse(), Ok).map_err(Failure::usage)?;
        if self.trace.is_some() && self.bandwidth.len() > 1 {
            return Err(Failure::usage("--trace records one run: give one --bandwidth"));
        }
        if self.hold_push.is_some() && modes.iter().any(|mode| mode.precopies()) {
            return Err(Failure::usage(
                "--hold-push is for --modes postcopy: the other modes decide by what may be pushed",
            ));
        }
        Ok(Plan {
            cells: self.cells(&defaults, memory)?,
            matrix: self.matrix,
            modes,
            peer,
            peer_modes,
            seed: self.seed.unwrap_or_else(any_seed),
            runs: self.runs.unwrap_or(defaults.runs),
            memory,
            vcpus: self.vcpus,
            period_ms: self.period,
            tls: self.tls,
            seccomp: self.seccomp,
            link: self.link,
            warmup_s: self.warmup.unwrap_or(defaults.warmup_s),
            after_s: self.after.unwrap_or(defaults.after_s),
            patience_s: self.patience.or(defaults.patience_s),
            hold_push_s: self.hold_push,
            parameters: self.set.iter().cloned().collect(),
            trace: self.trace.clone(),
            out: self.out.clone(),
            floor_s: defaults.floor_s,
        })
    }

    /// This VMM's modes, and the peer's.
    fn modes(&self, defaults: &Defaults, peer: Option<&'static Peer>) -> Result<[Vec<&'static dyn Mode>; 2], Failure> {
        let others = peer.map_or(&[][..], |peer| peer.modes);
        if self.modes.is_empty() {
            let ours = defaults.modes.iter().map(|name| modes::by_name(name)).collect::<Result<_, _>>()?;
            return Ok([ours, others.to_vec()]);
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (index, name) in self.modes.iter().enumerate() {
            if self.modes.iter().take(index).any(|other| other == name) {
                return Err(Failure::usage(format_args!("--modes names {name} twice; its runs are --runs")));
            }
            let before = theirs.len();
            theirs.extend(others.iter().filter(|mode| mode.name() == name));
            match modes::by_name(name) {
                Ok(mode) => ours.push(mode),
                Err(_) if theirs.len() > before => {}
                Err(failure) => return Err(failure),
            }
        }
        if let Some(peer) = peer.filter(|_| ours.is_empty() || theirs.is_empty()) {
            let whose = if ours.is_empty() { "switchover" } else { peer.name };
            let names: Vec<_> = others.iter().map(|mode| mode.name()).collect();
            return Err(Failure::usage(format_args!(
                "--modes names none of {whose}'s, and there is nothing to compare; switchover has {}, {} has {}",
                modes::NAMES.join(", "),
                peer.name,
                names.join(", ")
            )));
        }
        Ok([ours, theirs])
    }

    /// Every guest at every bandwidth, guest by guest.
    fn cells(&self, defaults: &Defaults, memory: Size) -> Result<Vec<Cell>, Failure> {
        let mut bandwidths = self.bandwidth.clone();
        if bandwidths.is_empty() {
            let parsed: Result<_, _> = defaults.bandwidths.iter().map(|text| text.parse()).collect();
            bandwidths = parsed.map_err(Failure::usage)?;
        }
        let guests = match &self.kernel {
            Some(path) => vec![(Guest::File(path.clone()), self.append.clone())],
            None if self.matrix => MATRIX_GUESTS
                .iter()
                .map(|name| Ok((builtin(name)?, self.builtin_append(memory))))
                .collect::<Result<_, Failure>>()?,
            None => vec![(builtin(&self.guest)?, self.builtin_append(memory))],
        };
        let cells = guests.into_iter().flat_map(|(guest, append)| {
            bandwidths.clone().into_iter().map(move |bandwidth| Cell {
                guest: guest.clone(),
                append: append.clone(),
                bandwidth,
            })
        });
        Ok(cells.collect())
    }

    /// A guest takes the last of two values of a parameter: what the user says stands behind what follows from the
    /// other options.
    fn builtin_append(&self, memory: Size) -> String {
        let working_set = memory.0.bytes() / 2 / 4096 * 4096;
        let ours = format!("ws={working_set} vcpus={} period={}", self.vcpus, self.period);
        if self.append.is_empty() { ours } else { format!("{ours} {}", self.append) }
    }
}

/// The clock's: nobody chose it.
fn any_seed() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.subsec_nanos() ^ u32::try_from(now.as_secs() & u64::from(u32::MAX)).unwrap_or_default()
}

fn builtin(name: &str) -> Result<Guest, Failure> {
    match guests::builtin(name) {
        Some(elf) => Ok(Guest::Builtin(name.to_owned(), elf)),
        None => Err(Failure::usage(format_args!(
            "--guest {name}: there is no such guest; choose one of {}, or give an ELF file with --kernel",
            guests::NAMES.join(", ")
        ))),
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
        let [cell] = &plan.cells[..] else { panic!("{:?}", plan.cells) };
        assert!(matches!(&cell.guest, Guest::Builtin(name, _) if name == "random"));
        assert_eq!(cell.append, "ws=268435456 vcpus=1 period=100");
        assert_eq!((cell.bandwidth, plan.matrix, plan.patience_s), (Bandwidth::UNLIMITED, false, None));
        assert_eq!((plan.runs, plan.modes.len(), plan.link), (5, 1, Link::Tcp));
    }

    #[test]
    fn the_matrix_is_every_guest_at_every_bandwidth_in_every_mode() {
        let plan = plan(&["--matrix"]).unwrap();
        let cells: Vec<_> = plan.cells.iter().map(|cell| format!("{} {}", cell.guest_name(), cell.bandwidth)).collect();
        assert_eq!(cells.len(), 12);
        assert_eq!(cells[..4], ["hotset 1G", "hotset 5G", "hotset unlimited", "sequential 1G"]);
        assert_eq!(plan.modes.iter().map(|mode| mode.name()).collect::<Vec<_>>(), ["precopy", "postcopy", "hybrid"]);
        assert!(plan.cells.iter().all(|cell| cell.append == "ws=134217728 vcpus=1 period=100"));
        assert_eq!((plan.runs, plan.patience_s), (5, Some(15.0)));
    }

    #[test]
    fn what_is_said_of_the_matrix_stands() {
        let plan =
            plan(&["--matrix", "--quick", "--bandwidth", "100M", "--modes", "hybrid", "--memory", "128M"]).unwrap();
        assert_eq!(
            (plan.cells.len(), plan.modes.len(), plan.runs, plan.memory.to_string().as_str()),
            (4, 1, 2, "128M")
        );
    }

    #[test]
    fn quick_is_short_and_what_is_said_stands() {
        let plan = plan(&["--quick", "--runs", "3", "--append", "ws=1M"]).unwrap();
        assert_eq!((plan.runs, plan.warmup_s), (3, 1.0));
        assert!(plan.cells[0].append.ends_with(" ws=1M"));
    }

    #[test]
    fn a_guest_of_ones_own_gets_only_ones_own_command_line() {
        let plan = plan(&["--kernel", "/g.elf", "--append", "a=1"]).unwrap();
        assert_eq!((&plan.cells[0].guest, plan.cells[0].append.as_str()), (&Guest::File("/g.elf".into()), "a=1"));
    }

    #[test]
    fn what_is_not_built_is_refused_with_a_sentence() {
        for (arguments, about) in [
            (&["--modes", "teleport"][..], "no such mode"),
            (&["--modes", "hybrid,hybrid"], "twice"),
            (&["--trace", "t", "--modes", "hybrid", "--bandwidth", "1G,5G"], "one --bandwidth"),
            (&["--hold-push", "1", "--modes", "postcopy,hybrid"], "--hold-push is for"),
            (&["--peer", "xen"], "no such peer; choose from qemu"),
            (&["--modes", "multifd"], "no such mode"),
            (&["--peer", "qemu", "--modes", "hybrid"], "none of qemu's"),
            (&["--peer", "qemu", "--modes", "multifd"], "none of switchover's"),
            (&["--guest", "nobody"], "choose one of random"),
        ] {
            let failure = plan(arguments).unwrap_err();
            assert_eq!(failure.status, 2);
            assert!(failure.sentence.contains(about), "{}", failure.sentence);
        }
    }

    #[test]
    fn beside_a_peer_both_move_it_in_all_their_ways_ten_times() {
        let names = |modes: &[&'static dyn Mode]| modes.iter().map(|mode| mode.name()).collect::<Vec<_>>();
        let plan = plan(&["--peer", "qemu", "--seed", "7"]).unwrap();
        assert_eq!((names(&plan.modes), plan.runs, plan.seed), (modes::NAMES.to_vec(), 10, 7));
        let all = ["precopy", "multifd", "postcopy", "postcopy-preempt", "precopy-postcopy"];
        assert_eq!(names(&plan.peer_modes), all);
        assert!(plan.warmup_s + plan.after_s >= 10.0, "ten seconds are to be seen");
    }

    #[test]
    fn a_mode_of_both_is_measured_in_both() {
        let names = |modes: &[&'static dyn Mode]| modes.iter().map(|mode| mode.name()).collect::<Vec<_>>();
        let plan = plan(&["--peer", "qemu", "--quick", "--modes", "postcopy,multifd,hybrid"]).unwrap();
        assert_eq!(names(&plan.modes), ["postcopy", "hybrid"]);
        assert_eq!((names(&plan.peer_modes), plan.runs), (vec!["postcopy", "multifd"], 2));
    }

    #[test]
    fn nonsense_does_not_parse() {
        for arguments in [
            ["--runs", "0"],
            ["--warmup", "-1"],
            ["--after", "nan"],
            ["--period", "5"],
            ["--link", "ib"],
            ["--bandwidth", "1"],
            ["--bandwidth", "1G,,"],
        ] {
            let error = Cli::try_parse_from([&["bench"], &arguments[..]].concat()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{arguments:?}");
        }
    }
}
