//! `switchover save`: drives a machine over QMP until its guest is in an image.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{BinaryBytes, HumanCount};
use serde_json::{Value, json};
use switchover_runtime::qmp::endpoint::Endpoint;

use crate::failure::Failure;
use crate::migrate::{connect, error_of, watch};
use crate::paths::absolute;
use crate::qmp_client::{QmpClient, QmpError};
use crate::signals::EndRequests;

/// What `switchover save` takes.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct SaveArgs {
    /// QMP socket of the machine whose guest is to be saved
    #[arg(long, value_name = "unix:PATH")]
    qmp: Endpoint,

    /// The image to write. One that is there already is replaced when the new one is whole
    #[arg(long, value_name = "FILE")]
    to: PathBuf,

    /// Compress memory with LZ4. The file is smaller then, and cannot be mapped
    #[arg(long)]
    compress: bool,

    /// Write memory while the guest runs, pause it for a moment, and let it go on
    #[arg(long, conflicts_with = "compress")]
    live: bool,
}

const EXAMPLES: &str = "\
Examples:
  Save a guest, end its machine, and restore the guest in another one, later or elsewhere:
    switchover save --qmp unix:/tmp/guest.qmp --to guest.image
    printf '%s\\n' '{\"execute\":\"qmp_capabilities\"}' '{\"execute\":\"quit\"}' | nc -U -q1 /tmp/guest.qmp
    switchover run --restore guest.image --memory 512M --qmp unix:/tmp/guest.qmp

The guest is paused, and stands still when it is saved: QMP `cont` lets it go on where it is. With --live it runs meanwhile: what it \
writes is written again, and it stands still for a moment only, mostly less than a millisecond; what it overwrites after that is put \
aside first, which slows it down until all is written. Of a guest that goes on here and is restored elsewhere there are two; see to it \
that they do not meet.

The image holds all of the guest's memory, passwords and keys too, and is readable for its owner alone. `switchover image` looks at it.

Ctrl-C calls the save off. Whatever fails, or is called off, leaves the guest running and the image that was there before.

Exit status: 0 when the guest is saved, durably, 1 when not (stderr says why), 2 for bad usage.";

/// Saves a guest.
///
/// # Errors
/// When it was not saved.
pub fn main(args: &SaveArgs) -> Result<(), Failure> {
    let ends = EndRequests::take(|_| ())?;
    let mut machine = connect(args.qmp.path())?;
    save(&mut machine, &args.to, &ends, args.compress, args.live)
}

/// Saves the guest of `machine` into the image `to`, and tells of it.
pub(crate) fn save(
    machine: &mut QmpClient,
    to: &Path,
    ends: &EndRequests,
    compress: bool,
    live: bool,
) -> Result<(), Failure> {
    let path = absolute(to);
    let name = path.to_str().ok_or_else(|| {
        Failure::usage(format_args!("{} is a name that is no text, which QMP cannot tell", path.display()))
    })?;
    let refused = |error: QmpError| Failure::failed(format_args!("cannot save the guest to {name}: {error}"));
    let off = |capability: &str| json!({ "capability": capability, "state": false });
    let capabilities = json!({ "capabilities": [off("postcopy-ram"), off("pause-before-switchover")] });
    machine.execute("migrate-set-capabilities", capabilities).map_err(refused)?;
    let parameters = json!({
        "x-switchover-mode": "precopy", "x-switchover-compress-image": compress, "x-switchover-live-save": live,
    });
    machine.execute("migrate-set-parameters", parameters).map_err(refused)?;
    machine.execute("migrate", json!({ "uri": format!("file:{name}") })).map_err(refused)?;
    let last = watch(machine, ends).map_err(refused)?;
    match last.get("status").and_then(Value::as_str) {
        Some("completed") => {
            let _ = std::io::stdout().lock().write_all(summary(name, &last, live).as_bytes());
            Ok(())
        }
        Some("cancelled") => Err(Failure::failed("called off: the guest goes on where it was")),
        _ => Err(Failure::failed(error_of(&last))),
    }
}

/// What was saved, in a sentence.
fn summary(name: &str, look: &Value, live: bool) -> String {
    let number = |pointer: &str| look.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    let pages = number("/ram/normal").saturating_add(number("/ram/duplicate"));
    let guest = match (live, look.get("x-switchover-downtime-ns").and_then(Value::as_u64)) {
        (false, _) => "the guest stands still, and `cont` lets it go on".to_owned(),
        (true, Some(ns)) => format!("the guest stood still for {:.1} ms, and runs", ns as f64 / 1e6),
        (true, None) => "the guest is as it was".to_owned(),
    };
    format!(
        "saved to {name}: {} of {} pages are not zero, {} written in {} ms; {guest}\n",
        HumanCount(number("/ram/normal")),
        HumanCount(pages),
        BinaryBytes(number("/ram/transferred")),
        HumanCount(number("/total-time")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_told() {
        let look = json!({ "total-time": 1234, "ram": { "normal": 3, "duplicate": 5, "transferred": 12288 } });
        let told = summary("/a", &look, false);
        assert!(told.starts_with("saved to /a: 3 of 8 pages are not zero, 12.00 KiB written in 1,234 ms"), "{told}");
        assert!(told.contains("stands still"), "{told}");
        let look = json!({ "x-switchover-downtime-ns": 2_340_000 });
        assert!(summary("/a", &look, true).ends_with("the guest stood still for 2.3 ms, and runs\n"));
    }
}
