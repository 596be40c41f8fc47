//! The destination's end.

use super::{Failure, FailureKind, GuestAfter, Outcome};
use crate::status::MigrationStatus;

/// What happens to a destination.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DestinationEvent {
    /// Memory is reserved and watched, the pager serves, all lanes are open.
    Prepared,
    /// It could not be prepared.
    PrepareFailed(String),
    /// The source has said which pages are still to come, and the pager knows.
    Missing {
        /// The guest shall not run before they are here.
        complete_first: bool,
    },
    /// The guest's state is here.
    State,
    /// [`DestinationAction::LoadState`] succeeded.
    Loaded,
    /// [`DestinationAction::LoadState`] failed.
    LoadFailed(String),
    /// The commit is here.
    Commit,
    /// [`DestinationAction::Run`] failed.
    RunFailed(String),
    /// Every page is here and mapped.
    Complete,
    /// The source has read that we have everything.
    DrainedAcknowledged,
    /// The source gives up.
    Aborted(String),
    /// A lane that carries pages is gone.
    LaneLost(String),
    /// The control lane or the source is gone.
    Lost(String),
    /// The pager cannot go on.
    PagerBroken(String),
    /// The source has opened new lanes in place of those that were lost.
    Rejoined,
    /// Its controller ends it, if the guest is not here.
    Closed,
}

/// What a destination does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DestinationAction {
    /// Show this status.
    Status(MigrationStatus),
    /// Tell the source that we are prepared.
    SendPrepared,
    /// Load the state that has come, not on a pager's thread; answer with `Loaded` or `LoadFailed`.
    LoadState,
    /// Tell the source that the state is loaded.
    SendRestored,
    /// Tell the source, finally, that we never ran and never will.
    SendRefused(String),
    /// The link is lost, for this reason: close its lanes, serve what is here, and wait for the source.
    AwaitRejoin {
        /// What kind of loss it is.
        kind: FailureKind,
        /// What happened.
        reason: String,
        /// Where that leaves the guest.
        guest: GuestAfter,
    },
    /// Tell the source over its new lanes where we stand, what is missing included.
    SendStanding {
        /// We have the commit.
        committed: bool,
    },
    /// Receive pages over the new lanes, and ask anew for what is waited for. Failing is `PagerBroken`.
    AttachLanes,
    /// Take the right to run, and run the guest unless its user had paused it; a failure is `RunFailed`.
    Run,
    /// Tell the source that the guest runs.
    SendRunning,
    /// Tell the source that we have everything.
    SendDrained,
    /// Memory is complete before the guest has run: unregister userfaultfd. A failure changes nothing: it is unregistered in
    /// the end.
    EndWatch,
    /// The guest runs: map what is here, before it is touched.
    MapTheRest,
    /// Unregister userfaultfd, end the pager, close all lanes: memory is complete.
    FinishPager,
    /// End the pager of a guest that never ran here, and close all lanes.
    Abandon,
    /// Stop the guest, because its memory can no longer be completed. The pager goes on serving what is here.
    StopForGood(String),
    /// It is over.
    Finish(Outcome),
}

/// A destination in one of its phases.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DestinationSession {
    /// Memory is being reserved.
    Preparing(Preparing),
    /// Waiting for the state.
    Prepared(Prepared),
    /// The state is being loaded, or is loaded, and the commit has not come.
    Loading(Loading),
    /// The guest runs here; its memory follows.
    Postcopy(Postcopy),
    /// The link is lost after the source may have sent its commit.
    Paused(Paused),
    /// The source is here again, over new lanes.
    Rejoining(Rejoining),
    /// Everything is here, and the source is being told.
    Drained(Drained),
    /// Over.
    Over,
}

/// Phase data of [`DestinationSession::Preparing`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Preparing(());

/// Phase data of [`DestinationSession::Prepared`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Prepared {
    /// Pages come as soon as the source is paused: all of a small guest's can be here before its state is.
    complete: bool,
    /// The handoff has begun: whether the guest waits for all of its memory.
    complete_first: Option<bool>,
}

/// Phase data of [`DestinationSession::Loading`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Loading {
    loaded: bool,
    complete: bool,
    complete_first: bool,
    /// The source has been told that the state is loaded.
    restored: bool,
}

/// Phase data of [`DestinationSession::Postcopy`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Postcopy(());

/// Phase data of [`DestinationSession::Paused`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Paused(Standing);

/// Phase data of [`DestinationSession::Rejoining`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejoining(Standing);

/// Where a destination stands while its link is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Standing {
    /// It has the commit, and the guest runs here. Where not, only the source knows whether it was sent.
    committed: bool,
    /// Every page is here.
    complete: bool,
}

/// Phase data of [`DestinationSession::Drained`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Drained(());

/// A session's next phase, and what to do on the way there.
pub type Step = (DestinationSession, Vec<DestinationAction>);

impl DestinationSession {
    /// A session whose source has been accepted and whose lanes are open.
    #[must_use]
    pub const fn new() -> Self {
        Self::Preparing(Preparing(()))
    }

    /// What follows from `event`. One that has no meaning in this phase is the source's breach of the protocol.
    #[must_use]
    pub fn on(self, event: DestinationEvent) -> Step {
        match self {
            Self::Preparing(phase) => phase.on(event),
            Self::Prepared(phase) => phase.on(event),
            Self::Loading(phase) => phase.on(event),
            Self::Postcopy(phase) => phase.on(event),
            Self::Paused(phase) => phase.on(event),
            Self::Rejoining(phase) => phase.on(event),
            Self::Drained(phase) => phase.on(event),
            Self::Over => (Self::Over, Vec::new()),
        }
    }
}

impl Default for DestinationSession {
    fn default() -> Self {
        Self::new()
    }
}

impl Preparing {
    fn on(self, event: DestinationEvent) -> Step {
        let Self(()) = self;
        match event {
            DestinationEvent::Prepared => (
                DestinationSession::Prepared(Prepared::default()),
                vec![DestinationAction::Status(MigrationStatus::Active), DestinationAction::SendPrepared],
            ),
            other => never_ran(other),
        }
    }
}

impl Prepared {
    fn on(self, event: DestinationEvent) -> Step {
        match (event, self.complete_first) {
            (DestinationEvent::Complete, _) => {
                (DestinationSession::Prepared(Self { complete: true, ..self }), Vec::new())
            }
            (DestinationEvent::Missing { complete_first }, None) => {
                (DestinationSession::Prepared(Self { complete_first: Some(complete_first), ..self }), Vec::new())
            }
            (DestinationEvent::State, Some(complete_first)) => {
                let loading = Loading { loaded: false, complete: self.complete, complete_first, restored: false };
                let actions = vec![DestinationAction::Status(MigrationStatus::Device), DestinationAction::LoadState];
                (DestinationSession::Loading(loading), actions)
            }
            (other, _) => never_ran(other),
        }
    }
}

impl Loading {
    fn on(self, event: DestinationEvent) -> Step {
        match event {
            DestinationEvent::Loaded if !self.loaded => Self { loaded: true, ..self }.confirm(),
            DestinationEvent::Complete if !self.complete => Self { complete: true, ..self }.confirm(),
            // The commit makes this side the one that may run, and the only one.
            DestinationEvent::Commit if self.restored => run(self.complete),
            // The commit may have been sent, and lost: neither running nor giving up is for this side to decide.
            DestinationEvent::Lost(reason) | DestinationEvent::LaneLost(reason) if self.restored => {
                lost(Standing { committed: false, complete: self.complete }, FailureKind::LinkLost, reason)
            }
            other => never_ran(other),
        }
    }

    /// Tells the source that the guest can run here, as soon as it can. What the guest waits for anyway is done behind that.
    fn confirm(self) -> Step {
        let mut actions = Vec::new();
        let confirmed = self.loaded && (self.complete || !self.complete_first);
        if confirmed && !self.restored {
            actions.push(DestinationAction::SendRestored);
        }
        if confirmed && self.complete {
            actions.push(DestinationAction::EndWatch);
        }
        (DestinationSession::Loading(Self { restored: confirmed, ..self }), actions)
    }
}

impl Postcopy {
    fn on(self, event: DestinationEvent) -> Step {
        match event {
            DestinationEvent::Complete => {
                (DestinationSession::Drained(Drained(())), vec![DestinationAction::SendDrained])
            }
            DestinationEvent::RunFailed(reason) => stopped(FailureKind::Machine, reason),
            DestinationEvent::PagerBroken(reason) => stopped(FailureKind::Pager, reason),
            DestinationEvent::LaneLost(reason) | DestinationEvent::Lost(reason) | DestinationEvent::Aborted(reason) => {
                lost(Standing { committed: true, complete: false }, FailureKind::LinkLost, reason)
            }
            DestinationEvent::Rejoined | DestinationEvent::Closed => (DestinationSession::Postcopy(self), Vec::new()),
            other => lost(Standing { committed: true, complete: false }, FailureKind::Protocol, breach(&other)),
        }
    }
}

impl Paused {
    fn on(self, event: DestinationEvent) -> Step {
        let Self(standing) = self;
        match event {
            DestinationEvent::Rejoined => (
                DestinationSession::Rejoining(Rejoining(standing)),
                vec![
                    DestinationAction::Status(MigrationStatus::PostcopyRecover),
                    DestinationAction::SendStanding { committed: standing.committed },
                ],
            ),
            DestinationEvent::Complete if standing.committed => {
                complete_alone("the link was lost when the last page had come".to_owned())
            }
            DestinationEvent::Complete => {
                (DestinationSession::Paused(Self(Standing { complete: true, ..standing })), Vec::new())
            }
            DestinationEvent::RunFailed(reason) | DestinationEvent::PagerBroken(reason) => broken(standing, reason),
            DestinationEvent::Closed if !standing.committed => never_ran(event),
            // There is no link, so nothing else can mean anything.
            _ => (DestinationSession::Paused(self), Vec::new()),
        }
    }
}

impl Rejoining {
    fn on(self, event: DestinationEvent) -> Step {
        let Self(standing) = self;
        match event {
            DestinationEvent::Commit if standing.committed => {
                let actions = vec![
                    DestinationAction::AttachLanes,
                    DestinationAction::SendRunning,
                    DestinationAction::Status(MigrationStatus::PostcopyActive),
                    // The last link may have been lost before this was done.
                    DestinationAction::MapTheRest,
                ];
                (DestinationSession::Postcopy(Postcopy(())), actions)
            }
            DestinationEvent::Commit => {
                // First of all: lanes that cannot be taken up end this list, and the guest counts as running from here.
                let (next, mut actions) = run(standing.complete);
                actions.splice(
                    1..1,
                    [DestinationAction::AttachLanes, DestinationAction::Status(MigrationStatus::PostcopyActive)],
                );
                (next, actions)
            }
            DestinationEvent::Complete => {
                (DestinationSession::Rejoining(Self(Standing { complete: true, ..standing })), Vec::new())
            }
            // The source was told that we have everything, and needed no more.
            DestinationEvent::DrainedAcknowledged if standing.committed && standing.complete => acknowledged(),
            DestinationEvent::Closed if standing.committed => (DestinationSession::Rejoining(self), Vec::new()),
            DestinationEvent::Closed => never_ran(event),
            DestinationEvent::RunFailed(reason) | DestinationEvent::PagerBroken(reason) => broken(standing, reason),
            DestinationEvent::Lost(reason) | DestinationEvent::LaneLost(reason) | DestinationEvent::Aborted(reason) => {
                lost(standing, FailureKind::LinkLost, reason)
            }
            // One attempt after another may have been told of before the first was heard of: its lanes were the latest.
            DestinationEvent::Rejoined => (DestinationSession::Rejoining(self), Vec::new()),
            other => lost(standing, FailureKind::Protocol, breach(&other)),
        }
    }
}

impl Drained {
    fn on(self, event: DestinationEvent) -> Step {
        match event {
            DestinationEvent::DrainedAcknowledged => acknowledged(),
            DestinationEvent::RunFailed(reason) => stopped(FailureKind::Machine, reason),
            DestinationEvent::PagerBroken(reason) => stopped(FailureKind::Pager, reason),
            // The source closes its page lanes behind its acknowledgement, and may be seen doing so first.
            DestinationEvent::LaneLost(_) | DestinationEvent::Rejoined | DestinationEvent::Closed => {
                (DestinationSession::Drained(self), Vec::new())
            }
            DestinationEvent::Lost(reason) | DestinationEvent::Aborted(reason) => complete_alone(reason),
            // Whatever its source says: a guest that is whole is not stopped.
            other => complete_alone(breach(&other)),
        }
    }
}

/// The source knows that everything is here.
fn acknowledged() -> Step {
    let actions = vec![DestinationAction::FinishPager, DestinationAction::Finish(Outcome::Completed)];
    (DestinationSession::Over, actions)
}

/// The commit is here: this side runs the guest, before anything else.
fn run(complete: bool) -> Step {
    let mut actions = vec![DestinationAction::Run, DestinationAction::SendRunning];
    if complete {
        actions.push(DestinationAction::SendDrained);
        (DestinationSession::Drained(Drained(())), actions)
    } else {
        actions.push(DestinationAction::Status(MigrationStatus::PostcopyActive));
        actions.push(DestinationAction::MapTheRest);
        (DestinationSession::Postcopy(Postcopy(())), actions)
    }
}

/// The link is lost, and what follows is not this side's to decide.
fn lost(standing: Standing, kind: FailureKind, reason: String) -> Step {
    let guest = if standing.committed { GuestAfter::Divided } else { GuestAfter::Undecided };
    (DestinationSession::Paused(Paused(standing)), vec![DestinationAction::AwaitRejoin { kind, reason, guest }])
}

/// The guest is whole and runs, so it needs nothing from the source any more. That the source may not know is the source's
/// trouble: it keeps its pages until it has asked.
fn complete_alone(reason: String) -> Step {
    (
        DestinationSession::Over,
        vec![DestinationAction::FinishPager, DestinationAction::Finish(Outcome::Unacknowledged(reason))],
    )
}

/// The pager or the machine has failed for good.
fn broken(standing: Standing, reason: String) -> Step {
    if standing.committed {
        stopped(FailureKind::Pager, reason)
    } else {
        never_ran(DestinationEvent::PagerBroken(reason))
    }
}

/// Ends a session without the commit: the guest never ran here, and this process never will run it.
fn never_ran(event: DestinationEvent) -> Step {
    let (kind, reason, refuse) = match event {
        // Memory, mostly.
        DestinationEvent::PrepareFailed(reason) | DestinationEvent::PagerBroken(reason) => {
            (FailureKind::Pager, reason, true)
        }
        DestinationEvent::LoadFailed(reason) => (FailureKind::Machine, reason, true),
        DestinationEvent::LaneLost(reason) => (FailureKind::LinkLost, reason, true),
        DestinationEvent::Lost(reason) => (FailureKind::LinkLost, reason, false),
        DestinationEvent::Closed => {
            (FailureKind::Refused, "it was ended on the destination before the commit had come".to_owned(), true)
        }
        DestinationEvent::Aborted(reason) => (FailureKind::Refused, format!("the source gave up: {reason}"), false),
        other => (FailureKind::Protocol, breach(&other), true),
    };
    let mut actions = Vec::new();
    if refuse {
        actions.push(DestinationAction::SendRefused(reason.clone()));
    }
    actions.push(DestinationAction::Abandon);
    let failure = Failure { kind, reason, guest: GuestAfter::OnSource };
    actions.push(DestinationAction::Finish(Outcome::Failed(failure)));
    (DestinationSession::Over, actions)
}

fn stopped(kind: FailureKind, reason: String) -> Step {
    let failure = Failure { kind, reason: reason.clone(), guest: GuestAfter::Lost };
    (
        DestinationSession::Over,
        vec![DestinationAction::StopForGood(reason), DestinationAction::Finish(Outcome::Failed(failure))],
    )
}

fn breach(event: &DestinationEvent) -> String {
    format!("the source broke the protocol: {event:?} came out of turn")
}
