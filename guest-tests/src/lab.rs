//! A test's own corner of the host.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use switchover_tools::check::{self, Verdict};
use switchover_tools::guests::builtin;
use tempfile::TempDir;

use crate::capture::Capture;
use crate::machine::Spec;
use crate::waiting::PATIENCE;

/// A directory that goes when the test does, and what it takes to start processes in it.
#[derive(Debug)]
pub struct Lab {
    directory: TempDir,
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; `None` when a signal ended it.
    pub status: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Lab {
    /// A corner for the test `name`, or `None`, said visibly, where the host cannot move guests.
    ///
    /// # Panics
    /// When there is no room for temporary files.
    #[must_use]
    pub fn open(name: &str) -> Option<Self> {
        for finding in check::look() {
            if let Verdict::Missing { seen, fix } = finding.verdict {
                println!("SKIP {name}: {}: {seen}; to change that: {fix}", finding.name);
                return None;
            }
        }
        Some(Self::without_kvm())
    }

    /// A corner for what needs nothing of the host.
    ///
    /// # Panics
    /// When there is no room for temporary files.
    #[must_use]
    pub fn without_kvm() -> Self {
        // Directly under /tmp: addresses of unix sockets are short.
        Self { directory: tempfile::Builder::new().prefix("swo").tempdir_in("/tmp").unwrap() }
    }

    /// The path of a file in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file.
    ///
    /// # Panics
    /// When that fails.
    #[must_use]
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// A machine that boots the built-in guest `name`.
    ///
    /// # Panics
    /// When there is no such guest.
    #[must_use]
    pub fn guest(&self, name: &str, append: &str) -> Spec {
        let kernel = self.file(&format!("{name}.elf"), builtin(name).expect("a built-in guest"));
        Spec { kernel: Some(kernel), append: append.to_owned(), ..Spec::default() }
    }

    /// Names of the sockets that lie in it.
    ///
    /// # Panics
    /// When the directory cannot be read.
    #[must_use]
    pub fn sockets(&self) -> Vec<String> {
        use std::os::unix::fs::FileTypeExt as _;
        let entries = fs::read_dir(self.directory.path()).unwrap().map(Result::unwrap);
        let sockets = entries.filter(|entry| entry.file_type().unwrap().is_socket());
        sockets.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// The end of a test whose machines have all ended by themselves: no socket is left.
    ///
    /// # Panics
    /// When one is.
    pub fn close(self) {
        assert_eq!(self.sockets(), Vec::<String>::new(), "sockets were left behind");
    }
}

/// The binary. Cargo builds a package's binaries before its tests, one folder above them.
///
/// # Panics
/// When this is not one of those tests.
#[must_use]
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).expect("tests are built two folders deep");
    let path = folder.join("switchover-under-test");
    assert!(path.is_file(), "{} is missing: run `cargo build -p switchover-guest-tests`", path.display());
    path
}

/// Runs the binary with `arguments` to its end.
///
/// # Panics
/// When it does not end.
#[must_use]
pub fn switchover<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Ended {
    let mut child = Command::new(binary())
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (stdout, stderr) = (Capture::of(child.stdout.take().unwrap()), Capture::of(child.stderr.take().unwrap()));
    let end = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > end => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("it does not end; it said {} and {}", stdout.text(), stderr.text());
            }
            None => stdout.wait_for_more(stdout.len(), Instant::now() + std::time::Duration::from_millis(5)),
        }
    };
    Ended { status: status.code(), stdout: stdout.to_end(), stderr: stderr.to_end() }
}
