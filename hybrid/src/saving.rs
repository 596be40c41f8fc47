//! A guest saved into an image: paused, written, and left standing still; or written while it runs, and paused for a moment.
//!
//! ```text
//! setup ── image begun ── active ── paused ── state read ── memory written ── image durable and named ── completed
//!                            └──────── whatever fails, or a cancellation: nothing of the image is left, the guest runs on
//! ```
//!
//! The machine keeps the right to run: its controller may let the guest go on, which then lives on beside its image.
//!
//! A *live* save writes memory while the guest runs, then again what it has written meanwhile, as long as that becomes less. What is left
//! is protected against writing, still while it runs; then it is paused, its state read, and let go on. The image is the guest as it was in
//! that pause, in which nothing is copied: the pages that were left are written out while it runs, and who wants to write to one before
//! that waits until it was put aside ([`Snapshot`]). A *checkpoint* is a live save after which the machine goes on noting what its guest
//! writes: the next one writes only that, as the differences to this one. So the pause grows neither with memory nor with what the guest writes.

use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use switchover_image::base::Base;
use switchover_image::error::ImageError;
use switchover_image::sections::{Origin, Sections};
use switchover_image::writer::{ImageWriter, Options, Written};
use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::dirty::{DirtyLog, DirtyLogError};
use switchover_precopy::snapshot::{Snapshot, SnapshotError};
use switchover_wire::clock::Nanos;
use switchover_wire::types::{PageCount, PageIndex};

use crate::at_rest::Books;
use crate::error::MigrationError;
use crate::failure::{FailureKind, FailureView, GuestAfter};
use crate::machine::{Machine, MachineError, Paused};
use crate::progress::Progress;
use crate::report::{Side, SideReport};
use crate::settings::Observer;
use crate::status::MigrationStatus;

/// Passes of a live save over what was written meanwhile. A guest that writes as fast as the disk would go on for ever.
const MOST_PASSES: u32 = 10;
/// Pages that another pass is not worth.
const FEW: PageCount = PageCount(256);
/// Times that pages are protected before the pause of a live save, which the guest undoes as it writes.
const MOST_SWEEPS: u32 = 10;
/// Pages that are protected in the pause itself without another time before it: a tenth of a millisecond.
const FEW_TO_PROTECT: PageCount = PageCount(32);

/// How a guest is saved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct How {
    /// Compress its memory. Not of a live save, which writes some pages more than once.
    pub compress: bool,
    /// Write its memory while it runs, and let it go on after a short pause.
    pub live: bool,
}

/// What becomes of the guest, and what is written of it.
enum Kind {
    /// It stands still, and stays so.
    Paused,
    /// It runs.
    Live,
    /// It runs, and what it writes from the moment on is noted for the next one. Of one with a base, only what was noted since that.
    Checkpoint { base: bool },
}

/// A save. Clones are handles to the same one; dropping them changes nothing.
#[derive(Clone)]
pub struct Saving {
    shared: Arc<Shared>,
}

struct Shared {
    books: Books,
    path: PathBuf,
    kind: Kind,
    /// What the next checkpoint may be based on: this one, as long as the machine notes what was written since.
    series: Mutex<Option<Base>>,
    /// Passes over memory begun.
    passes: AtomicU32,
    written: Mutex<Option<Written>>,
}

/// Why a guest was not saved.
enum Trouble {
    Image(ImageError),
    Machine(MachineError),
    Log(DirtyLogError),
    Snapshot(SnapshotError),
}

/// The guest in the pause of a live save.
struct Moment {
    sections: Sections,
    /// The pages that it had written since they were last written to the image.
    which: PageBitmap,
    /// What they held.
    snapshot: Snapshot,
}

impl Saving {
    /// Starts to save the guest of `machine` into the image `path`, and returns at once. What is there under that name stays as it
    /// is until the new image is whole.
    ///
    /// # Errors
    /// When no image can be made there, or no thread be started. The guest was not touched then.
    pub fn start(machine: Arc<dyn Machine>, path: &Path, how: How, observer: Observer) -> Result<Self, MigrationError> {
        let options = Options { compress: how.compress && !how.live };
        let writer = ImageWriter::create(path, machine.ram().pages(), options)?;
        Self::begin(machine, path, writer, if how.live { Kind::Live } else { Kind::Paused }, observer)
    }

    /// Starts to save the guest while it runs, into the image `path`. What it writes from then on is noted, for the next checkpoint. With
    /// a `base`, what another save's [`series`](Self::series) says, the image holds what was written since that one's moment.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn checkpoint(
        machine: Arc<dyn Machine>,
        path: &Path,
        base: Option<Base>,
        observer: Observer,
    ) -> Result<Self, MigrationError> {
        let (pages, kind) = (machine.ram().pages(), Kind::Checkpoint { base: base.is_some() });
        let writer = match base {
            Some(base) => ImageWriter::create_on(base, path, pages)?,
            None => ImageWriter::create(path, pages, Options::default())?,
        };
        Self::begin(machine, path, writer, kind, observer)
    }

    fn begin(
        machine: Arc<dyn Machine>,
        path: &Path,
        writer: ImageWriter,
        kind: Kind,
        observer: Observer,
    ) -> Result<Self, MigrationError> {
        let shared = Arc::new(Shared {
            books: Books::begin(machine, observer),
            path: path.to_owned(),
            kind,
            series: Mutex::new(None),
            passes: AtomicU32::new(0),
            written: Mutex::new(None),
        });
        let saver = Arc::clone(&shared);
        thread::Builder::new()
            .name("save".to_owned())
            .spawn(move || saver.books.cpu.measure(|| saver.run(writer)))
            .map_err(MigrationError::Thread)?;
        Ok(Self { shared })
    }

    /// What the next checkpoint may be based on, if this was one, and the machine notes what its guest writes since.
    #[must_use]
    pub fn series(&self) -> Option<Base> {
        self.shared.series().clone()
    }

    /// Somebody else needs the machine's book of written pages: no checkpoint can be based on this one any more.
    pub fn end_series(&self) {
        *self.shared.series() = None;
    }

    /// Calls the save off; the guest runs on. One that is as good as done may be done first: the status says.
    pub fn cancel(&self) {
        self.shared.books.tally.called_off.store(true, Ordering::Relaxed);
    }

    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let Shared { books, kind, passes, .. } = &*self.shared;
        let progress = books.progress();
        // Unless it is live, the guest stands still while its memory is written.
        let (precopy_bytes, downtime_bytes) = match kind {
            Kind::Paused => (0, progress.transferred),
            Kind::Live | Kind::Checkpoint { .. } => (progress.transferred, 0),
        };
        Progress { precopy_bytes, downtime_bytes, rounds: passes.load(Ordering::Relaxed), ..progress }
    }

    /// What is known of it. Complete once it is over.
    #[must_use]
    pub fn report(&self) -> SideReport {
        self.shared.books.report(Side::Source)
    }

    /// What the image has come to, once it is whole.
    #[must_use]
    pub fn written(&self) -> Option<Written> {
        *self.shared.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is over.
    #[must_use]
    pub fn wait(&self) -> MigrationStatus {
        self.shared.books.recorder.wait()
    }
}

impl Shared {
    fn run(&self, writer: ImageWriter) {
        self.books.recorder.set_status(MigrationStatus::Active);
        let saved = match self.kind {
            Kind::Paused => self.save_paused(writer),
            Kind::Live | Kind::Checkpoint { .. } => self.save_live(writer),
        };
        match saved {
            Ok(written) => {
                *self.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(written);
                self.books.recorder.set_status(MigrationStatus::Completed);
            }
            Err((trouble, guest)) => self.end(&trouble, guest),
        }
    }

    /// Of a guest that is paused for it, and stays so.
    fn save_paused(&self, writer: ImageWriter) -> Result<Written, (Trouble, GuestAfter)> {
        // Where the guest was not paused there is nothing to undo but the image.
        let paused = self.pause().map_err(|trouble| (trouble, GuestAfter::OnSource))?;
        self.begin_pass();
        match self.write(writer, paused) {
            Ok(written) => {
                self.books.machine.keep_paused();
                Ok(written)
            }
            Err(trouble) => match self.books.machine.resume() {
                Ok(()) => Err((trouble, GuestAfter::OnSource)),
                Err(error) => {
                    tracing::error!(%error, "the guest cannot go on after a save that failed");
                    Err((trouble, GuestAfter::PausedOnSource))
                }
            },
        }
    }

    fn pause(&self) -> Result<Paused, Trouble> {
        let paused = self.books.recorder.timed("pause", || self.books.machine.pause()).map_err(Trouble::Machine)?;
        self.books.recorder.write(|record| {
            record.instants.last_exit_ns = Some(paused.last_exit.0);
            record.was_running = paused.was_running;
        });
        Ok(paused)
    }

    fn begin_pass(&self) {
        self.books.recorder.tell_round(self.passes.fetch_add(1, Ordering::Relaxed) + 1);
    }

    fn series(&self) -> MutexGuard<'_, Option<Base>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of a guest that runs. What goes wrong leaves it so, but for one that cannot be let go on.
    fn save_live(&self, writer: ImageWriter) -> Result<Written, (Trouble, GuestAfter)> {
        let log = self.books.machine.dirty_log();
        let goes_on = matches!(self.kind, Kind::Checkpoint { .. });
        let caught = self.catch(&writer, &log);
        if !goes_on {
            log.stop();
        }
        let saved = caught.and_then(|moment| {
            let base = if goes_on { Some(self.base_of(&moment.sections)) } else { None };
            let written = self.write_moment(writer, moment).map_err(|trouble| (trouble, GuestAfter::OnSource))?;
            Ok((written, base.transpose().map_err(|error| (Trouble::Image(error), GuestAfter::OnSource))?))
        });
        match saved {
            Ok((written, base)) => {
                *self.series() = base;
                Ok(written)
            }
            Err(failed) => {
                // Notes of what was to be written are gone: the next checkpoint is a full one.
                log.stop();
                Err(failed)
            }
        }
    }

    fn base_of(&self, sections: &Sections) -> Result<Base, ImageError> {
        Base::at(&self.path, sections.moment()?)
    }

    /// Writes what the moment left to be written, while the guest runs.
    fn write_moment(&self, writer: ImageWriter, moment: Moment) -> Result<Written, Trouble> {
        let Moment { sections, which, snapshot } = moment;
        let Books { recorder, tally, .. } = &self.books;
        let read = |first: PageIndex, bytes: &mut [u8]| snapshot.read(first, bytes).map_err(io::Error::other);
        let nothing = |_: PageIndex, _: &[u64]| Ok(());
        let rewritten = recorder.timed("write-memory", || writer.rewrite(&read, which.words(), &nothing, tally));
        rewritten.map_err(Trouble::Image)?;
        tracing::debug!(
            pages = which.count().0,
            overwritten = snapshot.put_aside().0,
            "the moment's pages are written"
        );
        snapshot.end().map_err(Trouble::Snapshot)?;
        // What was protected page by page is mapped page by page.
        self.books.collapse();
        writer
            .settle(tally)
            .and_then(|()| recorder.timed("make-durable", || writer.commit(&sections)))
            .map_err(Trouble::Image)
    }

    /// Writes memory while the guest runs, and pauses it for a moment of which the rest is kept.
    fn catch(&self, writer: &ImageWriter, log: &Arc<dyn DirtyLog>) -> Result<Moment, (Trouble, GuestAfter)> {
        let unharmed = |trouble| (trouble, GuestAfter::OnSource);
        let Books { machine, recorder, .. } = &self.books;
        self.passes_over(writer, &**log).map_err(unharmed)?;
        let snapshot = recorder.timed("protect", || self.protect(log)).map_err(unharmed)?;
        let paused = self.pause().map_err(unharmed)?;
        let moment = self.moment(paused, &**log, snapshot);
        machine.resume().map_err(|error| (Trouble::Machine(error), GuestAfter::PausedOnSource))?;
        recorder.write(|record| record.running_heard = Some(Nanos::now()));
        moment.map_err(unharmed)
    }

    /// Writes all of memory, or what was written since the base, then what was written meanwhile, until that is little or becomes no
    /// less.
    fn passes_over(&self, writer: &ImageWriter, log: &dyn DirtyLog) -> Result<(), Trouble> {
        let ram = self.books.machine.ram();
        // Rearmed before it is read: what is written in between is noted.
        let rearm = |first: PageIndex, words: &[u64]| {
            log.rearm(first, words).map_err(|error| ImageError::Track(Box::new(error)))
        };
        let read = |first: PageIndex, bytes: &mut [u8]| ram.file().read_exact_at(bytes, first.offset());
        let mut before = ram.pages();
        self.begin_pass();
        if let Kind::Checkpoint { base: true } = self.kind {
            let written = self.noted(log)?;
            before = written.count();
            writer.rewrite(&read, written.words(), &rearm, &self.books.tally).map_err(Trouble::Image)?;
        } else {
            log.start().map_err(Trouble::Log)?;
            writer.write_moving(ram.file(), &rearm, &self.books.tally).map_err(Trouble::Image)?;
        }
        for _ in 1..MOST_PASSES {
            let written = self.noted(log)?;
            let count = written.count();
            if count <= FEW || count.0 > before.0 / 4 * 3 {
                return Ok(());
            }
            before = count;
            self.begin_pass();
            writer.rewrite(&read, written.words(), &rearm, &self.books.tally).map_err(Trouble::Image)?;
        }
        Ok(())
    }

    /// Protects what is not in the image yet, and again what the guest has written meanwhile, until that is little.
    fn protect(&self, log: &Arc<dyn DirtyLog>) -> Result<Snapshot, Trouble> {
        let ram = self.books.machine.ram();
        let noting = matches!(self.kind, Kind::Checkpoint { .. }).then(|| Arc::clone(log));
        let snapshot = Snapshot::begin(&ram, noting).map_err(Trouble::Snapshot)?;
        let mut before = ram.pages();
        for _ in 0..MOST_SWEEPS {
            let count = snapshot.protect(&self.noted(&**log)?).map_err(Trouble::Snapshot)?;
            if count <= FEW_TO_PROTECT || count.0 > before.0 / 4 * 3 {
                break;
            }
            before = count;
        }
        Ok(snapshot)
    }

    /// What of the paused guest is not in the image yet.
    fn moment(&self, paused: Paused, log: &dyn DirtyLog, snapshot: Snapshot) -> Result<Moment, Trouble> {
        // First: it may write to guest memory.
        let sections = self.sections(paused)?;
        let which = self.noted(log)?;
        let late = self.books.recorder.timed("take-snapshot", || snapshot.take(&which)).map_err(Trouble::Snapshot)?;
        tracing::debug!(pages = which.count().0, late = late.0, "the image is of this moment");
        Ok(Moment { sections, which, snapshot })
    }

    fn noted(&self, log: &dyn DirtyLog) -> Result<PageBitmap, Trouble> {
        let mut noted = PageBitmap::new(self.books.machine.ram().pages());
        log.peek(&mut noted).map_err(Trouble::Log)?;
        Ok(noted)
    }

    fn write(&self, writer: ImageWriter, paused: Paused) -> Result<Written, Trouble> {
        let sections = self.sections(paused)?;
        let ram = self.books.machine.ram();
        self.books
            .recorder
            .timed("write-memory", || writer.write_memory(ram.file(), &self.books.tally))
            .and_then(|()| self.books.recorder.timed("make-durable", || writer.commit(&sections)))
            .map_err(Trouble::Image)
    }

    /// Everything of the paused guest but its memory.
    fn sections(&self, paused: Paused) -> Result<Sections, Trouble> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let state =
            self.books.recorder.timed("save-state", || self.books.machine.save_state()).map_err(Trouble::Machine)?;
        self.books.recorder.write(|record| record.state_bytes = state.len() as u64);
        Ok(Sections {
            machine: self.books.machine.describe(),
            state,
            was_running: paused.was_running,
            first_pages: self.books.machine.first_pages(),
            origin: Origin {
                version: concat!("switchover ", env!("CARGO_PKG_VERSION")).to_owned(),
                saved_at: now.as_secs(),
            },
        })
    }

    /// It was called off, or it failed.
    fn end(&self, trouble: &Trouble, guest: GuestAfter) {
        let recorder = &self.books.recorder;
        if matches!((trouble, guest), (Trouble::Image(ImageError::Cancelled), GuestAfter::OnSource)) {
            recorder.set_status(MigrationStatus::Cancelling);
            return recorder.set_status(MigrationStatus::Cancelled);
        }
        let (kind, reason) = match trouble {
            Trouble::Image(error) => (FailureKind::Image, error.to_string()),
            Trouble::Machine(error) => (FailureKind::Machine, error.to_string()),
            Trouble::Log(error) => (FailureKind::Machine, error.to_string()),
            Trouble::Snapshot(error) => (FailureKind::Machine, error.to_string()),
        };
        let path = self.path.display();
        let sentence = format!("cannot save the guest to {path}: {reason}; {}", guest.sentence());
        recorder.fail(FailureView { kind, guest }, sentence);
    }
}
