//! Whose virtual machines are moved, one file each. All are processes that speak QMP and print the guest's serial port
//! on their standard output.

use std::path::{Path, PathBuf};
use std::process::Command;

use switchover_hybrid::report::SideReport;

use super::run_error::RunError;
use crate::qmp_client::QmpClient;
use crate::size::Size;

mod switchover;

pub use switchover::Switchover;

/// A machine to be started, twice.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The guest's ELF file.
    pub kernel: PathBuf,
    /// Its command line.
    pub append: String,
    /// Its memory.
    pub memory: Size,
    /// Its vCPUs.
    pub vcpus: u8,
}

/// A virtual machine monitor that can be measured.
pub trait Vmm {
    /// Its name in reports.
    fn name(&self) -> &'static str;

    /// The command of a source that boots `machine`.
    fn source(&self, machine: &Machine, qmp: &Path) -> Command;

    /// The command of a destination that waits for `migrate-incoming`.
    fn destination(&self, machine: &Machine, qmp: &Path) -> Command;

    /// What one side, which is `who`, knows of the migration that is over; `None` where it keeps no such report.
    ///
    /// # Errors
    /// When it should have one and has not.
    fn report(&self, who: &'static str, qmp: &mut QmpClient) -> Result<Option<SideReport>, RunError>;
}
