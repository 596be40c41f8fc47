//! A guest restored from an image, in a machine that waits for one.
//!
//! ```text
//! image opened, machines compared ── setup ── active: memory loaded, each chunk verified ── state loaded ── completed: it runs
//! ```
//!
//! Nothing runs before all of memory is here and verified. What fails leaves the guest in its image and nowhere else.

use std::path::Path;
use std::sync::Arc;
use std::thread;

use switchover_image::reader::Image;
use switchover_wire::clock::Nanos;
use switchover_wire::description::describe_mismatches;

use crate::at_rest::Books;
use crate::error::MigrationError;
use crate::failure::{FailureKind, FailureView, GuestAfter};
use crate::machine::{Machine, MachineError};
use crate::progress::Progress;
use crate::report::{Side, SideReport};
use crate::settings::Observer;
use crate::status::MigrationStatus;

/// A restore. Clones are handles to the same one; dropping them changes nothing.
#[derive(Clone)]
pub struct Restoring {
    shared: Arc<Shared>,
}

struct Shared {
    books: Books,
    image: Image,
}

impl Restoring {
    /// Starts to restore the guest of the image `path` in `machine`, which never ran and whose memory is zero, and returns at once.
    /// The guest runs when all of it is here, unless its user had paused it before it was saved.
    ///
    /// # Errors
    /// When it is no image, is damaged, or is of a guest that cannot go on on this machine; or when no thread can be started. The
    /// machine was not touched then, and can be given another guest.
    pub fn start(machine: Arc<dyn Machine>, path: &Path, observer: Observer) -> Result<Self, MigrationError> {
        let image = Image::open(path)?;
        let mismatches = machine.describe().mismatches(&image.sections().machine);
        if !mismatches.is_empty() {
            let reason = describe_mismatches(&mismatches);
            return Err(MigrationError::ImageMismatch { path: path.to_owned(), reason });
        }
        let shared = Arc::new(Shared { books: Books::begin(machine, observer), image });
        let restorer = Arc::clone(&shared);
        thread::Builder::new()
            .name("restore".to_owned())
            .spawn(move || restorer.books.cpu.measure(|| restorer.run()))
            .map_err(MigrationError::Thread)?;
        Ok(Self { shared })
    }

    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let progress = self.shared.books.progress();
        // Nothing of the guest runs before all of it is here.
        Progress { downtime_bytes: progress.transferred, ..progress }
    }

    /// What is known of it. Complete once it is over.
    #[must_use]
    pub fn report(&self) -> SideReport {
        self.shared.books.report(Side::Destination)
    }

    /// Waits until it is over.
    #[must_use]
    pub fn wait(&self) -> MigrationStatus {
        self.shared.books.recorder.wait()
    }
}

impl Shared {
    fn run(&self) {
        let recorder = &self.books.recorder;
        recorder.set_status(MigrationStatus::Active);
        match self.restore() {
            Ok(()) => recorder.set_status(MigrationStatus::Completed),
            Err((kind, reason)) => {
                let guest = GuestAfter::InImage;
                let path = self.image.path().display();
                let sentence = format!("cannot restore the guest of {path}: {reason}; {}", guest.sentence());
                recorder.fail(FailureView { kind, guest }, sentence);
            }
        }
    }

    fn restore(&self) -> Result<(), (FailureKind, String)> {
        let Self { books: Books { machine, recorder, tally, .. }, image } = self;
        let sections = image.sections();
        recorder.write(|record| {
            record.was_running = sections.was_running;
            record.state_bytes = sections.state.len() as u64;
        });
        recorder
            .timed("load-memory", || image.load(machine.ram().file(), tally))
            .map_err(|error| (FailureKind::Image, error.to_string()))?;
        let of_machine = |error: MachineError| (FailureKind::Machine, error.to_string());
        recorder.timed("load-state", || machine.load_state(&sections.state)).map_err(of_machine)?;
        recorder.write(|record| record.instants.commit_ns = Some(Nanos::now().0));
        machine.take_right_to_run();
        if sections.was_running {
            machine.resume().map_err(of_machine)?;
        }
        Ok(())
    }
}
