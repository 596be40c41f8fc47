//! A guest saved into an image: paused, written, and left standing still.
//!
//! ```text
//! setup ── image begun ── active ── paused ── state read ── memory written ── image durable and named ── completed
//!                            └──────── whatever fails, or a cancellation: nothing of the image is left, the guest runs on
//! ```
//!
//! The machine keeps the right to run: its controller may let the guest go on, which then lives on beside its image.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use switchover_image::Tally;
use switchover_image::error::ImageError;
use switchover_image::sections::{Origin, Sections};
use switchover_image::writer::{ImageWriter, Options, Written};
use switchover_pager::cpu::CpuMeter;
use switchover_wire::types::PAGE_SIZE_U64;

use crate::error::MigrationError;
use crate::failure::{FailureKind, FailureView, GuestAfter};
use crate::lanes::Lanes;
use crate::machine::{Machine, MachineError, Paused};
use crate::progress::Progress;
use crate::recorder::Recorder;
use crate::report::{CpuSeconds, Side, SideReport};
use crate::settings::Observer;
use crate::status::MigrationStatus;

/// A save. Clones are handles to the same one; dropping them changes nothing.
#[derive(Clone)]
pub struct Saving {
    shared: Arc<Shared>,
}

struct Shared {
    machine: Arc<dyn Machine>,
    path: PathBuf,
    recorder: Recorder,
    tally: Tally,
    cpu: CpuMeter,
    written: Mutex<Option<Written>>,
}

/// Why a guest was not saved.
enum Trouble {
    Image(ImageError),
    Machine(MachineError),
}

impl Saving {
    /// Starts to save the guest of `machine` into the image `path`, and returns at once. What is there under that name stays as it
    /// is until the new image is whole.
    ///
    /// # Errors
    /// When no image can be made there, or no thread be started. The guest was not touched then.
    pub fn start(
        machine: Arc<dyn Machine>,
        path: &Path,
        options: Options,
        observer: Observer,
    ) -> Result<Self, MigrationError> {
        let writer = ImageWriter::create(path, machine.ram().pages(), options)?;
        let shared = Arc::new(Shared {
            machine,
            path: path.to_owned(),
            recorder: Recorder::new(observer),
            tally: Tally::default(),
            cpu: CpuMeter::default(),
            written: Mutex::new(None),
        });
        shared.recorder.begin();
        let saver = Arc::clone(&shared);
        thread::Builder::new()
            .name("save".to_owned())
            .spawn(move || saver.cpu.measure(|| saver.run(writer)))
            .map_err(MigrationError::Thread)?;
        Ok(Self { shared })
    }

    /// Calls the save off; the guest runs on. One that is as good as done may be done first: the status says.
    pub fn cancel(&self) {
        self.shared.tally.called_off.store(true, Ordering::Relaxed);
    }

    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let Shared { machine, recorder, tally, .. } = &*self.shared;
        let record = recorder.read();
        let ram_total = machine.ram().pages().bytes();
        let (zero, data) = (tally.zero.load(Ordering::Relaxed), tally.data.load(Ordering::Relaxed));
        let bytes = tally.bytes.load(Ordering::Relaxed);
        Progress {
            status: record.status,
            error: record.error.clone(),
            failure: record.failure,
            ram_total,
            transferred: bytes,
            remaining: ram_total.saturating_sub((zero + data).saturating_mul(PAGE_SIZE_U64)),
            zero_pages: zero,
            normal_pages: data,
            total_time_ns: record.total_time_ns(),
            setup_time_ns: record.setup_time_ns(),
            // The guest stands still while its memory is written.
            downtime_bytes: bytes,
            rounds: u32::from(zero + data > 0),
            phases: record.phases,
            ..Progress::default()
        }
    }

    /// What is known of it. Complete once it is over.
    #[must_use]
    pub fn report(&self) -> SideReport {
        let shared = &self.shared;
        let pages = shared.machine.ram().pages();
        let mut report = shared.recorder.read().into_report(Side::Source, &Lanes::default(), pages);
        report.cpu += CpuSeconds::from(shared.cpu.total());
        report
    }

    /// What the image has come to, once it is whole.
    #[must_use]
    pub fn written(&self) -> Option<Written> {
        *self.shared.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is over.
    #[must_use]
    pub fn wait(&self) -> MigrationStatus {
        self.shared.recorder.wait()
    }
}

impl Shared {
    fn run(&self, writer: ImageWriter) {
        self.recorder.set_status(MigrationStatus::Active);
        let paused = match self.recorder.timed("pause", || self.machine.pause()) {
            Ok(paused) => paused,
            Err(error) => {
                // The guest was not paused: there is nothing to undo but the image.
                drop(writer);
                return self.fail(&Trouble::Machine(error), GuestAfter::OnSource);
            }
        };
        self.recorder.write(|record| {
            record.instants.last_exit_ns = Some(paused.last_exit.0);
            record.was_running = paused.was_running;
        });
        match self.write(writer, paused) {
            Ok(written) => {
                *self.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(written);
                self.machine.keep_paused();
                self.recorder.set_status(MigrationStatus::Completed);
            }
            Err(trouble) => self.run_on(&trouble),
        }
    }

    fn write(&self, writer: ImageWriter, paused: Paused) -> Result<Written, Trouble> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let state = self.recorder.timed("save-state", || self.machine.save_state()).map_err(Trouble::Machine)?;
        self.recorder.write(|record| record.state_bytes = state.len() as u64);
        let sections = Sections {
            machine: self.machine.describe(),
            state,
            was_running: paused.was_running,
            first_pages: self.machine.first_pages(),
            origin: Origin {
                version: concat!("switchover ", env!("CARGO_PKG_VERSION")).to_owned(),
                saved_at: now.as_secs(),
            },
        };
        let ram = self.machine.ram();
        self.recorder
            .timed("write-memory", || writer.write_memory(ram.file(), &self.tally))
            .and_then(|()| self.recorder.timed("make-durable", || writer.commit(&sections)))
            .map_err(Trouble::Image)
    }

    /// The image is gone; the guest is where it was.
    fn run_on(&self, trouble: &Trouble) {
        let cancelled = matches!(trouble, Trouble::Image(ImageError::Cancelled));
        if cancelled {
            self.recorder.set_status(MigrationStatus::Cancelling);
        }
        match self.machine.resume() {
            Ok(()) if cancelled => self.recorder.set_status(MigrationStatus::Cancelled),
            Ok(()) => self.fail(trouble, GuestAfter::OnSource),
            Err(error) => {
                tracing::error!(%error, "the guest cannot go on after a save that failed");
                self.fail(trouble, GuestAfter::PausedOnSource);
            }
        }
    }

    fn fail(&self, trouble: &Trouble, guest: GuestAfter) {
        let (kind, reason) = match trouble {
            Trouble::Image(error) => (FailureKind::Image, error.to_string()),
            Trouble::Machine(error) => (FailureKind::Machine, error.to_string()),
        };
        let path = self.path.display();
        let sentence = format!("cannot save the guest to {path}: {reason}; {}", guest.sentence());
        self.recorder.fail(FailureView { kind, guest }, sentence);
    }
}
