//! `switchover checkpoint`: images of a running guest, one after the other, each holding what was written since the one before.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{BinaryBytes, HumanCount};
use serde_json::{Value, json};
use switchover_image::Tally;
use switchover_image::folder::FolderLock;
use switchover_image::merge;
use switchover_runtime::qmp::endpoint::Endpoint;

use crate::failure::{Failure, say};
use crate::migrate::{connect, error_of, has_come_to_rest, watch};
use crate::paths::absolute;
use crate::qmp_client::{QmpClient, QmpError};
use crate::signals::EndRequests;

/// Between two looks at whether to end.
const LOOK: Duration = Duration::from_millis(20);
const PREFIX: &str = "checkpoint-";
const SUFFIX: &str = ".image";

/// What `switchover checkpoint` takes.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct CheckpointArgs {
    /// QMP socket of the machine whose guest is to be saved
    #[arg(long, value_name = "unix:PATH")]
    qmp: Endpoint,

    /// Folder of the checkpoints, for those of this guest alone. A series that is there is gone on with
    #[arg(long, value_name = "DIR")]
    to: PathBuf,

    /// Time from one checkpoint to the next, with a unit: ms, s, m or h. One that takes longer is followed by the next one at once
    #[arg(long, value_name = "TIME", default_value = "10s")]
    every: Interval,

    /// So many are kept, the newest; older ones are merged into them. The complete one that they are based on may stay below them
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u8).range(1..=48))]
    keep: u8,

    /// Take so many, and end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

const EXAMPLES: &str = "\
Examples:
  A checkpoint every ten seconds, of which the last six are kept, until Ctrl-C:
    switchover checkpoint --qmp unix:/tmp/guest.qmp --to checkpoints --every 10s --keep 6
  The guest as it was at one of them, in another machine:
    switchover run --restore checkpoints/checkpoint-000004.image --memory 512M
  One by itself, needing no other:
    switchover image merge checkpoints/checkpoint-000004.image --to guest.image

The guest runs meanwhile, and stands still for a millisecond or less at each. The first one holds all of its memory, the others what it \
wrote since the one before; each can be restored as long as those that it is based on are there (`switchover image inspect` says which, \
and whose names they have). When the machine does not know what was written since the last one, because it is another process or its \
guest was moved, saved or measured since, the next one is a full one again. So is one after another that failed.

The machine notes what its guest writes until it is saved or moved otherwise, also when this command has ended.

Exit status: 0 after --count checkpoints, or when it was ended (Ctrl-C) and at least one was taken; 1 otherwise; 2 for bad usage.";

/// A time between checkpoints.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Interval(Duration);

impl FromStr for Interval {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => {
                return Err("it is not a number with one of the units ms, s, m and h: write for example 10s".to_owned());
            }
        };
        let number: u32 = number.parse().map_err(|_| "the number is missing, or too large".to_owned())?;
        if number == 0 {
            return Err("no time at all is too short".to_owned());
        }
        Ok(Self(Duration::from_millis(u64::from(number) * milliseconds)))
    }
}

/// Takes checkpoints.
///
/// # Errors
/// When the machine cannot be reached, or none could be taken.
pub fn main(args: &CheckpointArgs) -> Result<(), Failure> {
    let ends = EndRequests::take(|_| ())?;
    let folder = absolute(&args.to);
    fs::create_dir_all(&folder)
        .map_err(|error| Failure::failed(format_args!("cannot make the folder {}: {error}", folder.display())))?;
    let mut machine = connect(args.qmp.path())?;
    let (mut taken, mut tried, mut last) = (0, 0, Ok(()));
    while ends.count() == 0 && args.count.is_none_or(|count| tried < count) {
        let begun = Instant::now();
        tried += 1;
        match round(&mut machine, &folder, args.keep, &ends) {
            Ok((line, kept)) => {
                taken += 1;
                let _ = std::io::stdout().lock().write_all(line.as_bytes());
                last = kept;
            }
            // The machine has gone: there is nothing to go on with.
            Err(Trouble::Gone(failure)) => return Err(failure),
            Err(Trouble::Once(failure)) => last = Err(failure),
        }
        let more = args.count.is_none_or(|count| tried < count);
        if let (Err(failure), true) = (&last, more && ends.count() == 0) {
            say(format_args!("{}; the next one is tried in time", failure.sentence));
        }
        // Once at least: others may wait for the folder, and nobody hands it to them.
        while more && ends.count() == 0 {
            thread::sleep(LOOK);
            if begun.elapsed() >= args.every.0 {
                break;
            }
        }
    }
    match last {
        Err(failure) if args.count.is_some() || taken == 0 => Err(failure),
        _ if taken == 0 => Err(Failure::failed("it was ended before there was a checkpoint")),
        _ => Ok(()),
    }
}

/// Takes the next one, and lets older ones go, which is a matter of its own. Says what to tell of it.
fn round(
    machine: &mut QmpClient,
    folder: &Path,
    keep: u8,
    ends: &EndRequests,
) -> Result<(String, Result<(), Failure>), Trouble> {
    let lock = lock(machine, folder, ends)?;
    let line = take(machine, folder, ends)?;
    Ok((line, keep_newest(&lock, keep)))
}

/// The folder for this command alone, where nothing else of the guest's is under way: whoever merges by hand, or returns to one of
/// these, has it for itself meanwhile; and is not kept from it for longer than a checkpoint takes.
fn lock(machine: &mut QmpClient, folder: &Path, ends: &EndRequests) -> Result<FolderLock, Trouble> {
    let gone = |error: QmpError| Trouble::Gone(Failure::failed(error));
    let mut told = false;
    while ends.count() == 0 {
        // What another command had begun that was killed goes on without it. It is not called off, and keeps nobody from the folder.
        if !is_busy(machine).map_err(gone)? {
            let lock = FolderLock::try_exclusive(&folder.join(PREFIX));
            match lock.map_err(|error| Trouble::Once(Failure::failed(error)))? {
                Some(lock) if !is_busy(machine).map_err(gone)? => return Ok(lock),
                None if !told => {
                    told = true;
                    say(format_args!("somebody else is at the images in {}: waiting", folder.display()));
                }
                _ => {}
            }
        }
        thread::sleep(LOOK);
    }
    Err(Trouble::Once(Failure::failed("ended before the next checkpoint was begun")))
}

/// Why there is no checkpoint.
enum Trouble {
    /// There may be one the next time.
    Once(Failure),
    Gone(Failure),
}

/// Takes the next one, and tells of it in a line.
fn take(machine: &mut QmpClient, folder: &Path, ends: &EndRequests) -> Result<String, Trouble> {
    let text = |path: &Path| {
        let name = path.to_str().map(str::to_owned);
        name.ok_or_else(|| Trouble::Gone(Failure::usage("--to has a name that is no text, which QMP cannot tell")))
    };
    let trouble = |error: QmpError| {
        let gone = !matches!(error, QmpError::Refused { .. });
        let failure = Failure::failed(format_args!("cannot take a checkpoint in {}: {error}", folder.display()));
        if gone { Trouble::Gone(failure) } else { Trouble::Once(failure) }
    };
    let series = series(folder).map_err(Trouble::Once)?;
    let number = series.last().map_or(1, |(number, _)| number + 1);
    let path = folder.join(format!("{PREFIX}{number:06}{SUFFIX}"));
    let to = text(&path)?;
    let base = series.last().map(|(_, path)| text(path)).transpose()?;
    let mut full = true;
    if let Some(base) = base {
        match machine.execute("x-switchover-checkpoint", json!({ "to": to, "base": base })) {
            Ok(_) => full = false,
            Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(trouble(error)),
        }
    }
    if full {
        machine.execute("x-switchover-checkpoint", json!({ "to": to })).map_err(trouble)?;
    }
    let look = watch(machine, ends).map_err(trouble)?;
    match look.get("status").and_then(Value::as_str) {
        Some("completed") => Ok(summary(&path, full, &look)),
        Some("cancelled") => {
            Err(Trouble::Once(Failure::failed("called off: the guest runs, and there is no new checkpoint")))
        }
        _ => Err(Trouble::Once(Failure::failed(error_of(&look)))),
    }
}

/// Whether something of the guest's is under way.
fn is_busy(machine: &mut QmpClient) -> Result<bool, QmpError> {
    let look = machine.execute("query-migrate", json!({}))?;
    Ok(look.get("status").and_then(Value::as_str).is_some_and(|status| !has_come_to_rest(status)))
}

fn summary(path: &Path, full: bool, look: &Value) -> String {
    let number = |pointer: &str| look.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    format!(
        "{}: {}, {} written in {} ms; the guest stood still for {:.1} ms\n",
        path.display(),
        if full { "all of the guest" } else { "what was written since the last one" },
        BinaryBytes(number("/ram/transferred")),
        HumanCount(number("/total-time")),
        number("/x-switchover-downtime-ns") as f64 / 1e6,
    )
}

/// The checkpoints in a folder, with their numbers, in order.
fn series(folder: &Path) -> Result<Vec<(u64, PathBuf)>, Failure> {
    let failed = |error| Failure::failed(format_args!("cannot look into the folder {}: {error}", folder.display()));
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX));
        let number = number.filter(|digits| digits.len() >= 6 && digits.bytes().all(|byte| byte.is_ascii_digit()));
        if let Some(number) = number.and_then(|digits| digits.parse().ok()) {
            found.push((number, folder.join(name)));
        }
    }
    found.sort();
    Ok(found)
}

/// Keeps the newest ones, and perhaps the one that they are based on.
fn keep_newest(lock: &FolderLock, keep: u8) -> Result<(), Failure> {
    let mut series: Vec<_> = series(lock.folder())?.into_iter().map(|(_, path)| path).collect();
    merge::thin_out(lock, &mut series, keep.into(), &Tally::default())
        .map_err(|error| Failure::failed(format_args!("older checkpoints stay: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        for (text, milliseconds) in [("10s", 10_000), ("250ms", 250), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(text.parse(), Ok(Interval(Duration::from_millis(milliseconds))));
        }
        for wrong in ["", "10", "s", "0s", "-1s", "1.5s", "10 s", "99999999999s"] {
            assert!(wrong.parse::<Interval>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn checkpoints_are_found_by_their_names_and_in_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in
            ["checkpoint-000010.image", "checkpoint-000009.image", "checkpoint-1.image", "checkpoint-00000a.image", "a"]
        {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let numbers: Vec<_> = series(folder.path()).unwrap().into_iter().map(|(number, _)| number).collect();
        assert_eq!(numbers, [9, 10]);
    }

    #[test]
    fn what_was_taken_is_told() {
        let look = json!({ "total-time": 1234, "ram": { "transferred": 12288 }, "x-switchover-downtime-ns": 340_000 });
        let told = summary(Path::new("/a"), false, &look);
        let expected = "/a: what was written since the last one, 12.00 KiB written in 1,234 ms; the guest stood still for 0.3 ms\n";
        assert_eq!(told, expected);
    }
}
