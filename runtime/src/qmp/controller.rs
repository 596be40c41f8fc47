//! What QMP commands act on, seen from the protocol's side.

use std::path::Path;
use std::time::{Duration, SystemTime};

use switchover_hybrid::error::MigrationError;
use switchover_hybrid::lazy::Lazily;
use switchover_hybrid::progress::Progress;
use switchover_hybrid::report::SideReport;
use switchover_hybrid::saving::How;
use switchover_hybrid::security::Security;
use switchover_hybrid::settings::{Settings, Tunables};
use switchover_hybrid::status::MigrationStatus;
use switchover_wire::address::Address;
use thiserror::Error;

use crate::audit::Audit;
use crate::dirty_rate::limit::Limit;
use crate::dirty_rate::{Measurement, MeterError, Plan};
use crate::error::VmError;
use crate::run_state::RunState;

/// A machine and its migration. Every method returns at once: what takes time goes on behind it.
pub trait Controller: Send + Sync + 'static {
    /// Where commands are noted.
    fn audit(&self) -> &Audit {
        Audit::off()
    }

    /// The machine's state.
    fn run_state(&self) -> RunState;

    /// Pauses the guest for its user.
    ///
    /// # Errors
    /// When it is not here, or in the middle of a handoff.
    fn stop(&self) -> Result<(), ControlError>;

    /// Starts the guest, or lets it go on.
    ///
    /// # Errors
    /// When it is not here.
    fn cont(&self) -> Result<(), ControlError>;

    /// Whether ending the machine now would lose a guest that lives elsewhere.
    ///
    /// # Errors
    /// When this is a source that still holds memory of the guest that it has given away.
    fn may_quit(&self) -> Result<(), ControlError>;

    /// Ends the machine and its process.
    fn quit(&self);

    /// Begins to move the guest to the destination that listens at `to`.
    ///
    /// # Errors
    /// When it cannot begin. Whatever fails later is seen in [`migration`](Self::migration).
    fn migrate(&self, to: Address, settings: Settings, security: Security) -> Result<(), ControlError>;

    /// Listens at `at` for a source.
    ///
    /// # Errors
    /// When this machine waits for none, or the address cannot be had.
    fn listen(&self, at: &Address, settings: Settings, security: Security) -> Result<(), ControlError>;

    /// Begins to save the guest into an image. It stands still from then on, and when it is saved until [`cont`](Self::cont); of a live
    /// save it runs, but for a moment.
    ///
    /// # Errors
    /// When it cannot begin. Whatever fails later is seen in [`migration`](Self::migration).
    fn save(&self, to: &Path, how: How) -> Result<(), ControlError>;

    /// Begins to save the guest into an image while it runs, and notes from then on what it writes. With a `base`, the last checkpoint, the
    /// image holds what was written since that; both lie in one folder.
    ///
    /// # Errors
    /// When it cannot begin, or the base is not what the machine's notes begin with: the next one must be a full one then.
    fn checkpoint(&self, to: &Path, base: Option<&Path>) -> Result<(), ControlError>;

    /// Begins to restore the guest of an image here.
    ///
    /// # Errors
    /// When this machine waits for none, or the image is none that it can take. It can be given another guest then.
    fn restore(&self, from: &Path) -> Result<(), ControlError>;

    /// Begins to restore the guest of an image here, which runs at once while its memory follows.
    ///
    /// # Errors
    /// As [`restore`](Self::restore), and when this host cannot have faults served by this process.
    fn restore_lazily(&self, from: &Path, how: Lazily) -> Result<(), ControlError>;

    /// Hands the guest over now.
    ///
    /// # Errors
    /// When there is no migration that could.
    fn start_postcopy(&self) -> Result<(), ControlError>;

    /// Goes on with the handoff of a guest that was paused for it.
    ///
    /// # Errors
    /// When no migration waits for that.
    fn continue_switchover(&self) -> Result<(), ControlError>;

    /// Cuts the link of a post-copy, as if it had been lost.
    ///
    /// # Errors
    /// When there is none to cut.
    fn pause_migration(&self) -> Result<(), ControlError>;

    /// On a source: joins a lost link again, over new lanes to the destination that listens at `to`.
    ///
    /// # Errors
    /// When no link is lost.
    fn resume_migration(&self, to: Address, settings: Settings, security: Security) -> Result<(), ControlError>;

    /// On a destination: listens at `at` too for the source to join a lost link again.
    ///
    /// # Errors
    /// When no link is lost, or the address cannot be had.
    fn recover(&self, at: &Address) -> Result<(), ControlError>;

    /// On a source: runs a guest again that was given away, since the caller vouches that it runs nowhere else.
    ///
    /// # Errors
    /// When no link is lost.
    fn reclaim(&self) -> Result<(), ControlError>;

    /// Changes what may be changed while a migration runs. Nothing to change is no error.
    fn set_tunables(&self, tunables: Tunables);

    /// On a destination: changes how long its source may be silent, from its next link on.
    fn set_silence(&self, silence: Duration);

    /// Why the guest cannot be moved away now, whatever it is asked; empty where nothing speaks against it.
    fn blockers(&self) -> Vec<String>;

    /// Cancels the migration. Nothing to cancel is no error.
    ///
    /// # Errors
    /// When the guest has been given away already.
    fn cancel(&self) -> Result<(), ControlError>;

    /// The last migration, if there was one.
    fn migration(&self) -> Option<MigrationView>;

    /// What this side knows of the last migration, if there was one.
    fn report(&self) -> Option<SideReport>;

    /// How many vCPUs the machine has.
    fn vcpus(&self) -> u32;

    /// What the machine knows of written pages, and how.
    fn written_pages_mode(&self) -> WrittenPagesMode;

    /// Begins to measure how fast the guest writes.
    ///
    /// # Errors
    /// During a migration or another measurement, or when the machine cannot tell.
    fn measure_dirty_rate(&self, plan: Plan) -> Result<(), ControlError>;

    /// The last measurement of that, if there was one.
    fn dirty_rate(&self) -> Option<Measurement>;

    /// Holds each vCPU to so many newly written bytes a second; `None` lifts that.
    ///
    /// # Errors
    /// During a migration or a measurement, or when the machine cannot.
    fn limit_dirty_rate(&self, bytes_per_second: Option<u64>) -> Result<(), ControlError>;

    /// The limit that is held, if there is one.
    fn dirty_limit(&self) -> Option<Limit>;

    /// How many bytes a second each vCPU newly writes now; `None` where the machine cannot tell them apart.
    fn vcpu_dirty_rates(&self) -> Option<Vec<u64>>;
}

/// How a machine keeps its book of written pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WrittenPagesMode {
    /// A bit a page.
    Bitmap,
    /// A ring of pages for each vCPU.
    Ring,
}

/// A look at a migration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MigrationView {
    /// How far it has come.
    pub progress: Progress,
    /// On a destination, where it listens for its source. `None` on a source.
    pub listening_at: Option<Address>,
}

/// Something that a controller's observers are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The guest was paused.
    Stop,
    /// The guest runs again, or for the first time.
    Resume,
    /// The machine is over.
    Shutdown {
        /// Whether the guest itself ended it.
        guest: bool,
        /// QEMU's name of the cause: `host-qmp-quit`, `host-signal`, `guest-shutdown`, `guest-reset`, `host-error`.
        reason: &'static str,
    },
    /// A migration's status has changed to this.
    Migration(MigrationStatus),
    /// This round of a migration's pre-copy begins, counted from 1.
    MigrationPass(u32),
}

/// An event and the time of day at which it happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimedEvent {
    /// What happened.
    pub event: Event,
    /// When.
    pub at: SystemTime,
}

impl TimedEvent {
    /// `event`, happening now.
    #[must_use]
    pub fn now(event: Event) -> Self {
        Self { event, at: SystemTime::now() }
    }
}

/// Why a command could not be carried out.
#[derive(Debug, Error)]
pub enum ControlError {
    /// One migration at a time.
    #[error("There's a migration process in progress")]
    Underway,
    /// A destination has no guest to send.
    #[error("Guest is waiting for an incoming migration")]
    NotArrived,
    /// The guest has left.
    #[error("the guest has moved to another host already, and can be moved again only from there")]
    MovedAway,
    /// The guest was saved. QEMU's sentence, and what to do.
    #[error(
        "Can't migrate the vm that was paused due to previous migration: it was saved to a file; `cont` lets it go on first"
    )]
    Saved,
    /// An increment that would be one on something else.
    #[error("the next checkpoint must be a full one, without 'base': {why}")]
    NoSeries {
        /// What does not fit.
        why: String,
    },
    /// The machine is over.
    #[error("the guest was stopped for good and cannot be moved: {reason}")]
    Ended {
        /// Why it was stopped.
        reason: String,
    },
    /// This machine was started with a guest of its own.
    #[error(
        "'-incoming' was not specified on the command line: only a machine started with --incoming can wait for one"
    )]
    NotIncoming,
    /// It listens already.
    #[error("The incoming migration has already been started")]
    ListensAlready,
    /// The destination runs the guest and wants its memory from here.
    #[error(
        "the guest has moved, but {} KiB of its memory are only here yet: to quit now would lose it; wait until \
         `query-migrate` says `completed`",
        remaining >> 10
    )]
    StillNeeded {
        /// Bytes that have not been sent.
        remaining: u64,
    },
    /// Nobody cancels from there.
    #[error("an incoming migration is cancelled at its source, or by ending this machine with `quit`")]
    CancelAtSource,
    /// There is no migration whose guest could be handed over.
    #[error("Postcopy must be started after migration has been started")]
    NothingToHandOver,
    /// There is no post-copy to pause.
    #[error("migrate-pause is currently only supported during postcopy-active or postcopy-recover state")]
    NothingToPause,
    /// There is no paused migration out of this machine.
    #[error("Cannot resume if there is no paused migration")]
    NothingToResume,
    /// There is no paused migration into this machine.
    #[error("Migrate recover can only be run when postcopy is paused.")]
    NothingToRecover,
    /// There is no guest to take back.
    #[error(
        "there is no guest to reclaim: a guest can be taken back only from a migration out of this machine whose link was lost \
         after the handoff (state `postcopy-paused`)"
    )]
    NothingToReclaim,
    /// No migration waits before its handoff.
    #[error("no migration out of this machine waits to go on")]
    NothingToContinue,
    /// A migration has the book of written pages.
    #[error(
        "the dirty rate cannot be measured during a migration; query-migrate has `dirty-pages-rate` while memory is copied"
    )]
    MeasuredByMigration,
    /// QEMU's sentence.
    #[error("can't {wish} dirty page rate limit while migration is running")]
    LimitDuringMigration {
        /// "set" or "cancel".
        wish: &'static str,
    },
    /// A limit has the book of written pages.
    #[error(
        "a dirty page rate limit is set, and needs the machine's book of written pages: lift it with \
         cancel-vcpu-dirty-limit; a migration can hold one of its own (capability dirty-limit)"
    )]
    Limited,
    /// The dirty rate could not be measured or limited.
    #[error(transparent)]
    Meter(#[from] MeterError),
    /// The machine refused.
    #[error(transparent)]
    Machine(#[from] VmError),
    /// The migration refused.
    #[error(transparent)]
    Migration(#[from] MigrationError),
}
