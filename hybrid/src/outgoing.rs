//! A source's migration: the threads that carry out what [`SourceSession`] decides.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use switchover_pager::cpu::CpuMeter;
use switchover_pager::lane::{Notify, PageLane, PagerEvent};
use switchover_pager::source::{Rest, SourcePager, SourceProgress};
use switchover_precopy::rounds::{Rounds, RoundsSettings};
use switchover_wire::address::Address;
use switchover_wire::clock::{HostClock, Nanos};
use switchover_wire::handshake::{Hello, LaneCounts, VERSION_MAX, VERSION_MIN, greet};
use switchover_wire::message::{
    ControlMessage, ControlReader, ControlWriter, MISSING_PAGES, MISSING_WORDS, MessageError,
};
use switchover_wire::socket::Socket;
use switchover_wire::types::{LaneId, LaneRole, PageCount, PageIndex, SessionId};

use crate::capability;
use crate::error::MigrationError;
use crate::lanes::{BULK_LANES_LIMIT, Lanes};
use crate::machine::{Machine, MachineError};
use crate::monitor::{Choice, Limits, Mode};
use crate::patience::{Patience, Rank, next_event};
use crate::progress::Progress;
use crate::recorder::Recorder;
use crate::report::{CpuSeconds, Side, SideReport};
use crate::rounds::{Conductor, Precopy, RoundsEnd};
use crate::session::source::{Ending, Plan, SourceAction, SourceEvent, SourceSession, WishRefused};
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

/// How long the lanes may take for the frames that they are sending when the rounds end: some milliseconds each on any link that
/// is alive.
const ROUNDS_PATIENCE: Duration = Duration::from_secs(5);

/// How often a wait for a lane's last frame looks whether the migration was cancelled.
const LOOK_FOR_CANCEL: Duration = Duration::from_millis(10);

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
    precopy: Mutex<Option<Arc<Precopy>>>,
    /// The thread that conducts the rounds.
    conductor: Mutex<Option<JoinHandle<()>>>,
    tunables: Mutex<Tunables>,
    cpu: CpuMeter,
}

/// What a session's thread needs besides what it shares.
struct Session {
    control: Arc<Mutex<ControlWriter>>,
    patience: Patience,
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
        if !(1..=BULK_LANES_LIMIT).contains(&settings.bulk_lanes) {
            return Err(MigrationError::BulkLanes { asked: settings.bulk_lanes, limit: BULK_LANES_LIMIT });
        }
        let plan = Plan { rounds: settings.limits.mode != Mode::Postcopy, hold: settings.pause_before_switchover };
        let (events, receiver) = bounded(EVENTS_ROOM);
        let lanes = Arc::new(Lanes::default());
        let shared = Arc::new(Shared {
            machine,
            settings,
            recorder: Recorder::new(observer),
            watchdog: Watchdog::start(Arc::clone(&lanes)).map_err(MigrationError::Thread)?,
            session: Mutex::new(SourceSession::new(plan)),
            events,
            cancelled: AtomicBool::new(false),
            lanes,
            pager: Mutex::new(None),
            precopy: Mutex::new(None),
            conductor: Mutex::new(None),
            tunables: Mutex::new(settings.tunables()),
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
    /// When the migration is over, or post-copy is not allowed.
    pub fn start_postcopy(&self) -> Result<(), MigrationError> {
        let too_late = |why| MigrationError::TooLate { wish: "start post-copy", why };
        if self.shared.recorder.read().status.is_final() {
            return Err(too_late("the migration is over"));
        }
        if !self.shared.settings.postcopy {
            return Err(MigrationError::PostcopyNotAllowed);
        }
        self.shared.events.send(SourceEvent::StartPostcopy).map_err(|_| too_late("the migration is over"))
    }

    /// Goes on with the handoff of a guest that was paused for it ([`Settings::pause_before_switchover`]).
    ///
    /// # Errors
    /// When it does not wait for this.
    pub fn proceed(&self) -> Result<(), MigrationError> {
        let too_late = || MigrationError::TooLate { wish: "go on", why: "the migration does not wait for it" };
        if !self.shared.session().is_held() {
            return Err(too_late());
        }
        self.shared.events.send(SourceEvent::Proceed).map_err(|_| too_late())
    }

    /// Changes what may be changed while it runs; the mode stays. Takes effect within some milliseconds.
    pub fn set_tunables(&self, tunables: Tunables) {
        let shared = &self.shared;
        let limits = Limits { mode: shared.settings.limits.mode, ..tunables.limits };
        let tunables = Tunables { limits, ..tunables };
        // Held until both know: what is started meanwhile takes these from here.
        let mut current = shared.tunables();
        *current = tunables;
        if let Some(precopy) = shared.precopy().as_ref() {
            precopy.set_tunables(tunables);
        }
        if let Some(pager) = shared.pager().as_ref() {
            pager.set_max_bandwidth(tunables.bandwidth.postcopy);
        }
    }

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
        let precopy = shared.precopy().as_ref().map(|precopy| precopy.progress());
        let pages = |of: fn(&SourceProgress) -> u64| pager.as_ref().map_or(0, of);
        let handed_over = record.instants.last_exit_ns.is_some();
        let rounds = precopy.unwrap_or_default();
        let remaining = match (precopy, pager) {
            (Some(precopy), _) if !handed_over => precopy.remaining,
            (_, Some(pager)) => pager.remaining.bytes(),
            _ => ram_total,
        };
        Progress {
            status: record.status,
            downtime_ns: record.downtime_ns(),
            setup_time_ns: record.setup_time_ns(),
            total_time_ns: record.total_time_ns(),
            ram_total,
            transferred: shared.lanes.transferred(),
            bulk_bytes: shared.lanes.bulk_bytes(),
            remaining,
            zero_pages: pages(|pager| pager.zero) + rounds.sent.zero_pages,
            normal_pages: pages(|pager| pager.data) + rounds.sent.data_pages,
            postcopy_requests: pages(|pager| pager.requests),
            precopy_bytes: rounds.sent.wire_bytes,
            rounds: rounds.rounds,
            dirty_pages_per_second: rounds.dirty_pages_per_second,
            expected_downtime_ns: rounds.expected_downtime_ns.filter(|_| !handed_over),
            throttle_percent: if handed_over { 0 } else { rounds.throttle_percent },
            error: record.error,
        }
    }

    /// What this side knows of it. Complete once it is over.
    #[must_use]
    pub fn report(&self) -> SideReport {
        let shared = &self.shared;
        let record = shared.recorder.read();
        // Only between two readings of one clock is it a blackout.
        let blackout_ns =
            record.downtime_ns().filter(|_| record.same_clock && record.instants.first_entry_ns.is_some());
        let mut report = record.into_report(Side::Source, &shared.lanes, shared.machine.ram().pages());
        report.cpu += CpuSeconds::from(shared.cpu.total());
        if let Some(pager) = shared.pager().as_ref() {
            report.cpu += CpuSeconds::from(pager.cpu());
        }
        if let Some(precopy) = shared.precopy().as_ref() {
            report.cpu += CpuSeconds::from(precopy.cpu());
            let mut rounds = precopy.report();
            if let Some(last) = rounds.decisions.last_mut()
                && matches!(last.verdict.choice, Choice::StopAndCopy | Choice::Postcopy)
            {
                last.actual_blackout_ns = blackout_ns;
            }
            report.precopy = Some(rounds);
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

    fn precopy(&self) -> std::sync::MutexGuard<'_, Option<Arc<Precopy>>> {
        self.precopy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tunables(&self) -> std::sync::MutexGuard<'_, Tunables> {
        self.tunables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pager_progress(&self) -> Option<SourceProgress> {
        self.pager().as_ref().map(SourcePager::progress)
    }

    /// The migration's thread, from beginning to end.
    fn migrate(self: &Arc<Self>, to: &Address, events: &Receiver<SourceEvent>) {
        match self.open(to) {
            Ok(control) => {
                let control = Arc::new(Mutex::new(control));
                self.drive(Session { control, patience: Patience::endless() }, events);
            }
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
        let mut round_trip = Duration::MAX;
        for (role, index) in std::iter::once((LaneRole::Fault, 0)).chain(bulk) {
            let began = Instant::now();
            let socket = self.open_lane(to, &hello(role, index))?;
            // Connecting and the handshake are a round trip each.
            round_trip = round_trip.min(began.elapsed() / 2);
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
        let tunables = self.tunables();
        if self.settings.limits.mode != Mode::Postcopy {
            let bulk: Vec<_> = page_lanes.iter().filter(|lane| lane.id.role == LaneRole::Bulk).cloned().collect();
            let rounds =
                RoundsSettings { packing: self.settings.packing, bytes_per_second: tunables.bandwidth.precopy };
            let log = self.machine.dirty_log();
            let rounds = Rounds::start(&self.machine.ram(), log, &bulk, rounds, &notify);
            let rounds = rounds.map_err(|error| error.to_string())?;
            let precopy = Precopy::new(rounds, &*self.machine, *tunables, round_trip);
            *self.precopy() = Some(Arc::new(precopy));
        }
        let pager = SourcePager::start(self.machine.ram(), page_lanes, tunables.bandwidth.postcopy, &notify)
            .map_err(|error| error.to_string())?;
        *self.pager() = Some(pager);
        drop(tunables);

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
    fn drive(self: &Arc<Self>, mut session: Session, events: &Receiver<SourceEvent>) {
        let mut waiting = VecDeque::new();
        let mut left_paused = None;
        loop {
            let mut event = waiting.pop_front().unwrap_or_else(|| {
                next_event(events, &mut session.patience, rank, &mut waiting).unwrap_or(SourceEvent::HandoffTimedOut)
            });
            // The commit must not go out over lanes that are being shut down: then nobody would have the guest.
            if event == SourceEvent::Restored && self.session().may_commit() && !self.watchdog.disarm() {
                event = SourceEvent::HandoffTimedOut;
            }
            let actions = {
                let mut phase = self.session();
                let (next, actions) = std::mem::replace(&mut *phase, SourceSession::Over).on(event);
                *phase = next;
                actions
            };
            for action in actions {
                match action {
                    SourceAction::Finish(outcome) => return self.finish(outcome, left_paused),
                    SourceAction::Resume => left_paused = self.machine.resume().err(),
                    // An answer is what the list was working towards, or why the rest of it must not be done.
                    action => {
                        if let Some(event) = self.perform(action, &mut session) {
                            waiting.push_back(event);
                            break;
                        }
                    }
                }
            }
        }
    }

    fn perform(self: &Arc<Self>, action: SourceAction, session: &mut Session) -> Option<SourceEvent> {
        match action {
            SourceAction::Status(status) => self.recorder.set_status(status),
            SourceAction::BeginRounds => return self.begin_rounds(session).err().map(SourceEvent::GaveUp),
            SourceAction::EndRounds => self.end_rounds(),
            SourceAction::Pause => return Some(self.pause()),
            SourceAction::ServePages(ending) => {
                let deadline = Instant::now() + HANDOFF_PATIENCE + self.tunables().limits.downtime_limit * 2;
                session.patience = Patience::until(deadline);
                self.watchdog.arm(deadline);
                return self.serve_pages(session, ending).err().map(SourceEvent::StateFailed);
            }
            SourceAction::PushPages => {
                // The guest runs already: finding out which pages are the hottest costs it nothing.
                let hottest = self.precopy().as_ref().map(|precopy| precopy.hottest()).unwrap_or_default();
                if let Some(pager) = self.pager().as_ref() {
                    pager.push_first(&hottest);
                    pager.start_sweep();
                }
            }
            SourceAction::SendState => return Some(self.send_state(session)),
            SourceAction::SurrenderRightToRun => self.machine.surrender_right_to_run(),
            SourceAction::TakeBackRightToRun => {
                tracing::warn!("the destination refused the guest for good: it goes on here");
                self.machine.take_back_right_to_run();
            }
            SourceAction::SendCommit => {
                session.patience = Patience::endless();
                self.recorder.write(|record| record.instants.commit_ns = Some(Nanos::now().0));
                if let Err(error) = session.send(&ControlMessage::Commit) {
                    return Some(SourceEvent::Lost(error.to_string()));
                }
            }
            SourceAction::AcknowledgeDrained => {
                self.recorder.write(|record| record.instants.drained_ns = Some(Nanos::now().0));
                if let Err(error) = session.send(&ControlMessage::DrainedAck) {
                    tracing::warn!(%error, "the destination has everything, but could not be told that we know");
                }
            }
            SourceAction::SendAbort(reason) => {
                self.watchdog.arm(Instant::now() + ABORT_PATIENCE);
                if let Err(error) = session.send(&ControlMessage::Abort { reason }) {
                    tracing::debug!(%error, "the destination could not be told to give up");
                }
            }
            SourceAction::CloseLanes => {
                if let Some(precopy) = self.precopy().as_ref() {
                    precopy.end();
                }
                if let Some(pager) = self.pager().as_mut() {
                    pager.stop();
                }
                let _ = self.watchdog.disarm();
                self.lanes.shut_down();
            }
            // The caller's: they decide how it ends.
            SourceAction::Resume | SourceAction::Finish(_) => {}
        }
        None
    }

    /// Starts the machine's book of written pages, and the thread that conducts the rounds.
    fn begin_rounds(self: &Arc<Self>, session: &Session) -> Result<(), String> {
        let precopy = self.precopy().clone().ok_or("pre-copy was never set up")?;
        precopy.start_noting().map_err(|error| error.to_string())?;
        let (shared, control) = (Arc::clone(self), Arc::clone(&session.control));
        let conduct = move || {
            let tell = |round| {
                shared.recorder.tell_round(round);
                let mut control = control.lock().unwrap_or_else(PoisonError::into_inner);
                if let Err(error) = control.send(&ControlMessage::Round { number: round }) {
                    tracing::debug!(%error, "the destination could not be told of a round");
                }
            };
            let end = Conductor::new(&precopy, &*shared.machine, &shared.settings).conduct(tell);
            let event = match end {
                RoundsEnd::SwitchOver(ending) => SourceEvent::SwitchOver(ending),
                RoundsEnd::GaveUp(reason) | RoundsEnd::Failed(reason) => SourceEvent::GaveUp(reason),
                RoundsEnd::Ended => return,
            };
            let _ = shared.events.send(event);
        };
        let (shared, name) = (Arc::clone(self), "rounds".to_owned());
        let spawned = thread::Builder::new().name(name).spawn(move || shared.cpu.measure(conduct));
        let conductor = spawned.map_err(|error| format!("cannot start the thread that conducts pre-copy: {error}"))?;
        *self.conductor.lock().unwrap_or_else(PoisonError::into_inner) = Some(conductor);
        Ok(())
    }

    /// Ends the rounds, and waits for the frames under way. The guest runs on meanwhile.
    fn end_rounds(&self) {
        let Some(precopy) = self.precopy().clone() else { return };
        precopy.end();
        let deadline = Instant::now() + ROUNDS_PATIENCE;
        while !precopy.wait_ended(Instant::now() + LOOK_FOR_CANCEL) {
            if self.cancelled.load(Ordering::Acquire) || Instant::now() >= deadline {
                // A lane that is stuck keeps neither a cancel waiting nor the news of a lost link.
                self.lanes.shut_down();
            }
        }
        precopy.settle();
    }

    /// Tells the destination what it lacks, and serves it.
    fn serve_pages(&self, session: &Session, ending: Ending) -> Result<(), String> {
        let pages = self.machine.ram().pages();
        let rest = match self.precopy().as_ref() {
            Some(precopy) => precopy.missing(pages).map_err(|error| error.to_string())?,
            None => Rest::all(pages),
        };
        // Stretches of whole words, so that each is a slice of them.
        let mut first = 0;
        for words in rest.missing.chunks(MISSING_WORDS) {
            let stretch = PageCount(MISSING_PAGES.min(pages.0 - first));
            let set = switchover_wire::bitmap::encode(words);
            let complete_first = ending == Ending::StopAndCopy;
            let message = ControlMessage::Missing { first: PageIndex(first), pages: stretch, set, complete_first };
            session.send(&message).map_err(|error| error.to_string())?;
            first += stretch.0;
        }
        let first = self.machine.first_pages();
        if let Some(pager) = self.pager().as_mut() {
            pager.start_serving(&first, rest);
            if ending == Ending::StopAndCopy {
                // The guest does not run yet: the bound for the time before the handoff still holds.
                pager.set_max_bandwidth(self.tunables().bandwidth.precopy);
                pager.start_sweep();
            }
        }
        Ok(())
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

    fn send_state(&self, session: &Session) -> SourceEvent {
        let state = match self.recorder.timed("save-state", || self.machine.save_state()) {
            Ok(state) => state,
            Err(error) => return SourceEvent::StateFailed(error.to_string()),
        };
        self.recorder.write(|record| record.state_bytes = state.len() as u64);
        let was_running = self.recorder.read().was_running;
        match self.recorder.timed("send-state", || session.send(&ControlMessage::State { state, was_running })) {
            Ok(()) => SourceEvent::StateSent,
            Err(error) => SourceEvent::Lost(error.to_string()),
        }
    }

    fn finish(&self, outcome: Outcome, left_paused: Option<MachineError>) {
        self.watchdog.end();
        if let Some(precopy) = self.precopy().clone() {
            // The lanes are shut down, so nothing of it can block; and nothing of it may touch the machine from here on, least
            // of all the next migration's book of written pages.
            precopy.stop();
            let conductor = self.conductor.lock().unwrap_or_else(PoisonError::into_inner).take();
            if conductor.is_some_and(|conductor| conductor.join().is_err()) {
                tracing::error!("the thread that conducts pre-copy panicked");
            }
            // Whether the guest goes on here or not: it is watched and slowed down no longer.
            self.machine.throttle(0);
            if let Err(error) = self.machine.limit_dirty_rate(None) {
                tracing::error!(%error, "the guest's dirty rate stays limited");
            }
            precopy.stop_noting();
        }
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

impl Session {
    fn send(&self, message: &ControlMessage) -> Result<(), MessageError> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner).send(message)
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
