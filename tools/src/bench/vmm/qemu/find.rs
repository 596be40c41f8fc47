//! Whether QEMU is here, and new enough.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Qemu;
use crate::bench::vmm::Found;
use crate::failure::Failure;

const PROGRAM: &str = "qemu-system-x86_64";
/// The first with a channel of its own for the pages that vCPUs wait for (`postcopy-preempt` came with 7.1 and was made
/// right in 8.0).
const OLDEST: Version = Version { major: 8, minor: 0, micro: 0 };
const ADVICE: &str = "On Debian 12 it is in backports; as root:\n  \
    echo 'deb http://deb.debian.org/debian bookworm-backports main' >/etc/apt/sources.list.d/backports.list\n  \
    apt-get update && apt-get install --no-install-recommends -t bookworm-backports qemu-system-x86\n\
    Debian 13 has it: apt-get install --no-install-recommends qemu-system-x86. Or leave --peer out";

/// A release of QEMU.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Version {
    major: u32,
    minor: u32,
    micro: u32,
}

/// QEMU as `PATH` has it; what to install, as bad usage, where that will not do.
pub fn find() -> Result<Found, Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    find_in(&std::env::split_paths(&path).collect::<Vec<_>>())
}

fn find_in(folders: &[PathBuf]) -> Result<Found, Failure> {
    let needed =
        |found: &str| Failure::usage(format_args!("--peer qemu needs QEMU {OLDEST} or later, and {found}. {ADVICE}"));
    let program = folders.iter().map(|folder| folder.join(PROGRAM)).find(|path| is_program(path));
    let program = program.ok_or_else(|| needed(&format!("there is no {PROGRAM} in PATH")))?;
    let here = program.display();
    let said = Command::new(&program).arg("--version").stdin(Stdio::null()).output();
    let said = said.map_err(|error| needed(&format!("{here} cannot be started: {error}")))?;
    let said = String::from_utf8_lossy(&said.stdout);
    let (version, text) = version(&said).ok_or_else(|| needed(&format!("{here} does not tell its version")))?;
    if version < OLDEST {
        return Err(needed(&format!("{here} is {text}")));
    }
    let text = text.to_owned();
    Ok(Found { vmm: Box::new(Qemu { program: program.clone() }), version: text, program })
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The version, and how it is written: `QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)`.
fn version(said: &str) -> Option<(Version, &str)> {
    let (_, rest) = said.lines().next()?.split_once("version ")?;
    let text = rest.split([' ', '(']).next()?;
    // A release candidate is `10.0.50` or `10.1.0-rc2`.
    let mut numbers = text.split(['.', '-']).map(str::parse::<u32>);
    let mut number = || numbers.next()?.ok();
    let (major, minor) = (number()?, number()?);
    Some((Version { major, minor, micro: number().unwrap_or(0) }, text))
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        for (said, numbers, text) in [
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright", (10, 0, 2), "10.0.2"),
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)", (7, 2, 22), "7.2.22"),
            ("QEMU emulator version 9.2.50 (v9.2.0-1234-gabc)", (9, 2, 50), "9.2.50"),
            ("QEMU emulator version 10.1.0-rc2", (10, 1, 0), "10.1.0-rc2"),
            ("QEMU emulator version 8.0", (8, 0, 0), "8.0"),
        ] {
            let (major, minor, micro) = numbers;
            assert_eq!(version(said), Some((Version { major, minor, micro }, text)), "{said}");
        }
        for said in ["", "bash: version", "QEMU emulator version ten"] {
            assert_eq!(version(said), None, "{said}");
        }
    }

    fn folder_with(script: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(PROGRAM);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        folder
    }

    fn refused(folder: &Path, about: &str) {
        let failure = find_in(&[folder.to_owned()]).err().unwrap();
        assert_eq!(failure.status, 2);
        for part in [about, "8.0 or later", "apt-get install", "bookworm-backports"] {
            assert!(failure.sentence.contains(part), "`{part}` is not in {}", failure.sentence);
        }
    }

    #[test]
    fn a_qemu_that_is_missing_or_too_old_is_said_with_what_to_install() {
        let empty = tempfile::tempdir().unwrap();
        refused(empty.path(), "there is no qemu-system-x86_64 in PATH");
        fs::write(empty.path().join(PROGRAM), "no program").unwrap();
        refused(empty.path(), "there is no qemu-system-x86_64 in PATH");
        refused(folder_with("#!/bin/sh\necho QEMU emulator version 7.2.22\n").path(), "is 7.2.22");
        refused(folder_with("#!/bin/sh\n").path(), "does not tell its version");
    }

    #[test]
    fn the_first_of_the_path_is_taken() {
        let new = folder_with("#!/bin/sh\necho 'QEMU emulator version 10.0.2 (Debian)'\n");
        let old = folder_with("#!/bin/sh\necho QEMU emulator version 7.2.22\n");
        let found = find_in(&[new.path().to_owned(), old.path().to_owned()]).ok().unwrap();
        assert_eq!((found.version.as_str(), found.program), ("10.0.2", new.path().join(PROGRAM)));
    }
}
