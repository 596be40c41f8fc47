//! What a migration can be told.

use std::sync::Arc;
use std::time::Duration;

use switchover_pager::lane::FAULT_LANES_LIMIT;
use switchover_precopy::pack::PackSettings;

use crate::error::MigrationError;
use crate::happening::Happening;
use crate::lanes::BULK_LANES_LIMIT;
use crate::monitor::{Limits, Mode};
use crate::status::MigrationStatus;

/// How a migration is to be carried out. Both sides have settings of their own; what the source asks for suffices.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Settings {
    /// How it may end its pre-copy, and within which bounds. [`Mode::Postcopy`] makes no rounds at all.
    pub limits: Limits,
    /// Post-copy is allowed: the controller may hand off whenever it wants.
    pub postcopy: bool,
    /// How many `fault` lanes the source opens. The destination divides guest memory among as many userfaultfds, each with a
    /// thread. A link that takes the place of a lost one has as many again, whatever is set then.
    pub fault_lanes: u8,
    /// How many `bulk` lanes the source opens. Each encodes on a thread of its own.
    pub bulk_lanes: u8,
    /// Bounds on pushed bytes a second.
    pub bandwidth: Bandwidth,
    /// Which encodings pre-copy may use.
    pub packing: PackSettings,
    /// How vCPUs are slowed down where pre-copy does not converge by itself.
    pub throttling: Throttling,
    /// Pause the guest and wait for the controller's word before the handoff.
    pub pause_before_switchover: bool,
    /// Let the pages that are sent carry checksums, which the destination checks. Without them a page that was damaged on the way
    /// may go unnoticed.
    pub checksums: bool,
    /// Digest guest memory on both sides, and compare. What was here at the handoff is digested while the guest stands still.
    pub verify_memory: bool,
    /// Record each round's bitmap in the report.
    pub record_bitmaps: bool,
    /// Destination: record each fault in the report.
    pub record_faults: bool,
    /// How long the other side may be silent before its link is taken to be lost; a second at least.
    pub silence: Duration,
    /// Destination: do not reserve memory before the handoff. The guest is lost if memory runs out after it.
    pub lazy_memory: bool,
    /// Destination: map memory as huge pages once it is complete, a little at a time.
    pub collapse: bool,
}

/// Bounds on the bytes a second of all bulk lanes together; 0 means none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bandwidth {
    /// Before the handoff.
    pub precopy: u64,
    /// After it.
    pub postcopy: u64,
}

/// How vCPUs are slowed down for pre-copy. Never after the handoff, and never by the hybrid.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Throttling {
    /// Not at all.
    #[default]
    Off,
    /// For a growing share of the time, as long as rounds do not shrink.
    AutoConverge {
        /// The first share, in percent.
        initial: u8,
        /// What each step adds, in percent.
        increment: u8,
        /// The ceiling, in percent.
        most: u8,
    },
    /// Each vCPU is held to this many newly written bytes a second.
    DirtyLimit {
        /// Bytes a second, of each vCPU.
        bytes_per_second: u64,
    },
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            limits: Limits { mode: Mode::Postcopy, ..Limits::default() },
            postcopy: true,
            fault_lanes: 1,
            bulk_lanes: 1,
            bandwidth: Bandwidth::default(),
            packing: PackSettings::default(),
            throttling: Throttling::Off,
            pause_before_switchover: false,
            checksums: true,
            verify_memory: false,
            record_bitmaps: false,
            record_faults: false,
            silence: Duration::from_secs(5),
            lazy_memory: false,
            collapse: true,
        }
    }
}

impl Settings {
    /// Whether they can be followed.
    ///
    /// # Errors
    /// When there are no fault lanes or no bulk lanes, or too many.
    pub fn check(&self) -> Result<(), MigrationError> {
        if !(1..=FAULT_LANES_LIMIT).contains(&self.fault_lanes) {
            return Err(MigrationError::FaultLanes { asked: self.fault_lanes, limit: FAULT_LANES_LIMIT });
        }
        if (1..=BULK_LANES_LIMIT).contains(&self.bulk_lanes) {
            Ok(())
        } else {
            Err(MigrationError::BulkLanes { asked: self.bulk_lanes, limit: BULK_LANES_LIMIT })
        }
    }

    /// What may change while a migration runs.
    #[must_use]
    pub const fn tunables(&self) -> Tunables {
        Tunables { limits: self.limits, bandwidth: self.bandwidth }
    }
}

/// What a controller may change while a migration runs. The mode of the limits stays what it was.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Tunables {
    /// When to stop.
    pub limits: Limits,
    /// How fast to send.
    pub bandwidth: Bandwidth,
}

/// What an observer is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    /// The status has changed to this.
    Status(MigrationStatus),
    /// This round of pre-copy begins, counted from 1.
    Round(u32),
    /// This has happened.
    Happening(Happening),
}

/// Whoever wants to know of a migration's steps. Called on the migration's own thread: must return at once.
pub type Observer = Arc<dyn Fn(Notice) + Send + Sync>;

/// An observer for those who do not want to know.
#[must_use]
pub fn no_observer() -> Observer {
    Arc::new(|_| {})
}
