//! `switchover migrate`: drives a source over QMP until its guest has moved.

mod rate;
mod summary;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use switchover_runtime::qmp::endpoint::Endpoint;
use switchover_wire::address::Address;

use crate::failure::{Failure, say};
use crate::paths::absolute;
use crate::qmp_client::{QmpClient, QmpError};
use crate::save;
use crate::signals::EndRequests;
use rate::Rate;
use summary::{gave_up, last_decision, number, rounds, summary, text};

/// How long to wait for the machine's QMP socket to appear.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the migration is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// What `switchover migrate` takes.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct MigrateArgs {
    /// QMP socket of the machine whose guest is to move
    #[arg(long, value_name = "unix:PATH")]
    qmp: Endpoint,

    /// Where the destination listens: what its `run --incoming` was given
    #[arg(long, value_name = "tcp:HOST:PORT|unix:PATH", required_unless_present = "recover")]
    to: Option<Address>,

    /// Join a link again that was lost after the handoff, and send what the destination still lacks
    #[arg(long, conflicts_with_all = ONLY_AT_FIRST)]
    resume: bool,

    /// At a destination whose link was lost: listen for its source here too, and say where
    #[arg(long, value_name = "tcp:HOST:PORT|unix:PATH", conflicts_with_all = ONLY_AT_FIRST,
          conflicts_with_all = ["to", "resume", "max_postcopy_bandwidth"])]
    recover: Option<Address>,

    /// Save the guest into this image before it moves, while it runs: `switchover rollback` returns to it
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,

    /// How the guest moves
    #[arg(long, value_enum, default_value_t = Mode::Hybrid)]
    mode: Mode,

    /// Most bytes a second before the handoff; 0 for no limit
    #[arg(long, value_name = "RATE")]
    max_bandwidth: Option<Rate>,

    /// Most bytes a second that are pushed after the handoff; 0 for no limit
    #[arg(long, value_name = "RATE")]
    max_postcopy_bandwidth: Option<Rate>,

    /// The longest blackout, in milliseconds, that pre-copy may end with
    #[arg(long, value_name = "MS")]
    downtime_limit: Option<u64>,

    /// The longest blackout, in milliseconds, that the hybrid copies the rest for; past that it hands over
    #[arg(long, value_name = "MS")]
    blackout: Option<u64>,

    /// The longest that pre-copy may go on, in seconds
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=4_294_967))]
    time_budget: Option<u64>,

    /// Connections for memory; each compresses on a thread of its own
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    channels: Option<u8>,

    /// Digest all of guest memory on both sides and compare when it has arrived; what was copied before the handoff is digested while
    /// the guest stands still, about a second for each 2 GiB
    #[arg(long)]
    verify_memory: bool,

    /// What memory is compressed with before the handoff
    #[arg(long, value_enum)]
    compression: Option<Compression>,

    /// Folder of the source's certificate and key, for TLS on every lane: as `run --tls-creds`, for this migration and later ones
    #[arg(long, value_name = "DIR", conflicts_with_all = ["recover", "allow_plain"])]
    tls_creds: Option<PathBuf>,

    /// The name that the destination's certificate must be for; the host of --to, if it is not given
    #[arg(long, value_name = "NAME", conflicts_with = "recover")]
    tls_hostname: Option<String>,

    /// Without TLS: move to another host nevertheless
    #[arg(long, conflicts_with = "recover")]
    allow_plain: bool,
}

/// What a migration takes along when it begins, and a link that is joined again does not change.
const ONLY_AT_FIRST: [&str; 9] = [
    "checkpoint",
    "mode",
    "max_bandwidth",
    "downtime_limit",
    "blackout",
    "time_budget",
    "channels",
    "compression",
    "verify_memory",
];

const EXAMPLES: &str = "\
Examples:
  A guest here, a destination there, and the move:
    switchover run --kernel guest.elf --memory 512M --qmp unix:/tmp/source.qmp
    switchover run --incoming tcp:0.0.0.0:4444 --memory 512M \\
      --qmp unix:/tmp/destination.qmp --tls-creds there/
    switchover migrate --qmp unix:/tmp/source.qmp --to tcp:10.0.0.2:4444 \\
      --tls-creds here/ --tls-hostname there.example
  (Once the source has its --tls-creds it keeps them.)
  Over a link that others use too, by pre-copy alone, standing still for 50 ms at most:
    switchover migrate --qmp unix:/tmp/source.qmp --to tcp:10.0.0.2:4444 \\
      --mode precopy --max-bandwidth 2Gbit --downtime-limit 50
  With a way back, by `switchover rollback`:
    switchover migrate --qmp unix:/tmp/source.qmp --to tcp:10.0.0.2:4444 --checkpoint before.image
  Over a fast link, on four connections:
    switchover migrate --qmp unix:/tmp/source.qmp --to tcp:10.0.0.2:4444 --channels 4
  After a link was lost with the guest at the destination already, join it again; over another
  network, let the destination listen there first:
    switchover migrate --qmp unix:/tmp/destination.qmp --recover tcp:192.168.7.2:4445
    switchover migrate --qmp unix:/tmp/source.qmp --to tcp:192.168.7.2:4445 --resume

A RATE is in bytes (500M: MiB a second) or in bits (10Gbit). What is not given stays as the machine has it; the defaults \
are no limits on bandwidth, --downtime-limit 300, --blackout 5, --time-budget 120, one channel, --compression adaptive.

Ctrl-C cancels as long as the guest has not been handed over, and the guest goes on where it was. After that the \
guest is on the destination and only its memory is still following: Ctrl-C says so, and the move goes on.

A link that is lost after that is told, with what to do next, and ends this command with status 1: the guest runs on at the \
destination with what has arrived, and both machines wait to be joined again.

Exit status: 0 when all of the guest has arrived, 1 when not (stderr says why, and where the guest is), 2 for bad usage.";

/// The ways to move a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mode {
    /// Copy memory while the guest runs, and stop it for the rest once that is little; fail if it never is
    Precopy,
    /// Start the guest on the destination at once; its memory follows, what it touches first
    Postcopy,
    /// Copy for as long as that pays, then stop it for the rest or hand over, whichever costs the guest less
    Hybrid,
}

/// What memory is compressed with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Compression {
    /// Nothing
    Off,
    /// Whatever pays at the bandwidth at hand, or nothing
    Adaptive,
    /// LZ4
    Lz4,
    /// zstd
    Zstd,
}

impl MigrateArgs {
    /// The capabilities that it needs, as `migrate-set-capabilities` takes them.
    fn capabilities(&self) -> Value {
        let mut list = vec![json!({ "capability": "postcopy-ram", "state": self.mode != Mode::Precopy })];
        if self.channels.is_some() {
            list.push(json!({ "capability": "multifd", "state": true }));
        }
        json!({ "capabilities": list })
    }

    /// The parameters that it was given, as `migrate-set-parameters` takes them.
    fn parameters(&self) -> Value {
        let name = |value: Option<clap::builder::PossibleValue>| value.map(|value| json!(value.get_name()));
        let all = [
            ("x-switchover-mode", name(self.mode.to_possible_value()).filter(|_| !self.resume)),
            ("max-bandwidth", self.max_bandwidth.map(|rate| json!(rate.0))),
            ("max-postcopy-bandwidth", self.max_postcopy_bandwidth.map(|rate| json!(rate.0))),
            ("downtime-limit", self.downtime_limit.map(Value::from)),
            ("x-switchover-blackout", self.blackout.map(Value::from)),
            ("x-switchover-time-budget", self.time_budget.map(|seconds| json!(seconds * 1000))),
            ("x-switchover-verify-memory", self.verify_memory.then_some(Value::Bool(true))),
            ("multifd-channels", self.channels.map(Value::from)),
            ("x-switchover-compression", name(self.compression.and_then(|value| value.to_possible_value()))),
        ];
        let folder = |path: &PathBuf| absolute(path);
        let all = all.into_iter().chain([
            ("tls-creds", self.tls_creds.as_ref().map(|path| json!(folder(path)))),
            ("tls-hostname", self.tls_hostname.as_ref().map(|name| json!(name))),
            ("x-switchover-allow-plain", self.allow_plain.then_some(json!(true))),
        ]);
        all.filter_map(|(name, value)| Some((name.to_owned(), value?))).collect::<Map<_, _>>().into()
    }
}

/// Moves a guest, or joins the lost link of one that has moved.
///
/// # Errors
/// When it did not move, or not all of it.
pub fn main(args: &MigrateArgs) -> Result<(), Failure> {
    match (&args.recover, &args.to) {
        (Some(at), _) => recover(args.qmp.path(), at),
        (None, Some(to)) => migrate(args, to),
        (None, None) => Err(Failure::usage("say with --to where the destination listens")),
    }
}

/// Has a destination listen for the source that has lost it.
fn recover(qmp: &Path, at: &Address) -> Result<(), Failure> {
    let mut destination = connect(qmp)?;
    let refused = |error: QmpError| Failure::failed(format_args!("cannot listen at {at} for the source: {error}"));
    destination.execute("migrate-recover", json!({ "uri": at.to_string() })).map_err(refused)?;
    let look = destination.execute("query-migrate", json!({})).map_err(refused)?;
    let listens = socket_address(&look).unwrap_or_else(|| at.to_string());
    let _ = writeln!(
        std::io::stdout().lock(),
        "listens at {listens}; now, for the source: switchover migrate --qmp unix:SOURCE --to {listens} --resume"
    );
    Ok(())
}

/// Where a destination listens, by its answer to `query-migrate`.
fn socket_address(look: &Value) -> Option<String> {
    let address = look.pointer("/socket-address/0")?;
    let part = |name: &str| address.get(name).and_then(Value::as_str);
    Some(match part("type")? {
        "inet" => {
            let port = part("port")?.parse().ok()?;
            Address::Tcp { host: part("host")?.to_owned(), port }.to_string()
        }
        _ => Address::Unix(part("path")?.into()).to_string(),
    })
}

fn migrate(args: &MigrateArgs, to: &Address) -> Result<(), Failure> {
    let ends = EndRequests::take(|_| ())?;
    let mut source = connect(args.qmp.path())?;
    let refused = |error: QmpError| Failure::failed(format_args!("cannot migrate to {to}: {error}"));
    if let Some(path) = &args.checkpoint {
        save::save(&mut source, path, &ends, false, true)?;
    }
    if !args.resume {
        source.execute("migrate-set-capabilities", args.capabilities()).map_err(refused)?;
    }
    source.execute("migrate-set-parameters", args.parameters()).map_err(refused)?;
    let mut how = json!({ "uri": to.to_string() });
    if args.resume {
        how["resume"] = json!(true);
    }
    source.execute("migrate", how).map_err(refused)?;
    if args.mode == Mode::Postcopy && !args.resume {
        match source.execute("migrate-start-postcopy", json!({})) {
            // A migration that is over already has a better reason than that: it is found below.
            Ok(_) | Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(refused(error)),
        }
    }
    let last = watch(&mut source, &ends).map_err(refused)?;
    let report = source.execute("x-switchover-report", json!({})).ok();
    match text(&last, "/status") {
        "completed" => {
            let _ = std::io::stdout().lock().write_all(summary(&last, report.as_ref()).as_bytes());
            match last.get("x-switchover-memory-matches").and_then(Value::as_bool) {
                Some(false) => Err(Failure::failed(error_of(&last))),
                None if args.verify_memory => {
                    Err(Failure::failed("all of the guest has arrived, but nobody compared it"))
                }
                _ => Ok(()),
            }
        }
        "cancelled" => Err(Failure::failed("cancelled: the guest goes on where it was")),
        "postcopy-paused" => Err(Failure::failed(paused(&last, &args.qmp, to))),
        status => Err(Failure::failed(format_args!(
            "the migration to {to} ended as `{status}`: {}{}",
            error_of(&last),
            report.as_ref().map(|report| afterwards(report, &mut source)).unwrap_or_default(),
        ))),
    }
}

/// A link that was lost after the handoff: where that leaves the guest, and what to do next.
fn paused(look: &Value, qmp: &Endpoint, to: &Address) -> String {
    format!(
        "the link to {to} was lost after the handoff: {}. The guest belongs to the destination, which runs it with what has \
         arrived; {} of its memory are only here, so do not end this machine. Next: `switchover migrate --qmp {qmp} --to {to} \
         --resume`, as often as it takes; if the destination is to be reached at another address, first there: `switchover \
         migrate --qmp unix:DESTINATION --recover tcp:HOST:PORT`",
        error_of(look),
        HumanBytes(number(look, "/ram/remaining")),
    )
}

pub(crate) fn error_of(look: &Value) -> &str {
    look.get("error-desc").and_then(Value::as_str).unwrap_or("no reason was given")
}

/// What there is to add where pre-copy was given up.
fn afterwards(report: &Value, source: &mut QmpClient) -> String {
    if !gave_up(report) {
        return String::new();
    }
    let rounds = rounds(report).map(|rounds| format!(" (rounds: {rounds})")).unwrap_or_default();
    let decision = last_decision(report).unwrap_or_default();
    let status = source.execute("query-status", json!({})).unwrap_or_default();
    let guest = match text(&status, "/status") {
        "running" => "the guest runs on where it was",
        "paused" => "the guest is where it was, paused as before",
        _ => "see query-status for where the guest is",
    };
    format!(
        "; {decision}{rounds}; {guest}. Move it with --mode hybrid, which hands over instead, or give it a longer \
         --downtime-limit or more --max-bandwidth"
    )
}

pub(crate) fn connect(path: &Path) -> Result<QmpClient, Failure> {
    QmpClient::connect(path, CONNECT_TIMEOUT).map_err(Failure::failed)
}

/// Whether a migration of this status does nothing more by itself.
pub(crate) fn has_come_to_rest(status: &str) -> bool {
    matches!(status, "completed" | "failed" | "cancelled" | "postcopy-paused")
}

/// Watches the migration to its end, or until its link is lost, and returns the last look at it.
pub(crate) fn watch(source: &mut QmpClient, ends: &EndRequests) -> Result<Value, QmpError> {
    let bar = ProgressBar::new(0);
    let template = "{msg:16} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} left {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    let mut heard = 0;
    loop {
        let look = source.execute("query-migrate", json!({}))?;
        let status = text(&look, "/status");
        if has_come_to_rest(status) {
            bar.finish_and_clear();
            return Ok(look);
        }
        let total = number(&look, "/ram/total");
        bar.set_length(total);
        bar.set_position(total.saturating_sub(number(&look, "/ram/remaining")));
        bar.set_message(status.to_owned());
        if ends.count() > heard {
            heard = ends.count();
            match source.execute("migrate_cancel", json!({})) {
                Ok(_) => bar.suspend(|| say("cancelling…")),
                Err(QmpError::Refused { .. }) => bar.suspend(|| {
                    say("too late to cancel: the guest runs on the destination; waiting for the rest of its memory");
                }),
                Err(error) => return Err(error),
            }
        }
        thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: MigrateArgs,
    }

    fn parse(more: &[&str]) -> Result<MigrateArgs, String> {
        let always = ["migrate", "--qmp", "unix:/q", "--to", "tcp:h:1"];
        let all = always.iter().chain(more);
        Command::try_parse_from(all).map(|command| command.args).map_err(|error| error.to_string())
    }

    #[test]
    fn only_what_is_given_is_set() {
        let args = parse(&[]).unwrap();
        assert_eq!(args.parameters(), json!({"x-switchover-mode": "hybrid"}));
        assert_eq!(args.capabilities(), json!({"capabilities": [{"capability": "postcopy-ram", "state": true}]}));
        let args = parse(&[
            "--mode",
            "precopy",
            "--max-bandwidth",
            "8Kbit",
            "--max-postcopy-bandwidth",
            "1K",
            "--downtime-limit",
            "50",
            "--blackout",
            "7",
            "--time-budget",
            "3",
            "--channels",
            "4",
            "--compression",
            "lz4",
        ])
        .unwrap();
        assert_eq!(
            args.parameters(),
            json!({
                "x-switchover-mode": "precopy", "max-bandwidth": 1000, "max-postcopy-bandwidth": 1024,
                "downtime-limit": 50, "x-switchover-blackout": 7, "x-switchover-time-budget": 3000,
                "multifd-channels": 4, "x-switchover-compression": "lz4",
            })
        );
        assert_eq!(
            args.capabilities(),
            json!({"capabilities": [
                {"capability": "postcopy-ram", "state": false}, {"capability": "multifd", "state": true},
            ]})
        );
    }

    #[test]
    fn a_link_is_joined_again_with_what_bounds_it_and_nothing_else() {
        let args = parse(&["--resume", "--max-postcopy-bandwidth", "1K"]).unwrap();
        assert_eq!(args.parameters(), json!({"max-postcopy-bandwidth": 1024}));
        let at = ["migrate", "--qmp", "unix:/q", "--recover", "tcp:h:0"];
        let args = Command::try_parse_from(at).unwrap().args;
        assert_eq!((args.to, args.recover.map(|at| at.to_string())), (None, Some("tcp:h:0".to_owned())));
        for more in ONLY_AT_FIRST {
            let value = match more {
                "mode" => Some("hybrid"),
                "compression" => Some("lz4"),
                "max_bandwidth" => Some("1G"),
                "verify_memory" => None,
                _ => Some("5"),
            };
            let option = format!("--{}", more.replace('_', "-"));
            let given: Vec<&str> = ["--resume", &option].into_iter().chain(value).collect();
            let error = parse(&given).unwrap_err();
            assert!(error.contains("cannot be used with"), "{more}: {error}");
        }
        assert!(parse(&["--recover", "tcp:h:1"]).unwrap_err().contains("cannot be used with"));
    }

    #[test]
    fn a_lost_link_is_told_with_the_way_on() {
        let look = json!({"status": "postcopy-paused", "error-desc": "cut", "ram": {"remaining": 2 << 20}});
        let told = paused(&look, &Endpoint::at("/q"), &"tcp:h:1".parse().unwrap());
        for part in ["handoff: cut. ", "2.00 MiB of its memory are only here", "--qmp unix:/q --to tcp:h:1 --resume`"] {
            assert!(told.contains(part), "{told}");
        }
        let inet = json!({"socket-address": [{"type": "inet", "host": "::1", "port": "7"}]});
        assert_eq!(socket_address(&inet), Some("tcp:[::1]:7".to_owned()));
        let unix = json!({"socket-address": [{"type": "unix", "path": "/m"}]});
        assert_eq!(socket_address(&unix), Some("unix:/m".to_owned()));
        assert_eq!(socket_address(&json!({})), None);
    }

    #[test]
    fn what_makes_no_sense_is_bad_usage() {
        for (more, part) in [
            (&["--channels", "0"][..], "0"),
            (&["--time-budget", "0"], "1..=4294967"),
            (&["--max-bandwidth", "fast"], "write for example 500M"),
            (&["--downtime-limit", "-1"], "-1"),
            (&["--compression", "rar"], "possible values"),
        ] {
            let error = parse(more).unwrap_err();
            assert!(error.contains(part), "{more:?}: {error}");
        }
    }
}
