//! The session's thread: feeds the source's session with events, and carries out what it decides.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;
use switchover_pager::cpu;
use switchover_pager::source::Rest;
use switchover_wire::address::Address;
use switchover_wire::clock::Nanos;
use switchover_wire::message::ControlMessage;
use switchover_wire::types::{PageCount, PageIndex};

use super::Shared;
use super::opening::Unopened;
use crate::control::Control;
use crate::failure::{FailureKind, FailureView};
use crate::happening::Happening;
use crate::heap::warm_up;
use crate::link::Told;
use crate::machine::MachineError;
use crate::missing::tell_missing;
use crate::patience::{Patience, Rank, next_event};
use crate::rounds::{Conductor, RoundsEnd};
use crate::session::source::{Ending, SourceAction, SourceEvent, SourceSession};
use crate::session::{Failure, GuestAfter, Outcome};
use crate::status::MigrationStatus;

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

/// How long a destination that was joined again may take to say where it stands.
const REJOIN_PATIENCE: Duration = Duration::from_secs(10);

/// What a session's thread needs besides what it shares.
struct Session {
    link: Control,
    patience: Patience,
}

impl Shared {
    /// The migration's thread, from beginning to end.
    pub(super) fn migrate(self: &Arc<Self>, to: &Address, events: &Receiver<Told<SourceEvent>>) {
        cpu::be_prompt();
        warm_up(self.machine.ram().pages());
        match self.open(to) {
            Ok(link) => self.drive(Session { link, patience: Patience::endless() }, events),
            Err(unopened) => {
                self.lanes.shut_down();
                // Ends its threads, if it was started.
                drop(self.pager().take());
                *self.session() = SourceSession::Over;
                let Unopened { kind, reason } = unopened;
                self.finish(Outcome::Failed(Failure { kind, reason, guest: GuestAfter::OnSource }), None);
            }
        }
    }

    /// Feeds events to the session and carries out its actions, until it is over.
    fn drive(self: &Arc<Self>, mut session: Session, events: &Receiver<Told<SourceEvent>>) {
        let mut waiting = VecDeque::new();
        let mut left_paused = None;
        loop {
            let told = waiting.pop_front().unwrap_or_else(|| {
                let rank = |told: &Told<SourceEvent>| rank(told.event());
                let timed_out = || Told::about_none(SourceEvent::HandoffTimedOut);
                next_event(events, &mut session.patience, rank, &mut waiting).unwrap_or_else(timed_out)
            });
            let Some(mut event) = self.events.heard(told) else { continue };
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
                    SourceAction::Finish(outcome) => {
                        session.link.end();
                        return self.finish(outcome, left_paused);
                    }
                    SourceAction::Resume => left_paused = self.machine.resume().err(),
                    // An answer is what the list was working towards, or why the rest of it must not be done.
                    action => {
                        if let Some(event) = self.perform(action, &mut session) {
                            waiting.push_back(Told::about_none(event));
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
            SourceAction::BeginRounds => return self.begin_rounds(session).err().map(SourceEvent::RoundsFailed),
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
                self.begin_comparison();
            }
            SourceAction::SendState => return Some(self.send_state(session)),
            SourceAction::SurrenderRightToRun => self.machine.surrender_right_to_run(),
            SourceAction::TakeBackRightToRun => {
                tracing::warn!("the destination does not run the guest and never will: it goes on here");
                self.comparer.call_off();
                self.machine.take_back_right_to_run();
                self.recorder.tell(Happening::TakenBack);
            }
            SourceAction::SendCommit => {
                session.patience = Patience::endless();
                self.recorder.tell(Happening::CommitSent);
                // The first one counts, whichever of them arrives.
                let now = Nanos::now().0;
                self.recorder.write(|record| record.instants.commit_ns = record.instants.commit_ns.or(Some(now)));
                if let Err(error) = session.link.send(&ControlMessage::Commit) {
                    return Some(SourceEvent::Lost(error.to_string()));
                }
            }
            SourceAction::AcknowledgeDrained => {
                self.recorder.write(|record| record.instants.drained_ns = Some(Nanos::now().0));
                self.recorder.tell(Happening::Drained);
                self.compare(session);
                if let Err(error) = session.link.send(&ControlMessage::DrainedAck) {
                    tracing::warn!(%error, "the destination has everything, but could not be told that we know");
                }
            }
            SourceAction::AwaitRejoin { kind, reason } => {
                self.events.end_link();
                session.link.end();
                self.lanes.retire();
                self.release_rounds();
                // A cancel that the commit has overtaken is forgotten.
                self.cancelled.store(false, Ordering::Release);
                self.recorder.interrupt(FailureView { kind, guest: GuestAfter::Divided }, &reason);
            }
            SourceAction::OpenLanes => {
                match self.open_again() {
                    Ok(link) => session.link = link,
                    Err(Unopened { kind, reason }) => return Some(SourceEvent::RejoinFailed { kind, reason }),
                }
                session.patience = Patience::until(Instant::now() + REJOIN_PATIENCE);
            }
            SourceAction::ServeAgain => {
                session.patience = Patience::endless();
                self.serve_again();
            }
            SourceAction::SendAbort(reason) => {
                self.watchdog.arm(Instant::now() + ABORT_PATIENCE);
                if let Err(error) = session.link.send(&ControlMessage::Abort { reason }) {
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
        let (shared, control) = (Arc::clone(self), session.link.writer());
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
                RoundsEnd::GaveUp(reason) => SourceEvent::GaveUp(reason),
                RoundsEnd::Failed(reason) => SourceEvent::RoundsFailed(reason),
                RoundsEnd::Ended => return,
            };
            let _ = shared.events.tell(event);
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
        let rest = self.recorder.timed("find-missing", || match self.precopy().as_ref() {
            Some(precopy) => precopy.missing(pages).map_err(|error| error.to_string()),
            None => Ok(Rest::all(pages)),
        })?;
        self.recorder.timed("tell-missing", || {
            tell_missing(&rest.missing, pages, ending == Ending::StopAndCopy)
                .try_for_each(|message| session.link.send(&message).map_err(|error| error.to_string()))
        })?;
        let first = self.recorder.timed("first-pages", || self.machine.first_pages());
        // Read before the pager is locked: whoever changes it locks them in this order.
        let before_handoff = self.tunables().bandwidth.precopy;
        if let Some(pager) = self.pager().as_mut() {
            self.recorder.timed("start-serving", || pager.start_serving(&first, rest));
            if ending == Ending::StopAndCopy {
                // The guest does not run yet: the bound for the time before the handoff still holds.
                pager.set_max_bandwidth(before_handoff);
                pager.start_sweep();
            }
        }
        Ok(())
    }

    /// Begins to digest what the guest was handed off with, where that is to be compared. The guest runs on the destination: it
    /// waits for none of this.
    fn begin_comparison(&self) {
        if let Some(session) = self.name.get().filter(|_| self.settings.verify_memory) {
            self.comparer.begin(*session, self.machine.ram());
        }
    }

    /// Compares, where that was asked for, and says on the link what came of it.
    fn compare(&self, session: &Session) {
        if !self.settings.verify_memory {
            return;
        }
        // Where the guest was complete before anybody could be told that it runs.
        self.begin_comparison();
        let comparison = self.recorder.timed("compare", || self.comparer.compare());
        let differing = comparison.differing.iter();
        let differing = differing.map(|stretch| (PageIndex(stretch.first_page), PageCount(stretch.pages))).collect();
        let told = comparison.failed.is_none().then(|| session.link.send(&ControlMessage::Compared { differing }));
        self.recorder.compared(comparison);
        if let Some(Err(error)) = told {
            tracing::warn!(%error, "the destination could not be told what came of the comparison of memory");
        }
    }

    fn pause(&self) -> SourceEvent {
        match self.recorder.timed("pause", || self.machine.pause()) {
            Ok(paused) => {
                self.recorder.write(|record| {
                    record.instants.last_exit_ns = Some(paused.last_exit.0);
                    record.was_running = paused.was_running;
                    record.bytes_at_pause = Some(self.lanes.transferred());
                });
                self.recorder.tell(Happening::HandoffBegun);
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
        match self.recorder.timed("send-state", || session.link.send(&ControlMessage::State { state, was_running })) {
            Ok(()) => SourceEvent::StateSent,
            Err(error) => SourceEvent::Lost(error.to_string()),
        }
    }

    fn finish(&self, outcome: Outcome, left_paused: Option<MachineError>) {
        self.watchdog.end();
        self.release_rounds();
        self.comparer.call_off();
        match (outcome, left_paused) {
            (Outcome::Completed | Outcome::Unacknowledged(_), _) => {
                self.recorder.set_status(MigrationStatus::Completed);
            }
            (Outcome::Cancelled, Some(error)) => {
                let view = FailureView { kind: FailureKind::Machine, guest: GuestAfter::PausedOnSource };
                self.recorder.fail(view, format!("cancelled, but the guest stays paused: {error}"));
            }
            (Outcome::Failed(failure), Some(error)) => {
                let view = FailureView { kind: failure.kind, guest: GuestAfter::PausedOnSource };
                self.recorder.fail(view, format!("{}; and the guest stays paused: {error}", failure.reason));
            }
            (Outcome::Cancelled, None) => self.recorder.set_status(MigrationStatus::Cancelled),
            // What a cancellation tears down on its way is no failure of its own.
            (Outcome::Failed(failure), None)
                if failure.guest == GuestAfter::OnSource && self.cancelled.load(Ordering::Acquire) =>
            {
                self.recorder.set_status(MigrationStatus::Cancelled);
            }
            (Outcome::Failed(failure), None) => self.recorder.fail(failure.view(), failure.sentence()),
        }
    }

    /// Ends what pre-copy has started. Safe to repeat.
    fn release_rounds(&self) {
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
    }

    /// Serves what the destination has said that it lacks, and nothing before it says so: its guest has been running.
    fn serve_again(&self) {
        let missing = self.lacking.lock().unwrap_or_else(PoisonError::into_inner).take();
        // What is here of a page at the destination may be torn, so nothing goes as a difference.
        let rest = Rest { missing: missing.unwrap_or_default(), ..Rest::default() };
        if let Some(pager) = self.pager().as_mut() {
            pager.start_serving(&[], rest);
        }
        self.past().left = None;
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
