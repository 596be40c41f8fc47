//! Builds the guests, which are freestanding programs outside the workspace, for `src/guests.rs` to embed.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The guests are linked by their own rules, but for the instruction set and the object format of this target.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What the outer cargo, or whoever calls it, sets for its own compilations (lints by clippy, coverage, a processor
/// to tune for, profiles) and must not reach the guests.
const NOT_INHERITED: [&str; 8] = [
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_LINKER",
    "RUSTDOCFLAGS",
    "CARGO_MANIFEST_DIR",
    "CARGO_MANIFEST_PATH",
];
const NOT_INHERITED_BY_PREFIX: [&str; 3] = ["CARGO_PROFILE_", "CARGO_BUILD_", "CARGO_TARGET_"];

fn main() -> ExitCode {
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else { return failed("OUT_DIR is not set") };
    // As it runs, not as it was compiled: in a target directory that two clones share, one's build script serves both.
    let Some(package) = env::var_os("CARGO_MANIFEST_DIR") else { return failed("CARGO_MANIFEST_DIR is not set") };
    let guests = Path::new(&package).join("../guest-tests/guests");
    // Named one by one: a build by hand may have left a target directory beside them.
    for part in ["Cargo.toml", "Cargo.lock", "build.rs", "guest.ld", "src"] {
        println!("cargo::rerun-if-changed={}", guests.join(part).display());
    }

    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--release", "--locked", "--offline", "--bins", "--target", TARGET, "--manifest-path"])
        .arg(guests.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(out.join("guests"))
        .current_dir(&guests);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if NOT_INHERITED.contains(&&*text) || NOT_INHERITED_BY_PREFIX.iter().any(|prefix| text.starts_with(prefix)) {
            cargo.env_remove(&name);
        }
    }
    match cargo.status() {
        Ok(status) if status.success() => {
            let built = out.join("guests").join(TARGET).join("release");
            println!("cargo::rustc-env=SWITCHOVER_GUESTS={}", built.display());
            ExitCode::SUCCESS
        }
        Ok(status) => failed(&format!(
            "building the guests in {} ended with {status}, for the reason above; they need the Rust target {TARGET} \
             (rustup target add {TARGET})",
            guests.display()
        )),
        Err(error) => failed(&format!("cannot start {cargo:?} to build the guests: {error}")),
    }
}

fn failed(why: &str) -> ExitCode {
    println!("cargo::error={why}");
    ExitCode::FAILURE
}
