//! A source's migration: the threads that carry out what [`SourceSession`] decides.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use switchover_pager::cpu::CpuMeter;
use switchover_pager::lane::{Notify, PageLane, PagerEvent};
use switchover_pager::source::{SourcePager, SourceProgress};
use switchover_wire::address::Address;
use switchover_wire::clock::{HostClock, Nanos};
use switchover_wire::handshake::{Hello, LaneCounts, VERSION_MAX, VERSION_MIN, greet};
use switchover_wire::message::{ControlMessage, ControlReader, ControlWriter};
use switchover_wire::socket::Socket;
use switchover_wire::types::{LaneId, LaneRole, SessionId};

use crate::capability;
use crate::error::MigrationError;
use crate::lanes::{BULK_LANES_LIMIT, Lanes};
use crate::machine::{Machine, MachineError};
use crate::patience::{Patience, Rank, next_event};
use crate::progress::Progress;
use crate::recorder::Recorder;
use crate::report::{CpuSeconds, Side, SideReport};
use crate::session::source::{SourceAction, SourceEvent, SourceSession, WishRefused};
use crate::session::{Failure, GuestAfter, Outcome};
use crate::settings::{Observer, Settings, Tunables};
use crate::status::MigrationStatus;
use crate::watchdog::Watchdog;

/// How long the destination's host may take to accept a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// How long the guest may stand still before the commit. Loading a state takes milliseconds; a destination that needs
/// longer than this is not going to make it, and until the commit the guest can simply go on here.
const HANDOFF_PATIENCE: Duration = Duration::from_secs(5);

/// How long telling the destination to give up may take: the guest may be standing still meanwhile.
const ABORT_PATIENCE: Duration = Duration::from_secs(1);

/// Messages of the destination that may wait while the session is busy. A well-behaved one sends five in all.
const EVENTS_ROOM: usize = 1024;

/// A migration on its source. Clones are handles to the same one; dropping them changes nothing.
#[derive(Clone)]
pub struct Outgoing {
    shared: Arc<Shared>,
}

struct Shared {
    machine: Arc<dyn Machine>,
    settings: Settings,
    recorder: Recorder,
    session: Mutex<SourceSession>,
    events: Sender<SourceEvent>,
    cancelled: AtomicBool,
    lanes: Arc<Lanes>,
    /// Ends a send that would keep the guest paused.
    watchdog: Watchdog,
    pager: Mutex<Option<SourcePager>>,
    cpu: CpuMeter,
}

impl Outgoing {
    /// Starts to migrate `machine` to the destination that listens at `to`, and returns at once.
    ///
    /// # Errors
    /// When the settings ask for what is not built, or no thread can be started.
    pub fn start(
        machine: Arc<dyn Machine>,
        to: Address,
        settings: Settings,
        observer: Observer,
    ) -> Result<Self, MigrationError> {
        if !settings.postcopy {
            return Err(MigrationError::PostcopyNotAllowed);
        }
        if !(1..=BULK_LANES_LIMIT).contains(&settings.bulk_lanes) {
            return Err(MigrationError::BulkLanes { asked: settings.bulk_lanes, limit: BULK_LANES_LIMIT });
        }
        let (events, receiver) = bounded(EVENTS_ROOM);
        let lanes = Arc::new(Lanes::default());
        let shared = Arc::new(Shared {
            machine,
            settings,
            recorder: Recorder::new(observer),
            watchdog: Watchdog::start(Arc::clone(&lanes)).map_err(MigrationError::Thread)?,
            session: Mutex::new(SourceSession::new()),
            events,
            cancelled: AtomicBool::new(false),
            lanes,
            pager: Mutex::new(None),
            cpu: CpuMeter::default(),
        });
        shared.recorder.begin();
        let driver = Arc::clone(&shared);
        thread::Builder::new()
            .name("migration".to_owned())
            .spawn(move || driver.cpu.measure(|| driver.migrate(&to, &receiver)))
            .map_err(MigrationError::Thread)?;
        Ok(Self { shared })
    }

    /// Hands the guest off: now, or as soon as the destination is prepared.
    ///
    /// # Errors
    /// When the migration is over.
    pub fn start_postcopy(&self) -> Result<(), MigrationError> {
        let too_late = |why| MigrationError::TooLate { wish: "start post-copy", why };
        if self.shared.recorder.read().status.is_final() {
            return Err(too_late("the migration is over"));
        }
        self.shared.events.send(SourceEvent::StartPostcopy).map_err(|_| too_late("the migration is over"))
    }

    /// Goes on with the handoff of a guest that was paused for it ([`Settings::pause_before_switchover`]).
    ///
    /// # Errors
    /// When it does not wait for this.
    pub fn proceed(&self) -> Result<(), MigrationError> {
        Err(MigrationError::TooLate { wish: "go on", why: "the migration does not wait for it" })
    }

    /// Changes what may be changed while it runs. Takes effect at once.
    pub fn set_tunables(&self, _tunables: Tunables) {}

    /// Calls the migration off. Whether that still succeeded is seen from the status: `cancelled`, or else.
    ///
    /// # Errors
    /// When the commit has been sent, or the migration is over: nothing is changed then.
    pub fn cancel(&self) -> Result<(), MigrationError> {
        let too_late = |why| MigrationError::TooLate { wish: "cancel", why };
        self.shared.session().can_cancel().map_err(|refused| {
            too_late(match refused {
                WishRefused::Committed => "the guest has been handed to the destination already",
                WishRefused::Over => "the migration is over",
            })
        })?;
        self.shared.cancelled.store(true, Ordering::Release);
        self.shared.events.send(SourceEvent::Cancel).map_err(|_| too_late("the migration is over"))?;
        if self.shared.pager().is_none() {
            // The lanes are still being opened: whatever that waits for ends now.
            self.shared.lanes.shut_down();
        }
        Ok(())
    }

    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let shared = &self.shared;
        let record = shared.recorder.read();
        let ram_total = shared.machine.ram().pages().bytes();
        let pager = shared.pager_progress();
        Progress {
            status: record.status,
            downtime_ns: record.downtime_ns(),
            setup_time_ns: record.setup_time_ns(),
            total_time_ns: record.total_time_ns(),
            ram_total,
            transferred: shared.lanes.transferred(),
            bulk_bytes: shared.lanes.bulk_bytes(),
            remaining: pager.map_or(ram_total, |pager| pager.remaining.bytes()),
            zero_pages: pager.map_or(0, |pager| pager.zero),
            normal_pages: pager.map_or(0, |pager| pager.data),
            postcopy_requests: pager.map_or(0, |pager| pager.requests),
            error: record.error,
            ..Progress::default()
        }
    }

    /// What this side knows of it. Complete once it is over.
    #[must_use]
    pub fn report(&self) -> SideReport {
        let shared = &self.shared;
        let record = shared.recorder.read();
        let mut report = record.into_report(Side::Source, &shared.lanes, shared.machine.ram().pages());
        report.cpu += CpuSeconds::from(shared.cpu.total());
        if let Some(pager) = shared.pager().as_ref() {
            report.cpu += CpuSeconds::from(pager.cpu());
        }
        report
    }

    /// Waits until it is over.
    #[must_use]
    pub fn wait(&self) -> MigrationStatus {
        self.shared.recorder.wait()
    }
}

impl Shared {
    fn session(&self) -> std::sync::MutexGuard<'_, SourceSession> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pager(&self) -> std::sync::MutexGuard<'_, Option<SourcePager>> {
        self.pager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pager_progress(&self) -> Option<SourceProgress> {
        self.pager().as_ref().map(SourcePager::progress)
    }

    /// The migration's thread, from beginning to end.
    fn migrate(self: &Arc<Self>, to: &Address, events: &Receiver<SourceEvent>) {
        match self.open(to) {
            Ok(control) => self.drive(control, events),
            Err(reason) => {
                self.lanes.shut_down();
                // Ends its threads, if it was started.
                drop(self.pager().take());
                *self.session() = SourceSession::Over;
                self.finish(Outcome::Failed(Failure { reason, guest: GuestAfter::OnSource }), None);
            }
        }
    }

    /// Opens all lanes and starts what serves them.
    fn open(self: &Arc<Self>, to: &Address) -> Result<ControlWriter, String> {
        let session = SessionId::random().map_err(|error| format!("cannot name the session: {error}"))?;
        self.recorder.write(|record| record.session = Some(session.to_string()));
        let lanes = LaneCounts { fault: 1, bulk: self.settings.bulk_lanes };
        let hello = |role, index| Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            session,
            lane: LaneId { role, index },
            lanes,
            description: (role == LaneRole::Control).then(|| self.machine.describe()),
            clock: HostClock::here(),
            capabilities: capability::POSTCOPY,
        };
        let control = self.open_lane(to, &hello(LaneRole::Control, 0))?;
        let mut page_lanes = Vec::new();
        let bulk = (0..lanes.bulk).map(|index| (LaneRole::Bulk, index));
        for (role, index) in std::iter::once((LaneRole::Fault, 0)).chain(bulk) {
            let socket = self.open_lane(to, &hello(role, index))?;
            page_lanes.push(PageLane { id: LaneId { role, index }, socket });
        }
        let events = self.events.clone();
        let notify: Notify = Arc::new(move |event| match event {
            PagerEvent::AllPushed | PagerEvent::Complete => {}
            PagerEvent::LaneFailed { lane, reason } => {
                let _ = events.send(SourceEvent::LaneLost(format!("the {lane} failed: {reason}")));
            }
            PagerEvent::Broken { reason } => {
                let _ = events.send(SourceEvent::Lost(reason));
            }
        });
        let bandwidth = self.settings.bandwidth.postcopy;
        let pager = SourcePager::start(self.machine.ram(), page_lanes, bandwidth, &notify)
            .map_err(|error| error.to_string())?;
        *self.pager() = Some(pager);

        let reader = ControlReader::new(Arc::clone(&control)).map_err(|error| error.to_string())?;
        let writer = ControlWriter::new(control).map_err(|error| error.to_string())?;
        let listener = Arc::clone(self);
        thread::Builder::new()
            .name("control lane".to_owned())
            .spawn(move || listener.cpu.measure(|| listener.listen(reader)))
            .map_err(|error| format!("cannot start a thread for the control lane: {error}"))?;
        Ok(writer)
    }

    fn open_lane(&self, to: &Address, hello: &Hello) -> Result<Arc<Socket>, String> {
        if self.cancelled.load(Ordering::Acquire) {
            return Err("cancelled".to_owned());
        }
        let socket = Arc::new(Socket::connect(to, CONNECT_PATIENCE).map_err(|error| error.to_string())?);
        self.lanes.add(hello.lane, Arc::clone(&socket));
        socket.tune(hello.lane.role).map_err(|error| error.to_string())?;
        let welcome = greet(&socket, hello).map_err(|error| format!("cannot open the {}: {error}", hello.lane))?;
        let same_clock = welcome.clock.same_host(&hello.clock);
        self.recorder.write(|record| record.same_clock = same_clock);
        Ok(socket)
    }

    /// The control lane's thread: turns what the destination says into events.
    fn listen(&self, mut reader: ControlReader) {
        loop {
            let event = match reader.recv() {
                Ok(ControlMessage::Prepared { .. }) => SourceEvent::Prepared,
                Ok(ControlMessage::Restored) => SourceEvent::Restored,
                Ok(ControlMessage::Refused { reason }) => SourceEvent::Refused(reason),
                Ok(ControlMessage::Running { first_entry_ns }) => {
                    let now = Nanos::now();
                    self.recorder.write(|record| {
                        record.running_heard = Some(now);
                        record.instants.first_entry_ns = first_entry_ns;
                    });
                    SourceEvent::Running
                }
                Ok(ControlMessage::Drained { first_entry_ns, last_page_ns }) => {
                    self.recorder.write(|record| {
                        record.instants.first_entry_ns = first_entry_ns.or(record.instants.first_entry_ns);
                        record.instants.last_page_ns = Some(last_page_ns);
                    });
                    SourceEvent::Drained
                }
                Ok(other) => {
                    SourceEvent::Lost(format!("the destination sent {}, which only a source says", other.name()))
                }
                Err(error) => SourceEvent::Lost(error.to_string()),
            };
            let over = matches!(event, SourceEvent::Lost(_) | SourceEvent::Drained | SourceEvent::Refused(_));
            if self.events.send(event).is_err() || over {
                return;
            }
        }
    }

    /// Feeds events to the session and carries out its actions, until it is over.
    fn drive(&self, mut control: ControlWriter, events: &Receiver<SourceEvent>) {
        let mut patience = Patience::endless();
        let mut waiting = VecDeque::new();
        let mut left_paused = None;
        loop {
            let event = waiting.pop_front().unwrap_or_else(|| {
                next_event(events, &mut patience, rank, &mut waiting).unwrap_or(SourceEvent::HandoffTimedOut)
            });
            let actions = {
                let mut session = self.session();
                let (next, actions) = std::mem::replace(&mut *session, SourceSession::Over).on(event);
                *session = next;
                actions
            };
            for action in actions {
                match action {
                    SourceAction::Finish(outcome) => return self.finish(outcome, left_paused),
                    SourceAction::Resume => left_paused = self.machine.resume().err(),
                    // An answer is what the list was working towards, or why the rest of it must not be done.
                    action => {
                        if let Some(event) = self.perform(action, &mut control, &mut patience) {
                            waiting.push_back(event);
                            break;
                        }
                    }
                }
            }
        }
    }

    fn perform(
        &self,
        action: SourceAction,
        control: &mut ControlWriter,
        patience: &mut Patience,
    ) -> Option<SourceEvent> {
        match action {
            SourceAction::Status(status) => self.recorder.set_status(status),
            SourceAction::Pause => return Some(self.pause()),
            SourceAction::ServePages => {
                let first = self.machine.first_pages();
                if let Some(pager) = self.pager().as_mut() {
                    pager.start_serving(&first);
                }
            }
            SourceAction::PushPages => {
                if let Some(pager) = self.pager().as_ref() {
                    pager.start_sweep();
                }
            }
            SourceAction::SendState => {
                let deadline = Instant::now() + HANDOFF_PATIENCE;
                *patience = Patience::until(deadline);
                self.watchdog.arm(deadline);
                return Some(self.send_state(control));
            }
            SourceAction::SurrenderRightToRun => self.machine.surrender_right_to_run(),
            SourceAction::TakeBackRightToRun => {
                tracing::warn!("the destination refused the guest for good: it goes on here");
                self.machine.take_back_right_to_run();
            }
            SourceAction::SendCommit => {
                *patience = Patience::endless();
                self.watchdog.disarm();
                self.recorder.write(|record| record.instants.commit_ns = Some(Nanos::now().0));
                if let Err(error) = control.send(&ControlMessage::Commit) {
                    return Some(SourceEvent::Lost(error.to_string()));
                }
            }
            SourceAction::AcknowledgeDrained => {
                self.recorder.write(|record| record.instants.drained_ns = Some(Nanos::now().0));
                if let Err(error) = control.send(&ControlMessage::DrainedAck) {
                    tracing::warn!(%error, "the destination has everything, but could not be told that we know");
                }
            }
            SourceAction::SendAbort(reason) => {
                self.watchdog.arm(Instant::now() + ABORT_PATIENCE);
                if let Err(error) = control.send(&ControlMessage::Abort { reason }) {
                    tracing::debug!(%error, "the destination could not be told to give up");
                }
            }
            SourceAction::CloseLanes => {
                if let Some(pager) = self.pager().as_mut() {
                    pager.stop();
                }
                self.watchdog.disarm();
                self.lanes.shut_down();
            }
            // The caller's: they decide how it ends.
            SourceAction::Resume | SourceAction::Finish(_) => {}
        }
        None
    }

    fn pause(&self) -> SourceEvent {
        match self.recorder.timed("pause", || self.machine.pause()) {
            Ok(paused) => {
                self.recorder.write(|record| {
                    record.instants.last_exit_ns = Some(paused.last_exit.0);
                    record.was_running = paused.was_running;
                });
                SourceEvent::Paused
            }
            Err(error) => SourceEvent::PauseFailed(error.to_string()),
        }
    }

    fn send_state(&self, control: &mut ControlWriter) -> SourceEvent {
        let state = match self.recorder.timed("save-state", || self.machine.save_state()) {
            Ok(state) => state,
            Err(error) => return SourceEvent::StateFailed(error.to_string()),
        };
        self.recorder.write(|record| record.state_bytes = state.len() as u64);
        let was_running = self.recorder.read().was_running;
        match self.recorder.timed("send-state", || control.send(&ControlMessage::State { state, was_running })) {
            Ok(()) => SourceEvent::StateSent,
            Err(error) => SourceEvent::Lost(error.to_string()),
        }
    }

    fn finish(&self, outcome: Outcome, left_paused: Option<MachineError>) {
        self.watchdog.end();
        match (outcome, left_paused) {
            (Outcome::Completed, _) => self.recorder.set_status(MigrationStatus::Completed),
            (Outcome::Cancelled, Some(error)) => {
                self.recorder.fail(format!("cancelled, but the guest stays paused: {error}"));
            }
            (Outcome::Failed(failure), Some(error)) => {
                self.recorder.fail(format!("{}; and the guest stays paused: {error}", failure.reason));
            }
            (Outcome::Cancelled, None) => self.recorder.set_status(MigrationStatus::Cancelled),
            // What a cancellation tears down on its way is no failure of its own.
            (Outcome::Failed(failure), None)
                if failure.guest == GuestAfter::OnSource && self.cancelled.load(Ordering::Acquire) =>
            {
                self.recorder.set_status(MigrationStatus::Cancelled);
            }
            (Outcome::Failed(failure), None) => {
                self.recorder.fail(format!("{}; {}", failure.reason, failure.guest.sentence()));
            }
        }
    }
}

/// What a source's event is to the loss of a page lane.
fn rank(event: &SourceEvent) -> Rank {
    match event {
        SourceEvent::LaneLost(_) => Rank::LaneLost,
        SourceEvent::Refused(_) | SourceEvent::Lost(_) | SourceEvent::Drained | SourceEvent::Cancel => Rank::Explains,
        _ => Rank::Follows,
    }
}
