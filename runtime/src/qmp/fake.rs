//! A controller without a machine behind it, that remembers what it was told.

use std::sync::Mutex;

use switchover_hybrid::progress::Progress;
use switchover_hybrid::report::SideReport;
use switchover_hybrid::settings::Settings;
use switchover_hybrid::status::MigrationStatus;
use switchover_wire::address::Address;

use super::controller::{ControlError, Controller, MigrationView};
use crate::run_state::RunState;

/// The fake. Its migration does what the test sets it to.
pub struct Fake {
    state: Mutex<State>,
}

struct State {
    run_state: RunState,
    migration: Option<MigrationView>,
    told: Vec<String>,
}

impl Fake {
    pub fn new(run_state: RunState) -> Self {
        Self { state: Mutex::new(State { run_state, migration: None, told: Vec::new() }) }
    }

    /// What it was told to do, in order.
    pub fn told(&self) -> Vec<String> {
        self.state.lock().unwrap().told.clone()
    }

    /// Makes its migration stand here.
    pub fn stand(&self, status: MigrationStatus) {
        let progress = Progress { status, ..Progress::default() };
        self.state.lock().unwrap().migration = Some(MigrationView { progress, listening_at: None });
    }

    fn note(&self, what: String) {
        self.state.lock().unwrap().told.push(what);
    }
}

impl Controller for Fake {
    fn run_state(&self) -> RunState {
        self.state.lock().unwrap().run_state
    }

    fn stop(&self) -> Result<(), ControlError> {
        self.note("stop".to_owned());
        self.state.lock().unwrap().run_state = RunState::Paused;
        Ok(())
    }

    fn cont(&self) -> Result<(), ControlError> {
        self.note("cont".to_owned());
        self.state.lock().unwrap().run_state = RunState::Running;
        Ok(())
    }

    fn may_quit(&self) -> Result<(), ControlError> {
        match self.migration() {
            Some(view) if view.progress.status == MigrationStatus::PostcopyActive => {
                Err(ControlError::StillNeeded { remaining: 4096 })
            }
            _ => Ok(()),
        }
    }

    fn quit(&self) {
        self.note("quit".to_owned());
    }

    fn migrate(&self, to: Address, settings: Settings) -> Result<(), ControlError> {
        self.note(format!("migrate to {to} over {} at {}", settings.bulk_lanes, settings.bandwidth.postcopy));
        self.stand(MigrationStatus::Active);
        Ok(())
    }

    fn listen(&self, at: &Address, _: Settings) -> Result<(), ControlError> {
        self.note(format!("listen at {at}"));
        if self.run_state() == RunState::Inmigrate { Ok(()) } else { Err(ControlError::NotIncoming) }
    }

    fn start_postcopy(&self) -> Result<(), ControlError> {
        if self.migration().is_none() {
            return Err(ControlError::NothingToHandOver);
        }
        self.stand(MigrationStatus::PostcopyActive);
        Ok(())
    }

    fn cancel(&self) -> Result<(), ControlError> {
        self.note("cancel".to_owned());
        Ok(())
    }

    fn migration(&self) -> Option<MigrationView> {
        self.state.lock().unwrap().migration.clone()
    }

    fn report(&self) -> Option<SideReport> {
        None
    }
}
