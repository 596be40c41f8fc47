//! The `switchover` command as its users meet it: exit statuses, sentences, and what it leaves behind.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use switchover_tools::check::{self, Verdict};
use switchover_tools::guests;
use switchover_tools::qmp_client::QmpClient;

/// Far more than anything here takes, on the slowest host.
const PATIENCE: Duration = Duration::from_secs(60);

fn switchover() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_switchover"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A running `switchover`, killed when a test that fails leaves it behind.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), signal).unwrap();
    }

    /// Waits for its end: exit status, stdout, stderr.
    fn finish(mut self) -> (i32, String, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.0.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > deadline => panic!("it did not end"),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let text = |pipe: &mut dyn Read| {
            let mut bytes = Vec::new();
            pipe.read_to_end(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (stdout, stderr) = (text(self.0.stdout.as_mut().unwrap()), text(self.0.stderr.as_mut().unwrap()));
        (status.code().expect("it was killed by a signal"), stdout, stderr)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command to its end: exit status, stdout, stderr.
fn output(arguments: &[&str]) -> (i32, String, String) {
    Running::start(switchover().args(arguments)).finish()
}

/// Whether guests can run and move here; says so where they cannot.
fn able(test: &str) -> bool {
    let missing = check::look().into_iter().find_map(|finding| match finding.verdict {
        Verdict::Missing { seen, .. } if matches!(finding.name, "kvm" | "userfaultfd" | "io_uring") => {
            Some(format!("{}: {seen}", finding.name))
        }
        _ => None,
    });
    if let Some(reason) = &missing {
        println!("SKIP {test}: {reason}");
    }
    missing.is_none()
}

/// A folder with a guest in it, for a test's sockets.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("guest"), guests::builtin("random").unwrap()).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.path(name).display())
    }

    /// A machine that boots, and its QMP connection.
    fn boot(&self, name: &str, append: &str) -> (Running, QmpClient) {
        let guest = self.path("guest");
        self.run(name, &["--kernel", guest.to_str().unwrap(), "--append", append])
    }

    /// A machine that waits for a guest at `name` with `-in` behind it.
    fn wait(&self, name: &str) -> (Running, QmpClient) {
        let at = self.unix(&format!("{name}-in"));
        self.run(name, &["--incoming", &at])
    }

    fn run(&self, name: &str, more: &[&str]) -> (Running, QmpClient) {
        let mut command = switchover();
        command.args(["run", "--memory", "64M", "--serial", "null", "--qmp", &self.unix(name)]).args(more);
        let running = Running::start(&mut command);
        (running, QmpClient::connect(&self.path(name), PATIENCE).unwrap())
    }

    /// What is left besides the guest.
    fn left(&self) -> Vec<String> {
        let names = fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.to_string_lossy().into_owned()).filter(|name| name != "guest").collect()
    }
}

fn ask(client: &mut QmpClient, command: &str) -> Value {
    client.execute(command, json!({})).unwrap()
}

fn run_state(client: &mut QmpClient) -> String {
    ask(client, "query-status")["status"].as_str().unwrap().to_owned()
}

#[test]
fn bad_usage_ends_with_2_and_says_what_is_wrong() {
    for (arguments, part) in [
        (&["run"][..], "--kernel"),
        (&["run", "--kernel", "k", "--memory", "512"], "it has no unit; write for example 512M"),
        (&["run", "--kernel", "k", "--vcpus", "0"], "--vcpus"),
        (&["run", "--kernel", "k", "--serial", "tty"], "stdio, null and file:PATH"),
        (&["run", "--kernel", "k", "--lazy-memory"], "--incoming"),
        (&["run", "--incoming", "defer"], "add --qmp unix:PATH"),
        (&["run", "--incoming", "10.0.0.2:4444"], "tcp:"),
        (&["migrate", "--to", "tcp:h:1"], "--qmp"),
        (&["migrate", "--qmp", "/q", "--to", "tcp:h:1"], "no `unix:` in front"),
        (&["migrate", "--qmp", "unix:/q", "--to", "tcp:h"], "the port is missing"),
        (&["migrate", "--qmp", "unix:/q", "--to", "tcp:h:1", "--max-bandwidth", "10"], "write for example 500M"),
        (&["bench", "--runs", "0"], "--runs"),
    ] {
        let (status, _, stderr) = output(arguments);
        assert_eq!(status, 2, "{arguments:?}: {stderr}");
        assert!(stderr.contains(part), "{arguments:?}: {stderr}");
    }
}

#[test]
fn help_shows_units_defaults_and_examples() {
    for command in ["run", "migrate", "bench", "floor"] {
        let (status, stdout, _) = output(&[command, "--help"]);
        assert_eq!(status, 0);
        assert!(stdout.contains("Example") || stdout.contains("switchover "), "{command} shows no example");
    }
    let (_, stdout, _) = output(&["run", "--help"]);
    assert!(stdout.contains("[default: 512M]") && stdout.contains("Exit status"), "{stdout}");
}

#[test]
fn nonsense_to_log_is_bad_usage() {
    let child = Running::start(switchover().env("SWITCHOVER_LOG", "switchover=loudly").arg("check"));
    let (status, _, stderr) = child.finish();
    assert_eq!((status, stderr.contains("write for example info")), (2, true), "{stderr}");
}

#[test]
fn a_machine_that_is_not_there_is_named() {
    let (status, _, stderr) = output(&["migrate", "--qmp", "unix:/nonexistent/qmp", "--to", "tcp:127.0.0.1:1"]);
    assert_eq!(status, 1);
    assert!(stderr.starts_with("switchover: ") && stderr.contains("/nonexistent/qmp"), "{stderr}");
}

#[test]
fn what_is_no_guest_is_refused() {
    if !able("what_is_no_guest_is_refused") {
        return;
    }
    let place = Place::new();
    let elf = fs::read(place.path("guest")).unwrap();
    fs::write(place.path("cut"), &elf[..elf.len() / 2]).unwrap();
    fs::write(place.path("text"), "#!/bin/sh\n").unwrap();
    for (name, part) in [("cut", "cannot boot"), ("text", "it is not an ELF file"), ("none", "cannot read")] {
        let kernel = place.path(name);
        let (status, _, stderr) = output(&["run", "--kernel", kernel.to_str().unwrap(), "--serial", "null"]);
        assert_eq!(status, 1, "{name}: {stderr}");
        assert!(stderr.contains(part) && stderr.contains(name), "{name}: {stderr}");
    }
}

#[test]
fn a_machine_ends_by_quit_by_a_signal_and_by_its_guest() {
    if !able("a_machine_ends_by_quit_by_a_signal_and_by_its_guest") {
        return;
    }
    let place = Place::new();
    let (child, mut client) = place.boot("quit", "ws=1M");
    assert_eq!(run_state(&mut client), "running", "whoever is answered finds the guest started");
    ask(&mut client, "quit");
    let told = client.wait_event("SHUTDOWN", PATIENCE).unwrap();
    assert_eq!(told["data"], json!({"guest": false, "reason": "host-qmp-quit"}));
    assert_eq!(child.finish().0, 0);

    for asked in [Signal::SIGINT, Signal::SIGTERM] {
        let (child, mut client) = place.boot("signal", "ws=1M");
        child.signal(asked);
        assert_eq!(client.wait_event("SHUTDOWN", PATIENCE).unwrap()["data"]["reason"], "host-signal");
        assert_eq!(child.finish().0, 0, "{asked}");
    }

    let (child, _client) = place.boot("success", "ws=1M period=10 stop=2");
    let (status, _, stderr) = child.finish();
    assert_eq!(status, 0, "{stderr}");

    // Started by hand, because it may be over before anybody could connect.
    let guest = place.path("guest");
    let (status, stdout, stderr) = output(&["run", "--kernel", guest.to_str().unwrap(), "--append", "nonsense=1"]);
    assert_eq!(status, 1, "{stderr}");
    assert!(stderr.contains("ended itself with the code 1") && stdout.contains("nonsense"), "{stdout} {stderr}");
    assert_eq!(place.left(), Vec::<String>::new());
}

#[test]
fn a_guest_moves_by_command_and_cannot_be_run_twice() {
    if !able("a_guest_moves_by_command_and_cannot_be_run_twice") {
        return;
    }
    let place = Place::new();
    let (source, mut here) = place.boot("source", "ws=16M");
    let (destination, mut there) = place.wait("destination");
    assert_eq!(run_state(&mut there), "inmigrate");
    let (from, to) = (place.unix("source"), place.unix("destination-in"));
    let (status, stdout, stderr) = output(&["migrate", "--qmp", &from, "--to", &to]);
    assert_eq!(status, 0, "{stderr}");
    assert!(stdout.contains("moved in") && stdout.contains("blackout"), "{stdout}");

    assert_eq!(run_state(&mut here), "postmigrate");
    assert_eq!(there.wait_status(&["completed"], PATIENCE).unwrap()["status"], "completed");
    assert_eq!(run_state(&mut there), "running");
    let refused = here.execute("cont", json!({})).unwrap_err().to_string();
    assert!(refused.contains("has moved"), "{refused}");
    let (status, _, stderr) = output(&["migrate", "--qmp", &from, "--to", &to]);
    assert_eq!((status, stderr.contains("has moved")), (1, true), "{stderr}");
    assert_eq!(ask(&mut here, "x-switchover-report")["side"], "source");
    assert_eq!(ask(&mut there, "x-switchover-report")["status"], "completed");

    ask(&mut here, "quit");
    ask(&mut there, "quit");
    assert_eq!((source.finish().0, destination.finish().0), (0, 0));
    assert_eq!(place.left(), Vec::<String>::new());
}

#[test]
fn a_migration_that_fails_leaves_the_guest_running() {
    if !able("a_migration_that_fails_leaves_the_guest_running") {
        return;
    }
    let place = Place::new();
    let (source, mut here) = place.boot("source", "ws=1M");
    let (status, stdout, stderr) = output(&["migrate", "--qmp", &place.unix("source"), "--to", &place.unix("nobody")]);
    assert_eq!((status, stdout.as_str()), (1, ""), "{stderr}");
    assert!(stderr.contains("nobody") && stderr.contains("unharmed on the source"), "{stderr}");
    assert_eq!(run_state(&mut here), "running");
    ask(&mut here, "migrate_cancel");
    assert_eq!(ask(&mut here, "query-migrate")["status"], "failed");
    ask(&mut here, "quit");
    assert_eq!(source.finish().0, 0);
}

#[test]
fn ctrl_c_cancels_a_migration_that_has_not_handed_over() {
    if !able("ctrl_c_cancels_a_migration_that_has_not_handed_over") {
        return;
    }
    let place = Place::new();
    let (source, mut here) = place.boot("source", "ws=1M");
    // Accepts nothing, and so never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = format!("tcp:{}", silent.local_addr().unwrap());
    let moving = Running::start(switchover().args(["migrate", "--qmp", &place.unix("source"), "--to", &to]));
    here.wait_status(&["setup"], PATIENCE).unwrap();
    moving.signal(Signal::SIGINT);
    let (status, _, stderr) = moving.finish();
    assert_eq!((status, stderr.contains("the guest goes on where it was")), (1, true), "{stderr}");
    assert_eq!(ask(&mut here, "query-migrate")["status"], "cancelled");
    assert_eq!(run_state(&mut here), "running");
    ask(&mut here, "quit");
    assert_eq!(source.finish().0, 0);
}

#[test]
fn a_destination_whose_source_gives_up_ends_with_the_reason() {
    if !able("a_destination_whose_source_gives_up_ends_with_the_reason") {
        return;
    }
    let place = Place::new();
    let (source, mut here) = place.boot("source", "ws=1M");
    let (destination, _there) = place.wait("destination");
    let postcopy = json!({"capabilities": [{"capability": "postcopy-ram", "state": true}]});
    here.execute("migrate-set-capabilities", postcopy).unwrap();
    here.execute("migrate-set-parameters", json!({"x-switchover-mode": "postcopy"})).unwrap();
    here.execute("migrate", json!({"uri": place.unix("destination-in")})).unwrap();
    here.wait_status(&["active"], PATIENCE).unwrap();
    ask(&mut here, "migrate_cancel");
    let (status, _, stderr) = destination.finish();
    assert_eq!(status, 1);
    assert!(stderr.contains("the incoming migration failed") && stderr.contains("cancelled"), "{stderr}");
    assert_eq!(here.wait_status(&["cancelled"], PATIENCE).unwrap()["status"], "cancelled");
    assert_eq!(run_state(&mut here), "running");
    ask(&mut here, "quit");
    assert_eq!(source.finish().0, 0);
    assert_eq!(place.left(), Vec::<String>::new());
}

#[test]
fn a_serial_port_leads_to_a_file() {
    if !able("a_serial_port_leads_to_a_file") {
        return;
    }
    let place = Place::new();
    let (guest, log) = (place.path("guest"), place.path("log"));
    let serial = format!("file:{}", log.display());
    let arguments = ["run", "--kernel", guest.to_str().unwrap(), "--append", "ws=1M period=10 stop=1"];
    let (status, stdout, stderr) = Running::start(switchover().args(arguments).args(["--serial", &serial])).finish();
    assert_eq!((status, stdout.as_str()), (0, ""), "{stderr}");
    assert!(fs::read_to_string(&log).unwrap().starts_with("R ready ws 1048576"));
}
