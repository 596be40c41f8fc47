//! The `switchover` command, built beside the tests that drive it.

use std::process::ExitCode;

fn main() -> ExitCode {
    switchover_tools::cli::main()
}
