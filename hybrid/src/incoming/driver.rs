//! The session's thread: feeds the destination's session with events, and carries out what it decides.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use switchover_pager::collapse::Collapse;
use switchover_pager::cpu;
use switchover_pager::destination::DestinationPager;
use switchover_pager::lane::{Notify, PageLane, PagerEvent};
use switchover_wire::clock::{HostClock, Nanos};
use switchover_wire::message::ControlMessage;
use switchover_wire::socket::Socket;
use switchover_wire::types::{LaneId, LaneRole};

use super::Shared;
use crate::comparison::{Comparison, tell_digests};
use crate::control::{Control, Listener};
use crate::failure::{FailureKind, FailureView, GuestAfter};
use crate::happening::Happening;
use crate::heap::warm_up;
use crate::link::{LinkTeller, Told};
use crate::missing::{MissingPages, tell_missing};
use crate::patience::{Patience, Rank, next_event};
use crate::session::Outcome;
use crate::session::destination::{DestinationAction, DestinationEvent, DestinationSession};
use crate::status::MigrationStatus;

/// How long to wait for a vCPU that was told to run to note its first entry, once nothing else is to be done, and how long
/// between two looks: a wake-up takes some ten microseconds where a processor is free.
const FIRST_ENTRY_PATIENCE: Duration = Duration::from_millis(100);
const FIRST_ENTRY_PAUSE: Duration = Duration::from_micros(200);

/// The session could not even begin.
pub(super) const NO_THREAD: FailureView = FailureView { kind: FailureKind::Machine, guest: GuestAfter::OnSource };

/// What a session's thread needs besides what it shares.
struct Session {
    link: Control,
    /// States for the thread that loads them: loading may wait for pages, and the session must not.
    loader: Sender<Vec<u8>>,
    /// The state that has come, until it goes to the loader.
    state: Arc<Mutex<Option<Vec<u8>>>>,
    /// The page lanes of a source that has joined again, until it serves.
    joined: Vec<PageLane>,
}

impl Shared {
    /// The session's thread, from beginning to end.
    pub(super) fn migrate(self: &Arc<Self>, control: &Arc<Socket>, pages: Vec<PageLane>) {
        cpu::be_prompt();
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (self.start_threads(control), heard) {
            (Ok(session), Some(heard)) => {
                let prepared = self.recorder.timed("prepare", || self.prepare(pages));
                let _ = self.events.tell(prepared);
                self.drive(session, &heard);
            }
            (Ok(_), None) => unreachable!("a destination has one session"),
            (Err(reason), _) => {
                self.lanes.shut_down();
                self.recorder.fail(NO_THREAD, reason);
            }
        }
        // A source that does not know yet that its guest is complete here may come to ask, and may have come already.
        if self.recorder.read().unacknowledged.is_none() {
            self.close_listeners();
        } else if let Some(lanes) = self.take_joined() {
            self.answer_at_last(&lanes);
        }
    }

    /// The threads that a session waits for: the link's, and the one that loads the state.
    fn start_threads(self: &Arc<Self>, control: &Arc<Socket>) -> Result<Session, String> {
        let state = Arc::new(Mutex::new(None));
        let (loader, to_load) = bounded::<Vec<u8>>(1);
        let (shared, told) = (Arc::clone(self), self.events.clone());
        thread::Builder::new()
            .name("load state".to_owned())
            .spawn(move || {
                cpu::be_prompt();
                if let Ok(state) = to_load.recv() {
                    let loaded = shared.recorder.timed("load-state", || shared.machine.load_state(&state));
                    let _ = told.tell(match loaded {
                        Ok(()) => DestinationEvent::Loaded,
                        Err(error) => DestinationEvent::LoadFailed(error.to_string()),
                    });
                }
            })
            .map_err(no_thread)?;
        let link = self.begin_link(control, &state)?;
        Ok(Session { link, loader, state, joined: Vec::new() })
    }

    /// Listens to the control lane, and for signs of life.
    fn begin_link(
        self: &Arc<Self>,
        socket: &Arc<Socket>,
        arriving: &Arc<Mutex<Option<Vec<u8>>>>,
    ) -> Result<Control, String> {
        let events = self.events.of_link();
        let silence = *self.silence();
        let told = events.clone();
        let silent = move || {
            let _ = told.tell(DestinationEvent::Lost(format!("nothing was heard of the source for {silence:?}")));
        };
        let (control, listener) = Control::open(socket, &self.lanes, silence, silent)?;
        let (shared, arriving) = (Arc::clone(self), Arc::clone(arriving));
        thread::Builder::new()
            .name("control lane".to_owned())
            .spawn(move || shared.cpu.measure(|| shared.listen(listener, &events, &arriving)))
            .map_err(no_thread)?;
        Ok(control)
    }

    /// Reserves and watches memory, and serves its faults from now on.
    fn prepare(&self, pages: Vec<PageLane>) -> DestinationEvent {
        let events = self.events.clone();
        let notify: Notify = Arc::new(move |event| {
            let _ = match event {
                PagerEvent::AllPushed => true,
                PagerEvent::Complete => events.tell(DestinationEvent::Complete),
                // Of the link that there is: a lost one's lanes have said all that they say before the next begins.
                PagerEvent::LaneFailed { lane, reason } => {
                    // Where the guest turns out to be complete, nobody else says it.
                    tracing::warn!(%lane, reason, "a lane has failed");
                    events.of_link().tell(DestinationEvent::LaneLost(format!("the {lane} failed: {reason}")))
                }
                PagerEvent::Broken { reason } => events.tell(DestinationEvent::PagerBroken(reason)),
            };
        });
        let (ram, lazy) = (self.machine.ram(), self.settings.lazy_memory);
        let compared = *self.compared.lock().unwrap_or_else(PoisonError::into_inner);
        let started = match compared {
            Some(session) => DestinationPager::start_digesting(ram, pages, lazy, session, &notify),
            None => DestinationPager::start(ram, pages, lazy, &notify),
        };
        match started {
            Ok(pager) => {
                if self.settings.record_faults {
                    pager.trace_faults();
                }
                *self.pager() = Some(pager);
                DestinationEvent::Prepared
            }
            Err(error) => DestinationEvent::PrepareFailed(error.to_string()),
        }
    }

    /// The control lane's thread: turns what the source says into events.
    fn listen(&self, mut listener: Listener, events: &LinkTeller<DestinationEvent>, arriving: &Mutex<Option<Vec<u8>>>) {
        cpu::be_prompt();
        let pages = self.machine.ram().pages();
        warm_up(pages);
        let mut handoff = MissingPages::new(pages);
        loop {
            let event = match listener.next() {
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
                    self.recorder.tell(Happening::Drained);
                    DestinationEvent::DrainedAcknowledged
                }
                Ok(ControlMessage::Compared { differing }) => {
                    self.recorder.compared(Comparison::of(&differing));
                    continue;
                }
                Ok(ControlMessage::Abort { reason }) => DestinationEvent::Aborted(reason),
                Ok(other) => {
                    DestinationEvent::Lost(format!("the source sent {}, which only a destination says", other.name()))
                }
                Err(reason) => DestinationEvent::Lost(reason),
            };
            let over = matches!(
                event,
                DestinationEvent::Lost(_) | DestinationEvent::Aborted(_) | DestinationEvent::DrainedAcknowledged
            );
            if !events.tell(event) || over {
                return;
            }
        }
    }

    /// Once all of `missing` is known, forgets what has come of it. Says whether it did. On this thread and at once: the guest
    /// stands still meanwhile.
    fn hand_over(&self, missing: Option<Vec<u64>>) -> Result<bool, String> {
        let Some(missing) = missing else { return Ok(false) };
        self.recorder.write(|record| record.bytes_at_pause = Some(self.lanes.transferred()));
        let pager = self.pager();
        let pager = pager.as_ref().ok_or("the source handed off before this side was prepared")?;
        self.recorder.timed("hand-over", || pager.hand_over(&missing)).map_err(|error| error.to_string())?;
        Ok(true)
    }

    /// Feeds events to the session and carries out its actions, until it is over.
    fn drive(self: &Arc<Self>, mut session: Session, events: &Receiver<Told<DestinationEvent>>) {
        let mut state = DestinationSession::new();
        let mut waiting = VecDeque::new();
        loop {
            let rank = |told: &Told<DestinationEvent>| rank(told.event());
            let told = waiting.pop_front().or_else(|| next_event(events, &mut Patience::endless(), rank, &mut waiting));
            // This side holds a sender itself, so the channel cannot end.
            let Some(told) = told else { return };
            let Some(event) = self.events.heard(told) else { continue };
            let (next, actions) = state.on(event);
            state = next;
            for action in actions {
                if let DestinationAction::Finish(outcome) = action {
                    session.link.end();
                    return self.finish(outcome);
                }
                // A failure is an event of its own, and the rest of the list must not be done.
                if let Some(event) = self.perform(action, &mut session) {
                    waiting.push_back(Told::about_none(event));
                    break;
                }
            }
        }
    }

    fn perform(self: &Arc<Self>, action: DestinationAction, session: &mut Session) -> Option<DestinationEvent> {
        match action {
            DestinationAction::Status(status) => self.recorder.set_status(status),
            DestinationAction::SendPrepared => {
                return send(&session.link, &ControlMessage::Prepared { clock: HostClock::here() }).err();
            }
            DestinationAction::LoadState => return session.load(),
            DestinationAction::SendRestored => return send(&session.link, &ControlMessage::Restored).err(),
            DestinationAction::SendRefused(reason) => {
                let _ = send(&session.link, &ControlMessage::Refused { reason });
            }
            DestinationAction::AwaitRejoin { kind, reason, guest } => {
                self.lanes.shut_down();
                if let Some(pager) = self.pager().as_mut() {
                    pager.detach();
                }
                self.events.end_link();
                session.link.end();
                session.joined.clear();
                self.lanes.retire();
                self.recorder.interrupt(FailureView { kind, guest }, &reason);
                // It may have joined again before this side noticed, and nobody says it twice.
                if self.joined.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                    let _ = self.events.tell(DestinationEvent::Rejoined);
                }
            }
            DestinationAction::SendStanding { committed } => return self.send_standing(session, committed).err(),
            DestinationAction::AttachLanes => {
                let lanes = std::mem::take(&mut session.joined);
                if let Some(Err(error)) = self.pager().as_mut().map(|pager| pager.attach(lanes)) {
                    return Some(DestinationEvent::Lost(error.to_string()));
                }
            }
            DestinationAction::Run => {
                // Only a commit that is acted upon counts: one that comes after our refusal does not.
                self.recorder.write(|record| {
                    record.instants.commit_ns = Some(Nanos::now().0);
                    record.bytes_at_running = Some(self.lanes.transferred());
                });
                self.machine.take_right_to_run();
                self.recorder.tell(Happening::CommitTaken);
                if self.recorder.read().was_running
                    && let Err(error) = self.machine.resume()
                {
                    return Some(DestinationEvent::RunFailed(error.to_string()));
                }
            }
            DestinationAction::SendRunning => {
                // Not waited for: the vCPUs need the processor now, and `Drained` tells it again.
                let first_entry_ns = self.machine.first_entry().map(|at| at.0);
                self.recorder.tell(Happening::Running);
                return send(&session.link, &ControlMessage::Running { first_entry_ns }).err();
            }
            DestinationAction::SendDrained => {
                let first_entry_ns = self.first_entry().map(|at| at.0);
                let last_page =
                    self.pager().as_ref().and_then(DestinationPager::last_placed).unwrap_or_else(Nanos::now);
                self.recorder.write(|record| record.instants.first_entry_ns = first_entry_ns);
                let drained = ControlMessage::Drained { first_entry_ns, last_page_ns: last_page.0 };
                let said = self.digests().into_iter().chain([drained]);
                return said.map(|message| send(&session.link, &message)).find_map(Result::err);
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
                match self.pager().as_mut().map(DestinationPager::finish) {
                    Some(Err(error)) => tracing::error!(%error, "the pager goes on serving a complete guest"),
                    Some(Ok(())) if self.settings.collapse => self.collapse(),
                    Some(Ok(())) | None => {}
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

    /// Takes up the lanes of a source that has joined again, and says where this side stands.
    fn send_standing(self: &Arc<Self>, session: &mut Session, committed: bool) -> Result<(), DestinationEvent> {
        let lost = |reason: String| DestinationEvent::Lost(reason);
        let joined = self.take_joined().ok_or_else(|| lost("its lanes were taken up already".to_owned()))?;
        self.lanes.add(LaneId { role: LaneRole::Control, index: 0 }, Arc::clone(&joined.control.socket));
        for (id, lane) in joined.pages {
            self.lanes.add(id, Arc::clone(&lane.socket));
            session.joined.push(lane.into_page_lane(id));
        }
        session.link = self.begin_link(&joined.control.socket, &session.state).map_err(lost)?;
        let missing = self.pager().as_ref().map(DestinationPager::missing).unwrap_or_default();
        let complete = missing.iter().all(|word| *word == 0);
        if complete {
            self.digests().iter().try_for_each(|message| send(&session.link, message))?;
        }
        send(&session.link, &ControlMessage::Standing { committed, complete })?;
        if !complete {
            for message in tell_missing(&missing, self.machine.ram().pages(), false) {
                send(&session.link, &message)?;
            }
        }
        Ok(())
    }

    /// The digests of what the guest was given, where they are asked for and all of it is here.
    pub(super) fn digests(&self) -> Vec<ControlMessage> {
        self.pager().as_ref().and_then(DestinationPager::digest).map(tell_digests).unwrap_or_default()
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

    /// Maps the complete guest's memory as huge pages from now on.
    fn collapse(&self) {
        match Collapse::start(&self.machine.ram()) {
            Ok(collapse) => *self.collapse.lock().unwrap_or_else(PoisonError::into_inner) = Some(collapse),
            Err(error) => tracing::warn!(%error, "no thread could be started that maps guest memory as huge pages"),
        }
    }

    fn finish(&self, outcome: Outcome) {
        match outcome {
            Outcome::Completed => self.recorder.set_status(MigrationStatus::Completed),
            Outcome::Unacknowledged(reason) => {
                tracing::warn!(reason, "the guest is complete here and runs, but its source may not know");
                self.recorder.write(|record| record.unacknowledged = Some(reason));
                self.recorder.set_status(MigrationStatus::Completed);
            }
            Outcome::Cancelled => self.recorder.set_status(MigrationStatus::Cancelled),
            Outcome::Failed(failure) => self.recorder.fail(failure.view(), failure.sentence()),
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
    fn load(&self) -> Option<DestinationEvent> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner).take();
        let handed = state.is_some_and(|state| self.loader.try_send(state).is_ok());
        (!handed).then(|| DestinationEvent::LoadFailed("the state came twice".to_owned()))
    }
}

/// Sends over a link whose loss is an event.
fn send(link: &Control, message: &ControlMessage) -> Result<(), DestinationEvent> {
    link.send(message).map_err(|error| DestinationEvent::Lost(error.to_string()))
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn no_thread(error: io::Error) -> String {
    format!("cannot start a thread of the session: {error}")
}
