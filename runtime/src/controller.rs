//! A virtual machine and its migrations as QMP commands see them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use std::{io, thread};

use crossbeam::channel::{Receiver, Sender, unbounded};
use serde_json::json;
use switchover_hybrid::error::MigrationError;
use switchover_hybrid::incoming::Incoming;
use switchover_hybrid::lazy::Lazily;
use switchover_hybrid::machine::Machine;
use switchover_hybrid::outgoing::Outgoing;
use switchover_hybrid::progress::Progress;
use switchover_hybrid::report::SideReport;
use switchover_hybrid::restoring::Restoring;
use switchover_hybrid::saving::{How, Saving};
use switchover_hybrid::security::Security;
use switchover_hybrid::settings::{Notice, Observer, Settings, Tunables};
use switchover_hybrid::status::MigrationStatus;
use switchover_image::base::Base;
use switchover_image::reader::Image;
use switchover_wire::address::Address;

use crate::audit::{Audit, brief};
use crate::control::VmEvent;
use crate::dirty_rate::limit::{DirtyLimiter, Limit};
use crate::dirty_rate::{DirtyMeter, Measurement, MeterError, Method, Plan};
use crate::lock;
use crate::qmp::controller::{ControlError, Controller, Event, MigrationView, TimedEvent, WrittenPagesMode};
use crate::run_state::{ExitReason, RunState};
use crate::vm::Vm;

/// How long a machine whose guest has ended goes on taking what its source still sends.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// Drives a [`Vm`] and its migrations: at most one at a time, into it or out of it.
pub struct VmController {
    vm: Arc<Vm>,
    /// The destination's wish not to reserve its memory: the machine's own, whatever a client sets.
    lazy_memory: bool,
    /// Whoever begins or ends a use of the machine's book of written pages holds this lock: a migration, the meter and the
    /// limiter need it one at a time.
    migration: Mutex<Migration>,
    meter: DirtyMeter,
    limiter: DirtyLimiter,
    events: Sender<TimedEvent>,
    quit_by_client: AtomicBool,
    audit: Audit,
}

/// The last migration. A machine that a guest has moved into may be the source of its next one.
enum Migration {
    None,
    Outgoing(Outgoing),
    Incoming(Incoming),
    Saving(Saving),
    Restoring(Restoring),
}

impl VmController {
    /// A controller of `vm`, which notes in `audit` what happens to it, and what a QMP server tells of it.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn new(vm: Arc<Vm>, lazy_memory: bool, audit: Audit) -> io::Result<(Arc<Self>, Receiver<TimedEvent>)> {
        let (events, told) = unbounded();
        let (seen, tell) = (vm.events(), events.clone());
        thread::Builder::new().name("vm-events".to_owned()).spawn(move || forward(&seen, &tell))?;
        let controller = Self {
            vm,
            lazy_memory,
            migration: Mutex::new(Migration::None),
            meter: DirtyMeter::default(),
            limiter: DirtyLimiter::default(),
            events,
            quit_by_client: AtomicBool::new(false),
            audit,
        };
        Ok((Arc::new(controller), told))
    }

    /// The machine is over, for this reason: tells clients so, the last thing that they are told, and removes the socket's
    /// file that a source may still connect to, since the threads that hold it end with the process.
    pub fn finish(&self, exit: &ExitReason) {
        match &*self.migration() {
            Migration::Incoming(incoming) => {
                // A guest that has ended wants nothing more, but its source does not know that, and would wait for this side.
                if matches!(exit, ExitReason::Guest(_) | ExitReason::Shutdown) {
                    incoming.wait_for_the_rest(Instant::now() + DRAIN_PATIENCE);
                }
                // Its threads end with the process, and would leave a unix socket's file behind.
                incoming.close();
            }
            // And this one half an image.
            Migration::Saving(saving) => {
                saving.cancel();
                let _ = saving.wait();
            }
            Migration::None | Migration::Outgoing(_) | Migration::Restoring(_) => {}
        }
        let (guest, reason) = match exit {
            ExitReason::Guest(_) => (true, "guest-shutdown"),
            ExitReason::Shutdown => (true, "guest-reset"),
            ExitReason::Quit if self.quit_by_client.load(Ordering::SeqCst) => (false, "host-qmp-quit"),
            ExitReason::Quit => (false, "host-signal"),
            ExitReason::Failed(_) => (false, "host-error"),
        };
        let why = if let ExitReason::Failed(why) = exit { brief(why) } else { String::new() };
        self.audit.note("end", json!({ "reason": reason, "why": why }));
        self.audit.flush();
        tell(&self.events, Event::Shutdown { guest, reason });
    }

    /// Ends the machine, on behalf of whoever runs this process.
    pub fn end(&self) {
        self.vm.quit();
    }

    /// Waits for the end of the migration out of this machine, or of the save, that was begun last; `None` where none was.
    pub fn wait_until_it_has_left(&self) -> Option<MigrationStatus> {
        enum Leaving {
            Guest(Outgoing),
            Image(Saving),
        }
        let leaving = match &*self.migration() {
            Migration::Outgoing(outgoing) => Leaving::Guest(outgoing.clone()),
            Migration::Saving(saving) => Leaving::Image(saving.clone()),
            Migration::None | Migration::Incoming(_) | Migration::Restoring(_) => return None,
        };
        Some(match leaving {
            Leaving::Guest(outgoing) => outgoing.wait(),
            Leaving::Image(saving) => saving.wait(),
        })
    }

    fn migration(&self) -> MutexGuard<'_, Migration> {
        lock(&self.migration)
    }

    /// Why there is no guest any more that could be moved.
    fn ended(&self) -> Option<ControlError> {
        matches!(self.vm.run_state(), RunState::InternalError | RunState::Shutdown).then(|| ControlError::Ended {
            reason: self.vm.status_reason().unwrap_or_else(|| "it has ended".to_owned()),
        })
    }

    /// Whether the guest may be moved or saved now. What stands in the way and may be called off is.
    fn make_ready_to_leave(&self, migration: &Migration) -> Result<(), ControlError> {
        match self.vm.run_state() {
            RunState::Inmigrate => return Err(ControlError::NotArrived),
            _ if migration.is_under_way() => return Err(ControlError::Underway),
            RunState::Postmigrate if self.vm.is_saved() => return Err(ControlError::Saved),
            RunState::Postmigrate => return Err(ControlError::MovedAway),
            _ => {}
        }
        if let Some(ended) = self.ended() {
            return Err(ended);
        }
        if self.limiter.limit().is_some() {
            return Err(ControlError::Limited);
        }
        // Moving the guest is worth more than knowing how fast it writes.
        self.meter.interrupt();
        Ok(())
    }

    /// Whether a guest may come now.
    fn check_waiting(&self, migration: &Migration) -> Result<(), ControlError> {
        if matches!(migration, Migration::Incoming(_) | Migration::Restoring(_)) {
            return Err(ControlError::ListensAlready);
        }
        if self.vm.run_state() == RunState::Inmigrate { Ok(()) } else { Err(ControlError::NotIncoming) }
    }

    /// A restore has begun.
    fn watch_over(&self, migration: &mut Migration, restoring: Restoring) -> Result<(), ControlError> {
        let (vm, watched) = (Arc::clone(&self.vm), restoring.clone());
        // It goes on, whoever watches it: there must be no other one beside it.
        *migration = Migration::Restoring(restoring);
        self.at_the_end("restore-end", move || fail_without_restoring(&vm, &watched))
    }

    /// Starts a thread that waits for the end of what brings the guest. Without it the machine is of no use.
    fn at_the_end(&self, name: &str, wait: impl FnOnce() + Send + 'static) -> Result<(), ControlError> {
        let started = thread::Builder::new().name(name.to_owned()).spawn(wait).map(drop);
        let started = started.map_err(MigrationError::Thread);
        Ok(started.inspect_err(|error| self.vm.fail(format!("nobody could see to the guest's arrival: {error}")))?)
    }

    /// The machine's book of written pages is wanted for something else than the next checkpoint, or for nothing.
    fn end_series(&self, migration: &Migration) {
        if let Migration::Saving(saving) = migration
            && saving.series().is_some()
        {
            saving.end_series();
            self.vm.dirty_log().stop();
        }
    }

    fn machine(&self) -> Arc<dyn Machine> {
        Arc::<Vm>::clone(&self.vm)
    }

    fn observer(&self, way: &'static str) -> Observer {
        let (events, audit) = (self.events.clone(), self.audit.clone());
        Arc::new(move |notice| {
            audit.note_migration(way, &notice);
            match notice {
                Notice::Status(status) => tell(&events, Event::Migration(status)),
                Notice::Round(pass) => tell(&events, Event::MigrationPass(pass)),
                Notice::Happening(_) => {}
            }
        })
    }
}

impl Controller for VmController {
    fn audit(&self) -> &Audit {
        &self.audit
    }

    fn run_state(&self) -> RunState {
        self.vm.run_state()
    }

    fn stop(&self) -> Result<(), ControlError> {
        Ok(self.vm.stop()?)
    }

    fn cont(&self) -> Result<(), ControlError> {
        Ok(self.vm.cont()?)
    }

    fn may_quit(&self) -> Result<(), ControlError> {
        match self.migration().progress() {
            Some((Direction::Outgoing, Progress { status, remaining, .. })) if status.is_in_postcopy() => {
                Err(ControlError::StillNeeded { remaining })
            }
            _ => Ok(()),
        }
    }

    fn quit(&self) {
        self.quit_by_client.store(true, Ordering::SeqCst);
        self.vm.quit();
    }

    fn migrate(&self, to: Address, settings: Settings, security: Security) -> Result<(), ControlError> {
        let mut migration = self.migration();
        self.make_ready_to_leave(&migration)?;
        self.end_series(&migration);
        *migration =
            Migration::Outgoing(Outgoing::start(self.machine(), to, settings, security, self.observer("out"))?);
        Ok(())
    }

    fn save(&self, to: &Path, how: How) -> Result<(), ControlError> {
        let mut migration = self.migration();
        self.make_ready_to_leave(&migration)?;
        self.end_series(&migration);
        *migration = Migration::Saving(Saving::start(self.machine(), to, how, self.observer("out"))?);
        Ok(())
    }

    fn checkpoint(&self, to: &Path, base: Option<&Path>) -> Result<(), ControlError> {
        let mut migration = self.migration();
        self.make_ready_to_leave(&migration)?;
        let base = base.map(|path| base_at(&migration, path, to)).transpose()?;
        if base.is_none() {
            self.end_series(&migration);
        }
        let observer = self.observer("out");
        *migration = Migration::Saving(Saving::checkpoint(self.machine(), to, base, observer)?);
        Ok(())
    }

    fn restore(&self, from: &Path) -> Result<(), ControlError> {
        let mut migration = self.migration();
        self.check_waiting(&migration)?;
        self.watch_over(&mut migration, Restoring::start(self.machine(), from, self.observer("in"))?)
    }

    fn restore_lazily(&self, from: &Path, how: Lazily) -> Result<(), ControlError> {
        let mut migration = self.migration();
        self.check_waiting(&migration)?;
        self.watch_over(&mut migration, Restoring::start_lazily(self.machine(), from, how, self.observer("in"))?)
    }

    fn listen(&self, at: &Address, settings: Settings, security: Security) -> Result<(), ControlError> {
        let mut migration = self.migration();
        self.check_waiting(&migration)?;
        let settings = Settings { lazy_memory: self.lazy_memory, ..settings };
        let incoming = Incoming::listen(self.machine(), at, settings, security, self.observer("in"))?;
        let (vm, watched) = (Arc::clone(&self.vm), incoming.clone());
        *migration = Migration::Incoming(incoming);
        self.at_the_end("incoming-end", move || fail_without_a_guest(&vm, &watched))
    }

    fn start_postcopy(&self) -> Result<(), ControlError> {
        match &*self.migration() {
            Migration::Outgoing(outgoing) if outgoing.progress().status.is_under_way() => {
                Ok(outgoing.start_postcopy()?)
            }
            _ => Err(ControlError::NothingToHandOver),
        }
    }

    fn continue_switchover(&self) -> Result<(), ControlError> {
        match &*self.migration() {
            Migration::Outgoing(outgoing) => Ok(outgoing.proceed()?),
            _ => Err(ControlError::NothingToContinue),
        }
    }

    fn pause_migration(&self) -> Result<(), ControlError> {
        let paused = match &*self.migration() {
            Migration::Outgoing(outgoing) => outgoing.pause(),
            Migration::Incoming(incoming) => incoming.pause(),
            _ => return Err(ControlError::NothingToPause),
        };
        paused.map_err(|_| ControlError::NothingToPause)
    }

    fn resume_migration(&self, to: Address, settings: Settings, security: Security) -> Result<(), ControlError> {
        match &*self.migration() {
            Migration::Outgoing(outgoing) => outgoing.resume(to, settings, security).map_err(|error| match error {
                MigrationError::NotLost { .. } => ControlError::NothingToResume,
                other => other.into(),
            }),
            _ => Err(ControlError::NothingToResume),
        }
    }

    fn recover(&self, at: &Address) -> Result<(), ControlError> {
        match &*self.migration() {
            Migration::Incoming(incoming) => match incoming.recover(at) {
                Ok(address) => {
                    tracing::info!(%address, "listens for the source to join its lost link again");
                    Ok(())
                }
                Err(MigrationError::NotLost { .. }) => Err(ControlError::NothingToRecover),
                Err(other) => Err(other.into()),
            },
            _ => Err(ControlError::NothingToRecover),
        }
    }

    fn reclaim(&self) -> Result<(), ControlError> {
        match &*self.migration() {
            Migration::Outgoing(outgoing) => outgoing.reclaim().map_err(|error| match error {
                MigrationError::NotLost { .. } => ControlError::NothingToReclaim,
                other => other.into(),
            })?,
            _ => return Err(ControlError::NothingToReclaim),
        }
        self.audit.note("fence", json!({ "vouched": "the guest runs nowhere else" }));
        tracing::warn!("the guest is reclaimed: its controller vouches that it runs nowhere else");
        Ok(())
    }

    fn set_tunables(&self, tunables: Tunables) {
        if let Migration::Outgoing(outgoing) = &*self.migration() {
            outgoing.set_tunables(tunables);
        }
    }

    fn set_silence(&self, silence: Duration) {
        if let Migration::Incoming(incoming) = &*self.migration() {
            incoming.set_silence(silence);
        }
    }

    fn blockers(&self) -> Vec<String> {
        let limited = self.limiter.limit().map(|_| ControlError::Limited);
        self.ended().into_iter().chain(limited).map(|error| error.to_string()).collect()
    }

    fn cancel(&self) -> Result<(), ControlError> {
        let migration = self.migration();
        if !migration.is_under_way() {
            return Ok(());
        }
        match &*migration {
            Migration::None => Ok(()),
            Migration::Incoming(_) | Migration::Restoring(_) => Err(ControlError::CancelAtSource),
            Migration::Saving(saving) => {
                saving.cancel();
                Ok(())
            }
            Migration::Outgoing(outgoing) => match outgoing.cancel() {
                // It ended by itself meanwhile.
                Err(_) if outgoing.progress().status.is_final() => Ok(()),
                done => Ok(done?),
            },
        }
    }

    fn migration(&self) -> Option<MigrationView> {
        let migration = self.migration();
        let (_, progress) = migration.progress()?;
        let listening_at = match &*migration {
            Migration::Incoming(incoming) => Some(incoming.recovery_address().unwrap_or_else(|| incoming.address())),
            _ => None,
        };
        Some(MigrationView { progress, listening_at })
    }

    fn report(&self) -> Option<SideReport> {
        match &*self.migration() {
            Migration::None => None,
            Migration::Outgoing(outgoing) => Some(outgoing.report()),
            Migration::Incoming(incoming) => Some(incoming.report()),
            Migration::Saving(saving) => Some(saving.report()),
            Migration::Restoring(restoring) => Some(restoring.report()),
        }
    }

    fn vcpus(&self) -> u32 {
        self.vm.describe().vcpus
    }

    fn written_pages_mode(&self) -> WrittenPagesMode {
        if self.vm.keeps_rings() { WrittenPagesMode::Ring } else { WrittenPagesMode::Bitmap }
    }

    fn measure_dirty_rate(&self, plan: Plan) -> Result<(), ControlError> {
        let migration = self.migration();
        if migration.is_under_way() {
            return Err(ControlError::MeasuredByMigration);
        }
        if self.vm.run_state() == RunState::Inmigrate {
            return Err(ControlError::NotArrived);
        }
        if plan.method == Method::Book && self.limiter.limit().is_some() {
            return Err(MeterError::Limited.into());
        }
        if plan.method == Method::Book {
            self.end_series(&migration);
        }
        Ok(self.meter.measure(&*self.vm, plan)?)
    }

    fn dirty_rate(&self) -> Option<Measurement> {
        self.meter.last()
    }

    fn limit_dirty_rate(&self, bytes_per_second: Option<u64>) -> Result<(), ControlError> {
        let migration = self.migration();
        if migration.is_under_way() {
            let wish = if bytes_per_second.is_some() { "set" } else { "cancel" };
            return Err(ControlError::LimitDuringMigration { wish });
        }
        let Some(bytes_per_second) = bytes_per_second else {
            self.limiter.lift();
            return Ok(());
        };
        if self.vm.run_state() == RunState::Inmigrate {
            return Err(ControlError::NotArrived);
        }
        let measures_by_book = |last: Measurement| last.plan.method == Method::Book;
        if self.meter.is_measuring() && self.meter.last().is_some_and(measures_by_book) {
            return Err(MeterError::Measuring.into());
        }
        self.end_series(&migration);
        Ok(self.limiter.hold(self.machine(), bytes_per_second)?)
    }

    fn dirty_limit(&self) -> Option<Limit> {
        self.limiter.limit()
    }

    fn vcpu_dirty_rates(&self) -> Option<Vec<u64>> {
        self.vm.dirty_rates()
    }
}

/// Which way a guest goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Direction {
    Outgoing,
    Incoming,
}

impl Migration {
    fn progress(&self) -> Option<(Direction, Progress)> {
        match self {
            Self::None => None,
            Self::Outgoing(outgoing) => Some((Direction::Outgoing, outgoing.progress())),
            Self::Incoming(incoming) => Some((Direction::Incoming, incoming.progress())),
            Self::Saving(saving) => Some((Direction::Outgoing, saving.progress())),
            Self::Restoring(restoring) => Some((Direction::Incoming, restoring.progress())),
        }
    }

    fn is_under_way(&self) -> bool {
        self.progress().is_some_and(|(_, progress)| progress.status.is_under_way())
    }
}

/// The checkpoint at `path` as the base of one at `to`, if it is the one that the machine has noted the guest's writes since.
fn base_at(migration: &Migration, path: &Path, to: &Path) -> Result<Base, ControlError> {
    let none = |why: String| ControlError::NoSeries { why };
    let last = match migration {
        Migration::Saving(saving) => saving.series(),
        _ => None,
    };
    let last = last.ok_or_else(|| none("this machine has not noted what was written since a checkpoint".to_owned()))?;
    if path.parent() != to.parent() {
        return Err(none(format!("it would not lie in one folder with {}", path.display())));
    }
    let image = Image::open(path).map_err(|error| none(error.to_string()))?;
    if image.sections().moment().ok() != Some(last.moment) {
        return Err(none(format!("{} is not this machine's last checkpoint, which was {}", path.display(), last.name)));
    }
    Base::of(&image, to).map_err(|error| none(error.to_string()))
}

/// A machine whose guest could not be restored has none.
fn fail_without_restoring(vm: &Vm, restoring: &Restoring) {
    if restoring.wait() != MigrationStatus::Completed {
        vm.fail(restoring.progress().error.unwrap_or_else(|| "the guest was not restored".to_owned()));
    }
}

/// A destination whose migration fails before the commit has no guest, and never will: its process ends, as QEMU's
/// does. One that fails later was stopped by the pager, and stays to say so.
fn fail_without_a_guest(vm: &Vm, incoming: &Incoming) {
    let status = incoming.wait();
    if status != MigrationStatus::Completed && incoming.report().instants.commit_ns.is_none() {
        let reason = incoming.progress().error.unwrap_or_else(|| "it was cancelled".to_owned());
        vm.fail(format!("the incoming migration failed: {reason}"));
    }
}

/// The end is told by [`VmController::finish`], when the process is ready for it.
fn forward(seen: &Receiver<VmEvent>, events: &Sender<TimedEvent>) {
    for event in seen {
        match event {
            VmEvent::Stop => tell(events, Event::Stop),
            VmEvent::Resume => tell(events, Event::Resume),
            VmEvent::Shutdown => {}
        }
    }
}

fn tell(events: &Sender<TimedEvent>, event: Event) {
    // Nobody listens where no QMP socket was asked for.
    let _ = events.send(TimedEvent::now(event));
}
