//! The `switchover` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    switchover_tools::cli::main()
}
