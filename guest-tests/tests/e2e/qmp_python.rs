//! QEMU's own client library drives the machines: `qemu.qmp`, and the shell that comes with it.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};
use switchover_guest_tests::capture::Capture;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::{Lab, binary};
use switchover_guest_tests::machine::Machine;
use switchover_guest_tests::waiting::{PATIENCE, until};

use crate::lab;

/// What pip installs, and nothing else: a version and its file.
const REQUIREMENT: &str =
    "qemu.qmp==0.0.6 --hash=sha256:5d7c5af0e9de427696e3bf72e333965c3a697929f77f6b7ddc30c989fc7b539b\n";
/// Where it is kept from run to run, beside the tests. Named after what is in it.
const KEPT_AS: &str = "python-qemu.qmp-0.0.6";
/// A guest whose memory takes long to follow where it is held back, since it asks for few pages.
const SLOW: &str = "ws=32M period=50 pace=2000000";

/// A Python with `qemu.qmp`, or why there is none.
fn python() -> Result<PathBuf, String> {
    let kept = binary().parent().unwrap().join(KEPT_AS);
    let found = kept.join("bin/python3");
    if !found.is_file() {
        // Made elsewhere and moved here whole: several tests may want it at once, and any of them may be killed.
        let making = tempfile::Builder::new().prefix(KEPT_AS).tempdir_in(kept.parent().unwrap()).unwrap();
        let environment = making.path().join("made");
        ran("install python3 and python3-venv", Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
        let requirements = making.path().join("requirements.txt");
        fs::write(&requirements, REQUIREMENT).unwrap();
        let mut pip = Command::new(environment.join("bin/python3"));
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]);
        pip.args(["--require-hashes", "--requirement"]).arg(&requirements);
        ran("let pip reach PyPI, or a mirror of it (PIP_INDEX_URL)", &mut pip)?;
        if let Err(error) = fs::rename(&environment, &kept) {
            assert!(found.is_file(), "{}: {error}", kept.display());
        }
    }
    Ok(found)
}

/// Runs `command`, or says why it failed and what to do about that.
fn ran(fix: &str, command: &mut Command) -> Result<(), String> {
    let failed = |seen: &str| format!("{command:?}: {seen}; to change that: {fix}");
    match Command::new(command.get_program()).args(command.get_args()).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            Err(failed(said.lines().rfind(|line| !line.is_empty()).unwrap_or("it says nothing")))
        }
        Err(error) => Err(failed(&error.to_string())),
    }
}

/// Python for the test, or its end where there is none.
macro_rules! python {
    ($name:literal) => {
        match python() {
            Ok(python) => python,
            Err(reason) => {
                println!("SKIP {}: {reason}", $name);
                return;
            }
        }
    };
}

/// A machine with a guest, and two that wait to be told where to listen.
fn machines(lab: &Lab) -> (Machine, [Machine; 2], Journey) {
    let spec = lab.guest("random", SLOW);
    let source = Machine::start(lab, &spec);
    let destinations = [0, 1].map(|_| Machine::start(lab, &spec.incoming("defer")));
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    (source, destinations, journey)
}

#[test]
fn qemus_client_library_uses_every_command() {
    const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/qmp_client.py");
    let lab = lab!("qemus_client_library_uses_every_command");
    let python = python!("qemus_client_library_uses_every_command");
    let (mut source, [mut left, mut there], mut journey) = machines(&lab);
    let mut script = Command::new(python);
    script.args(["-B", SCRIPT]).args([source.qmp_path(), left.qmp_path(), there.qmp_path()]);
    script.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut script = script.spawn().unwrap();
    let (stdout, stderr) = (Capture::of(script.stdout.take().unwrap()), Capture::of(script.stderr.take().unwrap()));
    let end = Instant::now() + 2 * PATIENCE;
    let status = loop {
        match script.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > end => {
                script.kill().unwrap();
                panic!("the script does not end; it said\n{}{}", stdout.text(), stderr.text());
            }
            None => stdout.wait_for_more(stdout.len(), Instant::now() + std::time::Duration::from_millis(20)),
        }
    };
    let (stdout, stderr) = (stdout.to_end(), stderr.to_end());
    assert!(status.success(), "{stdout}{stderr}");
    println!("{stdout}");
    let found: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(found["interruptions"].as_array().unwrap().len(), 1, "{found}");
    assert_eq!((source.wait_end(), left.wait_end(), there.wait_end()), (0, 1, 0));
    journey.goes_to(&there);
    journey.log();
    lab.close();
}

/// `qmp-shell`, fed by lines as a user types them.
struct Shell {
    child: Child,
    lines: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Shell {
    fn on(machine: &Machine, python: &Path, lab: &Lab) -> Self {
        // What the command of this name runs: the command itself names the folder that it was installed in.
        let mut shell = Command::new(python);
        shell.args(["-B", "-u", "-c", "from qemu.qmp.qmp_shell import main; main()"]).arg(machine.qmp_path());
        // It keeps a history there.
        shell.env("HOME", lab.path("")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = shell.spawn().unwrap();
        let (lines, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut shell = Self { child, lines, answers };
        assert_eq!(shell.line(), "Welcome to the QMP low-level shell!");
        assert!(shell.line().starts_with("Connected to QEMU 10."));
        assert_eq!(shell.line(), "");
        shell
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.answers.read_line(&mut line).unwrap() > 0, "the shell is gone");
        line.trim_end().to_owned()
    }

    /// Types a command and reads the answer.
    fn types(&mut self, line: &str) -> Value {
        writeln!(self.lines, "{line}").unwrap();
        let answer = self.line();
        let answer = answer.trim_start_matches("(QEMU) ");
        serde_json::from_str(answer).unwrap_or_else(|error| panic!("`{line}` was answered with `{answer}`: {error}"))
    }

    /// Types a command that must succeed.
    fn does(&mut self, line: &str) -> Value {
        let mut answer = self.types(line);
        let value = answer.get_mut("return").map(Value::take);
        value.unwrap_or_else(|| panic!("`{line}`: {answer}"))
    }

    fn waits_for(&mut self, status: &str) -> Value {
        until(&format!("the shell sees {status}"), || {
            let look = self.does("query-migrate");
            (look["status"] == status).then_some(look)
        })
    }

    /// Where the machine listens.
    fn address(&mut self) -> String {
        let look = self.does("query-migrate");
        let part = |name: &str| look["socket-address"][0][name].as_str().unwrap().to_owned();
        format!("tcp:{}:{}", part("host"), part("port"))
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // It has ended where its machine has.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn qmp_shell_drives_a_cancel_a_migration_and_a_recovery() {
    let lab = lab!("qmp_shell_drives_a_cancel_a_migration_and_a_recovery");
    let python = python!("qmp_shell_drives_a_cancel_a_migration_and_a_recovery");
    let (mut source, [mut left, mut there], mut journey) = machines(&lab);
    let [mut here, mut first, mut second] = [&source, &left, &there].map(|machine| Shell::on(machine, &python, &lab));
    assert_eq!(here.does("query-status"), json!({ "status": "running", "running": true }));
    assert_eq!(here.types("no-such-command")["error"]["class"], "CommandNotFound");
    here.does(r#"migrate-set-capabilities capabilities=[{"capability":"postcopy-ram","state":true}]"#);
    here.does("migrate-set-parameters x-switchover-mode=postcopy max-postcopy-bandwidth=400000");

    first.does("migrate-incoming uri=tcp:127.0.0.1:0");
    let to = first.address();
    here.does(&format!("migrate uri={to}"));
    here.waits_for("active");
    here.does("migrate_cancel");
    here.waits_for("cancelled");
    assert_eq!(here.does("query-status")["running"], true);
    assert_eq!(left.wait_end(), 1);
    journey.works_on(1);

    second.does("migrate-incoming uri=tcp:127.0.0.1:0");
    let to = second.address();
    here.does(&format!("migrate uri={to}"));
    here.waits_for("active");
    here.does("migrate-start-postcopy");
    here.waits_for("postcopy-active");
    second.waits_for("postcopy-active");
    second.does("migrate-pause");
    for shell in [&mut here, &mut second] {
        let paused = shell.waits_for("postcopy-paused");
        assert!(!paused["error-desc"].as_str().unwrap().is_empty(), "{paused}");
    }
    second.does("migrate-recover uri=tcp:127.0.0.1:0");
    let elsewhere = second.address();
    assert_ne!(to, elsewhere);
    here.does("migrate-set-parameters max-postcopy-bandwidth=0");
    here.does(&format!("migrate uri={elsewhere} resume=true"));
    here.waits_for("completed");
    second.waits_for("completed");
    assert_eq!(here.does("query-status")["status"], "postmigrate");
    assert_eq!(second.does("query-status")["status"], "running");
    here.does("quit");
    assert_eq!(source.wait_end(), 0);
    journey.goes_to(&there);
    journey.works_on(1);
    second.does("quit");
    assert_eq!(there.wait_end(), 0);
    journey.log();
    lab.close();
}
