//! Whose virtual machines are moved, one file each. All are processes that speak QMP and print the guest's serial port
//! on their standard output.
//!
//! A further peer is a file with a [`Peer`] in it, and its line in `PEERS`.

use std::path::{Path, PathBuf};
use std::process::Command;

use switchover_hybrid::report::SideReport;

use super::modes::Mode;
use super::run_error::RunError;
use crate::failure::Failure;
use crate::qmp_client::QmpClient;
use crate::size::Size;

mod qemu;
mod switchover;

pub use switchover::{Lanes, Switchover};

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

    /// Whether a thread of this name is one of its vCPUs.
    fn is_vcpu_thread(&self, name: &str) -> bool;

    /// The command of a source that boots `machine`.
    fn source(&self, machine: &Machine, qmp: &Path) -> Command;

    /// The command of a destination that waits for `migrate-incoming`.
    fn destination(&self, machine: &Machine, qmp: &Path) -> Command;

    /// What one side, which is `who`, knows of the migration that is over; `None` where it keeps no such report.
    ///
    /// # Errors
    /// When it should have one and has not.
    fn report(&self, who: &'static str, qmp: &mut QmpClient) -> Result<Option<SideReport>, RunError>;

    /// What can be had of a VMM that keeps no such report, when its guest has moved. Nothing where it does.
    ///
    /// # Errors
    /// When it does not answer as it should.
    fn account(&self, _source: &mut QmpClient, _destination: &mut QmpClient) -> Result<Account, RunError> {
        Ok(Account::default())
    }
}

/// What a VMM without reports tells of a migration. What it does not tell is absent; `docs/report.md` says what each is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Account {
    /// Its own figure of how long the guest stood still.
    pub own_downtime_ns: Option<u64>,
    /// The whole migration.
    pub total_ns: Option<u64>,
    /// Its set-up.
    pub setup_ns: Option<u64>,
    /// From when pages could come after the handoff until all had; absent where that was there before.
    pub drain_ns: Option<u64>,
    /// What crossed in that time.
    pub drain_bytes: Option<u64>,
    /// What crossed altogether.
    pub wire_bytes: Option<u64>,
    /// Pages that the destination asked for.
    pub page_requests: Option<u64>,
}

/// A VMM to measure beside this one.
#[derive(Debug)]
pub struct Peer {
    /// Its name on the command line and in reports.
    pub name: &'static str,
    /// Its name for people.
    pub title: &'static str,
    /// Every way in which it is to move guests.
    pub modes: &'static [&'static dyn Mode],
    /// Looks for it on this host; says what to install where it is not there or too old.
    pub find: fn() -> Result<Found, Failure>,
}

/// A peer that is there.
pub struct Found {
    /// What drives it.
    pub vmm: Box<dyn Vmm>,
    /// Its version, in its own words.
    pub version: String,
    /// Its program.
    pub program: PathBuf,
}

/// All of them.
const PEERS: &[Peer] = &[qemu::PEER];

/// The peer called `name`.
///
/// # Errors
/// When there is none.
pub fn peer(name: &str) -> Result<&'static Peer, Failure> {
    PEERS.iter().find(|peer| peer.name == name).ok_or_else(|| {
        let names: Vec<_> = PEERS.iter().map(|peer| peer.name).collect();
        Failure::usage(format_args!("--peer {name}: there is no such peer; choose from {}", names.join(", ")))
    })
}
