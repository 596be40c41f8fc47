//! `switchover audit`: is a log of `run --audit` as it was written?

use std::fs;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use switchover_runtime::audit::verify::{Finding, verify};

use crate::failure::Failure;

/// What `switchover audit` takes.
#[derive(Args, Debug)]
pub struct AuditArgs {
    #[command(subcommand)]
    command: AuditCommand,
}

#[derive(Subcommand, Debug)]
enum AuditCommand {
    /// Find altered, missing and moved lines, and half a line at the end
    #[command(after_help = LIMITS)]
    Verify(VerifyArgs),
}

#[derive(Args, Debug)]
struct VerifyArgs {
    /// The log
    file: PathBuf,

    /// Hash of a line that was in it once, as an earlier `verify` said it: finds an end that was cut off, or a log made anew
    #[arg(long, value_name = "HASH", value_parser = known)]
    known: Option<String>,
}

const LIMITS: &str = "\
Each line has the hash (BLAKE3) of the line before, so that a line cannot be changed, taken out or moved without a trace. \
No secret goes into the hashes: whoever may write the file may make all of it anew, or take whole lines from its end. \
Keep the last line's hash elsewhere, and give it with --known, to find that out too.

Exit status: 0 when it is as it was written, 1 when it is not, 2 when it cannot be read.";

/// The least of a hash that nobody finds another line for by trying.
const KNOWN_LEAST: usize = 32;

fn known(text: &str) -> Result<String, String> {
    let text = text.trim().to_ascii_lowercase();
    if (KNOWN_LEAST..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Ok(text)
    } else {
        Err(format!("it is no hash of {KNOWN_LEAST} to 64 hexadecimal digits"))
    }
}

/// Does what `switchover audit` is told.
///
/// # Errors
/// When the log is not as it was written, or cannot be read.
pub fn main(args: &AuditArgs) -> Result<(), Failure> {
    let AuditCommand::Verify(VerifyArgs { file, known }) = &args.command;
    let log = fs::read(file).map_err(|error| {
        Failure::usage(format_args!(
            "cannot read the audit log {}: {error}; is it the file of `run --audit`?",
            file.display()
        ))
    })?;
    let verdict = verify(&log, known.as_deref());
    if verdict.records == 0 {
        return Err(Failure::failed(format_args!(
            "there is no record in {} that could be read: is it the file of `run --audit`?",
            file.display()
        )));
    }
    for Finding { line, reason } in &verdict.problems {
        println!("line {line} {reason}");
    }
    for Finding { line, reason } in &verdict.notes {
        println!("note: line {line} {reason}");
    }
    if let Some((seq, hash)) = &verdict.head {
        println!("{} records, the last is {seq}, its hash {hash}", verdict.records);
    }
    match verdict.problems.len() {
        0 => Ok(()),
        count => Err(Failure::failed(format_args!(
            "the audit log {} is not as it was written: {count} {}; keep it as it is for whoever looks into it",
            file.display(),
            if count == 1 { "finding" } else { "findings" },
        ))),
    }
}
