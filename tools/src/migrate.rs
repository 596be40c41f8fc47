//! `switchover migrate`: drives a source over QMP until its guest has moved.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use switchover_runtime::qmp::endpoint::Endpoint;
use switchover_wire::address::Address;

use crate::failure::{Failure, say};
use crate::qmp_client::{QmpClient, QmpError};
use crate::signals::EndRequests;

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
    #[arg(long, value_name = "tcp:HOST:PORT|unix:PATH")]
    to: Address,

    /// How the guest moves
    #[arg(long, value_enum, default_value_t = Mode::Postcopy)]
    mode: Mode,
}

const EXAMPLES: &str = "\
Examples:
  A guest here, a destination there, and the move:
    switchover run --kernel guest.elf --memory 512M --qmp unix:/tmp/source.qmp
    switchover run --incoming tcp:0.0.0.0:4444 --memory 512M --qmp unix:/tmp/destination.qmp
    switchover migrate --qmp unix:/tmp/source.qmp --to tcp:10.0.0.2:4444

Ctrl-C cancels as long as the guest has not been handed over, and the guest goes on where it was. After that the
guest is on the destination and only its memory is still following: Ctrl-C says so, and the move goes on.

Exit status: 0 when all of the guest has arrived, 1 when not (stderr says why, and where the guest is), 2 for bad usage.";

/// The ways to move a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mode {
    /// Copy memory while the guest runs, then stop it for the rest (not built yet)
    Precopy,
    /// Start the guest on the destination at once; its memory follows, what it touches first
    Postcopy,
    /// Copy for as long as that pays, then hand over (not built yet)
    Hybrid,
}

/// Moves a guest.
///
/// # Errors
/// When it did not move, or not all of it.
pub fn main(args: &MigrateArgs) -> Result<(), Failure> {
    if args.mode != Mode::Postcopy {
        let name = if args.mode == Mode::Precopy { "precopy" } else { "hybrid" };
        return Err(Failure::usage(format_args!(
            "--mode {name} is not built yet: move the guest with --mode postcopy"
        )));
    }
    let ends = EndRequests::take(|_| ())?;
    let mut source = connect(args.qmp.path())?;
    let refused = |error: QmpError| Failure::failed(format_args!("cannot migrate to {}: {error}", args.to));
    let postcopy = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
    source.execute("migrate-set-capabilities", postcopy).map_err(refused)?;
    source.execute("migrate", json!({ "uri": args.to.to_string() })).map_err(refused)?;
    match source.execute("migrate-start-postcopy", json!({})) {
        // A migration that is over already has a better reason than that: it is found below.
        Ok(_) | Err(QmpError::Refused { .. }) => {}
        Err(error) => return Err(refused(error)),
    }
    let last = watch(&mut source, &ends).map_err(refused)?;
    match text(&last, "/status") {
        "completed" => {
            let _ = std::io::stdout().lock().write_all(summary(&last).as_bytes());
            Ok(())
        }
        "cancelled" => Err(Failure::failed("cancelled: the guest goes on where it was")),
        status => Err(Failure::failed(format_args!(
            "the migration to {} ended as `{status}`: {}",
            args.to,
            last.get("error-desc").and_then(Value::as_str).unwrap_or("no reason was given")
        ))),
    }
}

fn connect(path: &Path) -> Result<QmpClient, Failure> {
    QmpClient::connect(path, CONNECT_TIMEOUT).map_err(Failure::failed)
}

/// Watches the migration to its end and returns the last look at it.
fn watch(source: &mut QmpClient, ends: &EndRequests) -> Result<Value, QmpError> {
    let bar = ProgressBar::new(0);
    let template = "{msg:16} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} left {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    let mut heard = 0;
    loop {
        let look = source.execute("query-migrate", json!({}))?;
        let status = text(&look, "/status");
        if matches!(status, "completed" | "failed" | "cancelled") {
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

/// What there is to say of a migration that is complete.
fn summary(look: &Value) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "{name:12} {value}");
    };
    line("moved in", format!("{} ms, {} ms of it set-up", number(look, "/total-time"), number(look, "/setup-time")));
    if let Some(blackout) = look.get("x-switchover-downtime-ns").and_then(Value::as_u64) {
        line(
            "blackout",
            format!(
                "{}.{:03} ms as the source knows it (no vCPU ran); what the guest felt only the guest can say",
                blackout / 1_000_000,
                blackout / 1_000 % 1_000
            ),
        );
    }
    line("on the wire", HumanBytes(number(look, "/ram/transferred")).to_string());
    line(
        "pages",
        format!(
            "{} with their bytes, {} known to be zero, {} asked for by faults",
            HumanCount(number(look, "/ram/normal")),
            HumanCount(number(look, "/ram/duplicate")),
            HumanCount(number(look, "/ram/postcopy-requests"))
        ),
    );
    out
}

fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or("none")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_shows_what_the_source_knows() {
        let look = json!({
            "status": "completed", "total-time": 283, "setup-time": 7, "downtime": 3,
            "x-switchover-downtime-ns": 3_210_987,
            "ram": {"transferred": 1_048_576, "normal": 65536, "duplicate": 12, "postcopy-requests": 34},
        });
        let text = summary(&look);
        for part in
            ["283 ms, 7 ms of it", "3.210 ms as the source knows it", "1.00 MiB", "65,536 with", "12 known", "34 asked"]
        {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn without_a_known_blackout_none_is_shown() {
        assert!(!summary(&json!({"status": "completed", "total-time": 1})).contains("blackout"));
    }
}
