//! A guest restored from an image, in a machine that waits for one.
//!
//! ```text
//! image opened, machines compared ── setup ── active: memory loaded, each chunk verified ── state loaded ── completed: it runs
//! ```
//!
//! Nothing runs before all of memory is here and verified. What fails leaves the guest in its image and nowhere else.
//!
//! Or lazily ([`crate::lazy`]): the state is loaded at once and the guest runs, while its memory follows:
//!
//! ```text
//! image opened, machines compared, memory watched ── setup ── state loaded, it runs ── postcopy-active: memory follows ── completed
//! ```

use std::path::Path;
use std::sync::Arc;
use std::thread;

use switchover_image::reader::Image;
use switchover_wire::clock::Nanos;
use switchover_wire::description::describe_mismatches;
use switchover_wire::types::PageCount;

use crate::at_rest::Books;
use crate::error::MigrationError;
use crate::failure::{FailureKind, FailureView, GuestAfter};
use crate::lazy::{FaultThread, Lazily, LazyError, LazyMemory};
use crate::machine::{Machine, MachineError};
use crate::progress::Progress;
use crate::report::{PageClasses, Side, SideReport, fault_report};
use crate::settings::Observer;
use crate::status::MigrationStatus;

/// A restore. Clones are handles to the same one; dropping them changes nothing.
#[derive(Clone)]
pub struct Restoring {
    shared: Arc<Shared>,
}

struct Shared {
    books: Books,
    way: Way,
}

/// How memory comes.
enum Way {
    /// All of it before the guest runs.
    Whole(Box<Image>),
    /// While it runs.
    Lazy(Arc<LazyMemory>),
}

impl Restoring {
    /// Starts to restore the guest of the image `path` in `machine`, which never ran and whose memory is zero, and returns at once.
    /// The guest runs when all of it is here, unless its user had paused it before it was saved.
    ///
    /// # Errors
    /// When it is no image, is damaged, or is of a guest that cannot go on on this machine; or when no thread can be started. The
    /// machine was not touched then, and can be given another guest.
    pub fn start(machine: Arc<dyn Machine>, path: &Path, observer: Observer) -> Result<Self, MigrationError> {
        let image = open(&*machine, path)?;
        Self::begin(machine, Way::Whole(Box::new(image)), observer)
    }

    /// The same, but the guest runs at once and its memory follows: it waits where it touches what is not here yet. Where memory
    /// cannot be completed it is stopped for good.
    ///
    /// # Errors
    /// As [`start`](Self::start), and when userfaultfd refuses.
    pub fn start_lazily(
        machine: Arc<dyn Machine>,
        path: &Path,
        how: Lazily,
        observer: Observer,
    ) -> Result<Self, MigrationError> {
        let image = open(&*machine, path)?;
        let memory = Arc::new(LazyMemory::new(image, machine.ram(), how)?);
        let begun = Self::begin(machine, Way::Lazy(Arc::clone(&memory)), observer);
        if begun.is_err() {
            // Nobody runs on it.
            memory.watch().unregister().map_err(LazyError::from)?;
        }
        begun
    }

    fn begin(machine: Arc<dyn Machine>, way: Way, observer: Observer) -> Result<Self, MigrationError> {
        let shared = Arc::new(Shared { books: Books::begin(machine, observer), way });
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
        let Way::Lazy(memory) = &self.shared.way else {
            // Nothing of the guest runs before all of it is here.
            return Progress { downtime_bytes: progress.transferred, ..progress };
        };
        let (missing, pushed, requested) = memory.counts();
        let (requests, waits) = {
            let stats = memory.stats();
            (stats.remote, stats.waits)
        };
        let transferred = PageCount(pushed + requested).bytes();
        Progress {
            remaining: PageCount(missing).bytes(),
            transferred,
            postcopy_bytes: transferred,
            zero_pages: memory.zero_pages(),
            normal_pages: pushed + requested,
            postcopy_requests: requests,
            waits: Some(waits),
            ..progress
        }
    }

    /// What is known of it. Complete once it is over.
    #[must_use]
    pub fn report(&self) -> SideReport {
        let mut report = self.shared.books.report(Side::Destination);
        let Way::Lazy(memory) = &self.shared.way else { return report };
        let (_, pushed, requested) = memory.counts();
        let commit = report.instants.commit_ns;
        report.instants.first_entry_ns = commit.and_then(|_| self.shared.books.machine.first_entry()).map(|at| at.0);
        report.instants.last_page_ns = memory.last_placed().map(|at| at.0);
        report.pages = Some(PageClasses { zero: memory.zero_pages(), pushed, requested, ..PageClasses::default() });
        // A copy, so that no fault waits for it to be encoded.
        let stats = memory.stats().clone();
        report.faults = fault_report(&stats).ok();
        report
    }

    /// Waits until it is over.
    #[must_use]
    pub fn wait(&self) -> MigrationStatus {
        self.shared.books.recorder.wait()
    }
}

/// Opens an image whose guest can go on on `machine`.
fn open(machine: &dyn Machine, path: &Path) -> Result<Image, MigrationError> {
    let image = Image::open(path)?;
    let mismatches = machine.describe().mismatches(&image.sections().machine);
    if mismatches.is_empty() {
        return Ok(image);
    }
    let reason = describe_mismatches(&mismatches);
    Err(MigrationError::ImageMismatch { path: path.to_owned(), reason })
}

/// Why it failed, and where that leaves the guest.
type Failed = (FailureView, String);

impl Shared {
    fn run(&self) {
        let (recorder, path) = (&self.books.recorder, self.image().path().display());
        let done = match &self.way {
            Way::Whole(image) => {
                recorder.set_status(MigrationStatus::Active);
                self.restore(image)
            }
            Way::Lazy(memory) => self.restore_lazily(memory),
        };
        match done {
            Ok(()) => recorder.set_status(MigrationStatus::Completed),
            Err((failure, reason)) => {
                let sentence = format!("cannot restore the guest of {path}: {reason}; {}", guest_after(failure.guest));
                if failure.guest == GuestAfter::Lost {
                    self.books.machine.stop_for_good(&sentence);
                }
                recorder.fail(failure, sentence);
            }
        }
    }

    fn image(&self) -> &Image {
        match &self.way {
            Way::Whole(image) => image,
            Way::Lazy(memory) => memory.image(),
        }
    }

    fn restore(&self, image: &Image) -> Result<(), Failed> {
        let Books { machine, recorder, tally, .. } = &self.books;
        self.note_sections();
        recorder
            .timed("load-memory", || image.load(machine.ram().file(), tally))
            .map_err(|error| (in_image(FailureKind::Image), error.to_string()))?;
        self.load_state()?;
        self.let_run()
    }

    /// The guest runs, then its memory comes.
    fn restore_lazily(&self, memory: &Arc<LazyMemory>) -> Result<(), Failed> {
        let recorder = &self.books.recorder;
        self.note_sections();
        let before = |error: LazyError| (in_image(kind_of(&error)), error.to_string());
        let faults = match FaultThread::start(memory).map_err(LazyError::Thread).map_err(before) {
            Ok(faults) => faults,
            Err(failed) => {
                let_go(memory);
                return Err(failed);
            }
        };
        let started = recorder.timed("head-start", || memory.head_start()).map_err(before).and_then(|()| {
            let loaded = self.load_state();
            // What could not be had comes first: the state may have been loaded from zeros then.
            memory.let_run().map_err(before)?;
            loaded?;
            self.let_run()
        });
        if let Err((failure, reason)) = started {
            // An ending machine may have been told to run its guest by somebody else, too.
            if self.books.machine.first_entry().is_some() {
                return Err((FailureView { guest: GuestAfter::Lost, ..failure }, reason));
            }
            // It never ran, so nobody can be given zeros.
            if let_go(memory) {
                faults.end();
            }
            return Err((failure, reason));
        }
        recorder.set_status(MigrationStatus::PostcopyActive);
        memory.push().map_err(|error| {
            let failure = FailureView { kind: kind_of(&error), guest: GuestAfter::Lost };
            (failure, error.to_string())
        })?;
        faults.end();
        self.books.collapse();
        recorder.timed("keep-working-set", || memory.keep_working_set());
        tracing::debug!(recorded = memory.recorded(), "the guest's memory is all here");
        Ok(())
    }

    fn note_sections(&self) {
        let sections = self.image().sections();
        self.books.recorder.write(|record| {
            record.was_running = sections.was_running;
            record.state_bytes = sections.state.len() as u64;
        });
    }

    fn load_state(&self) -> Result<(), Failed> {
        let Books { machine, recorder, .. } = &self.books;
        let loaded = recorder.timed("load-state", || machine.load_state(&self.image().sections().state));
        loaded.map_err(|error| of_machine(&error))
    }

    fn let_run(&self) -> Result<(), Failed> {
        let Books { machine, recorder, .. } = &self.books;
        recorder.write(|record| record.instants.commit_ns = Some(Nanos::now().0));
        machine.take_right_to_run();
        if self.image().sections().was_running {
            machine.resume().map_err(|error| of_machine(&error))?;
        }
        Ok(())
    }
}

/// Ends a watch under which nothing ran; without this its descriptor would stay for ever.
fn let_go(memory: &LazyMemory) -> bool {
    let ended = memory.watch().unregister();
    ended.inspect_err(|error| tracing::warn!(%error, "userfaultfd stays registered")).is_ok()
}

fn in_image(kind: FailureKind) -> FailureView {
    FailureView { kind, guest: GuestAfter::InImage }
}

fn of_machine(error: &MachineError) -> Failed {
    (in_image(FailureKind::Machine), error.to_string())
}

const fn kind_of(error: &LazyError) -> FailureKind {
    match error {
        LazyError::Image(_) => FailureKind::Image,
        LazyError::Watch(_) | LazyError::Wait(_) | LazyError::Thread(_) => FailureKind::Pager,
    }
}

/// Where that leaves the guest, of which there is an image whatever happens.
const fn guest_after(guest: GuestAfter) -> &'static str {
    match guest {
        GuestAfter::Lost => {
            "the guest ran here and was stopped, because parts of its memory cannot be had; what it did is lost, and it is in its image \
             as it was saved"
        }
        other => other.sentence(),
    }
}
