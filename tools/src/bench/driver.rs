//! One run: two processes, a guest that works, its move, and what came of it.

use std::cell::Cell as Counter;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use switchover_hybrid::monitor::Choice;
use switchover_hybrid::report::{Side, SideReport};
use switchover_wire::clock::Nanos;
use tempfile::TempDir;

use super::args::{Cell, Guest, Link, Plan};
use super::bandwidth::Bandwidth;
use super::cpu_time::CpuTime;
use super::felt::Felt;
use super::figures::{Figures, deciding};
use super::guest_lines::Line;
use super::guest_trace::{GuestTrace, Marks};
use super::modes::{Hold, Mode, Moved, Pair, Stayed};
use super::network::{DESTINATION_ADDRESS, Namespace, Network};
use super::process::Process;
use super::run_error::RunError;
use super::schema::RunReport;
use super::serial_log::{self, Chunk};
use super::vmm::{Account, Machine, Vmm};
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

/// Asks for each fault in the report.
const RECORD_FAULTS: &str = "x-switchover-record-faults";

const SOURCE: &str = "the source";
const DESTINATION: &str = "the destination";

/// Makes runs of one plan. Its files and its network are gone when it is dropped.
pub struct Driver<'a> {
    plan: &'a Plan,
    directory: TempDir,
    network: Option<Network>,
    /// Numbers each run's files.
    files: Counter<u32>,
    ends: &'a EndRequests,
}

/// What is to be run.
#[derive(Clone, Copy)]
pub struct Order<'a> {
    /// What is moved over what.
    pub cell: &'a Cell,
    /// How.
    pub mode: &'a dyn Mode,
    /// Counted from 1.
    pub run: u32,
    /// Told what is being done.
    pub tell: &'a dyn Fn(&str),
}

/// The files of one run.
struct Files {
    source_qmp: PathBuf,
    destination_qmp: PathBuf,
    migration: PathBuf,
}

/// What a run left behind when both machines had been asked.
struct Outcome {
    marks: Marks,
    source: Option<SideReport>,
    destination: Option<SideReport>,
    account: Account,
    /// CPU time of both processes without their vCPUs.
    cpu_ns: Option<u64>,
    not_converged: Option<String>,
    /// When the pusher was let go, where it was held back.
    released: Option<Nanos>,
}

impl<'a> Driver<'a> {
    /// Lays out the files and the network that runs need.
    ///
    /// # Errors
    /// When that fails.
    pub fn new(plan: &'a Plan, ends: &'a EndRequests) -> Result<Self, Failure> {
        let network = (plan.link == Link::Veth).then(Network::new).transpose()?;
        let failed = |error| Failure::failed(format_args!("cannot make a temporary directory: {error}; set TMPDIR"));
        let directory = tempfile::Builder::new().prefix("switchover-bench").tempdir().map_err(failed)?;
        let driver = Self { plan, directory, network, files: Counter::new(0), ends };
        for cell in &plan.cells {
            if let Guest::Builtin(_, elf) = &cell.guest {
                let path = driver.kernel(cell);
                fs::write(&path, elf).map_err(|error| {
                    Failure::failed(format_args!("cannot write the guest to {}: {error}; set TMPDIR", path.display()))
                })?;
            }
        }
        Ok(driver)
    }

    fn kernel(&self, cell: &Cell) -> PathBuf {
        match &cell.guest {
            Guest::Builtin(name, _) => self.directory.path().join(name),
            Guest::File(path) => path.clone(),
        }
    }

    /// Makes the run that `order` describes.
    pub fn run(&self, vmm: &dyn Vmm, order: Order<'_>) -> RunReport {
        let run = order.run;
        let (mut lines, mut why) = (Vec::new(), Vec::new());
        match self.move_once(vmm, order, &mut lines, &mut why) {
            Ok(outcome) => {
                let guest = GuestTrace::read(&lines);
                let doubts = match outcome.not_converged {
                    None => guest.doubts(Side::Destination, 0),
                    Some(_) => guest.doubts(Side::Source, outcome.marks.completed_ns),
                };
                let progress = guest.progress(&outcome.marks);
                let figures = match (&outcome.source, &outcome.destination) {
                    (Some(source), Some(destination)) => Figures::of(source, destination, progress),
                    (Some(source), None) => Figures::of_attempt(source, progress),
                    _ => Figures::of_account(&outcome.account, progress),
                };
                let figures = figures.with_cpu(outcome.cpu_ns, guest.working_set);
                RunReport {
                    run,
                    verified: doubts.is_empty(),
                    doubts,
                    not_converged: outcome.not_converged,
                    figures,
                    marks: Some(outcome.marks),
                    felt: Felt::of(&guest, &outcome.marks, outcome.released),
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
        order: Order<'_>,
        lines: &mut Vec<serial_log::TimedLine>,
        why: &mut Vec<String>,
    ) -> Result<Outcome, RunError> {
        (order.tell)("booting");
        let files = self.next_files();
        let cell = order.cell;
        let machine = Machine {
            kernel: self.kernel(cell),
            append: cell.append.clone(),
            memory: self.plan.memory,
            vcpus: self.plan.vcpus,
        };
        let start = |who, mut command: Command, namespace: Option<&Namespace>| {
            let entered = namespace.map_or(Ok(()), |namespace| namespace.enter(&mut command));
            entered.map_err(|source| RunError::Start { who, source })?;
            Process::start(who, command)
        };
        let network = self.network.as_ref();
        let mut source = start(SOURCE, vmm.source(&machine, &files.source_qmp), network.map(Network::source))?;
        let mut destination =
            start(DESTINATION, vmm.destination(&machine, &files.destination_qmp), network.map(Network::destination))?;
        let result = self.drive(vmm, order, &files, &mut source, &mut destination);
        *lines = serial_log::join(&source.serial().chunks(), &destination.serial().chunks());
        // A machine that died explains a broken connection or a failed migration better than either does.
        if matches!(result, Err(RunError::Qmp { .. } | RunError::Failed { .. })) {
            for process in [&mut source, &mut destination] {
                if let Err(ended) = process.must_live_for(LAST_WORDS) {
                    why.push(ended.to_string());
                }
            }
        }
        result
    }

    fn drive(
        &self,
        vmm: &dyn Vmm,
        order: Order<'_>,
        files: &Files,
        source: &mut Process,
        destination: &mut Process,
    ) -> Result<Outcome, RunError> {
        let Order { cell, mode, tell, .. } = order;
        let mut source_qmp = connect(source, SOURCE, &files.source_qmp)?;
        let mut destination_qmp = connect(destination, DESTINATION, &files.destination_qmp)?;
        tell("waiting for the guest");
        let warm_up = self.ready(source)?;
        tell("warming up");
        self.pause(self.plan.warmup_s, &mut [source, destination])?;

        tell("moving");
        if !self.plan.parameters.is_empty() {
            for (qmp, who) in [(&mut source_qmp, SOURCE), (&mut destination_qmp, DESTINATION)] {
                let parameters = json!(self.plan.parameters);
                qmp.execute("migrate-set-parameters", parameters).map_err(RunError::on(who))?;
            }
        }
        mode.prepare(&mut source_qmp, &mut destination_qmp)?;
        let uri = self.listen(&mut destination_qmp, files)?;
        // The network holds the bandwidth by itself.
        let bandwidth = if self.network.is_some() { Bandwidth::UNLIMITED } else { cell.bandwidth };
        let is_vcpu = |name: &str| vmm.is_vcpu_thread(name);
        let [source_id, destination_id] = [source.id(), destination.id()];
        let cpu = || Some([CpuTime::of(source_id, &is_vcpu)?, CpuTime::of(destination_id, &is_vcpu)?]);
        let cpu_before = cpu();
        let mut pair = Pair {
            source: &mut source_qmp,
            destination: &mut destination_qmp,
            uri: &uri,
            bandwidth,
            patience: self.plan.patience_s.map(Duration::from_secs_f64),
            trace: self.plan.trace.is_some(),
            hold: Hold::for_seconds(self.plan.hold_push_s),
            ends: self.ends,
        };
        let moved = mode.migrate(&mut pair)?;
        let released = pair.hold.and_then(|hold| hold.released);
        let cpu_ns = cpu_before
            .zip(cpu())
            .and_then(|([s, d], [source, destination])| Some(source.since(&s)? + destination.since(&d)?));
        tell("watching it go on");
        let stayed = moved.stayed.is_some();
        if stayed {
            self.pause(self.plan.after_s, &mut [source])?;
        } else {
            self.pause(self.plan.after_s, &mut [source, destination])?;
        }
        let source_report = vmm.report(SOURCE, &mut source_qmp)?;
        let not_converged = moved.stayed.as_ref().map(|why| not_converged(why, source_report.as_ref())).transpose()?;
        let account = if stayed {
            Account::default()
        } else {
            // A command that was answered proves nothing.
            run_state(&mut source_qmp, SOURCE, "postmigrate")?;
            run_state(&mut destination_qmp, DESTINATION, "running")?;
            vmm.account(&mut source_qmp, &mut destination_qmp)?
        };
        // A destination that nothing came to has nothing to tell.
        let destination_report = if stayed { None } else { vmm.report(DESTINATION, &mut destination_qmp)? };
        tell("ending");
        quit(source, &mut source_qmp, SOURCE)?;
        if !stayed {
            quit(destination, &mut destination_qmp, DESTINATION)?;
        }
        Ok(Outcome {
            marks: marks(warm_up, &moved, source_report.as_ref()),
            source: source_report,
            destination: destination_report,
            account,
            cpu_ns,
            not_converged,
            released,
        })
    }

    /// Has the destination listen, and says where.
    fn listen(&self, destination: &mut QmpClient, files: &Files) -> Result<String, RunError> {
        // The kernel chooses a free port.
        let tcp = |address: &str, port: u16| format!("tcp:{address}:{port}");
        let address = match self.plan.link {
            Link::Tcp => "127.0.0.1",
            Link::Veth => DESTINATION_ADDRESS,
            Link::Unix => "",
        };
        let wanted = match self.plan.link {
            Link::Unix => format!("unix:{}", files.migration.display()),
            Link::Tcp | Link::Veth => tcp(address, 0),
        };
        if self.plan.trace.is_some() {
            let parameters = json!({ RECORD_FAULTS: true });
            destination.execute("migrate-set-parameters", parameters).map_err(RunError::on(DESTINATION))?;
        }
        destination.execute("migrate-incoming", json!({ "uri": wanted })).map_err(RunError::on(DESTINATION))?;
        if self.plan.link == Link::Unix {
            return Ok(wanted);
        }
        let answer = destination.execute("query-migrate", json!({})).map_err(RunError::on(DESTINATION))?;
        port(&answer).map(|port| tcp(address, port)).ok_or_else(|| RunError::Answer {
            who: DESTINATION,
            command: "query-migrate",
            what: "the port that it listens on (`socket-address`)".to_owned(),
        })
    }

    /// Has the link of the runs that follow carry what `cell` says.
    ///
    /// # Errors
    /// When the network cannot be shaped.
    pub fn prepare(&self, cell: &Cell) -> Result<(), Failure> {
        self.network.as_ref().map_or(Ok(()), |network| network.shape(cell.bandwidth))
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

    fn next_files(&self) -> Files {
        let number = self.files.get();
        self.files.set(number.wrapping_add(1));
        let file = |what: &str| self.directory.path().join(format!("{what}{number}"));
        Files { source_qmp: file("s"), destination_qmp: file("d"), migration: file("m") }
    }
}

/// When the bench did what in a run whose guest was ready at `warm_up`.
fn marks(warm_up: Nanos, moved: &Moved, source: Option<&SideReport>) -> Marks {
    // The source runs on this host, and its clock is this process'.
    let left = source.and_then(|source| source.instants.last_exit_ns).filter(|_| moved.stayed.is_none());
    let completed_ns = moved.ended.0;
    Marks {
        warm_up_ns: warm_up.0,
        migrate_ns: moved.migrate.0,
        handoff_ns: moved.handoff.map(|handoff| handoff.0).or(left).unwrap_or(completed_ns),
        completed_ns,
    }
}

/// Why the guest was not moved; an error where that is not because pre-copy did not converge.
fn not_converged(stayed: &Stayed, source: Option<&SideReport>) -> Result<String, RunError> {
    match stayed {
        Stayed::Cancelled(after) => Ok(format!("cancelled after {:.0} s", after.as_secs_f64())),
        Stayed::Failed(reason) => {
            let decision = source.and_then(|source| source.precopy.as_ref()).and_then(deciding);
            if decision.is_some_and(|decision| decision.verdict.choice == Choice::GiveUp) {
                Ok(reason.clone())
            } else {
                Err(RunError::Failed { reason: reason.clone() })
            }
        }
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

/// What a side says of itself must be `wanted`.
fn run_state(qmp: &mut QmpClient, who: &'static str, wanted: &'static str) -> Result<(), RunError> {
    let answer = qmp.execute("query-status", json!({})).map_err(RunError::on(who))?;
    let state = answer.get("status").and_then(Value::as_str).unwrap_or("unknown");
    if state == wanted { Ok(()) } else { Err(RunError::RunState { who, state: state.to_owned(), wanted }) }
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
    use super::super::synthetic;
    use super::*;

    #[test]
    fn the_port_is_found_where_qemu_puts_it() {
        let answer = json!({ "socket-address": [{ "type": "inet", "host": "127.0.0.1", "port": "4444" }] });
        assert_eq!(port(&answer), Some(4444));
        assert_eq!(port(&json!({ "status": "none" })), None);
        assert_eq!(port(&json!({ "socket-address": [{ "port": "70000" }] })), None);
    }

    #[test]
    fn giving_up_is_a_result_and_any_other_failure_is_none() {
        let failed = Stayed::Failed("the rest does not fit".to_owned());
        let stayed = synthetic::stayed_runs(1).remove(0);
        assert_eq!(not_converged(&failed, stayed.source.as_ref()).unwrap(), "the rest does not fit");
        let (broken, _) = synthetic::hybrid_sides(1);
        assert!(matches!(not_converged(&failed, Some(&broken)), Err(RunError::Failed { .. })));
        assert!(not_converged(&failed, None).is_err());
        let cancelled = Stayed::Cancelled(Duration::from_secs(15));
        assert_eq!(not_converged(&cancelled, None).unwrap(), "cancelled after 15 s");
    }

    #[test]
    fn a_handoff_that_nobody_asked_for_is_where_the_source_says() {
        let (source, _) = synthetic::hybrid_sides(1);
        let moved = Moved { migrate: Nanos(5), handoff: None, ended: Nanos(9), stayed: None };
        let exit = source.instants.last_exit_ns.unwrap();
        assert_eq!(marks(Nanos(1), &moved, Some(&source)).handoff_ns, exit);
        assert_eq!(marks(Nanos(1), &moved, None).handoff_ns, 9);
        let asked = Moved { handoff: Some(Nanos(6)), ..moved };
        assert_eq!(marks(Nanos(1), &asked, Some(&source)).handoff_ns, 6);
    }

    #[test]
    fn the_first_word_is_readiness_or_refusal() {
        let chunk = |text: &str| [Chunk { at: Nanos(7), bytes: text.as_bytes().to_vec() }];
        assert_eq!(first_word(&chunk("boot\nR ready ws 1 tsc_khz 2 vcpus 1\n")), Some(Ok(Nanos(7))));
        assert_eq!(first_word(&chunk("E parameter \"x\": unknown\n")), Some(Err(())));
        assert_eq!(first_word(&chunk("R ready ws 1 tsc_khz 2 vcpus 1")), None);
    }
}
