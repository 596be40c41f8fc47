//! Who may run: the flags of a machine and what may change them. Pure; [`crate::control`] keeps one under its lock.
//!
//! A guest runs only while all of this holds: the machine has the right to run, its user has not paused it, no
//! migration holds it, and nothing has ended it. The states that a controller sees are derived from these flags, so
//! that no two of them can contradict each other.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A machine's state in QEMU's words.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Built to boot, not started yet.
    Prelaunch,
    /// Waits for a migration to bring its memory and state.
    Inmigrate,
    /// The guest runs.
    Running,
    /// Paused by its user, or arrived and not started.
    Paused,
    /// Paused for a handoff.
    FinishMigrate,
    /// Its guest has moved away, or was saved and stands still since.
    Postmigrate,
    /// Stopped for good by an error.
    InternalError,
    /// The guest has ended, or this machine was told to.
    Shutdown,
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prelaunch => "prelaunch",
            Self::Inmigrate => "inmigrate",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::FinishMigrate => "finish-migrate",
            Self::Postmigrate => "postmigrate",
            Self::InternalError => "internal-error",
            Self::Shutdown => "shutdown",
        })
    }
}

/// Why a machine is over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExitReason {
    /// The guest wrote to the debug-exit port; this is the exit status that follows from what it wrote.
    Guest(i32),
    /// Its controller said so.
    Quit,
    /// The guest was reset: by the keyboard controller or a triple fault.
    Shutdown,
    /// It cannot go on, or never could.
    Failed(String),
}

/// A machine may not do what was asked of it. Nothing has changed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Refusal {
    /// The guest lives elsewhere now.
    #[error("cannot start the guest: it has moved to another host, and may run only there")]
    MovedAway,
    /// The guest is not here yet.
    #[error("cannot start or stop the guest: it has not arrived yet; wait for the incoming migration")]
    NotArrived,
    /// In the middle of a handoff.
    #[error("cannot start or stop the guest during a handoff; wait for it to end, or cancel the migration first")]
    Handoff,
    /// It is over.
    #[error("the guest cannot run any more: {reason}")]
    Ended {
        /// Why.
        reason: String,
    },
    /// It was saved, and its controller has not let it go on.
    #[error("the guest was saved to a file and stands still since; `cont` lets it go on here")]
    Saved,
    /// A migration asked for what only a paused machine does.
    #[error("the machine must be paused for a migration first")]
    NotPaused,
    /// State was to be loaded over a guest's own.
    #[error("only a machine that waits for a migration and has no state yet can be given one")]
    NotIncoming,
}

/// What keeps the guest from running, as far as migrations are concerned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hold {
    None,
    /// A source's handoff: between pause and resume or surrender.
    Outgoing,
    /// The guest was saved: until its controller lets it go on.
    Saved,
    /// A destination: from its beginning until resume.
    Incoming {
        /// Whether the state has come.
        loaded: bool,
    },
}

/// The flags.
#[derive(Clone, Debug)]
pub struct RunFlags {
    right_to_run: bool,
    started: bool,
    paused_by_user: bool,
    hold: Hold,
    broken: Option<String>,
    exit: Option<ExitReason>,
}

impl RunFlags {
    /// A machine that boots: it has the right to run, and waits for its user's word.
    #[must_use]
    pub fn booting() -> Self {
        Self { right_to_run: true, started: false, paused_by_user: true, hold: Hold::None, broken: None, exit: None }
    }

    /// A machine that waits for a migration.
    #[must_use]
    pub fn incoming() -> Self {
        Self { right_to_run: false, paused_by_user: false, hold: Hold::Incoming { loaded: false }, ..Self::booting() }
    }

    /// Whether vCPUs may enter the guest.
    #[must_use]
    pub fn may_run(&self) -> bool {
        self.right_to_run && !self.paused_by_user && self.hold == Hold::None && !self.has_ended()
    }

    /// The state that a controller sees.
    #[must_use]
    pub fn state(&self) -> RunState {
        match (&self.exit, self.hold) {
            (Some(ExitReason::Failed(_)), _) => RunState::InternalError,
            (Some(_), _) => RunState::Shutdown,
            (None, _) if self.broken.is_some() => RunState::InternalError,
            (None, Hold::Incoming { .. }) if !self.right_to_run => RunState::Inmigrate,
            (None, Hold::Outgoing) if self.right_to_run => RunState::FinishMigrate,
            (None, Hold::Saved) => RunState::Postmigrate,
            _ if !self.right_to_run => RunState::Postmigrate,
            (None, Hold::None) if self.may_run() => RunState::Running,
            (None, Hold::None) if !self.started => RunState::Prelaunch,
            _ => RunState::Paused,
        }
    }

    /// Why the machine was stopped for good, if it was.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        match &self.exit {
            Some(ExitReason::Failed(reason)) => Some(reason.clone()),
            _ => self.broken.clone(),
        }
    }

    /// How the machine ended, if it has.
    #[must_use]
    pub fn exit(&self) -> Option<&ExitReason> {
        self.exit.as_ref()
    }

    /// Its user pauses it. Paused already is no error. A guest that has not arrived yet arrives paused, as with QEMU.
    ///
    /// # Errors
    /// During a handoff.
    pub fn stop(&mut self) -> Result<(), Refusal> {
        match self.hold {
            Hold::Outgoing if self.right_to_run => Err(Refusal::Handoff),
            _ => {
                self.paused_by_user = true;
                Ok(())
            }
        }
    }

    /// Its user starts it, or lets it go on. Running already is no error. A guest that has arrived paused starts; one that was to arrive
    /// paused is not to any more.
    ///
    /// # Errors
    /// Without the right to run, during a handoff, and after its end.
    pub fn cont(&mut self) -> Result<(), Refusal> {
        self.check_alive()?;
        match self.hold {
            Hold::Incoming { .. } if !self.right_to_run && std::mem::take(&mut self.paused_by_user) => return Ok(()),
            Hold::Incoming { .. } if !self.right_to_run => return Err(Refusal::NotArrived),
            _ if !self.right_to_run => return Err(Refusal::MovedAway),
            Hold::Outgoing => return Err(Refusal::Handoff),
            Hold::Incoming { .. } | Hold::Saved | Hold::None => {}
        }
        self.hold = Hold::None;
        self.paused_by_user = false;
        self.started = true;
        Ok(())
    }

    /// A migration pauses it. Answers whether the guest was running until now.
    ///
    /// # Errors
    /// Without the right to run, and after its end.
    pub fn pause(&mut self) -> Result<bool, Refusal> {
        self.check_alive()?;
        match self.hold {
            Hold::Incoming { .. } => Err(Refusal::NotArrived),
            _ if !self.right_to_run => Err(Refusal::MovedAway),
            Hold::Outgoing => Err(Refusal::Handoff),
            Hold::Saved => Err(Refusal::Saved),
            Hold::None => {
                let was_running = self.may_run();
                self.hold = Hold::Outgoing;
                Ok(was_running)
            }
        }
    }

    /// A migration lets it go on, unless its user had paused it.
    ///
    /// # Errors
    /// Without the right to run, and after its end.
    pub fn resume(&mut self) -> Result<(), Refusal> {
        self.check_alive()?;
        if !self.right_to_run {
            return Err(match self.hold {
                Hold::Incoming { .. } => Refusal::NotArrived,
                _ => Refusal::MovedAway,
            });
        }
        match self.hold {
            Hold::Saved => return Err(Refusal::Saved),
            Hold::Incoming { .. } => self.started = true,
            Hold::Outgoing | Hold::None => {}
        }
        self.hold = Hold::None;
        Ok(())
    }

    /// The guest that a migration has paused was saved. It stands still until its user lets it go on, with the right to run.
    pub fn keep_saved(&mut self) {
        if self.hold == Hold::Outgoing && self.right_to_run {
            self.hold = Hold::Saved;
        }
    }

    /// Whether it was saved, and stands still since.
    #[must_use]
    pub fn is_saved(&self) -> bool {
        self.hold == Hold::Saved
    }

    /// Gives up the right to run.
    pub fn surrender(&mut self) {
        self.right_to_run = false;
    }

    /// Takes back the right to run that a handoff gave up, the destination having refused it for good. Answers whether
    /// there was one to take back.
    #[must_use]
    pub fn take_back(&mut self) -> bool {
        if self.hold == Hold::Outgoing {
            self.right_to_run = true;
        }
        self.right_to_run
    }

    /// Whether a paused machine's state may be read.
    ///
    /// # Errors
    /// When no migration has paused it.
    pub fn check_saving(&self) -> Result<(), Refusal> {
        if self.hold == Hold::Outgoing { Ok(()) } else { Err(Refusal::NotPaused) }
    }

    /// Whether a state may be loaded: once, and only into a machine that waits for one.
    ///
    /// # Errors
    /// Otherwise.
    pub fn check_loading(&self) -> Result<(), Refusal> {
        self.check_alive()?;
        if self.hold == (Hold::Incoming { loaded: false }) && !self.right_to_run {
            Ok(())
        } else {
            Err(Refusal::NotIncoming)
        }
    }

    /// The state has been loaded in full.
    pub fn loaded(&mut self) {
        if matches!(self.hold, Hold::Incoming { .. }) {
            self.hold = Hold::Incoming { loaded: true };
        }
    }

    /// Takes the right to run. Answers whether it did: a machine without a state never gets it.
    #[must_use]
    pub fn take(&mut self) -> bool {
        if self.hold == (Hold::Incoming { loaded: true }) {
            self.right_to_run = true;
        }
        self.right_to_run
    }

    /// Stops the guest for good, but not the machine: it answers its controller on. The first reason stays.
    pub fn break_down(&mut self, reason: &str) {
        self.broken.get_or_insert_with(|| reason.to_owned());
    }

    /// Ends the machine. The first end stays.
    pub fn end(&mut self, reason: ExitReason) {
        self.exit.get_or_insert(reason);
    }

    fn has_ended(&self) -> bool {
        self.broken.is_some() || self.exit.is_some()
    }

    /// Whether the guest can still run, some time.
    ///
    /// # Errors
    /// When it has ended, or was stopped for good; the reason is in it.
    pub fn check_alive(&self) -> Result<(), Refusal> {
        let reason = match (&self.exit, &self.broken) {
            (None, None) => return Ok(()),
            (Some(ExitReason::Failed(reason)), _) | (None, Some(reason)) => reason.clone(),
            (Some(ExitReason::Guest(code)), _) => format!("it has ended itself with exit status {code}"),
            (Some(ExitReason::Quit), _) => "its controller has ended it".to_owned(),
            (Some(ExitReason::Shutdown), _) => "it has shut down".to_owned(),
        };
        Err(Refusal::Ended { reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> RunFlags {
        let mut flags = RunFlags::booting();
        flags.cont().unwrap();
        flags
    }

    fn arrived() -> RunFlags {
        let mut flags = RunFlags::incoming();
        flags.loaded();
        assert!(flags.take());
        flags
    }

    #[test]
    fn a_booting_machine_waits_for_cont() {
        let mut flags = RunFlags::booting();
        assert_eq!(flags.state(), RunState::Prelaunch);
        assert!(!flags.may_run());
        flags.cont().unwrap();
        assert_eq!(flags.state(), RunState::Running);
        flags.stop().unwrap();
        flags.stop().unwrap();
        assert_eq!(flags.state(), RunState::Paused);
        assert!(!flags.may_run());
        flags.cont().unwrap();
        assert!(flags.may_run());
    }

    #[test]
    fn nothing_starts_a_guest_that_has_moved_away() {
        let mut flags = running();
        assert!(flags.pause().unwrap());
        flags.surrender();
        assert_eq!(flags.state(), RunState::Postmigrate);
        assert_eq!(flags.cont(), Err(Refusal::MovedAway));
        assert_eq!(flags.resume(), Err(Refusal::MovedAway));
        assert_eq!(flags.pause(), Err(Refusal::MovedAway));
        assert!(!flags.take());
        flags.stop().unwrap();
        assert!(!flags.may_run());
        assert_eq!(flags.state(), RunState::Postmigrate);
    }

    #[test]
    fn a_refused_guest_comes_back_and_a_booting_one_gains_nothing() {
        let mut flags = running();
        assert!(flags.pause().unwrap());
        flags.surrender();
        assert!(flags.take_back());
        flags.resume().unwrap();
        assert_eq!(flags.state(), RunState::Running);
        assert!(!RunFlags::incoming().take_back(), "a machine that waits for a guest has nothing to take back");
    }

    #[test]
    fn nothing_starts_a_guest_that_has_not_arrived() {
        let mut flags = RunFlags::incoming();
        assert_eq!(flags.state(), RunState::Inmigrate);
        assert!(!flags.take(), "the right without a state");
        for attempt in [RunFlags::cont, RunFlags::resume] {
            assert_eq!(attempt(&mut flags), Err(Refusal::NotArrived));
        }
        assert_eq!(flags.pause(), Err(Refusal::NotArrived));
        flags.loaded();
        assert_eq!(flags.resume(), Err(Refusal::NotArrived), "a state without the right");
        assert!(!flags.may_run());
    }

    #[test]
    fn a_guest_that_has_arrived_runs_on_resume_or_cont() {
        for start in [RunFlags::resume, RunFlags::cont] {
            let mut flags = arrived();
            assert_eq!(flags.state(), RunState::Paused);
            assert!(!flags.may_run());
            start(&mut flags).unwrap();
            assert_eq!(flags.state(), RunState::Running);
        }
    }

    #[test]
    fn a_guest_whose_user_stops_it_before_it_has_arrived_arrives_paused() {
        let arrive = |flags: &mut RunFlags| {
            flags.loaded();
            assert!(flags.take());
            flags.resume().unwrap();
        };
        let mut flags = RunFlags::incoming();
        flags.stop().unwrap();
        assert_eq!(flags.state(), RunState::Inmigrate);
        arrive(&mut flags);
        assert_eq!((flags.state(), flags.may_run()), (RunState::Paused, false));
        flags.cont().unwrap();
        assert!(flags.may_run());
        let mut flags = RunFlags::incoming();
        flags.stop().unwrap();
        flags.cont().unwrap();
        assert_eq!(flags.state(), RunState::Inmigrate, "it is not here for that");
        arrive(&mut flags);
        assert!(flags.may_run());
    }

    #[test]
    fn a_guest_that_has_arrived_can_leave_again() {
        let mut flags = arrived();
        flags.resume().unwrap();
        assert!(flags.pause().unwrap());
        flags.check_saving().unwrap();
        flags.surrender();
        assert_eq!(flags.state(), RunState::Postmigrate);
    }

    #[test]
    fn a_handoff_keeps_the_user_out_and_keeps_what_the_user_had_set() {
        let mut flags = running();
        flags.stop().unwrap();
        assert!(!flags.pause().unwrap(), "was not running");
        assert_eq!(flags.state(), RunState::FinishMigrate);
        assert_eq!(flags.cont(), Err(Refusal::Handoff));
        assert_eq!(flags.stop(), Err(Refusal::Handoff));
        assert_eq!(flags.pause(), Err(Refusal::Handoff));
        flags.resume().unwrap();
        assert_eq!(flags.state(), RunState::Paused);
        flags.cont().unwrap();
        assert!(flags.may_run());
    }

    #[test]
    fn a_saved_guest_stands_still_until_its_user_lets_it_go_on() {
        let mut flags = running();
        flags.keep_saved();
        assert!(flags.may_run(), "nothing has paused it");
        assert!(flags.pause().unwrap());
        flags.keep_saved();
        assert!(flags.is_saved() && !flags.may_run());
        assert_eq!(flags.state(), RunState::Postmigrate);
        assert_eq!(flags.pause(), Err(Refusal::Saved));
        assert_eq!(flags.resume(), Err(Refusal::Saved));
        flags.stop().unwrap();
        assert_eq!(flags.state(), RunState::Postmigrate);
        flags.cont().unwrap();
        assert_eq!(flags.state(), RunState::Running);
        assert!(flags.pause().unwrap(), "it can be saved again");
        flags.surrender();
        flags.keep_saved();
        assert!(!flags.is_saved(), "what was given away stays so");
    }

    #[test]
    fn a_state_is_loaded_once_and_saved_only_when_paused() {
        assert_eq!(running().check_saving(), Err(Refusal::NotPaused));
        assert_eq!(running().check_loading(), Err(Refusal::NotIncoming));
        let mut flags = RunFlags::incoming();
        flags.check_loading().unwrap();
        flags.loaded();
        assert_eq!(flags.check_loading(), Err(Refusal::NotIncoming));
        assert_eq!(arrived().check_loading(), Err(Refusal::NotIncoming));
    }

    #[test]
    fn the_first_reason_stays_and_nothing_runs_after_it() {
        let mut flags = running();
        flags.break_down("memory lost");
        flags.break_down("something else");
        assert_eq!(flags.reason().as_deref(), Some("memory lost"));
        assert_eq!(flags.state(), RunState::InternalError);
        assert!(!flags.may_run());
        assert!(flags.exit().is_none());
        assert_eq!(flags.cont(), Err(Refusal::Ended { reason: "memory lost".to_owned() }));
        flags.end(ExitReason::Quit);
        flags.end(ExitReason::Shutdown);
        assert_eq!(flags.exit(), Some(&ExitReason::Quit));
        assert_eq!(flags.state(), RunState::Shutdown);
    }

    #[test]
    fn the_names_are_the_same_in_both_writings() {
        for (state, name) in [(RunState::FinishMigrate, "finish-migrate"), (RunState::InternalError, "internal-error")]
        {
            assert_eq!(state.to_string(), name);
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{name}\""));
        }
    }
}
