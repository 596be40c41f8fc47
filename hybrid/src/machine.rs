//! The one trait through which a migration sees a virtual machine.

use std::error::Error;
use std::sync::Arc;

use switchover_pager::ram::Ram;
use switchover_precopy::dirty::DirtyLog;
use switchover_wire::clock::Nanos;
use switchover_wire::description::MachineDescription;
use switchover_wire::types::PageIndex;
use thiserror::Error;

/// A machine could not do what a migration asked of it.
#[derive(Debug, Error)]
#[error("cannot {attempted}: {source}")]
pub struct MachineError {
    /// What was asked, as an infinitive: "pause vCPU 1".
    pub attempted: String,
    /// Why it failed.
    pub source: Box<dyn Error + Send + Sync>,
}

impl MachineError {
    /// An error of attempting `attempted`.
    pub fn new(attempted: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { attempted: attempted.into(), source: source.into() }
    }
}

/// A machine that has been paused for a handoff.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Paused {
    /// When the last vCPU left guest mode, on this host's clock.
    pub last_exit: Nanos,
    /// Whether the guest was running until then. Where its user had paused it before, it arrives paused.
    pub was_running: bool,
}

/// A virtual machine that can be moved.
///
/// # Who may run
/// A machine holds the *right to run* or it does not. One that boots holds it; one that waits for a migration
/// does not until [`take_right_to_run`](Self::take_right_to_run). A source gives it up with
/// [`surrender_right_to_run`](Self::surrender_right_to_run) before the commit is submitted to the socket. A machine
/// without the right must refuse to run whoever asks, a controller's `cont` included: this is the last guard of
/// "one runner".
///
/// All methods may be called from any thread, one at a time.
pub trait Machine: Send + Sync + 'static {
    /// What the other side must match.
    fn describe(&self) -> MachineDescription;

    /// Its memory.
    fn ram(&self) -> Ram;

    /// Its book of written pages.
    fn dirty_log(&self) -> Arc<dyn DirtyLog>;

    /// Keeps the vCPUs from running for this share of the time, in percent; 0 ends it. At most 99.
    ///
    /// Called on a source only. A pause takes no longer for it.
    fn throttle(&self, percent: u8);

    /// Holds each vCPU to so many newly written bytes a second; `None` ends it. Needs a started
    /// [`dirty_log`](Self::dirty_log).
    ///
    /// # Errors
    /// When the machine cannot tell what each vCPU writes.
    fn limit_dirty_rate(&self, bytes_per_second: Option<u64>) -> Result<(), MachineError>;

    /// Takes every vCPU out of the guest and completes what they had half done. On success nothing writes guest
    /// memory any more; on failure the guest runs as it did before.
    ///
    /// Called on a source only, never while a vCPU can be waiting for a page.
    ///
    /// # Errors
    /// When a vCPU does not come out in time.
    fn pause(&self) -> Result<Paused, MachineError>;

    /// Undoes [`pause`](Self::pause): the guest runs on, unless its user had paused it.
    ///
    /// # Errors
    /// When the machine has not the right to run, or a vCPU thread is gone.
    fn resume(&self) -> Result<(), MachineError>;

    /// Ends what [`pause`](Self::pause) began without running on: the guest was saved, and stands still until its controller lets it
    /// go on. The machine keeps the right to run.
    fn keep_paused(&self);

    /// Gives up the right to run. Called on a paused machine.
    fn surrender_right_to_run(&self);

    /// Takes the right to run: the commit has arrived. Called on a machine whose state is loaded.
    fn take_right_to_run(&self);

    /// Takes back the right to run that was surrendered: the destination has said, finally, that it never ran the guest
    /// and never will. Called on nothing less than that.
    fn take_back_right_to_run(&self);

    /// The pages that the paused guest's first instructions will want, most urgent first: under the instruction
    /// and stack pointers, and the page tables that lead there. A hint: wrong or empty costs time only.
    fn first_pages(&self) -> Vec<PageIndex>;

    /// Everything but memory that the paused guest can see.
    ///
    /// # Errors
    /// When a part of it cannot be read.
    fn save_state(&self) -> Result<Vec<u8>, MachineError>;

    /// Makes this machine, which never ran, what [`save_state`](Self::save_state) described. It stays paused.
    /// May touch guest memory: the pager must be serving, and this must not be one of its threads.
    ///
    /// # Errors
    /// When the state is malformed, of another version, or refused by the hardware.
    fn load_state(&self, state: &[u8]) -> Result<(), MachineError>;

    /// When the first vCPU entered the guest after the last [`resume`](Self::resume); `None` before it has.
    fn first_entry(&self) -> Option<Nanos>;

    /// Stops the guest because its memory can no longer be completed, and remembers why. Returns at once: a vCPU
    /// that waits for a page stays where it is, and must never be given zeros.
    fn stop_for_good(&self, reason: &str);
}
