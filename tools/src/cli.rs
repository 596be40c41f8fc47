//! The command line: its commands, its help, and how each ends.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::failure::Failure;
use crate::{audit, bench, certs, check, checkpoint, floor, image, migrate, rollback, run, save, simulate};

/// The environment variable that says what is logged.
const LOG_VARIABLE: &str = "SWITCHOVER_LOG";

const ABOUT: &str = "Moves a running KVM guest from one host to another";

const LONG_ABOUT: &str = "\
Moves a running KVM guest from one host to another by post-copy: the guest stops for a few milliseconds, goes on at \
the destination at once, and its memory follows, the pages that it touches first.

`run` boots a guest, or waits for one. `migrate` moves it, as any QMP client written for QEMU can. `bench` does both \
on this host, checks that no byte was lost, and reports how long the guest stood still and what its faults cost.";

const AFTER: &str = "\
Begin with:
  switchover check                  can this host do it, and what to change where not
  switchover bench --quick          a real guest moved under load, with a report
  switchover COMMAND --help         units, defaults and examples

Exit status: 0 done, 1 failed, 2 bad usage. Errors are on stderr.
SWITCHOVER_LOG=info (or debug, trace, or switchover_hybrid=debug,…) says more there; the default is warn.";

/// The command line.
#[derive(Parser, Debug)]
#[command(name = "switchover", version, about = ABOUT, long_about = LONG_ABOUT, after_help = AFTER)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run a machine: boot a guest, or wait for one to move here
    Run(run::RunArgs),
    /// Move the guest of a running machine to a destination
    Migrate(migrate::MigrateArgs),
    /// Save the guest of a running machine to a file
    Save(save::SaveArgs),
    /// Save a running guest again and again, each time what it has written since
    Checkpoint(checkpoint::CheckpointArgs),
    /// Return a guest to its checkpoint, wherever it has gone since
    Rollback(rollback::RollbackArgs),
    /// Move real guests on this host, prove that no byte was lost, and write a report of what it cost
    Bench(bench::BenchArgs),
    /// Play recorded or made-up guests through the convergence monitor, and compare it with the best that could be done
    Simulate(simulate::SimulateArgs),
    /// Check the audit log of a machine
    Audit(audit::AuditArgs),
    /// Look at images of guests: what is in one, whether it is whole, and where two differ
    Image(image::ImageArgs),
    /// Say what this host can do at best, to read a report against
    Floor(floor::FloorArgs),
    /// Say whether this host can do it: kvm, userfaultfd, io_uring, limits; and what to change where not
    Check,
    /// Make a CA and certificates for both sides, to try TLS with
    Certs(certs::CertsArgs),
}

/// Does what the command line says.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = log().and_then(|()| match cli.command {
        Command::Run(args) => run::main(args),
        Command::Migrate(args) => migrate::main(&args),
        Command::Save(args) => save::main(&args),
        Command::Checkpoint(args) => checkpoint::main(&args),
        Command::Rollback(args) => rollback::main(&args),
        Command::Bench(args) => bench::main(&args),
        Command::Simulate(args) => simulate::main(&args),
        Command::Audit(args) => audit::main(&args),
        Command::Image(args) => image::main(&args),
        Command::Floor(args) => floor::main(&args),
        Command::Check => check::main(),
        Command::Certs(args) => certs::main(&args),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn log() -> Result<(), Failure> {
    let wanted = std::env::var(LOG_VARIABLE).unwrap_or_else(|_| "warn".to_owned());
    let filter = EnvFilter::try_new(&wanted).map_err(|error| {
        Failure::usage(format_args!("{LOG_VARIABLE}=`{wanted}` makes no sense: {error}; write for example info"))
    })?;
    // Where there is no room for a message, it is lost. To tell of that in the same place would be a panic, and the guest's end.
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    lines.log_internal_errors(false).init();
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_is_broken_where_the_terminal_ends_and_nowhere_else() {
        // Broken at 100 columns already, a longer line leaves the rest of it on a line of its own.
        fn look_at(command: &clap::Command) {
            let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for (line, next) in text.lines().zip(text.lines().skip(1)) {
                let goes_on = next.starts_with(|first: char| first.is_ascii_lowercase());
                let is_example = line.starts_with(' ') && !line.contains(": ");
                assert!(line.len() <= 100 || !(goes_on || is_example), "{}: {line}\n{next}", command.get_name());
            }
            command.get_subcommands().for_each(look_at);
        }
        look_at(&Cli::command());
    }

    #[test]
    fn bad_usage_is_told_apart_from_failure() {
        for arguments in [
            &["switchover"][..],
            &["switchover", "no-such-command"],
            &["switchover", "migrate", "--qmp", "unix:/q"],
            &["switchover", "migrate", "--qmp", "tcp:1", "--to", "tcp:h:1"],
            &["switchover", "migrate", "--qmp", "unix:/q", "--to", "h:1"],
            &["switchover", "run", "--memory", "512"],
            &["switchover", "run", "--vcpus", "0"],
            &["switchover", "run", "--serial", "nowhere"],
            &["switchover", "run", "--incoming", "later"],
            &["switchover", "run", "--restore", "f", "--incoming", "defer"],
            &["switchover", "save", "--qmp", "unix:/q"],
            &["switchover", "save", "--qmp", "unix:/q", "--to", "f", "--live", "--compress"],
            &["switchover", "checkpoint", "--qmp", "unix:/q", "--to", "d", "--every", "10"],
            &["switchover", "checkpoint", "--qmp", "unix:/q", "--to", "d", "--keep", "0"],
            &["switchover", "image", "merge"],
            &["switchover", "rollback", "--checkpoint", "f", "--source", "unix:/s", "--destination", "unix:/d"],
            &["switchover", "audit"],
            &["switchover", "audit", "verify"],
            &["switchover", "audit", "verify", "file", "--known", "12"],
            &["switchover", "image"],
            &["switchover", "image", "verify"],
            &["switchover", "image", "diff", "one"],
            &["switchover", "simulate"],
            &["switchover", "simulate", "t", "--bandwidth", "1"],
            &["switchover", "simulate", "t", "--seeds", "1"],
        ] {
            let error = Cli::try_parse_from(arguments).expect_err(&arguments.join(" "));
            assert_eq!(error.exit_code(), 2, "{arguments:?}");
        }
    }
}
