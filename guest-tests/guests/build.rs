//! Links the guests as static, position-dependent PVH ELF files.
//!
//! The flags are given here and not in a `.cargo/config.toml`, because cargo looks for that file from the working
//! directory upwards, not beside the manifest, and the guests are mostly built from elsewhere.

use std::env;
use std::path::PathBuf;

fn main() {
    let script = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("guest.ld");
    println!("cargo:rerun-if-changed=guest.ld");
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
    for flag in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,max-page-size=4096",
    ] {
        println!("cargo:rustc-link-arg-bins={flag}");
    }
}
