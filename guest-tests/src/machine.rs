//! One `switchover run` process.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use switchover_tools::qmp_client::{QmpClient, QmpError};

use crate::capture::Capture;
use crate::lab::{Lab, binary};
use crate::waiting::{PATIENCE, until};

/// What a machine is started with.
#[derive(Clone, Debug)]
pub struct Spec {
    /// `--kernel`.
    pub kernel: Option<PathBuf>,
    /// `--append`.
    pub append: String,
    /// `--memory`.
    pub memory: String,
    /// `--vcpus`.
    pub vcpus: u8,
    /// `--serial`.
    pub serial: String,
    /// `--incoming`.
    pub incoming: Option<String>,
    /// Further arguments.
    pub more: Vec<String>,
    /// `--tls-creds`.
    pub tls_creds: Option<PathBuf>,
    /// Whether what it says on standard error finds no room: it says all that it can, then.
    pub no_room_for_logs: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            kernel: None,
            append: String::new(),
            memory: "64M".to_owned(),
            vcpus: 1,
            serial: "stdio".to_owned(),
            incoming: None,
            more: Vec::new(),
            tls_creds: None,
            no_room_for_logs: false,
        }
    }
}

impl Spec {
    /// A machine like this one that waits for a guest at `address`.
    #[must_use]
    pub fn incoming(&self, address: &str) -> Self {
        Self { kernel: None, append: String::new(), incoming: Some(address.to_owned()), ..self.clone() }
    }
}

/// A machine. Dropping it ends its process, whatever it is doing.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    ended: Option<ExitStatus>,
    name: String,
    qmp_path: PathBuf,
    qmp: Option<QmpClient>,
    serial: Arc<Capture>,
    stderr: Arc<Capture>,
}

/// Open files and threads of a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Holdings {
    /// Entries of /proc/PID/fd.
    pub files: usize,
    /// Entries of /proc/PID/task.
    pub threads: usize,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

impl Machine {
    /// Starts one and connects to its QMP socket.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn start(lab: &Lab, spec: &Spec) -> Self {
        let name = format!("m{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let qmp_path = lab.path(&format!("{name}.qmp"));
        let mut command = Command::new(binary());
        command.args(["run", "--append", &spec.append, "--memory", &spec.memory, "--serial", &spec.serial]);
        command.args(["--vcpus", &spec.vcpus.to_string(), "--qmp", &format!("unix:{}", qmp_path.display())]);
        if let Some(kernel) = &spec.kernel {
            command.arg("--kernel").arg(kernel);
        }
        if let Some(incoming) = &spec.incoming {
            command.args(["--incoming", incoming]);
        }
        command.args(&spec.more);
        if let Some(folder) = &spec.tls_creds {
            command.arg("--tls-creds").arg(folder);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if spec.no_room_for_logs {
            command.stderr(File::options().write(true).open("/dev/full").unwrap()).env("SWITCHOVER_LOG", "trace");
        }
        let mut child = command.spawn().unwrap();
        let serial = Capture::of(child.stdout.take().unwrap());
        let stderr = child.stderr.take().map_or_else(Arc::default, Capture::of);
        let mut machine = Self { child, ended: None, name, qmp_path, qmp: None, serial, stderr };
        machine.qmp = Some(machine.client());
        machine
    }

    /// Another QMP client.
    ///
    /// # Panics
    /// When it cannot connect.
    #[must_use]
    pub fn client(&self) -> QmpClient {
        QmpClient::connect(&self.qmp_path, PATIENCE).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// Its own QMP client.
    ///
    /// # Panics
    /// After [`Self::disconnect`].
    pub fn qmp(&mut self) -> &mut QmpClient {
        self.qmp.as_mut().expect("the client was disconnected")
    }

    /// Drops its own QMP client.
    pub fn disconnect(&mut self) {
        self.qmp = None;
    }

    /// Where its QMP socket is.
    #[must_use]
    pub fn qmp_path(&self) -> &Path {
        &self.qmp_path
    }

    /// `--qmp`, as it was told.
    #[must_use]
    pub fn qmp_endpoint(&self) -> String {
        format!("unix:{}", self.qmp_path.display())
    }

    /// Executes a QMP command that must succeed.
    ///
    /// # Panics
    /// When it does not.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let done = self.qmp().execute(command, arguments);
        done.unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// Executes a QMP command that must be refused, and returns the reason.
    ///
    /// # Panics
    /// When it is not.
    pub fn refuses(&mut self, command: &str, arguments: Value) -> String {
        match self.qmp().execute(command, arguments) {
            Err(QmpError::Refused { desc, .. }) => desc,
            other => panic!("{}: `{command}` was to be refused, not {other:?}", self.name),
        }
    }

    /// The state in `query-status`.
    pub fn run_state(&mut self) -> String {
        let answer = self.execute("query-status", json!({}));
        let state = answer["status"].as_str().unwrap().to_owned();
        assert_eq!(answer["running"], json!(state == "running"), "{}: {answer}", self.name);
        state
    }

    /// Waits for a state in `query-status`.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait_run_state(&mut self, wanted: &str) {
        let what = format!("{} is {wanted}", self.name);
        until(&what, || (self.run_state() == wanted).then_some(()));
    }

    /// Waits until `query-migrate` says `wanted`, and returns that answer.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait_migration(&mut self, wanted: &str) -> Value {
        let name = self.name.clone();
        self.qmp().wait_status(&[wanted], PATIENCE).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Where it waits for a guest, as a source is told.
    ///
    /// # Panics
    /// When it does not.
    pub fn address(&mut self) -> String {
        let name = self.name.clone();
        until(&format!("{name} listens"), || {
            let answer = self.execute("query-migrate", json!({}));
            let address = answer.get("socket-address")?.get(0)?;
            Some(match address["type"].as_str()? {
                "inet" => format!("tcp:{}:{}", address["host"].as_str()?, address["port"].as_str()?),
                _ => format!("unix:{}", address["path"].as_str()?),
            })
        })
    }

    /// What its guest prints.
    #[must_use]
    pub fn serial(&self) -> Arc<Capture> {
        Arc::clone(&self.serial)
    }

    /// What it says on standard error.
    #[must_use]
    pub fn stderr(&self) -> Arc<Capture> {
        Arc::clone(&self.stderr)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its open files and threads.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        let count = |what: &str| fs::read_dir(format!("/proc/{}/{what}", self.child.id())).unwrap().count();
        Holdings { files: count("fd"), threads: count("task") }
    }

    /// Of each mapping of guest memory, how many bytes there are and how many of them are mapped as huge pages.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn huge_mappings(&self) -> Vec<(u64, u64)> {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.child.id())).unwrap();
        let kib = |line: &str, name: &str| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
        let (mut mappings, mut of_guest) = (Vec::new(), false);
        for line in smaps.lines() {
            // The first line of each mapping begins with its addresses, the others with a name and a colon.
            if line.split_whitespace().next().is_some_and(|word| !word.ends_with(':')) {
                of_guest = line.contains("memfd:guest-ram");
            } else if !of_guest {
            } else if let Some(size) = kib(line, "Size:") {
                mappings.push((size << 10, 0));
            } else if let (Some(huge), Some(last)) = (kib(line, "ShmemPmdMapped:"), mappings.last_mut()) {
                last.1 = huge << 10;
            }
        }
        mappings
    }

    /// The names of its threads, for whoever finds one too many.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn thread_names(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        // One that ends meanwhile has no name.
        let name = |task: std::io::Result<fs::DirEntry>| fs::read_to_string(task.ok()?.path().join("comm")).ok();
        tasks.filter_map(name).map(|name| name.trim_end().to_owned()).collect()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it has ended.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Ends it with SIGKILL and waits until it is gone.
    ///
    /// # Panics
    /// When it has ended already.
    pub fn kill(&mut self) {
        assert!(self.has_ended().is_none(), "{} has ended by itself", self.name);
        self.child.kill().unwrap();
        self.ended = Some(self.child.wait().unwrap());
    }

    /// Its exit status, if it has ended.
    ///
    /// # Panics
    /// When it cannot be asked for.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().unwrap();
        }
        self.ended
    }

    /// Waits for its end and returns its exit status.
    ///
    /// # Panics
    /// When it does not end, or by a signal.
    pub fn wait_end(&mut self) -> i32 {
        let what = format!("{} has ended", self.name);
        let status = until(&what, || self.has_ended());
        status.code().unwrap_or_else(|| panic!("{} was ended by a signal: {status}", self.name))
    }

    /// Ends it with `quit`.
    ///
    /// # Panics
    /// When it does not end with status 0, or leaves its socket behind.
    pub fn quit(&mut self) {
        self.execute("quit", json!({}));
        assert_eq!(self.wait_end(), 0, "{} ended by `quit`", self.name);
        assert!(!self.qmp_path.exists(), "{} left its QMP socket behind", self.name);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.has_ended().is_none() {
            // It may end by itself meanwhile: then there is nothing to kill, only to wait for.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            let (serial, stderr) = (self.serial.text(), self.stderr.text());
            let tail: Vec<&str> = serial.lines().rev().take(5).collect();
            let how = self.ended.map_or_else(|| "was running".to_owned(), |status| status.to_string());
            eprintln!("{} ({how}) printed, last line first: {tail:#?}\nand said:\n{stderr}", self.name);
        }
    }
}
