//! A destination's migration: the threads that carry out what [`DestinationSession`] decides.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use switchover_pager::cpu::CpuMeter;
use switchover_pager::destination::{DestinationPager, DestinationProgress};
use switchover_pager::lane::{Notify, PageLane, PagerEvent};
use switchover_wire::address::Address;
use switchover_wire::clock::{HostClock, Nanos};
use switchover_wire::description::describe_mismatches;
use switchover_wire::handshake::{Hello, Welcome, accept, read_hello, refuse};
use switchover_wire::message::{ControlMessage, ControlReader, ControlWriter};
use switchover_wire::socket::{Listener, Socket};
use switchover_wire::types::{LaneId, LaneRole};

use crate::capability;
use crate::error::MigrationError;
use crate::lanes::{BULK_LANES_LIMIT, Lanes};
use crate::machine::Machine;
use crate::missing::MissingPages;
use crate::patience::{Patience, Rank, next_event};
use crate::progress::Progress;
use crate::reception::{self, Reception};
use crate::recorder::Recorder;
use crate::report::{CpuSeconds, PageClasses, Side, SideReport, fault_report, rate_series};
use crate::session::Outcome;
use crate::session::destination::{DestinationAction, DestinationEvent, DestinationSession};
use crate::settings::{Observer, Settings};
use crate::status::MigrationStatus;

/// Connections that may be in their handshake at once: each costs a thread, and 64 KiB at most, whoever connects. Where
/// there are more, the oldest is dropped: a source speaks at once, and what has been silent for longest is the least
/// likely to be one.
const HANDSHAKES_LIMIT: usize = 16;

/// Messages of the source that may wait while the session is busy. A well-behaved one sends three in all.
const EVENTS_ROOM: usize = 1024;

/// How long to wait for a vCPU that was told to run to note its first entry, once nothing else is to be done, and how long
/// between two looks: a wake-up takes some ten microseconds where a processor is free.
const FIRST_ENTRY_PATIENCE: Duration = Duration::from_millis(100);
const FIRST_ENTRY_PAUSE: Duration = Duration::from_micros(200);

/// A migration on its destination. Clones are handles to the same one; dropping them changes nothing.
#[derive(Clone)]
pub struct Incoming {
    shared: Arc<Shared>,
}

struct Shared {
    machine: Arc<dyn Machine>,
    settings: Settings,
    recorder: Recorder,
    listener: Listener,
    reception: Mutex<Reception<Arc<Socket>>>,
    handshakes: Mutex<VecDeque<Arc<Socket>>>,
    lanes: Lanes,
    pager: Mutex<Option<DestinationPager>>,
    cpu: CpuMeter,
}

/// What a session's thread needs besides what it shares.
struct Session {
    control: ControlWriter,
    /// States for the thread that loads them: loading may wait for pages, and the session must not.
    loader: Sender<Vec<u8>>,
    /// The state that has come, until it goes to the loader.
    state: Arc<Mutex<Option<Vec<u8>>>>,
}

impl Incoming {
    /// Listens at `at` for one source that wants to give its guest to `machine`. Bound when it returns.
    ///
    /// # Errors
    /// When the address cannot be bound, or no thread can be started.
    pub fn listen(
        machine: Arc<dyn Machine>,
        at: &Address,
        settings: Settings,
        observer: Observer,
    ) -> Result<Self, MigrationError> {
        let shared = Arc::new(Shared {
            machine,
            settings,
            recorder: Recorder::new(observer),
            listener: Listener::bind(at)?,
            reception: Mutex::new(Reception::Waiting),
            handshakes: Mutex::new(VecDeque::new()),
            lanes: Lanes::default(),
            pager: Mutex::new(None),
            cpu: CpuMeter::default(),
        });
        shared.recorder.begin();
        let acceptor = Arc::clone(&shared);
        thread::Builder::new()
            .name("listener".to_owned())
            .spawn(move || acceptor.accept_all())
            .map_err(MigrationError::Thread)?;
        Ok(Self { shared })
    }

    /// Where it listens, with the port that the kernel chose where 0 was asked for.
    #[must_use]
    pub fn address(&self) -> Address {
        self.shared.listener.address()
    }

    /// Listens no longer, and ends a migration that has not had its commit. One that has goes on.
    pub fn close(&self) {
        self.shared.listener.close();
        if self.shared.recorder.read().instants.commit_ns.is_none() {
            self.shared.lanes.shut_down();
        }
    }

    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let shared = &self.shared;
        let record = shared.recorder.read();
        let ram_total = shared.machine.ram().pages();
        let seen = shared.pager().as_ref().map_or_else(
            || DestinationProgress { missing: ram_total.0, ..DestinationProgress::default() },
            DestinationPager::progress,
        );
        Progress {
            status: record.status,
            downtime_ns: record.downtime_ns(),
            setup_time_ns: record.setup_time_ns(),
            total_time_ns: record.total_time_ns(),
            ram_total: ram_total.bytes(),
            transferred: shared.lanes.transferred(),
            remaining: switchover_wire::types::PageCount(seen.missing).bytes(),
            zero_pages: seen.zero + seen.precopied_zero,
            normal_pages: seen.pushed + seen.requested + seen.precopied,
            postcopy_requests: seen.requests,
            error: record.error,
            ..Progress::default()
        }
    }

    /// What this side knows of it. Complete once it is over.
    #[must_use]
    pub fn report(&self) -> SideReport {
        let shared = &self.shared;
        let record = shared.recorder.read();
        let mut report = record.into_report(Side::Destination, &shared.lanes, shared.machine.ram().pages());
        report.cpu += CpuSeconds::from(shared.cpu.total());
        report.instants.first_entry_ns =
            report.instants.commit_ns.and_then(|_| shared.machine.first_entry()).map(|at| at.0);
        if let Some(pager) = shared.pager().as_ref() {
            report.cpu += CpuSeconds::from(pager.cpu());
            let seen = pager.progress();
            report.pages = Some(PageClasses {
                precopied: seen.kept,
                zero: seen.zero,
                pushed: seen.pushed,
                requested: seen.requested,
                discarded: seen.discarded,
            });
            let stats = pager.fault_stats();
            report.instants.last_page_ns = pager.last_placed().map(|at| at.0);
            // What came between the handoff and the commit belongs to it.
            let handed_over = report.phases.iter().find(|phase| phase.name == "hand-over").map(|phase| phase.start_ns);
            let start =
                report.instants.commit_ns.map(|commit| handed_over.map_or(commit, |handoff| handoff.min(commit)));
            report.rates = start.map(|start| rate_series(&stats, pager, Nanos(start)));
            report.faults = fault_report(&stats).ok();
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
    fn pager(&self) -> MutexGuard<'_, Option<DestinationPager>> {
        self.pager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reception(&self) -> MutexGuard<'_, Reception<Arc<Socket>>> {
        self.reception.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The listener's thread. It goes on while a session is under way, so that others are refused with a reason.
    fn accept_all(self: &Arc<Self>) {
        loop {
            match self.listener.accept() {
                Ok(Some(socket)) => self.receive(socket),
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "the destination can no longer be connected to");
                    return;
                }
            }
        }
    }

    /// Starts a connection's handshake on a thread of its own: a slow peer must not keep others waiting.
    fn receive(self: &Arc<Self>, socket: Socket) {
        let socket = Arc::new(socket);
        {
            let mut handshakes = self.handshakes();
            handshakes.push_back(Arc::clone(&socket));
            if handshakes.len() > HANDSHAKES_LIMIT
                && let Some(oldest) = handshakes.pop_front()
            {
                tracing::warn!(peer = oldest.peer(), "dropped a connection: too many are in their handshake");
                oldest.shutdown();
            }
        }
        let (shared, shaking) = (Arc::clone(self), Arc::clone(&socket));
        let spawned = thread::Builder::new().name("handshake".to_owned()).spawn(move || {
            if let Err(reason) = shared.shake_hands(&shaking) {
                tracing::warn!(peer = shaking.peer(), reason, "a connection was not taken");
            }
            shared.end_handshake(&shaking);
        });
        if let Err(error) = spawned {
            self.end_handshake(&socket);
            tracing::warn!(%error, "dropped a connection: no thread for its handshake");
        }
    }

    fn handshakes(&self) -> MutexGuard<'_, VecDeque<Arc<Socket>>> {
        self.handshakes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end_handshake(&self, socket: &Arc<Socket>) {
        self.handshakes().retain(|other| !Arc::ptr_eq(other, socket));
    }

    fn shake_hands(self: &Arc<Self>, socket: &Arc<Socket>) -> Result<(), String> {
        let hello = read_hello(socket).map_err(|error| error.to_string())?;
        // It has spoken: it can no longer be dropped for its silence.
        self.end_handshake(socket);
        if let Err(reason) = self.admit(&hello, socket) {
            let _ = refuse(socket, &reason);
            return Err(format!("refused: {reason}"));
        }
        let clock = HostClock::here();
        let same_clock = clock.same_host(&hello.clock);
        let welcome = Welcome { version: hello.common_version().unwrap_or_default(), clock };
        let welcomed = socket.tune(hello.lane.role).map_err(|error| error.to_string());
        let welcomed = welcomed.and_then(|()| accept(socket, &welcome).map_err(|error| error.to_string()));
        if let Err(reason) = welcomed {
            self.reception().forget(hello.session);
            return Err(reason);
        }
        if let Some(lanes) = self.reception().complete() {
            self.recorder.write(|record| record.same_clock = same_clock);
            self.begin(lanes);
        }
        Ok(())
    }

    /// Whether this lane may be taken; it has its place then.
    fn admit(&self, hello: &Hello, socket: &Arc<Socket>) -> Result<(), String> {
        let (session, lane) = (hello.session, hello.lane);
        if lane.role != LaneRole::Control {
            return self.reception().page_lane(session, lane, Arc::clone(socket));
        }
        let unknown = hello.capabilities & !capability::KNOWN;
        if unknown != 0 {
            return Err(format!("the source asks for capabilities {unknown:#x}, which this destination does not have"));
        }
        if hello.lanes.fault != 1 || !(1..=BULK_LANES_LIMIT).contains(&hello.lanes.bulk) {
            let (fault, bulk) = (hello.lanes.fault, hello.lanes.bulk);
            return Err(format!(
                "the source wants {fault} fault and {bulk} bulk lanes; this destination takes 1 and 1 to {BULK_LANES_LIMIT}"
            ));
        }
        let source = hello.description.as_ref().ok_or("the source did not describe its machine")?;
        let mismatches = self.machine.describe().mismatches(source);
        if !mismatches.is_empty() {
            return Err(describe_mismatches(&mismatches));
        }
        self.reception().control(session, hello.lanes, Arc::clone(socket), Instant::now(), |control| control.is_open())
    }

    /// All lanes are open: the session's thread takes over.
    fn begin(self: &Arc<Self>, lanes: reception::Lanes<Arc<Socket>>) {
        self.lanes.add(LaneId { role: LaneRole::Control, index: 0 }, Arc::clone(&lanes.control));
        let session = lanes.session.to_string();
        self.recorder.begin_again(session);
        let pages: Vec<PageLane> = lanes.pages.into_iter().map(|(id, socket)| PageLane { id, socket }).collect();
        for lane in &pages {
            self.lanes.add(lane.id, Arc::clone(&lane.socket));
        }
        let driver = Arc::clone(self);
        let control = lanes.control;
        let spawned = thread::Builder::new()
            .name("migration".to_owned())
            .spawn(move || driver.cpu.measure(|| driver.migrate(control, pages)));
        if let Err(error) = spawned {
            self.lanes.shut_down();
            self.listener.close();
            self.recorder.fail(format!("cannot start the migration's thread: {error}"));
        }
    }

    /// The session's thread, from beginning to end.
    fn migrate(self: &Arc<Self>, control: Arc<Socket>, pages: Vec<PageLane>) {
        let (events, receiver) = bounded(EVENTS_ROOM);
        match self.start_threads(control, &events) {
            Ok(session) => {
                let prepared = self.recorder.timed("prepare", || self.prepare(pages, &events));
                let _ = events.send(prepared);
                self.drive(session, &receiver);
            }
            Err(reason) => {
                self.lanes.shut_down();
                self.recorder.fail(reason);
            }
        }
        self.listener.close();
    }

    /// The threads that a session waits for: the control lane's, and the one that loads the state.
    fn start_threads(
        self: &Arc<Self>,
        control: Arc<Socket>,
        events: &Sender<DestinationEvent>,
    ) -> Result<Session, String> {
        let reader = ControlReader::new(Arc::clone(&control)).map_err(|error| error.to_string())?;
        let writer = ControlWriter::new(control).map_err(|error| error.to_string())?;
        let state = Arc::new(Mutex::new(None));
        let (loader, to_load) = bounded::<Vec<u8>>(1);
        let no_thread = |error| format!("cannot start a thread of the session: {error}");

        let (shared, told, arriving) = (Arc::clone(self), events.clone(), Arc::clone(&state));
        thread::Builder::new()
            .name("control lane".to_owned())
            .spawn(move || shared.cpu.measure(|| shared.listen(reader, &told, &arriving)))
            .map_err(no_thread)?;
        let (shared, told) = (Arc::clone(self), events.clone());
        thread::Builder::new()
            .name("load state".to_owned())
            .spawn(move || {
                if let Ok(state) = to_load.recv() {
                    let loaded = shared.recorder.timed("load-state", || shared.machine.load_state(&state));
                    let _ = told.send(match loaded {
                        Ok(()) => DestinationEvent::Loaded,
                        Err(error) => DestinationEvent::LoadFailed(error.to_string()),
                    });
                }
            })
            .map_err(no_thread)?;
        Ok(Session { control: writer, loader, state })
    }

    /// Reserves and watches memory, and serves its faults from now on.
    fn prepare(&self, pages: Vec<PageLane>, events: &Sender<DestinationEvent>) -> DestinationEvent {
        let events = events.clone();
        let notify: Notify = Arc::new(move |event| {
            let event = match event {
                PagerEvent::AllPushed => return,
                PagerEvent::Complete => DestinationEvent::Complete,
                PagerEvent::LaneFailed { lane, reason } => {
                    DestinationEvent::LaneLost(format!("the {lane} failed: {reason}"))
                }
                PagerEvent::Broken { reason } => DestinationEvent::PagerBroken(reason),
            };
            let _ = events.send(event);
        });
        match DestinationPager::start(self.machine.ram(), pages, self.settings.lazy_memory, &notify) {
            Ok(pager) => {
                *self.pager() = Some(pager);
                DestinationEvent::Prepared
            }
            Err(error) => DestinationEvent::PrepareFailed(error.to_string()),
        }
    }

    /// The control lane's thread: turns what the source says into events.
    fn listen(&self, mut reader: ControlReader, events: &Sender<DestinationEvent>, arriving: &Mutex<Option<Vec<u8>>>) {
        let mut handoff = MissingPages::new(self.machine.ram().pages());
        loop {
            let event = match reader.recv() {
                Ok(ControlMessage::Round { number }) => {
                    if let Some(pager) = self.pager().as_ref() {
                        pager.begin_round(number);
                    }
                    continue;
                }
                Ok(ControlMessage::Missing { first, pages, set, complete_first }) => {
                    match handoff.add(first, pages, &set).and_then(|missing| self.hand_over(missing)) {
                        Ok(true) => DestinationEvent::Missing { complete_first },
                        Ok(false) => continue,
                        Err(reason) => DestinationEvent::Lost(reason),
                    }
                }
                Ok(ControlMessage::State { state, was_running }) => {
                    self.recorder.write(|record| {
                        record.was_running = was_running;
                        record.state_bytes = state.len() as u64;
                    });
                    *arriving.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
                    DestinationEvent::State
                }
                Ok(ControlMessage::Commit) => DestinationEvent::Commit,
                Ok(ControlMessage::DrainedAck) => {
                    let now = Nanos::now();
                    self.recorder.write(|record| record.instants.drained_ns = Some(now.0));
                    DestinationEvent::DrainedAcknowledged
                }
                Ok(ControlMessage::Abort { reason }) => DestinationEvent::Aborted(reason),
                Ok(other) => {
                    DestinationEvent::Lost(format!("the source sent {}, which only a destination says", other.name()))
                }
                Err(error) => DestinationEvent::Lost(error.to_string()),
            };
            let over = matches!(
                event,
                DestinationEvent::Lost(_) | DestinationEvent::Aborted(_) | DestinationEvent::DrainedAcknowledged
            );
            if events.send(event).is_err() || over {
                return;
            }
        }
    }

    /// Once all of `missing` is known, forgets what has come of it. Says whether it did. On this thread and at once: the guest
    /// stands still meanwhile.
    fn hand_over(&self, missing: Option<Vec<u64>>) -> Result<bool, String> {
        let Some(missing) = missing else { return Ok(false) };
        let pager = self.pager();
        let pager = pager.as_ref().ok_or("the source handed off before this side was prepared")?;
        self.recorder.timed("hand-over", || pager.hand_over(&missing)).map_err(|error| error.to_string())?;
        Ok(true)
    }

    /// Feeds events to the session and carries out its actions, until it is over.
    fn drive(&self, mut session: Session, events: &Receiver<DestinationEvent>) {
        let mut state = DestinationSession::new();
        let mut waiting = VecDeque::new();
        loop {
            let event =
                waiting.pop_front().or_else(|| next_event(events, &mut Patience::endless(), rank, &mut waiting));
            // This thread holds a sender itself, so the channel cannot end.
            let Some(event) = event else { return };
            let (next, actions) = state.on(event);
            state = next;
            for action in actions {
                if let DestinationAction::Finish(outcome) = action {
                    return self.finish(outcome);
                }
                // A failure is an event of its own, and the rest of the list must not be done.
                if let Some(event) = self.perform(action, &mut session) {
                    waiting.push_back(event);
                    break;
                }
            }
        }
    }

    fn perform(&self, action: DestinationAction, session: &mut Session) -> Option<DestinationEvent> {
        match action {
            DestinationAction::Status(status) => self.recorder.set_status(status),
            DestinationAction::SendPrepared => {
                return session.say(&ControlMessage::Prepared { clock: HostClock::here() });
            }
            DestinationAction::LoadState => return session.load(),
            DestinationAction::SendRestored => return session.say(&ControlMessage::Restored),
            DestinationAction::SendRefused(reason) => {
                let _ = session.control.send(&ControlMessage::Refused { reason });
            }
            DestinationAction::Run => {
                // Only a commit that is acted upon counts: one that comes after our refusal does not.
                self.recorder.write(|record| record.instants.commit_ns = Some(Nanos::now().0));
                self.machine.take_right_to_run();
                if self.recorder.read().was_running
                    && let Err(error) = self.machine.resume()
                {
                    return Some(DestinationEvent::RunFailed(error.to_string()));
                }
            }
            DestinationAction::SendRunning => {
                // Not waited for: the vCPUs need the processor now, and `Drained` tells it again.
                let first_entry_ns = self.machine.first_entry().map(|at| at.0);
                return session.say(&ControlMessage::Running { first_entry_ns });
            }
            DestinationAction::SendDrained => {
                let first_entry_ns = self.first_entry().map(|at| at.0);
                let last_page =
                    self.pager().as_ref().and_then(DestinationPager::last_placed).unwrap_or_else(Nanos::now);
                self.recorder.write(|record| record.instants.first_entry_ns = first_entry_ns);
                return session.say(&ControlMessage::Drained { first_entry_ns, last_page_ns: last_page.0 });
            }
            DestinationAction::EndWatch => {
                let ended = self.pager().as_ref().map(|pager| self.recorder.timed("end-watch", || pager.end_watch()));
                if let Some(Err(error)) = ended {
                    tracing::warn!(%error, "userfaultfd goes on watching memory that is complete");
                }
            }
            DestinationAction::MapTheRest => {
                if let Some(pager) = self.pager().as_ref() {
                    pager.map_the_rest();
                }
            }
            DestinationAction::FinishPager => {
                if let Some(pager) = self.pager().as_mut()
                    && let Err(error) = pager.finish()
                {
                    tracing::error!(%error, "the pager goes on serving a complete guest");
                }
                self.lanes.shut_down();
            }
            DestinationAction::Abandon => {
                if let Some(pager) = self.pager().take() {
                    pager.abandon();
                }
                self.lanes.shut_down();
            }
            DestinationAction::StopForGood(reason) => {
                self.machine.stop_for_good(&reason);
                // The source learns of it by losing its lanes. Faults on pages that are here are served on.
                self.lanes.shut_down();
            }
            DestinationAction::Finish(_) => {}
        }
        None
    }

    /// When the guest entered. A small guest's memory can be complete before its vCPUs have woken up.
    fn first_entry(&self) -> Option<Nanos> {
        let deadline = Instant::now() + FIRST_ENTRY_PATIENCE;
        loop {
            let entry = self.machine.first_entry();
            if entry.is_some() || !self.recorder.read().was_running || Instant::now() >= deadline {
                return entry;
            }
            thread::sleep(FIRST_ENTRY_PAUSE);
        }
    }

    fn finish(&self, outcome: Outcome) {
        match outcome {
            Outcome::Completed => self.recorder.set_status(MigrationStatus::Completed),
            Outcome::Cancelled => self.recorder.set_status(MigrationStatus::Cancelled),
            Outcome::Failed(failure) => {
                self.recorder.fail(format!("{}; {}", failure.reason, failure.guest.sentence()));
            }
        }
    }
}

/// What a destination's event is to the loss of a page lane.
fn rank(event: &DestinationEvent) -> Rank {
    match event {
        DestinationEvent::LaneLost(_) => Rank::LaneLost,
        DestinationEvent::Aborted(_)
        | DestinationEvent::Lost(_)
        | DestinationEvent::PagerBroken(_)
        | DestinationEvent::Complete
        | DestinationEvent::DrainedAcknowledged => Rank::Explains,
        _ => Rank::Follows,
    }
}

impl Session {
    fn say(&mut self, message: &ControlMessage) -> Option<DestinationEvent> {
        self.control.send(message).err().map(|error| DestinationEvent::Lost(error.to_string()))
    }

    fn load(&self) -> Option<DestinationEvent> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner).take();
        let handed = state.is_some_and(|state| self.loader.try_send(state).is_ok());
        (!handed).then(|| DestinationEvent::LoadFailed("the state came twice".to_owned()))
    }
}
