//! `switchover rollback`: returns a guest to its checkpoint, wherever it has gone since.
//!
//! ```text
//!   fence ─▶ verify ─▶ stop ─▶ restore ─▶ confirm ─▶ resume ─▶ record ─▶ clean up
//!     │         └─ the checkpoint is damaged: what was fenced goes on, nothing has happened
//!     └─ from here on the guest runs nowhere, until `resume`
//! ```
//!
//! Every step can be repeated: it looks at where the machines are before it does anything, and the journal says what may have been
//! begun. So whoever is killed, this command or the host, runs the same command again. There is never a second guest, because
//! nothing is restored before the machines that had it have ended, and it runs in one new machine only.

mod held;
mod journal;

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};
use switchover_image::Tally;
use switchover_image::folder::FolderLock;
use switchover_image::reader::Image;
use switchover_runtime::audit::Audit;
use switchover_runtime::qmp::endpoint::Endpoint;

use self::held::Held;
use self::journal::{Journal, Stage, Step, Subject};
use crate::failure::{Failure, say};
use crate::image::inspect;
use crate::paths::absolute;
use crate::qmp_client::{QmpClient, QmpError};

/// How long a machine has to answer, to stand still, or to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the new machine may still take to start.
const START: Duration = Duration::from_secs(2);
/// How long a socket is tried where nobody may be any more.
const KNOCK: Duration = Duration::from_millis(100);
const LOOK: Duration = Duration::from_millis(10);

/// What `switchover rollback` takes.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct RollbackArgs {
    /// The image to return to: what `switchover migrate --checkpoint` wrote, or any other
    #[arg(long, value_name = "FILE")]
    checkpoint: PathBuf,

    /// QMP socket of the machine that the guest left
    #[arg(long, value_name = "unix:PATH")]
    source: Endpoint,

    /// QMP socket of the machine that the guest moved to, or was to
    #[arg(long, value_name = "unix:PATH")]
    destination: Endpoint,

    /// QMP socket of the machine in which the guest goes on: one that waits, as `switchover run --incoming defer` does
    #[arg(long, value_name = "unix:PATH")]
    into: Endpoint,

    /// Source or destination cannot be reached, and you have seen to it yourself that neither of those ever runs the guest again
    #[arg(long)]
    fenced: bool,

    /// The rollback's journal. By default beside the checkpoint: FILE.rollback
    #[arg(long, value_name = "FILE")]
    journal: Option<PathBuf>,

    /// Where it is recorded that the guest was rolled back, as `run --audit` records what happens to a machine. By default beside the
    /// checkpoint: FILE.rollbacks
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  A move with a checkpoint before it:
    switchover migrate --qmp unix:/tmp/source.qmp --to tcp:10.0.0.2:4444 --checkpoint before.image
  The guest does not get on with its new host: back to where it was, in a new machine:
    switchover run --incoming defer --memory 512M --qmp unix:/tmp/again.qmp
    switchover rollback --checkpoint before.image --source unix:/tmp/source.qmp \\
      --destination unix:/tmp/destination.qmp --into unix:/tmp/again.qmp

The steps, each of them printed:
  fence      the guest stands still at both, and a migration between them is called off
  verify     the checkpoint is compared with its hashes; if it is damaged, the guest goes on
  stop       source and destination end
  restore    the guest of the checkpoint is loaded into the new machine, paused
  confirm    that machine has all of it, and the checkpoint is still the same
  resume     it runs, unless its user had paused it before the checkpoint
  record     that this happened is recorded
  clean up   sockets that nobody listens on any more are removed, and the journal is closed

What the guest did after the checkpoint is lost. If this command is killed, or fails, run it again: it goes on where it was. A machine that \
cannot be reached at first may still run the guest: see to it that it does not, then say --fenced.

Exit status: 0 when the guest is back, 1 when not (stderr says why, and where it is), 2 for bad usage.";

/// A machine that had the guest, or could have.
struct Machine {
    name: &'static str,
    socket: PathBuf,
}

/// A rollback.
struct Rollback {
    checkpoint: PathBuf,
    /// What the machine that loads it is told.
    uri: String,
    image: Image,
    root: String,
    /// The destination first: it is the one that runs the guest, as a rule.
    old: [Machine; 2],
    into: PathBuf,
    fenced: bool,
    record: PathBuf,
    journal: Journal,
    /// Nobody takes the checkpoint out of its series meanwhile.
    _folder: FolderLock,
    /// No other rollback has one of the machines.
    _held: Held,
}

/// Returns a guest to its checkpoint.
///
/// # Errors
/// When it is not back.
pub fn main(args: &RollbackArgs) -> Result<(), Failure> {
    let checkpoint = absolute(&args.checkpoint);
    let sockets = [args.source.path(), args.destination.path(), args.into.path()];
    if sockets[0] == sockets[1] || sockets[2] == sockets[0] || sockets[2] == sockets[1] {
        return Err(Failure::usage("--source, --destination and --into are three machines, with three sockets"));
    }
    let uri = checkpoint.to_str().filter(|path| !path.contains(",offset="));
    let uri = uri.map(|path| format!("file:{path}")).ok_or_else(|| {
        Failure::usage("--checkpoint has a name that QMP cannot tell: it is no text, or has `,offset=` in it")
    })?;
    // By names that do not depend on where this is run.
    let [source, destination, into] = sockets.map(absolute);
    let held = Held::take([&source, &destination, &into])?;
    let folder = match FolderLock::try_shared(&checkpoint).map_err(Failure::failed)? {
        Some(lock) => lock,
        None => {
            tell("somebody is at the images in the checkpoint's folder: waiting for that to be done");
            FolderLock::shared(&checkpoint).map_err(Failure::failed)?
        }
    };
    // Before anything is touched: most of what can be wrong with an image is found here.
    let image = Image::open(&checkpoint).map_err(Failure::failed)?;
    let root = inspect::root(&image);
    let moment = inspect::moment(&image).map_err(Failure::failed)?;
    let [source, destination, into] = [source, destination, into].map(|path| path.display().to_string());
    let subject = Subject { moment, source, destination, into };
    let beside = |suffix: &str| {
        let mut name = checkpoint.clone().into_os_string();
        name.push(suffix);
        PathBuf::from(name)
    };
    let path = args.journal.clone().unwrap_or_else(|| beside(".rollback"));
    let old = [
        Machine { name: "destination", socket: args.destination.path().to_owned() },
        Machine { name: "source", socket: args.source.path().to_owned() },
    ];
    if Journal::is_over(&path, &subject) && old.iter().all(|machine| matches!(machine.knock(), Ok(None))) {
        tell("the guest is back already: this rollback came to its end before");
        return Ok(());
    }
    let journal = Journal::open(&path, &subject).map_err(Failure::failed)?;
    let record = args.record.clone().unwrap_or_else(|| beside(".rollbacks"));
    let (into, fenced) = (args.into.path().to_owned(), args.fenced);
    Rollback { checkpoint, uri, image, root, old, into, fenced, record, journal, _folder: folder, _held: held }.run()
}

impl Rollback {
    fn run(mut self) -> Result<(), Failure> {
        if let Err(failure) = self.look_at_the_new_machine() {
            let untouched = self.journal.stage(Step::Fence).is_none();
            if untouched {
                self.journal.discard().map_err(Failure::failed)?;
            }
            let where_it_is = if untouched { "nothing was touched" } else { "the guest stands still where it was" };
            return Err(Failure::failed(format_args!("{}; {where_it_is}", failure.sentence)));
        }
        self.fence()?;
        if let Err(failure) = self.verify() {
            let told = self.let_go_on();
            self.journal.discard().map_err(Failure::failed)?;
            return Err(Failure::failed(format_args!("{}; nothing was rolled back: {told}", failure.sentence)));
        }
        self.stop()?;
        let mut machine = self.restore()?;
        self.confirm(&mut machine)?;
        self.resume(&mut machine)?;
        self.record()?;
        self.clean_up()
    }

    /// Whether it can take the guest: before there is no other place for it.
    fn look_at_the_new_machine(&self) -> Result<(), Failure> {
        if self.journal.stage(Step::Stop).is_some() {
            return Ok(());
        }
        let into = self.into.display();
        let start = "start one with --incoming defer and the memory and vCPUs that the guest had, and run this again";
        let failed = |error: QmpError| {
            Failure::failed(format_args!("{error}: no machine waits for the guest at {into}; {start}"))
        };
        let mut machine = QmpClient::connect(&self.into, START).map_err(failed)?;
        let status = status_of(&mut machine).map_err(failed)?;
        if status != "inmigrate" {
            return Err(Failure::failed(format_args!(
                "the machine at {into} does not wait for a guest, it is `{status}`; {start}"
            )));
        }
        Ok(())
    }

    /// Makes the guest stand still wherever it may be. The journal says which machines it ran on until then.
    fn fence(&mut self) -> Result<(), Failure> {
        let begun = self.journal.stage(Step::Fence).is_some();
        let mut there = Vec::new();
        for (index, machine) in self.old.iter().enumerate() {
            match machine.knock()? {
                Some(client) => there.push((index, client)),
                // It was there when this began, or somebody vouches for it.
                None if begun || self.fenced => {}
                None => {
                    let Machine { name, socket } = machine;
                    return Err(Failure::failed(format_args!(
                        "the {name} does not answer at {}: it may still run the guest, and then there would be two. See to it that it \
                         does not, and say --fenced; nothing was touched",
                        socket.display()
                    )));
                }
            }
        }
        self.begin(Step::Fence)?;
        for (index, client) in &mut there {
            if !self.journal.ran().contains(index) && self.old[*index].runs(client)? {
                // Before it is stopped: it is to go on if the checkpoint turns out to be damaged, whoever is killed until then.
                self.journal.note_running(*index).map_err(Failure::failed)?;
            }
        }
        for (index, mut client) in there {
            self.old[index].hold_still(&mut client)?;
        }
        self.done(Step::Fence, "the guest runs neither at the source nor at the destination")
    }

    /// Undoes the fence: the guest goes on if it ran before, wherever it is by now.
    fn let_go_on(&self) -> String {
        let ran: Vec<_> = self.journal.ran().iter().filter_map(|index| self.old.get(*index)).collect();
        if ran.is_empty() {
            return "the guest is where it was".to_owned();
        }
        // Where it ran; else where it has come to while it was fenced. One that waits for it has to start it again, too.
        let others = self.old.iter().filter(|machine| !ran.iter().any(|one| one.socket == machine.socket));
        let mut running = None;
        for machine in ran.iter().copied().chain(others) {
            let Some(mut client) = machine.knock().ok().flatten() else { continue };
            if running.is_none() || status_of(&mut client).is_ok_and(|status| status == "inmigrate") {
                let _ = client.execute("cont", json!({}));
            }
            if running.is_none() && machine.runs(&mut client).unwrap_or(false) {
                running = Some(machine.name);
            }
        }
        match running {
            None => format!("the guest stands still at the {}, where `cont` lets it go on", ran[0].name),
            Some(name) => format!("the guest goes on at the {name}"),
        }
    }

    fn verify(&mut self) -> Result<(), Failure> {
        // As long as there is a guest to go on instead, it is looked at again: it may have been merged since.
        if self.journal.is_done(Step::Verify) && self.journal.stage(Step::Stop).is_some() {
            return Ok(());
        }
        self.begin(Step::Verify)?;
        self.image.verify(&Tally::default()).map_err(Failure::failed)?;
        let sentence = format!("{} is as it was written, root {}", self.checkpoint.display(), self.root);
        self.done(Step::Verify, &sentence)
    }

    /// Ends the machines that had the guest.
    fn stop(&mut self) -> Result<(), Failure> {
        self.begin(Step::Stop)?;
        for machine in &self.old {
            machine.end()?;
        }
        self.done(Step::Stop, "source and destination have ended")
    }

    /// Has the new machine load the guest, and keep it paused.
    fn restore(&mut self) -> Result<QmpClient, Failure> {
        let into = self.into.display().to_string();
        let ran_on = self.journal.stage(Step::Resume).is_some();
        let mut machine = QmpClient::connect(&self.into, PATIENCE).map_err(|error| match ran_on {
            true => self.went_on("does not answer"),
            false => Failure::failed(format_args!(
                "{error}. The guest runs nowhere now and is in its checkpoint: start a machine for it, `switchover run --incoming defer \
                 --qmp unix:{into}`, and run this again"
            )),
        })?;
        let lost = |error: QmpError| lost(&into, &error);
        let status = status_of(&mut machine).map_err(lost)?;
        let begun = self.journal.stage(Step::Restore).is_some();
        match &*status {
            "inmigrate" if !ran_on => {
                self.begin(Step::Restore)?;
                // So that it stands still when it is here: it is not to run before all of this is confirmed.
                machine.execute("stop", json!({})).map_err(lost)?;
                let under_way = machine.execute("query-migrate", json!({})).map_err(lost)?.get("status").is_some();
                if !under_way {
                    machine.execute("migrate-incoming", json!({ "uri": self.uri })).map_err(lost)?;
                }
                wait_until_restored(&mut machine).map_err(lost)?;
            }
            "paused" if begun => wait_until_restored(&mut machine).map_err(lost)?,
            "running" if ran_on => {}
            other if ran_on => return Err(self.went_on(&format!("is `{other}` now"))),
            other => {
                return Err(Failure::failed(format_args!(
                    "the machine at {into} does not wait for a guest, it is `{other}`: the guest runs nowhere now and is in its \
                     checkpoint. Start a machine with --incoming defer and run this again with it"
                )));
            }
        }
        self.done(Step::Restore, &format!("the guest is in the machine at {into}, and stands still"))?;
        Ok(machine)
    }

    /// The new machine has, or had, the guest running, and is something else now.
    fn went_on(&self, how: &str) -> Failure {
        Failure::failed(format_args!(
            "the guest ran, or was about to, in the machine at {}, which {how}: it may have moved on, and then there would be two. If you \
             know that it runs nowhere, remove {} and run this again with --fenced",
            self.into.display(),
            self.journal.path().display()
        ))
    }

    /// Whether it is all of that guest.
    fn confirm(&mut self, machine: &mut QmpClient) -> Result<(), Failure> {
        self.begin(Step::Confirm)?;
        let into = self.into.display().to_string();
        let look = machine.execute("query-migrate", json!({})).map_err(|error| lost(&into, &error))?;
        let total = look.pointer("/ram/total").and_then(Value::as_u64);
        let remaining = look.pointer("/ram/remaining").and_then(Value::as_u64);
        if (total, remaining) != (Some(self.image.pages().bytes()), Some(0)) {
            return Err(Failure::failed(format_args!(
                "the machine at {into} has {total:?} bytes of memory of which {remaining:?} have not come, and the checkpoint has {}: it \
                 is another guest's. End that machine, start one with --incoming defer, and run this again",
                self.image.pages().bytes()
            )));
        }
        let now = Image::open(&self.checkpoint).map_err(Failure::failed)?;
        if inspect::root(&now) != self.root {
            return Err(Failure::failed(format_args!(
                "{} was replaced by another image meanwhile: the guest in the machine at {into} stands still, and may be of either",
                self.checkpoint.display()
            )));
        }
        self.done(Step::Confirm, "all of the guest is there, and the checkpoint is the same")
    }

    fn resume(&mut self, machine: &mut QmpClient) -> Result<(), Failure> {
        self.begin(Step::Resume)?;
        if !self.image.sections().was_running {
            return self.done(Step::Resume, "the guest stays paused, as it was in the checkpoint");
        }
        let into = self.into.display().to_string();
        machine.execute("cont", json!({})).map_err(|error| lost(&into, &error))?;
        let status = status_of(machine).map_err(|error| lost(&into, &error))?;
        if status != "running" {
            return Err(Failure::failed(format_args!(
                "the guest in the machine at {into} does not run: it is `{status}`"
            )));
        }
        self.done(Step::Resume, &format!("the guest runs in the machine at {into}"))
    }

    /// It may be there twice where this was killed.
    fn record(&mut self) -> Result<(), Failure> {
        self.begin(Step::Record)?;
        let audit = Audit::append(&self.record).map_err(Failure::failed)?;
        let [destination, source] = &self.old;
        audit.note(
            "rollback",
            json!({
                "checkpoint": self.checkpoint.display().to_string(),
                "root": self.root,
                "source": source.socket.display().to_string(),
                "destination": destination.socket.display().to_string(),
                "into": self.into.display().to_string(),
            }),
        );
        audit.flush();
        self.done(Step::Record, &format!("in {}", self.record.display()))
    }

    fn clean_up(&mut self) -> Result<(), Failure> {
        self.begin(Step::CleanUp)?;
        for machine in &self.old {
            machine.clear_away();
        }
        self.done(Step::CleanUp, "nothing is left of the machines that ended")
    }

    fn begin(&mut self, step: Step) -> Result<(), Failure> {
        if self.journal.is_done(step) {
            return Ok(());
        }
        self.journal.note(step, Stage::Begun).map_err(Failure::failed)
    }

    fn done(&mut self, step: Step, sentence: &str) -> Result<(), Failure> {
        if !self.journal.is_done(step) {
            self.journal.note(step, Stage::Done).map_err(Failure::failed)?;
        }
        tell(&format!("{:9} {sentence}", step.name()));
        Ok(())
    }
}

impl Machine {
    /// A connection; `None` where nobody listens, which is what a process that has ended leaves.
    ///
    /// # Errors
    /// When somebody may be there and does not answer: that is not to have ended.
    fn knock(&self) -> Result<Option<QmpClient>, Failure> {
        let silent = |error: QmpError| {
            Failure::failed(format_args!(
                "the {} at {} does not answer, and may run the guest: {error}; end that machine, and run this again",
                self.name,
                self.socket.display()
            ))
        };
        match QmpClient::connect(&self.socket, KNOCK) {
            Ok(client) => Ok(Some(client)),
            Err(error) if error.is_nobody() => Ok(None),
            // It ends, or is busy: once more, with patience.
            Err(QmpError::Closed { .. } | QmpError::Io { .. }) => match QmpClient::connect(&self.socket, PATIENCE) {
                Ok(client) => Ok(Some(client)),
                Err(error) if error.is_nobody() => Ok(None),
                Err(error) => Err(silent(error)),
            },
            Err(error) => Err(silent(error)),
        }
    }

    /// Removes the socket that one leaves which was killed; nothing that somebody listens at, or that is no socket.
    fn clear_away(&self) {
        let known = || {
            let known = fs::symlink_metadata(&self.socket).ok()?;
            known.file_type().is_socket().then(|| (known.dev(), known.ino()))
        };
        let before = known();
        if before.is_some() && matches!(self.knock(), Ok(None)) && known() == before {
            let _ = fs::remove_file(&self.socket);
        }
    }

    fn runs(&self, client: &mut QmpClient) -> Result<bool, Failure> {
        match client.execute("query-status", json!({})) {
            Ok(status) => Ok(status.get("running").and_then(Value::as_bool).unwrap_or(false)),
            Err(QmpError::Closed { .. }) => Ok(false),
            Err(error) => Err(Failure::failed(format_args!("the {} cannot be fenced: {error}", self.name))),
        }
    }

    /// Makes its guest stand still, whatever it is doing.
    fn hold_still(&self, client: &mut QmpClient) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let look = client.execute("query-status", json!({})).map(|status| {
                let running = status.get("running").and_then(Value::as_bool).unwrap_or(true);
                let handing_over = status.get("status").and_then(Value::as_str) == Some("finish-migrate");
                (running, handing_over)
            });
            match look {
                Ok((false, false)) => {
                    // One that waits for the guest, too: it would start it when it comes.
                    let _ = client.execute("stop", json!({}));
                    return Ok(());
                }
                Ok(_) => {}
                // It has ended meanwhile.
                Err(QmpError::Closed { .. }) => return Ok(()),
                Err(error) => return Err(Failure::failed(format_args!("the {} cannot be fenced: {error}", self.name))),
            }
            if Instant::now() >= deadline {
                return Err(Failure::failed(format_args!(
                    "the guest does not stand still at the {} within {PATIENCE:?}; end that machine, and run this again",
                    self.name
                )));
            }
            // Refused where there is nothing to cancel, and in a handoff, which does not take long.
            let _ = client.execute("migrate_cancel", json!({}));
            let _ = client.execute("stop", json!({}));
            thread::sleep(LOOK);
        }
    }

    /// Ends it, and waits until nobody listens there any more.
    fn end(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        while let Some(mut client) = self.knock()? {
            if Instant::now() >= deadline {
                return Err(Failure::failed(format_args!(
                    "the {} at {} does not end; end that machine yourself, and run this again. The guest stands still there",
                    self.name,
                    self.socket.display()
                )));
            }
            let _ = client.execute("quit", json!({ "x-switchover-force": true }));
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

fn status_of(machine: &mut QmpClient) -> Result<String, QmpError> {
    let status = machine.execute("query-status", json!({}))?;
    Ok(status.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
}

fn wait_until_restored(machine: &mut QmpClient) -> Result<(), QmpError> {
    loop {
        let look = machine.execute("query-migrate", json!({}))?;
        match look.get("status").and_then(Value::as_str) {
            Some("completed") => return Ok(()),
            Some(status @ ("failed" | "cancelled")) => {
                let desc = crate::migrate::error_of(&look).to_owned();
                return Err(QmpError::MigrationFailed { status: status.to_owned(), desc });
            }
            _ => thread::sleep(LOOK),
        }
    }
}

/// The new machine does not do what it must.
fn lost(into: &str, error: &QmpError) -> Failure {
    Failure::failed(format_args!(
        "the machine at {into} cannot take the guest: {error}. What it says itself may tell why. The guest runs nowhere else, and is in its \
         checkpoint: start a machine with --incoming defer there, with the memory and vCPUs that the guest had, and run this again"
    ))
}

fn tell(line: &str) {
    use std::io::Write as _;
    if writeln!(io::stdout().lock(), "{line}").is_err() {
        say(line);
    }
}
