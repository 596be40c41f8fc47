//! A controller without a machine behind it, that remembers what it was told.

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use switchover_hybrid::lazy::Lazily;
use switchover_hybrid::progress::Progress;
use switchover_hybrid::report::SideReport;
use switchover_hybrid::saving::How;
use switchover_hybrid::security::Security;
use switchover_hybrid::settings::{Settings, Tunables};
use switchover_hybrid::status::MigrationStatus;
use switchover_wire::address::Address;

use super::controller::{ControlError, Controller, MigrationView, WrittenPagesMode};
use crate::dirty_rate::limit::Limit;
use crate::dirty_rate::{Measurement, Plan, Standing};
use crate::run_state::RunState;

/// The fake. Its migration does what the test sets it to.
pub struct Fake {
    state: Mutex<State>,
}

struct State {
    run_state: RunState,
    migration: Option<MigrationView>,
    began: Option<Settings>,
    tuned: Option<Tunables>,
    measurement: Option<Measurement>,
    limit: Option<Limit>,
    told: Vec<String>,
}

impl Fake {
    pub fn new(run_state: RunState) -> Self {
        Self {
            state: Mutex::new(State {
                run_state,
                migration: None,
                began: None,
                tuned: None,
                measurement: None,
                limit: None,
                told: Vec::new(),
            }),
        }
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

    /// The settings of the last migration.
    pub fn began(&self) -> Settings {
        self.state.lock().unwrap().began.unwrap()
    }

    /// What was last changed under way.
    pub fn tuned(&self) -> Option<Tunables> {
        self.state.lock().unwrap().tuned
    }

    /// Ends its measurement.
    pub fn measured(&self, bytes_per_second: u64) {
        let mut state = self.state.lock().unwrap();
        state.measurement.as_mut().unwrap().standing = Standing::Measured { bytes_per_second };
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

    fn migrate(&self, to: Address, settings: Settings, _: Security) -> Result<(), ControlError> {
        self.note(format!("migrate to {to} over {} at {}", settings.bulk_lanes, settings.bandwidth.postcopy));
        self.state.lock().unwrap().began = Some(settings);
        self.stand(MigrationStatus::Active);
        Ok(())
    }

    fn listen(&self, at: &Address, _: Settings, _: Security) -> Result<(), ControlError> {
        self.note(format!("listen at {at}"));
        if self.run_state() == RunState::Inmigrate { Ok(()) } else { Err(ControlError::NotIncoming) }
    }

    fn save(&self, to: &Path, how: How) -> Result<(), ControlError> {
        self.note(format!("save to {}, {how:?}", to.display()));
        self.stand(MigrationStatus::Active);
        Ok(())
    }

    fn checkpoint(&self, to: &Path, base: Option<&Path>) -> Result<(), ControlError> {
        self.note(format!("checkpoint to {}, on {base:?}", to.display()));
        self.stand(MigrationStatus::Active);
        Ok(())
    }

    fn restore(&self, from: &Path) -> Result<(), ControlError> {
        self.note(format!("restore from {}", from.display()));
        if self.run_state() == RunState::Inmigrate { Ok(()) } else { Err(ControlError::NotIncoming) }
    }

    fn restore_lazily(&self, from: &Path, how: Lazily) -> Result<(), ControlError> {
        self.note(format!("restore lazily from {}, {how:?}", from.display()));
        if self.run_state() == RunState::Inmigrate { Ok(()) } else { Err(ControlError::NotIncoming) }
    }

    fn start_postcopy(&self) -> Result<(), ControlError> {
        if self.migration().is_none() {
            return Err(ControlError::NothingToHandOver);
        }
        self.stand(MigrationStatus::PostcopyActive);
        Ok(())
    }

    fn continue_switchover(&self) -> Result<(), ControlError> {
        self.note("continue".to_owned());
        self.stand(MigrationStatus::Device);
        Ok(())
    }

    fn pause_migration(&self) -> Result<(), ControlError> {
        match self.migration() {
            Some(view) if view.progress.status == MigrationStatus::PostcopyActive => {
                self.stand(MigrationStatus::PostcopyPaused);
                Ok(())
            }
            _ => Err(ControlError::NothingToPause),
        }
    }

    fn resume_migration(&self, to: Address, settings: Settings, _: Security) -> Result<(), ControlError> {
        if self.migration().is_none_or(|view| view.progress.status != MigrationStatus::PostcopyPaused) {
            return Err(ControlError::NothingToResume);
        }
        self.note(format!("resume to {to} over {} at {}", settings.bulk_lanes, settings.bandwidth.postcopy));
        self.stand(MigrationStatus::PostcopyActive);
        Ok(())
    }

    fn recover(&self, at: &Address) -> Result<(), ControlError> {
        if self.migration().is_none_or(|view| view.progress.status != MigrationStatus::PostcopyPaused) {
            return Err(ControlError::NothingToRecover);
        }
        self.note(format!("recover at {at}"));
        Ok(())
    }

    fn reclaim(&self) -> Result<(), ControlError> {
        if self.migration().is_none_or(|view| view.progress.status != MigrationStatus::PostcopyPaused) {
            return Err(ControlError::NothingToReclaim);
        }
        self.note("reclaim".to_owned());
        Ok(())
    }

    fn set_tunables(&self, tunables: Tunables) {
        self.state.lock().unwrap().tuned = Some(tunables);
    }

    fn set_silence(&self, silence: Duration) {
        self.note(format!("silence of {silence:?}"));
    }

    fn blockers(&self) -> Vec<String> {
        self.dirty_limit().map(|_| "a limit is held".to_owned()).into_iter().collect()
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

    fn vcpus(&self) -> u32 {
        2
    }

    fn written_pages_mode(&self) -> WrittenPagesMode {
        WrittenPagesMode::Ring
    }

    fn measure_dirty_rate(&self, plan: Plan) -> Result<(), ControlError> {
        let started = std::time::UNIX_EPOCH + std::time::Duration::from_millis(1_700_000_000_900);
        let measurement = Measurement { plan, started, standing: Standing::Measuring };
        self.state.lock().unwrap().measurement = Some(measurement);
        Ok(())
    }

    fn dirty_rate(&self) -> Option<Measurement> {
        self.state.lock().unwrap().measurement
    }

    fn limit_dirty_rate(&self, bytes_per_second: Option<u64>) -> Result<(), ControlError> {
        let limit = bytes_per_second.map(|bytes_per_second| Limit { bytes_per_second, written_per_second: 5 << 20 });
        self.state.lock().unwrap().limit = limit;
        Ok(())
    }

    fn dirty_limit(&self) -> Option<Limit> {
        self.state.lock().unwrap().limit
    }

    fn vcpu_dirty_rates(&self) -> Option<Vec<u64>> {
        // Below 4 MiB a second it cannot tell its two vCPUs apart.
        let limit = self.dirty_limit()?;
        (limit.bytes_per_second >= 4 << 20).then(|| vec![1 << 20, 4 << 20])
    }
}
