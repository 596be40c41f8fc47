//! Whole migrations of the two state machines against each other, with a fault injected at every step. When nothing moves any
//! more the controller joins what was lost, and it must come to an end then.
//!
//! The world is a pair of message queues and a handful of flags; what the invariants say about them is checked after
//! every single action.

use std::collections::VecDeque;

use super::destination::{DestinationAction, DestinationEvent, DestinationSession};
use super::source::{Ending, Plan, SourceAction, SourceEvent, SourceSession};
use super::{FailureKind, GuestAfter, Outcome};
use crate::status::MigrationStatus;

/// What goes wrong, and at which step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mishap {
    Nothing,
    /// The link is cut: what is under way is lost, and both sides notice.
    Cut,
    /// The controller cancels.
    Cancel,
    /// The source's patience in the handoff ends.
    TimeOut,
    /// The source's machine or the destination's refuses its next task.
    MachineFails,
    /// A page lane of the destination fails.
    LaneFails,
    /// All pages arrive.
    AllPagesArrive,
}

const ALL_MISHAPS: [Mishap; 6] =
    [Mishap::Cut, Mishap::Cancel, Mishap::TimeOut, Mishap::MachineFails, Mishap::LaneFails, Mishap::AllPagesArrive];

/// How a migration is meant to go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Scenario {
    plan: Plan,
    /// What the rounds decide; `None` without rounds, where the controller decides.
    ending: Option<Ending>,
    /// The controller asks for the handoff while the rounds are going on.
    impatient: bool,
}

const fn scenario(ending: Option<Ending>, hold: bool, impatient: bool) -> Scenario {
    Scenario { plan: Plan { rounds: ending.is_some(), hold }, ending, impatient }
}

const ALL_SCENARIOS: [Scenario; 6] = [
    scenario(None, false, false),
    scenario(None, true, false),
    scenario(Some(Ending::Postcopy), false, false),
    scenario(Some(Ending::StopAndCopy), false, false),
    scenario(Some(Ending::StopAndCopy), true, false),
    scenario(Some(Ending::StopAndCopy), false, true),
];

/// The answers that actions call for are queued beside the messages, in the order in which they arise.
struct World {
    scenario: Scenario,
    /// The rounds are going on, and write into the destination's memory.
    rounds: bool,
    /// The destination has been told which pages are missing, and whether the guest waits for them.
    complete_first: Option<bool>,
    source: SourceSession,
    destination: DestinationSession,
    to_source: VecDeque<SourceEvent>,
    to_destination: VecDeque<DestinationEvent>,
    link: bool,
    machine_fails: bool,
    source_runs: bool,
    source_may_run: bool,
    source_serves: bool,
    destination_runs: bool,
    commit_submitted: bool,
    /// The destination has said that it never ran and never will.
    refused: bool,
    commit_arrived: bool,
    pages_complete: bool,
    watch_registered: bool,
    source_outcome: Option<Outcome>,
    destination_outcome: Option<Outcome>,
    /// Each side waits for the other to join again.
    source_waits: bool,
    destination_waits: bool,
}

impl World {
    fn new(scenario: Scenario) -> Self {
        let wish = scenario.ending.is_none().then_some(SourceEvent::StartPostcopy);
        Self {
            scenario,
            rounds: false,
            complete_first: None,
            source: SourceSession::new(scenario.plan),
            destination: DestinationSession::new(),
            to_source: wish.into_iter().collect(),
            to_destination: VecDeque::from([DestinationEvent::Prepared]),
            link: true,
            machine_fails: false,
            source_runs: true,
            source_may_run: true,
            source_serves: false,
            destination_runs: false,
            commit_submitted: false,
            refused: false,
            commit_arrived: false,
            pages_complete: false,
            watch_registered: true,
            source_outcome: None,
            destination_outcome: None,
            source_waits: false,
            destination_waits: false,
        }
    }

    /// The controller joins a lost link again, if there is one; says whether there was.
    fn rejoin(&mut self) -> bool {
        if self.source_waits {
            self.to_source.push_back(SourceEvent::Rejoin);
        }
        self.source_waits
    }

    fn strike(&mut self, mishap: Mishap) {
        match mishap {
            Mishap::Nothing => {}
            Mishap::Cut => self.cut(),
            Mishap::Cancel => {
                if self.source.can_cancel().is_ok() {
                    self.to_source.push_back(SourceEvent::Cancel);
                }
            }
            Mishap::TimeOut => self.to_source.push_back(SourceEvent::HandoffTimedOut),
            Mishap::MachineFails => self.machine_fails = true,
            Mishap::LaneFails => self.to_destination.push_back(DestinationEvent::LaneLost("broken".into())),
            Mishap::AllPagesArrive => self.complete(),
        }
    }

    fn cut(&mut self) {
        if !std::mem::replace(&mut self.link, false) {
            return;
        }
        self.drop_under_way();
        self.to_source.push_back(SourceEvent::Lost("cut".into()));
        self.to_destination.push_back(DestinationEvent::Lost("cut".into()));
    }

    /// What the link carries is lost; what each side tells itself is not.
    fn drop_under_way(&mut self) {
        self.to_source.retain(|event| {
            matches!(event, SourceEvent::Paused | SourceEvent::StateSent | SourceEvent::Rejoin | SourceEvent::Cancel)
        });
        self.to_destination.retain(|event| {
            matches!(event, DestinationEvent::Loaded | DestinationEvent::Prepared | DestinationEvent::Complete)
        });
    }

    fn complete(&mut self) {
        if self.source_serves
            && self.complete_first.is_some()
            && self.link
            && !std::mem::replace(&mut self.pages_complete, true)
        {
            self.to_destination.push_back(DestinationEvent::Complete);
        }
    }

    /// One event on one side; `false` when there is none.
    fn step(&mut self, source_first: bool) -> bool {
        let source_turn = if source_first { !self.to_source.is_empty() } else { self.to_destination.is_empty() };
        if source_turn {
            let Some(event) = self.to_source.pop_front() else { return false };
            let (next, actions) = std::mem::take(&mut self.source).on(event);
            self.source = next;
            for action in actions {
                self.source_does(action);
                self.check();
            }
        } else {
            let Some(event) = self.to_destination.pop_front() else { return false };
            let (next, actions) = std::mem::take(&mut self.destination).on(event);
            self.destination = next;
            for action in actions {
                self.destination_does(action);
                self.check();
            }
        }
        true
    }

    fn tell_destination(&mut self, event: DestinationEvent) {
        if self.link {
            self.to_destination.push_back(event);
        }
    }

    fn tell_source(&mut self, event: SourceEvent) {
        if self.link {
            self.to_source.push_back(event);
        }
    }

    fn source_does(&mut self, action: SourceAction) {
        match action {
            SourceAction::Status(MigrationStatus::PreSwitchover) => {
                assert!(self.scenario.plan.hold && !self.source_runs);
                self.to_source.push_back(SourceEvent::Proceed);
            }
            SourceAction::Status(_) => {}
            SourceAction::BeginRounds => {
                self.rounds = true;
                let ending = self.scenario.ending.expect("rounds only where they are planned");
                if self.scenario.impatient {
                    self.to_source.push_back(SourceEvent::StartPostcopy);
                }
                self.to_source.push_back(SourceEvent::SwitchOver(ending));
            }
            SourceAction::EndRounds => self.rounds = false,
            SourceAction::Pause if std::mem::take(&mut self.machine_fails) => {
                self.to_source.push_back(SourceEvent::PauseFailed("tired".into()));
            }
            SourceAction::Pause => {
                self.source_runs = false;
                self.to_source.push_back(SourceEvent::Paused);
            }
            SourceAction::ServePages(ending) => {
                assert!(!self.source_runs, "pages are served while the guest changes them");
                self.source_serves = true;
                let complete_first = ending == Ending::StopAndCopy;
                self.tell_destination(DestinationEvent::Missing { complete_first });
                if self.link {
                    self.complete_first = Some(complete_first);
                }
            }
            SourceAction::PushPages => assert!(self.source_serves),
            SourceAction::SendState if std::mem::take(&mut self.machine_fails) => {
                self.to_source.push_back(SourceEvent::StateFailed("tired".into()));
            }
            SourceAction::SendState => {
                self.to_source.push_back(SourceEvent::StateSent);
                self.tell_destination(DestinationEvent::State);
            }
            SourceAction::SurrenderRightToRun => self.source_may_run = false,
            SourceAction::TakeBackRightToRun => {
                assert!(self.refused && !self.commit_arrived, "took the right to run back without a refusal");
                self.source_may_run = true;
            }
            SourceAction::SendCommit => {
                assert!(!self.source_may_run, "the right to run goes before the commit");
                self.commit_submitted = true;
                self.tell_destination(DestinationEvent::Commit);
            }
            SourceAction::AwaitRejoin { .. } => {
                assert!(self.commit_submitted, "waits for a destination that was never committed to");
                // The other side sees the lanes close.
                self.cut();
                self.to_source.retain(|event| !matches!(event, SourceEvent::Lost(_) | SourceEvent::LaneLost(_)));
                self.source_waits = true;
            }
            SourceAction::OpenLanes => {
                self.source_waits = false;
                if self.destination_waits {
                    (self.link, self.destination_waits) = (true, false);
                    self.to_destination.push_back(DestinationEvent::Rejoined);
                } else if matches!(self.destination_outcome, Some(Outcome::Unacknowledged(_))) {
                    self.link = true;
                    self.tell_source(SourceEvent::Standing { committed: true, complete: true });
                } else {
                    self.to_source.push_back(SourceEvent::RejoinFailed {
                        kind: FailureKind::Unreachable,
                        reason: "unknown session".into(),
                    });
                }
            }
            SourceAction::ServeAgain => {
                assert!(!self.source_runs, "pages are served while the guest changes them");
                self.source_serves = true;
            }
            SourceAction::AcknowledgeDrained => self.tell_destination(DestinationEvent::DrainedAcknowledged),
            SourceAction::SendAbort(reason) => self.tell_destination(DestinationEvent::Aborted(reason)),
            SourceAction::CloseLanes => self.source_serves = false,
            SourceAction::Resume => {
                assert!(self.source_may_run, "resumed without the right to run");
                assert!(!self.source_serves, "pages are served while the guest changes them");
                self.source_runs = true;
            }
            SourceAction::Finish(outcome) => assert!(self.source_outcome.replace(outcome).is_none()),
        }
    }

    fn destination_does(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Status(_) => {}
            DestinationAction::SendPrepared => self.tell_source(SourceEvent::Prepared),
            DestinationAction::LoadState if std::mem::take(&mut self.machine_fails) => {
                self.to_destination.push_back(DestinationEvent::LoadFailed("tired".into()));
            }
            DestinationAction::LoadState => self.to_destination.push_back(DestinationEvent::Loaded),
            DestinationAction::SendRestored => self.tell_source(SourceEvent::Restored),
            DestinationAction::SendRefused(reason) => {
                assert!(!self.commit_arrived, "refused a guest that ran");
                self.refused = true;
                self.tell_source(SourceEvent::Refused(reason));
            }
            DestinationAction::AwaitRejoin { .. } => {
                assert!(self.watch_registered || self.pages_complete, "waits without serving what is here");
                self.cut();
                self.to_destination
                    .retain(|event| !matches!(event, DestinationEvent::Lost(_) | DestinationEvent::LaneLost(_)));
                self.destination_waits = true;
            }
            DestinationAction::SendStanding { committed } => {
                assert_eq!(committed, self.commit_arrived);
                let complete = self.pages_complete;
                self.tell_source(SourceEvent::Standing { committed, complete });
            }
            DestinationAction::AttachLanes => assert!(self.commit_submitted, "attached before the source serves"),
            DestinationAction::EndWatch => {
                assert!(self.pages_complete, "the watch ended before the pages were complete");
                self.watch_registered = false;
            }
            DestinationAction::MapTheRest => assert!(self.destination_runs),
            DestinationAction::Run => {
                assert!(self.commit_submitted, "ran without the commit");
                let complete_first = self.complete_first.expect("ran without knowing what is missing");
                assert!(self.pages_complete || !complete_first, "ran before its memory was complete");
                assert!(!self.refused, "ran after the final refusal");
                self.commit_arrived = true;
                self.destination_runs = true;
            }
            DestinationAction::SendRunning => self.tell_source(SourceEvent::Running),
            DestinationAction::SendDrained => self.tell_source(SourceEvent::Drained),
            DestinationAction::FinishPager => {
                assert!(self.pages_complete, "the watch ended before the pages were complete");
                self.watch_registered = false;
            }
            DestinationAction::Abandon => {
                assert!(!self.commit_arrived, "abandoned a guest that ran");
                self.watch_registered = false;
            }
            DestinationAction::StopForGood(_) => self.destination_runs = false,
            DestinationAction::Finish(outcome) => assert!(self.destination_outcome.replace(outcome).is_none()),
        }
    }

    fn check(&self) {
        assert!(!(self.source_runs && self.destination_runs), "two runners");
        assert!(
            !(self.source_runs && self.commit_submitted) || self.refused,
            "the source runs after its commit, which nobody refused"
        );
        assert!(
            !self.destination_runs || self.watch_registered || self.pages_complete,
            "a running guest could read zeros"
        );
    }

    /// What must hold when nothing moves any more.
    fn check_end(&self, context: &str) {
        assert!(
            self.source_runs || self.commit_submitted,
            "{context}: the guest runs nowhere, and was never given away"
        );
        if self.source_outcome == Some(Outcome::Completed) {
            assert!(self.destination_runs && self.pages_complete, "{context}: success without a running guest");
        }
        if self.destination_outcome == Some(Outcome::Completed) {
            let source = &self.source_outcome;
            assert_eq!(*source, Some(Outcome::Completed), "{context}: the source does not know that it is done");
        }
        if matches!(self.destination_outcome, Some(Outcome::Unacknowledged(_))) {
            assert!(self.destination_runs && self.pages_complete, "{context}: alone without being complete");
        }
        if self.source_waits {
            assert!(!self.source_may_run, "{context}: it waits, and could run");
            let gone = self.destination_outcome.as_ref().is_some_and(|outcome| {
                matches!(outcome, Outcome::Failed(failure) if !self.commit_arrived || failure.guest == GuestAfter::Lost)
            });
            assert!(gone, "{context}: two that could have met wait for each other");
        }
        if let Some(Outcome::Failed(failure)) = &self.source_outcome {
            assert!(self.source_may_run && failure.guest == GuestAfter::OnSource, "{context}");
        }
        if let Some(Outcome::Failed(failure)) = &self.destination_outcome {
            match failure.guest {
                GuestAfter::OnSource => assert!(!self.commit_arrived, "{context}"),
                GuestAfter::Lost => assert!(self.commit_arrived && !self.destination_runs, "{context}"),
                other => panic!("{context}: a destination cannot know that the guest is {other:?}"),
            }
        }
    }
}

fn run(scenario: Scenario, mishaps: &[(usize, Mishap)], source_first: bool) -> World {
    let mut world = World::new(scenario);
    let mut joins = 0;
    for step in 0..400 {
        for (_, mishap) in mishaps.iter().filter(|(at, _)| *at == step) {
            world.strike(*mishap);
        }
        if !world.step(source_first) {
            // Nothing moves: the pages arrive in the end, if the link holds.
            let before = world.pages_complete;
            world.complete();
            if world.pages_complete == before && mishaps.iter().all(|(at, _)| *at <= step) {
                // One for each mishap that can cut the link, and one more.
                joins += 1;
                if joins > mishaps.len() + 1 || !world.rejoin() {
                    break;
                }
            }
        }
    }
    world.check_end(&format!("{scenario:?}, {mishaps:?}, source first: {source_first}"));
    world
}

#[test]
fn an_undisturbed_migration_completes_on_both_sides() {
    for scenario in ALL_SCENARIOS {
        for source_first in [true, false] {
            let world = run(scenario, &[(0, Mishap::Nothing)], source_first);
            assert_eq!(world.source_outcome, Some(Outcome::Completed), "{scenario:?}");
            assert_eq!(world.destination_outcome, Some(Outcome::Completed), "{scenario:?}");
            assert!(world.destination_runs && !world.source_runs && !world.watch_registered);
        }
    }
}

#[test]
fn one_mishap_at_any_step_leaves_one_guest() {
    for scenario in ALL_SCENARIOS {
        for mishap in ALL_MISHAPS {
            for at in 0..40 {
                for source_first in [true, false] {
                    run(scenario, &[(at, mishap)], source_first);
                }
            }
        }
    }
}

#[test]
fn two_mishaps_at_any_steps_leave_one_guest() {
    let pairs = ALL_MISHAPS.into_iter().flat_map(|first| ALL_MISHAPS.into_iter().map(move |second| (first, second)));
    for (first, second) in pairs {
        for scenario in ALL_SCENARIOS {
            for at in 0..20 {
                for later in at..20 {
                    for source_first in [true, false] {
                        run(scenario, &[(at, first), (later, second)], source_first);
                    }
                }
            }
        }
    }
}

#[test]
fn a_cancel_before_the_commit_leaves_the_guest_running() {
    for scenario in ALL_SCENARIOS {
        for at in 0..8 {
            let world = run(scenario, &[(at, Mishap::Cancel)], true);
            if world.source_outcome == Some(Outcome::Cancelled) {
                assert!(world.source_runs && !world.destination_runs, "cancelled at step {at}");
            }
        }
    }
}

fn committed() -> SourceSession {
    let steps = [SourceEvent::Prepared, SourceEvent::StartPostcopy, SourceEvent::Paused, SourceEvent::Restored];
    steps.into_iter().fold(SourceSession::new(Plan::default()), |session, event| session.on(event).0)
}

#[test]
fn a_final_refusal_that_crosses_the_commit_brings_the_guest_back() {
    let (_, actions) = committed().on(SourceEvent::Refused("a lane failed".into()));
    let back = actions.iter().position(|action| *action == SourceAction::TakeBackRightToRun).unwrap();
    assert_eq!(actions.get(back + 1), Some(&SourceAction::Resume));
}

#[test]
fn nothing_else_after_the_commit_lets_the_source_run() {
    let losses = ["the link was cut", "unknown session"].map(|reason| SourceEvent::Lost(reason.into()));
    let runs = |actions: &[SourceAction]| {
        actions.contains(&SourceAction::Resume) || actions.contains(&SourceAction::TakeBackRightToRun)
    };
    for event in losses.into_iter().chain([SourceEvent::LaneLost("cut".into()), SourceEvent::Drained]) {
        let (session, actions) = committed().on(event);
        assert!(session.is_lost().is_ok() && !runs(&actions));
        // Nor does a destination that does not know the session.
        let (session, _) = session.on(SourceEvent::Rejoin);
        let (session, actions) = session.on(SourceEvent::RejoinFailed {
            kind: FailureKind::Unreachable,
            reason: "session 1 is unknown here".into(),
        });
        assert!(session.is_lost().is_ok() && !runs(&actions));
    }
    // A decision of the rounds that comes late changes nothing.
    for late in [SourceEvent::SwitchOver(Ending::Postcopy), SourceEvent::GaveUp("late".into())] {
        assert_eq!(committed().on(late.clone()), (committed(), Vec::new()));
        let (running, _) = committed().on(SourceEvent::Running);
        assert_eq!(running.clone().on(late), (running, Vec::new()));
    }
    let (session, _) = committed().on(SourceEvent::Running);
    let (_, actions) = session.on(SourceEvent::Refused("after it said that it runs".into()));
    assert!(!actions.contains(&SourceAction::Resume));
}

#[test]
fn a_reclaim_runs_the_guest_only_where_the_link_is_lost() {
    let lost = committed().on(SourceEvent::Lost("cut".into())).0;
    let (session, actions) = lost.clone().on(SourceEvent::Reclaim);
    assert_eq!(session, SourceSession::Over);
    let back = actions.iter().position(|action| *action == SourceAction::TakeBackRightToRun).unwrap();
    assert_eq!(actions.get(back + 1), Some(&SourceAction::Resume));
    let joining = lost.on(SourceEvent::Rejoin).0;
    for session in [committed(), committed().on(SourceEvent::Running).0, joining] {
        assert_eq!(session.clone().on(SourceEvent::Reclaim), (session, Vec::new()));
    }
}

#[test]
fn a_destination_without_the_commit_runs_only_when_it_comes_over_the_next_link() {
    let mut session = DestinationSession::new();
    let missing = DestinationEvent::Missing { complete_first: false };
    for event in [DestinationEvent::Prepared, missing, DestinationEvent::State, DestinationEvent::Loaded] {
        session = session.on(event).0;
    }
    let runs = |actions: &[DestinationAction]| actions.contains(&DestinationAction::Run);
    let (session, actions) = session.on(DestinationEvent::Lost("cut".into()));
    assert!(matches!(session, DestinationSession::Paused(_)) && !runs(&actions), "{actions:?}");
    // Without a link there is nobody whose commit it could be.
    let (session, actions) = session.on(DestinationEvent::Commit);
    assert!(matches!(session, DestinationSession::Paused(_)) && actions.is_empty());
    let (session, actions) = session.on(DestinationEvent::Rejoined);
    assert!(actions.contains(&DestinationAction::SendStanding { committed: false }) && !runs(&actions));
    let (session, actions) = session.on(DestinationEvent::Commit);
    assert!(matches!(session, DestinationSession::Postcopy(_)) && runs(&actions));
    // Where it runs already, a second commit runs nothing.
    let (session, _) = session.on(DestinationEvent::Lost("cut again".into()));
    let (session, actions) = session.on(DestinationEvent::Rejoined);
    assert!(actions.contains(&DestinationAction::SendStanding { committed: true }));
    let (session, actions) = session.on(DestinationEvent::Commit);
    assert!(matches!(session, DestinationSession::Postcopy(_)) && !runs(&actions));
}

#[test]
fn a_join_that_is_told_of_twice_changes_nothing() {
    let mut session = DestinationSession::new();
    let missing = DestinationEvent::Missing { complete_first: false };
    for event in [DestinationEvent::Prepared, missing, DestinationEvent::State, DestinationEvent::Loaded] {
        session = session.on(event).0;
    }
    session = session.on(DestinationEvent::Lost("cut".into())).0;
    for event in [DestinationEvent::Rejoined, DestinationEvent::Commit, DestinationEvent::Complete] {
        session = session.on(event).0;
        assert_eq!(session.clone().on(DestinationEvent::Rejoined), (session.clone(), Vec::new()));
    }
    // Whatever its source says: a guest that is whole is not stopped.
    let (_, actions) = session.on(DestinationEvent::State);
    assert!(matches!(actions[..], [DestinationAction::FinishPager, DestinationAction::Finish(_)]), "{actions:?}");
}

#[test]
fn the_guest_runs_before_its_new_lanes_are_taken_up() {
    let mut session = DestinationSession::new();
    let missing = DestinationEvent::Missing { complete_first: false };
    for event in [DestinationEvent::Prepared, missing, DestinationEvent::State, DestinationEvent::Loaded] {
        session = session.on(event).0;
    }
    let session = session.on(DestinationEvent::Lost("cut".into())).0.on(DestinationEvent::Rejoined).0;
    let (_, actions) = session.on(DestinationEvent::Commit);
    // Where lanes cannot be taken up the rest of the list is not done, and the next commit runs nothing any more.
    assert_eq!(actions[..2], [DestinationAction::Run, DestinationAction::AttachLanes]);
}

#[test]
fn a_destination_that_refused_never_runs() {
    let mut session = DestinationSession::new();
    let missing = DestinationEvent::Missing { complete_first: false };
    for event in [DestinationEvent::Prepared, missing, DestinationEvent::State, DestinationEvent::Loaded] {
        session = session.on(event).0;
    }
    // A lost lane is no reason: the link may be gone with it, and the commit be lost on it.
    let waiting = session.clone().on(DestinationEvent::LaneLost("broken".into())).0;
    assert!(matches!(waiting, DestinationSession::Paused(_)));
    let rejoining = waiting.clone().on(DestinationEvent::Rejoined).0;
    let ends = [
        session.on(DestinationEvent::PagerBroken("broken".into())),
        rejoining.on(DestinationEvent::Closed),
        waiting.on(DestinationEvent::Closed),
    ];
    for (session, actions) in ends {
        assert!(actions.iter().any(|action| matches!(action, DestinationAction::SendRefused(_))));
        assert_eq!(session.on(DestinationEvent::Commit), (DestinationSession::Over, Vec::new()));
    }
}

#[test]
fn a_guest_that_is_here_is_not_ended_by_closing() {
    let mut session = DestinationSession::new();
    let missing = DestinationEvent::Missing { complete_first: false };
    let begun = [DestinationEvent::Prepared, missing, DestinationEvent::State, DestinationEvent::Loaded];
    for event in begun.into_iter().chain([DestinationEvent::Commit]) {
        session = session.on(event).0;
    }
    let paused = session.clone().on(DestinationEvent::Lost("cut".into())).0;
    let rejoining = paused.clone().on(DestinationEvent::Rejoined).0;
    let drained = session.clone().on(DestinationEvent::Complete).0;
    for session in [session, paused, rejoining, drained] {
        assert_eq!(session.clone().on(DestinationEvent::Closed), (session, Vec::new()));
    }
}

#[test]
fn a_commit_without_the_state_runs_nothing() {
    let missing = || DestinationEvent::Missing { complete_first: true };
    for events in [
        vec![DestinationEvent::Prepared],
        vec![DestinationEvent::Prepared, missing()],
        vec![DestinationEvent::Prepared, missing(), DestinationEvent::State],
        // Loaded, but the guest was to wait for its memory.
        vec![DestinationEvent::Prepared, missing(), DestinationEvent::State, DestinationEvent::Loaded],
    ] {
        let session = events.into_iter().fold(DestinationSession::new(), |session, event| session.on(event).0);
        let (session, actions) = session.on(DestinationEvent::Commit);
        assert_eq!(session, DestinationSession::Over);
        assert!(!actions.contains(&DestinationAction::Run), "{actions:?}");
    }
}

#[test]
fn a_state_before_the_missing_pages_is_refused() {
    let session = DestinationSession::new().on(DestinationEvent::Prepared).0;
    let (session, actions) = session.on(DestinationEvent::State);
    assert_eq!(session, DestinationSession::Over);
    assert!(actions.iter().any(|action| matches!(action, DestinationAction::SendRefused(_))));
}

#[test]
fn rounds_that_do_not_converge_leave_the_guest_running() {
    let plan = Plan { rounds: true, hold: false };
    let session = SourceSession::new(plan).on(SourceEvent::Prepared).0;
    let (session, actions) = session.on(SourceEvent::GaveUp("it writes too fast".into()));
    assert_eq!(session, SourceSession::Over);
    let failed = |action: &SourceAction| matches!(action, SourceAction::Finish(Outcome::Failed(failure)) if failure.guest == GuestAfter::OnSource);
    assert!(actions.iter().any(failed) && !actions.contains(&SourceAction::Resume), "{actions:?}");
}
