//! One run: two processes, a guest that works, its move, and what came of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use switchover_hybrid::report::SideReport;
use switchover_wire::clock::Nanos;
use tempfile::TempDir;

use super::args::{Guest, Link, Plan};
use super::figures::Figures;
use super::guest_lines::Line;
use super::guest_trace::{GuestTrace, Marks};
use super::modes::{Mode, Moved, Pair};
use super::process::Process;
use super::run_error::RunError;
use super::schema::RunReport;
use super::serial_log::{self, Chunk};
use super::vmm::{Machine, Vmm};
use crate::failure::Failure;
use crate::qmp_client::QmpClient;
use crate::signals::EndRequests;

/// A machine is up within a second, its memory reserved; firmware may take longer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// A guest of many gigabytes initialises its pages before it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// From `quit` until a machine's memory is given back.
const QUIT_TIMEOUT: Duration = Duration::from_secs(20);
/// A machine that fails closes its QMP socket a little before it ends.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How often a wait looks whether the user wants to end it.
const LOOK: Duration = Duration::from_millis(100);

const SOURCE: &str = "the source";
const DESTINATION: &str = "the destination";

/// Makes runs of one plan. Its files are gone when it is dropped.
pub struct Driver<'a> {
    plan: &'a Plan,
    machine: Machine,
    directory: TempDir,
    ends: &'a EndRequests,
}

/// What a run left behind when both machines had been asked.
struct Outcome {
    marks: Marks,
    source: Option<SideReport>,
    destination: Option<SideReport>,
}

impl<'a> Driver<'a> {
    /// Lays out the files that runs need.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn new(plan: &'a Plan, ends: &'a EndRequests) -> Result<Self, Failure> {
        let failed = |error| Failure::failed(format_args!("cannot make a temporary directory: {error}; set TMPDIR"));
        let directory = tempfile::Builder::new().prefix("switchover-bench").tempdir().map_err(failed)?;
        let kernel = match &plan.guest {
            Guest::Builtin(name, elf) => {
                let path = directory.path().join(name);
                fs::write(&path, elf).map_err(|error| {
                    Failure::failed(format_args!("cannot write the guest to {}: {error}; set TMPDIR", path.display()))
                })?;
                path
            }
            Guest::File(path) => path.clone(),
        };
        let machine = Machine { kernel, append: plan.append.clone(), memory: plan.memory, vcpus: plan.vcpus };
        Ok(Self { plan, machine, directory, ends })
    }

    /// Makes run number `run`. `tell` is told what it is doing.
    pub fn run(&self, vmm: &dyn Vmm, mode: &dyn Mode, run: u32, tell: &dyn Fn(&str)) -> RunReport {
        let (mut lines, mut why) = (Vec::new(), Vec::new());
        match self.move_once(vmm, mode, run, tell, &mut lines, &mut why) {
            Ok(outcome) => {
                let guest = GuestTrace::read(&lines);
                let doubts = guest.doubts();
                let progress = guest.progress(&outcome.marks);
                let figures = match (&outcome.source, &outcome.destination) {
                    (Some(source), Some(destination)) => Figures::of(source, destination, progress),
                    _ => Figures { progress, ..Figures::default() },
                };
                RunReport {
                    run,
                    verified: doubts.is_empty(),
                    doubts,
                    figures,
                    marks: Some(outcome.marks),
                    guest: Some(guest),
                    source: outcome.source,
                    destination: outcome.destination,
                }
            }
            Err(error) => {
                let guest = Some(GuestTrace::read(&lines)).filter(|guest| guest.ready_ns.is_some());
                let mut doubts = vec![error.to_string()];
                doubts.append(&mut why);
                // That a guest did not go on is no news where the run failed; that it found corruption is.
                doubts.extend(guest.iter().flat_map(|guest| guest.complaints.iter().cloned()));
                RunReport { run, doubts, guest, ..RunReport::default() }
            }
        }
    }

    /// The run itself. `lines` gets what the guest said, however the run ends; `why`, what a machine that died said.
    fn move_once(
        &self,
        vmm: &dyn Vmm,
        mode: &dyn Mode,
        run: u32,
        tell: &dyn Fn(&str),
        lines: &mut Vec<serial_log::TimedLine>,
        why: &mut Vec<String>,
    ) -> Result<Outcome, RunError> {
        tell("booting");
        let (source_socket, destination_socket) = (self.file(run, "s"), self.file(run, "d"));
        let mut source = Process::start(SOURCE, vmm.source(&self.machine, &source_socket))?;
        let mut destination = Process::start(DESTINATION, vmm.destination(&self.machine, &destination_socket))?;
        let result =
            self.drive(vmm, mode, run, tell, &mut source, &mut destination, &source_socket, &destination_socket);
        *lines = serial_log::join(&source.serial().chunks(), &destination.serial().chunks());
        // A machine that died explains a broken connection or a failed migration better than either does.
        if matches!(result, Err(RunError::Qmp { .. })) {
            for process in [&mut source, &mut destination] {
                if let Err(ended) = process.must_live_for(LAST_WORDS) {
                    why.push(ended.to_string());
                }
            }
        }
        result
    }

    #[expect(clippy::too_many_arguments, reason = "the two processes, their sockets, and what is to be done with them")]
    fn drive(
        &self,
        vmm: &dyn Vmm,
        mode: &dyn Mode,
        run: u32,
        tell: &dyn Fn(&str),
        source: &mut Process,
        destination: &mut Process,
        source_socket: &Path,
        destination_socket: &Path,
    ) -> Result<Outcome, RunError> {
        let mut source_qmp = connect(source, SOURCE, source_socket)?;
        let mut destination_qmp = connect(destination, DESTINATION, destination_socket)?;
        tell("waiting for the guest");
        let warm_up = self.ready(source)?;
        tell("warming up");
        self.pause(self.plan.warmup_s, &mut [source, destination])?;

        tell("moving");
        let uri = self.listen(&mut destination_qmp, run)?;
        let mut pair = Pair { source: &mut source_qmp, destination: &mut destination_qmp, uri: &uri };
        let Moved { migrate, handoff, completed } = mode.migrate(&mut pair)?;
        let marks =
            Marks { warm_up_ns: warm_up.0, migrate_ns: migrate.0, handoff_ns: handoff.0, completed_ns: completed.0 };
        tell("watching it go on");
        self.pause(self.plan.after_s, &mut [source, destination])?;

        let outcome = Outcome {
            marks,
            source: vmm.report(SOURCE, &mut source_qmp)?,
            destination: vmm.report(DESTINATION, &mut destination_qmp)?,
        };
        tell("ending");
        quit(source, &mut source_qmp, SOURCE)?;
        quit(destination, &mut destination_qmp, DESTINATION)?;
        Ok(outcome)
    }

    /// Has the destination listen, and says where.
    fn listen(&self, destination: &mut QmpClient, run: u32) -> Result<String, RunError> {
        let wanted = match self.plan.link {
            // The kernel chooses a free port.
            Link::Tcp => "tcp:127.0.0.1:0".to_owned(),
            Link::Unix => format!("unix:{}", self.file(run, "m").display()),
        };
        destination.execute("migrate-incoming", json!({ "uri": wanted })).map_err(RunError::on(DESTINATION))?;
        if self.plan.link == Link::Unix {
            return Ok(wanted);
        }
        let answer = destination.execute("query-migrate", json!({})).map_err(RunError::on(DESTINATION))?;
        port(&answer).map(|port| format!("tcp:127.0.0.1:{port}")).ok_or_else(|| RunError::Answer {
            who: DESTINATION,
            command: "query-migrate",
            what: "the port that it listens on (`socket-address`)".to_owned(),
        })
    }

    /// Waits until the guest has said that it is ready, and says when it did.
    fn ready(&self, source: &mut Process) -> Result<Nanos, RunError> {
        let until = Instant::now() + READY_TIMEOUT;
        while Instant::now() < until {
            self.not_interrupted()?;
            match source.serial().wait(Instant::now() + LOOK, first_word) {
                Some(Ok(at)) => return Ok(at),
                Some(Err(())) => return Err(RunError::Refused { said: source.serial().tail() }),
                None => source.must_live()?,
            }
        }
        Err(RunError::NotReady { waited: READY_TIMEOUT, said: source.serial().tail() })
    }

    /// Lets `seconds` pass, while all of `processes` must live.
    fn pause(&self, seconds: f64, processes: &mut [&mut Process]) -> Result<(), RunError> {
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        loop {
            self.not_interrupted()?;
            processes.iter_mut().try_for_each(|process| process.must_live())?;
            let Some(left) = until.checked_duration_since(Instant::now()) else { return Ok(()) };
            std::thread::sleep(left.min(LOOK));
        }
    }

    fn not_interrupted(&self) -> Result<(), RunError> {
        if self.ends.count() > 0 { Err(RunError::Interrupted) } else { Ok(()) }
    }

    fn file(&self, run: u32, what: &str) -> PathBuf {
        self.directory.path().join(format!("{what}{run}"))
    }
}

fn connect(process: &mut Process, who: &'static str, socket: &Path) -> Result<QmpClient, RunError> {
    let until = Instant::now() + CONNECT_TIMEOUT;
    loop {
        // In short steps, so that a machine that could not start is not waited for.
        match QmpClient::connect(socket, LOOK) {
            Ok(client) => return Ok(client),
            Err(error) => {
                process.must_live()?;
                if Instant::now() >= until {
                    return Err(RunError::on(who)(error));
                }
            }
        }
    }
}

fn quit(process: &mut Process, qmp: &mut QmpClient, who: &'static str) -> Result<(), RunError> {
    qmp.execute("quit", json!({})).map_err(RunError::on(who))?;
    process.must_end(QUIT_TIMEOUT)
}

/// When the guest said that it is ready; an error where it said that it will never be.
fn first_word(chunks: &[Chunk]) -> Option<Result<Nanos, ()>> {
    serial_log::join(chunks, &[]).iter().find_map(|line| match Line::parse(&line.bytes) {
        Line::Ready(_) => Some(Ok(line.at)),
        Line::Died(_) => Some(Err(())),
        _ => None,
    })
}

/// The port in a `query-migrate` answer: QEMU gives a list of addresses, whose ports are strings.
fn port(answer: &Value) -> Option<u16> {
    let address = answer.get("socket-address")?;
    let first = address.as_array().map_or(Some(address), |list| list.first())?;
    match first.get("port")? {
        Value::String(text) => text.parse().ok(),
        other => other.as_u64().and_then(|port| u16::try_from(port).ok()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_where_qemu_puts_it() {
        let answer = json!({ "socket-address": [{ "type": "inet", "host": "127.0.0.1", "port": "4444" }] });
        assert_eq!(port(&answer), Some(4444));
        assert_eq!(port(&json!({ "status": "none" })), None);
        assert_eq!(port(&json!({ "socket-address": [{ "port": "70000" }] })), None);
    }

    #[test]
    fn the_first_word_is_readiness_or_refusal() {
        let chunk = |text: &str| [Chunk { at: Nanos(7), bytes: text.as_bytes().to_vec() }];
        assert_eq!(first_word(&chunk("boot\nR ready ws 1 tsc_khz 2 vcpus 1\n")), Some(Ok(Nanos(7))));
        assert_eq!(first_word(&chunk("E parameter \"x\": unknown\n")), Some(Err(())));
        assert_eq!(first_word(&chunk("R ready ws 1 tsc_khz 2 vcpus 1")), None);
    }
}
