//! The source's end.

use super::{Failure, FailureKind, GuestAfter, Outcome};
use crate::status::MigrationStatus;

/// What happens to a source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceEvent {
    /// The destination is prepared.
    Prepared,
    /// The controller wants the handoff by post-copy.
    StartPostcopy,
    /// Pre-copy has come to its end: no lane sends any more, and the handoff is due.
    SwitchOver(Ending),
    /// Pre-copy does not converge, and nothing else is allowed.
    GaveUp(String),
    /// Pre-copy could not go on: the machine cannot tell what it writes.
    RoundsFailed(String),
    /// The controller lets a paused guest go on to its handoff.
    Proceed,
    /// The controller wants out.
    Cancel,
    /// [`SourceAction::Pause`] succeeded.
    Paused,
    /// [`SourceAction::Pause`] failed; the guest runs on.
    PauseFailed(String),
    /// [`SourceAction::SendState`] succeeded.
    StateSent,
    /// The state could not be read from the machine.
    StateFailed(String),
    /// The destination has loaded the state.
    Restored,
    /// The destination's final word: it never ran the guest, and never will.
    Refused(String),
    /// The guest is paused and the destination has not answered in time.
    HandoffTimedOut,
    /// The destination runs the guest.
    Running,
    /// The destination has all of it.
    Drained,
    /// A lane that carries pages is gone.
    LaneLost(String),
    /// The control lane or the destination is gone.
    Lost(String),
    /// The controller wants a lost link to be joined again.
    Rejoin,
    /// [`SourceAction::OpenLanes`] failed. What the other side may have answered is no refusal: it may not know the session.
    RejoinFailed {
        /// What kind of failure it is.
        kind: FailureKind,
        /// What happened.
        reason: String,
    },
    /// New lanes are open, and the destination has said where it stands, what it lacks included.
    Standing {
        /// It has the commit.
        committed: bool,
        /// It has every page.
        complete: bool,
    },
    /// The controller vouches that the destination is fenced: it does not run the guest, and never will.
    Reclaim,
}

/// How pre-copy ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// The guest runs on the destination when all of it is there.
    StopAndCopy,
    /// The guest runs on the destination at once; the rest follows.
    Postcopy,
}

/// What is fixed when a session begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// Memory is copied in rounds before the handoff.
    pub rounds: bool,
    /// The paused guest waits for the controller's word before its handoff.
    pub hold: bool,
}

/// What a source does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceAction {
    /// Show this status.
    Status(MigrationStatus),
    /// Begin the rounds of pre-copy; they end with `SwitchOver` or `GaveUp`, or by [`SourceAction::EndRounds`].
    BeginRounds,
    /// No more rounds: returns when no lane sends any more.
    EndRounds,
    /// Pause the machine; answer with `Paused` or `PauseFailed`.
    Pause,
    /// Memory no longer changes: find out what the destination lacks and tell it, serve pages from now on, and push the few that the
    /// guest's first instructions will want; all of them, where the guest shall not run before. Failing is `Lost`.
    ServePages(Ending),
    /// Push all others. Not before the guest runs: until then the handoff needs the processors more.
    PushPages,
    /// Save the state and send it; answer with `StateSent`, `StateFailed` or `Lost`.
    SendState,
    /// Give up the right to run.
    SurrenderRightToRun,
    /// Take the right to run again, because the destination has said, finally, that it never ran and never will, or the
    /// controller has vouched for that.
    TakeBackRightToRun,
    /// Submit the commit to the socket. A failure is `Lost`.
    SendCommit,
    /// Acknowledge that the destination has everything. A failure changes nothing here.
    AcknowledgeDrained,
    /// The link is lost after the commit, for this reason: keep all pages, and wait for the controller.
    AwaitRejoin {
        /// What kind of loss it is.
        kind: FailureKind,
        /// What happened.
        reason: String,
    },
    /// Open new lanes to where the controller says; answer with `Standing`, `RejoinFailed` or `Lost`.
    OpenLanes,
    /// Serve what the destination has said that it lacks, over the new lanes. Failing is `Lost`.
    ServeAgain,
    /// Tell the destination to give up, if it still listens.
    SendAbort(String),
    /// End the pager and close all lanes; no page is read afterwards.
    CloseLanes,
    /// Let the guest run on.
    Resume,
    /// It is over.
    Finish(Outcome),
}

/// What the source says to a controller's wish that comes at the wrong time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WishRefused {
    /// A cancel after the commit.
    Committed,
    /// A rejoin or a reclaim of a link that is not lost.
    NotLost,
    /// Anything after the end.
    Over,
}

/// A source in one of its phases.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceSession {
    /// The guest runs; the destination is preparing.
    Setup(Setup),
    /// The guest runs; the handoff can begin at any moment.
    Active(Active),
    /// The guest is being paused, or is paused, and the right to run is still here.
    Handoff(Handoff),
    /// The commit counts as sent. The guest must never run here again.
    Committed(Committed),
    /// The guest runs on the destination; its pages are served and pushed.
    Postcopy(Postcopy),
    /// The commit counts as sent, and the link is lost. All pages are kept.
    Paused(Paused),
    /// New lanes are being opened.
    Rejoining(Rejoining),
    /// Over.
    Over,
}

/// Phase data of [`SourceSession::Setup`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Setup {
    plan: Plan,
    /// The controller has asked for the handoff already.
    start_at_once: bool,
}

/// Phase data of [`SourceSession::Active`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Active {
    plan: Plan,
}

/// Phase data of [`SourceSession::Handoff`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Handoff {
    /// The machine is being asked to pause. What ends the migration meanwhile has to wait for its answer: whether the
    /// guest must be resumed is not known before.
    Pausing {
        /// How the handoff will be made.
        ending: Ending,
        /// Whether the controller's word is waited for.
        hold: bool,
        /// How it will end.
        doomed: Option<Outcome>,
    },
    /// The guest is paused, and the controller has not said go on.
    Held {
        /// How the handoff will be made.
        ending: Ending,
    },
    /// The guest is paused, and its state is on the way.
    Paused {
        /// How the handoff is made.
        ending: Ending,
    },
}

/// Phase data of [`SourceSession::Committed`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Committed {
    ending: Ending,
}

/// Phase data of [`SourceSession::Postcopy`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Postcopy(());

/// Phase data of [`SourceSession::Paused`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Paused(());

/// Phase data of [`SourceSession::Rejoining`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejoining(());

/// A session's next phase, and what to do on the way there.
pub type Step = (SourceSession, Vec<SourceAction>);

impl SourceSession {
    /// A session whose lanes are open.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        Self::Setup(Setup { plan, start_at_once: false })
    }

    /// Whether the next [`SourceEvent::Restored`] leads to the commit.
    #[must_use]
    pub const fn may_commit(&self) -> bool {
        matches!(self, Self::Handoff(Handoff::Paused { .. }))
    }

    /// Whether it waits for [`SourceEvent::Proceed`].
    #[must_use]
    pub const fn is_held(&self) -> bool {
        matches!(self, Self::Handoff(Handoff::Held { .. }))
    }

    /// Whether a cancel can still be carried out.
    ///
    /// # Errors
    /// When it cannot, and why.
    pub const fn can_cancel(&self) -> Result<(), WishRefused> {
        match self {
            Self::Setup(_) | Self::Active(_) | Self::Handoff(_) => Ok(()),
            Self::Committed(_) | Self::Postcopy(_) | Self::Paused(_) | Self::Rejoining(_) => {
                Err(WishRefused::Committed)
            }
            Self::Over => Err(WishRefused::Over),
        }
    }

    /// Whether the guest runs on the destination and its pages are served.
    #[must_use]
    pub const fn is_in_postcopy(&self) -> bool {
        matches!(self, Self::Postcopy(_))
    }

    /// Whether a rejoin or a reclaim can be carried out.
    ///
    /// # Errors
    /// When it cannot, and why.
    pub const fn is_lost(&self) -> Result<(), WishRefused> {
        match self {
            Self::Paused(_) => Ok(()),
            Self::Over => Err(WishRefused::Over),
            _ => Err(WishRefused::NotLost),
        }
    }

    /// What follows from `event`. One that has no meaning in this phase is the destination's breach of the protocol.
    #[must_use]
    pub fn on(self, event: SourceEvent) -> Step {
        match self {
            Self::Setup(phase) => phase.on(event),
            Self::Active(phase) => phase.on(event),
            Self::Handoff(phase) => phase.on(event),
            Self::Committed(phase) => phase.on(event),
            Self::Postcopy(phase) => phase.on(event),
            Self::Paused(phase) => phase.on(event),
            Self::Rejoining(phase) => phase.on(event),
            Self::Over => (Self::Over, Vec::new()),
        }
    }
}

impl Default for SourceSession {
    fn default() -> Self {
        Self::new(Plan::default())
    }
}

impl Setup {
    fn on(self, event: SourceEvent) -> Step {
        match event {
            SourceEvent::Prepared => {
                let active = SourceAction::Status(MigrationStatus::Active);
                let phase = Active { plan: self.plan };
                if self.start_at_once {
                    let (next, mut actions) = phase.hand_off(Ending::Postcopy);
                    actions.insert(0, active);
                    (next, actions)
                } else {
                    let mut actions = vec![active];
                    actions.extend(self.plan.rounds.then_some(SourceAction::BeginRounds));
                    (SourceSession::Active(phase), actions)
                }
            }
            SourceEvent::StartPostcopy => (SourceSession::Setup(Self { start_at_once: true, ..self }), Vec::new()),
            other => before_pause(other),
        }
    }
}

impl Active {
    fn on(self, event: SourceEvent) -> Step {
        match event {
            SourceEvent::StartPostcopy => {
                let rounds = self.plan.rounds;
                let (next, mut actions) = self.hand_off(Ending::Postcopy);
                if rounds {
                    actions.insert(0, SourceAction::EndRounds);
                }
                (next, actions)
            }
            SourceEvent::SwitchOver(ending) if self.plan.rounds => self.hand_off(ending),
            other => before_pause(other),
        }
    }

    fn hand_off(self, ending: Ending) -> Step {
        let hold = self.plan.hold;
        let mut actions = Vec::new();
        if !hold {
            actions.push(SourceAction::Status(MigrationStatus::Device));
        }
        actions.push(SourceAction::Pause);
        (SourceSession::Handoff(Handoff::Pausing { ending, hold, doomed: None }), actions)
    }
}

impl Handoff {
    fn on(self, event: SourceEvent) -> Step {
        match self {
            Self::Pausing { ending, hold, doomed } => Self::while_pausing(ending, hold, doomed, event),
            Self::Held { ending } => Self::while_held(ending, event),
            Self::Paused { ending } => Self::while_paused(ending, event),
        }
    }

    fn while_pausing(ending: Ending, hold: bool, doomed: Option<Outcome>, event: SourceEvent) -> Step {
        match (event, doomed) {
            (SourceEvent::Paused, None) if hold => (
                SourceSession::Handoff(Self::Held { ending }),
                vec![SourceAction::Status(MigrationStatus::PreSwitchover)],
            ),
            (SourceEvent::Paused, None) => Self::go(ending),
            (SourceEvent::Paused, Some(outcome)) => give_up(outcome, true),
            (SourceEvent::PauseFailed(reason), doomed) => {
                give_up(doomed.unwrap_or_else(|| fail(FailureKind::Machine, reason)), false)
            }
            // The rounds' own decision may have crossed the controller's wish.
            (
                SourceEvent::StartPostcopy
                | SourceEvent::SwitchOver(_)
                | SourceEvent::GaveUp(_)
                | SourceEvent::RoundsFailed(_),
                doomed,
            ) => (SourceSession::Handoff(Self::Pausing { ending, hold, doomed }), Vec::new()),
            (event, doomed) => {
                let doomed = Some(doomed.unwrap_or_else(|| self::ending(event)));
                (SourceSession::Handoff(Self::Pausing { ending, hold, doomed }), Vec::new())
            }
        }
    }

    fn while_held(ending: Ending, event: SourceEvent) -> Step {
        match event {
            SourceEvent::Proceed => {
                let (next, mut actions) = Self::go(ending);
                actions.insert(0, SourceAction::Status(MigrationStatus::Device));
                (next, actions)
            }
            SourceEvent::StartPostcopy
            | SourceEvent::SwitchOver(_)
            | SourceEvent::GaveUp(_)
            | SourceEvent::RoundsFailed(_) => (SourceSession::Handoff(Self::Held { ending }), Vec::new()),
            other => give_up(self::ending(other), true),
        }
    }

    fn go(ending: Ending) -> Step {
        let actions = vec![SourceAction::ServePages(ending), SourceAction::SendState];
        (SourceSession::Handoff(Self::Paused { ending }), actions)
    }

    fn while_paused(ending: Ending, event: SourceEvent) -> Step {
        match event {
            SourceEvent::StartPostcopy
            | SourceEvent::SwitchOver(_)
            | SourceEvent::GaveUp(_)
            | SourceEvent::RoundsFailed(_)
            | SourceEvent::Proceed
            | SourceEvent::StateSent => (SourceSession::Handoff(Self::Paused { ending }), Vec::new()),
            // The point of no return. The right to run goes before the commit is submitted: whatever becomes of the
            // commit on its way, nothing on this side can run the guest any more.
            SourceEvent::Restored => {
                let mut actions = vec![SourceAction::SurrenderRightToRun];
                if ending == Ending::Postcopy {
                    // Between the two: who sees it knows that this process holds the guest's only pages.
                    actions.push(SourceAction::Status(MigrationStatus::PostcopyActive));
                }
                actions.push(SourceAction::SendCommit);
                (SourceSession::Committed(Committed { ending }), actions)
            }
            other => give_up(self::ending(other), true),
        }
    }
}

impl Committed {
    fn on(self, event: SourceEvent) -> Step {
        match event {
            SourceEvent::Running => {
                let mut actions = Vec::new();
                if self.ending == Ending::Postcopy {
                    actions.push(SourceAction::Status(MigrationStatus::PostcopyActive));
                    // Where the guest waited for all of it, all of it was pushed.
                    actions.push(SourceAction::PushPages);
                }
                (SourceSession::Postcopy(Postcopy(())), actions)
            }
            event if comes_late(&event) => (SourceSession::Committed(self), Vec::new()),
            SourceEvent::Refused(reason) => taken_back(&reason),
            SourceEvent::Lost(reason) | SourceEvent::LaneLost(reason) => lost(FailureKind::LinkLost, reason),
            other => lost(FailureKind::Protocol, breach(&other)),
        }
    }
}

impl Postcopy {
    fn on(self, event: SourceEvent) -> Step {
        match event {
            SourceEvent::Drained => drained(),
            event if comes_late(&event) => (SourceSession::Postcopy(self), Vec::new()),
            SourceEvent::Lost(reason) | SourceEvent::LaneLost(reason) => lost(FailureKind::LinkLost, reason),
            other => lost(FailureKind::Protocol, breach(&other)),
        }
    }
}

impl Paused {
    #[expect(clippy::needless_pass_by_value, reason = "as in every other phase")]
    fn on(self, event: SourceEvent) -> Step {
        match event {
            SourceEvent::Rejoin => (
                SourceSession::Rejoining(Rejoining(())),
                vec![SourceAction::Status(MigrationStatus::PostcopyRecover), SourceAction::OpenLanes],
            ),
            SourceEvent::Reclaim => (
                SourceSession::Over,
                vec![
                    SourceAction::TakeBackRightToRun,
                    SourceAction::Resume,
                    SourceAction::Finish(fail(
                        FailureKind::Reclaimed,
                        "it was reclaimed, and goes on from where it was handed off: what it did since is lost"
                            .to_owned(),
                    )),
                ],
            ),
            // There is no link, so nothing else can mean anything.
            _ => (SourceSession::Paused(self), Vec::new()),
        }
    }
}

impl Rejoining {
    fn on(self, event: SourceEvent) -> Step {
        match event {
            SourceEvent::Standing { committed: true, complete: true } => drained(),
            // The commit says once more whose the guest is, and that its pages are served. A destination that has it already
            // only goes on.
            SourceEvent::Standing { .. } => (
                SourceSession::Committed(Committed { ending: Ending::Postcopy }),
                vec![SourceAction::ServeAgain, SourceAction::SendCommit],
            ),
            SourceEvent::HandoffTimedOut => {
                lost(FailureKind::TimedOut, "the destination did not say in time where it stands".to_owned())
            }
            event if comes_late(&event) => (SourceSession::Rejoining(self), Vec::new()),
            SourceEvent::Refused(reason) => taken_back(&reason),
            SourceEvent::RejoinFailed { kind, reason } => lost(kind, reason),
            SourceEvent::Lost(reason) | SourceEvent::LaneLost(reason) => lost(FailureKind::LinkLost, reason),
            other => lost(FailureKind::Protocol, breach(&other)),
        }
    }
}

/// What means nothing any more after the commit: the controller's wishes, and answers that crossed it.
const fn comes_late(event: &SourceEvent) -> bool {
    matches!(
        event,
        SourceEvent::StateSent
            | SourceEvent::Cancel
            | SourceEvent::StartPostcopy
            | SourceEvent::SwitchOver(_)
            | SourceEvent::GaveUp(_)
            | SourceEvent::RoundsFailed(_)
            | SourceEvent::Proceed
            | SourceEvent::HandoffTimedOut
            | SourceEvent::Rejoin
            | SourceEvent::Reclaim
    )
}

/// The destination has everything, and knows that it may run.
fn drained() -> Step {
    (
        SourceSession::Over,
        vec![SourceAction::AcknowledgeDrained, SourceAction::CloseLanes, SourceAction::Finish(Outcome::Completed)],
    )
}

/// The link is lost after the commit. The guest is the destination's, and what it still lacks is only here.
fn lost(kind: FailureKind, reason: String) -> Step {
    (SourceSession::Paused(Paused(())), vec![SourceAction::CloseLanes, SourceAction::AwaitRejoin { kind, reason }])
}

/// A destination refuses only where it has not acted on the commit, and never acts on one afterwards. So its word, which
/// crossed our commit, brings the guest back. Silence or a lost link does not.
fn taken_back(reason: &str) -> Step {
    (
        SourceSession::Over,
        vec![
            SourceAction::CloseLanes,
            SourceAction::TakeBackRightToRun,
            SourceAction::Resume,
            SourceAction::Finish(fail(FailureKind::Refused, refusal(reason))),
        ],
    )
}

/// What every phase in which the guest still runs makes of an event that is not its own.
fn before_pause(event: SourceEvent) -> Step {
    give_up(ending(event), false)
}

/// How a migration ends by an event that no phase before the commit can go on from.
fn ending(event: SourceEvent) -> Outcome {
    match event {
        SourceEvent::Cancel => Outcome::Cancelled,
        SourceEvent::Lost(reason) | SourceEvent::LaneLost(reason) => fail(FailureKind::LinkLost, reason),
        SourceEvent::StateFailed(reason) | SourceEvent::RoundsFailed(reason) => fail(FailureKind::Machine, reason),
        SourceEvent::GaveUp(reason) => fail(FailureKind::NotConverging, reason),
        SourceEvent::Refused(reason) => fail(FailureKind::Refused, refusal(&reason)),
        SourceEvent::HandoffTimedOut => {
            fail(FailureKind::TimedOut, "the destination did not confirm the guest's state in time".to_owned())
        }
        other => fail(FailureKind::Protocol, breach(&other)),
    }
}

/// Ends a session whose commit has not been submitted: the guest goes on here.
fn give_up(outcome: Outcome, paused: bool) -> Step {
    let reason = match &outcome {
        Outcome::Failed(failure) => failure.reason.clone(),
        _ => "the migration was cancelled on the source".to_owned(),
    };
    let mut actions = vec![SourceAction::SendAbort(reason), SourceAction::CloseLanes];
    if paused {
        actions.push(SourceAction::Resume);
    }
    actions.push(SourceAction::Finish(outcome));
    (SourceSession::Over, actions)
}

fn fail(kind: FailureKind, reason: String) -> Outcome {
    Outcome::Failed(Failure { kind, reason, guest: GuestAfter::OnSource })
}

fn refusal(reason: &str) -> String {
    format!("the destination refused: {reason}")
}

fn breach(event: &SourceEvent) -> String {
    format!("the destination broke the protocol: {event:?} came out of turn")
}
