//! A guest saved into an image: paused, written, and left standing still; or written while it runs, and paused for a moment.
//!
//! ```text
//! setup ── image begun ── active ── paused ── state read ── memory written ── image durable and named ── completed
//!                            └──────── whatever fails, or a cancellation: nothing of the image is left, the guest runs on
//! ```
//!
//! The machine keeps the right to run: its controller may let the guest go on, which then lives on beside its image.
//!
//! A *live* save writes memory while the guest runs, then again what it has written meanwhile, as long as that becomes less. Then it
//! pauses the guest, reads its state, copies the pages that it has written since, and lets it go on; the copy is written, and the
//! image made durable, while it runs. The image is the guest as it was in that pause, which is as long as it takes to copy those pages,
//! however large memory is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use switchover_image::Tally;
use switchover_image::error::ImageError;
use switchover_image::sections::{Origin, Sections};
use switchover_image::writer::{ImageWriter, Options, Written};
use switchover_pager::cpu::CpuMeter;
use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::dirty::{DirtyLog, DirtyLogError};
use switchover_wire::clock::Nanos;
use switchover_wire::types::{PAGE_SIZE_U64, PageCount, PageIndex};

use crate::error::MigrationError;
use crate::failure::{FailureKind, FailureView, GuestAfter};
use crate::lanes::Lanes;
use crate::machine::{Machine, MachineError, Paused};
use crate::progress::Progress;
use crate::recorder::Recorder;
use crate::report::{CpuSeconds, Side, SideReport};
use crate::settings::Observer;
use crate::status::MigrationStatus;

/// Passes of a live save over what was written meanwhile. A guest that writes as fast as the disk would go on for ever.
const MOST_PASSES: u32 = 10;
/// Pages that are copied in the pause of a live save without another pass before it: a megabyte, a fraction of a millisecond.
const FEW: PageCount = PageCount(256);

/// How a guest is saved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct How {
    /// Compress its memory. Not of a live save, which writes some pages more than once.
    pub compress: bool,
    /// Write its memory while it runs, and let it go on after a short pause.
    pub live: bool,
}

/// A save. Clones are handles to the same one; dropping them changes nothing.
#[derive(Clone)]
pub struct Saving {
    shared: Arc<Shared>,
}

struct Shared {
    machine: Arc<dyn Machine>,
    path: PathBuf,
    live: bool,
    recorder: Recorder,
    /// Passes over memory begun.
    passes: AtomicU32,
    tally: Tally,
    cpu: CpuMeter,
    written: Mutex<Option<Written>>,
}

/// Why a guest was not saved.
enum Trouble {
    Image(ImageError),
    Machine(MachineError),
    Log(DirtyLogError),
}

/// The guest in the pause of a live save.
struct Moment {
    sections: Sections,
    /// The pages that it had written since they were last written to the image.
    which: PageBitmap,
    copy: Copied,
}

/// Stretches of pages and their bytes, in order.
struct Copied(Vec<(PageIndex, Vec<u8>)>);

impl Copied {
    /// Those of `which`, as they are in `memory` now.
    fn of(memory: &File, which: &PageBitmap) -> Result<Self, ImageError> {
        let copy = |(first, count): (PageIndex, PageCount)| {
            let mut bytes = vec![0; usize::try_from(count.bytes()).unwrap_or(usize::MAX)];
            match memory.read_exact_at(&mut bytes, first.offset()) {
                Ok(()) => Ok((first, bytes)),
                Err(source) => Err(ImageError::Memory { attempted: "read", page: first, source }),
            }
        };
        which.runs().map(copy).collect::<Result<_, _>>().map(Self)
    }

    /// Pages that lie in one stretch.
    fn read(&self, first: PageIndex, bytes: &mut [u8]) -> io::Result<()> {
        let behind = self.0.partition_point(|(start, _)| *start <= first);
        let found = behind.checked_sub(1).and_then(|index| self.0.get(index)).and_then(|(start, held)| {
            let at = usize::try_from(first.offset() - start.offset()).ok()?;
            held.get(at..)?.get(..bytes.len())
        });
        bytes.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
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
        let shared = Arc::new(Shared {
            machine,
            path: path.to_owned(),
            live: how.live,
            passes: AtomicU32::new(0),
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
            // Unless it is live, the guest stands still while its memory is written.
            downtime_bytes: if self.shared.live { 0 } else { bytes },
            precopy_bytes: if self.shared.live { bytes } else { 0 },
            downtime_ns: record.downtime_ns(),
            rounds: self.shared.passes.load(Ordering::Relaxed),
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
        if self.live {
            let log = self.machine.dirty_log();
            let saved = self.save_live(writer, &*log);
            log.stop();
            return match saved {
                Ok(written) => {
                    *self.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(written);
                    self.recorder.set_status(MigrationStatus::Completed);
                }
                Err((trouble, guest)) => self.end(&trouble, guest),
            };
        }
        let paused = match self.pause() {
            Ok(paused) => paused,
            Err(trouble) => {
                // The guest was not paused: there is nothing to undo but the image.
                drop(writer);
                return self.fail(&trouble, GuestAfter::OnSource);
            }
        };
        self.begin_pass();
        match self.write(writer, paused) {
            Ok(written) => {
                *self.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(written);
                self.machine.keep_paused();
                self.recorder.set_status(MigrationStatus::Completed);
            }
            Err(trouble) => self.run_on(&trouble),
        }
    }

    fn pause(&self) -> Result<Paused, Trouble> {
        let paused = self.recorder.timed("pause", || self.machine.pause()).map_err(Trouble::Machine)?;
        self.recorder.write(|record| {
            record.instants.last_exit_ns = Some(paused.last_exit.0);
            record.was_running = paused.was_running;
        });
        Ok(paused)
    }

    fn begin_pass(&self) {
        self.recorder.tell_round(self.passes.fetch_add(1, Ordering::Relaxed) + 1);
    }

    /// Of a guest that runs. What goes wrong leaves it so, but for one that cannot be let go on.
    fn save_live(&self, writer: ImageWriter, log: &dyn DirtyLog) -> Result<Written, (Trouble, GuestAfter)> {
        let unharmed = |trouble| (trouble, GuestAfter::OnSource);
        self.passes_over(&writer, log).map_err(unharmed)?;
        let paused = self.pause().map_err(unharmed)?;
        let moment = self.recorder.timed("copy", || self.moment(paused, log));
        if let Err(error) = self.machine.resume() {
            return Err((Trouble::Machine(error), GuestAfter::PausedOnSource));
        }
        self.recorder.write(|record| record.running_heard = Some(Nanos::now()));
        log.stop();
        let Moment { sections, copy, which } = moment.map_err(unharmed)?;
        let read = |first: PageIndex, bytes: &mut [u8]| copy.read(first, bytes);
        let nothing = |_: PageIndex, _: &[u64]| Ok(());
        let written = self
            .recorder
            .timed("write-memory", || writer.rewrite(&read, which.words(), &nothing, &self.tally))
            .and_then(|()| writer.settle(&self.tally))
            .and_then(|()| self.recorder.timed("make-durable", || writer.commit(&sections)));
        written.map_err(|error| unharmed(Trouble::Image(error)))
    }

    /// Writes all of memory, then what was written meanwhile, until that is little or becomes no less.
    fn passes_over(&self, writer: &ImageWriter, log: &dyn DirtyLog) -> Result<(), Trouble> {
        let ram = self.machine.ram();
        log.start().map_err(Trouble::Log)?;
        // Rearmed before it is read: what is written in between is noted.
        let rearm = |first: PageIndex, words: &[u64]| {
            log.rearm(first, words).map_err(|error| ImageError::Track(Box::new(error)))
        };
        let read = |first: PageIndex, bytes: &mut [u8]| ram.file().read_exact_at(bytes, first.offset());
        self.begin_pass();
        writer.write_moving(ram.file(), &rearm, &self.tally).map_err(Trouble::Image)?;
        let mut before = ram.pages();
        for _ in 1..MOST_PASSES {
            let mut written = PageBitmap::new(ram.pages());
            log.peek(&mut written).map_err(Trouble::Log)?;
            let count = written.count();
            if count <= FEW || count.0 > before.0 / 4 * 3 {
                return Ok(());
            }
            before = count;
            self.begin_pass();
            writer.rewrite(&read, written.words(), &rearm, &self.tally).map_err(Trouble::Image)?;
        }
        Ok(())
    }

    /// What of the paused guest is not in the image yet.
    fn moment(&self, paused: Paused, log: &dyn DirtyLog) -> Result<Moment, Trouble> {
        let ram = self.machine.ram();
        let sections = self.sections(paused)?;
        let mut which = PageBitmap::new(ram.pages());
        log.peek(&mut which).map_err(Trouble::Log)?;
        let copy = Copied::of(ram.file(), &which).map_err(Trouble::Image)?;
        Ok(Moment { sections, copy, which })
    }

    fn write(&self, writer: ImageWriter, paused: Paused) -> Result<Written, Trouble> {
        let sections = self.sections(paused)?;
        let ram = self.machine.ram();
        self.recorder
            .timed("write-memory", || writer.write_memory(ram.file(), &self.tally))
            .and_then(|()| self.recorder.timed("make-durable", || writer.commit(&sections)))
            .map_err(Trouble::Image)
    }

    /// Everything of the paused guest but its memory.
    fn sections(&self, paused: Paused) -> Result<Sections, Trouble> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let state = self.recorder.timed("save-state", || self.machine.save_state()).map_err(Trouble::Machine)?;
        self.recorder.write(|record| record.state_bytes = state.len() as u64);
        Ok(Sections {
            machine: self.machine.describe(),
            state,
            was_running: paused.was_running,
            first_pages: self.machine.first_pages(),
            origin: Origin {
                version: concat!("switchover ", env!("CARGO_PKG_VERSION")).to_owned(),
                saved_at: now.as_secs(),
            },
        })
    }

    /// The image is gone; the guest is where it was.
    fn run_on(&self, trouble: &Trouble) {
        match self.machine.resume() {
            Ok(()) => self.end(trouble, GuestAfter::OnSource),
            Err(error) => {
                tracing::error!(%error, "the guest cannot go on after a save that failed");
                self.fail(trouble, GuestAfter::PausedOnSource);
            }
        }
    }

    /// It was called off, or it failed.
    fn end(&self, trouble: &Trouble, guest: GuestAfter) {
        if matches!((trouble, guest), (Trouble::Image(ImageError::Cancelled), GuestAfter::OnSource)) {
            self.recorder.set_status(MigrationStatus::Cancelling);
            self.recorder.set_status(MigrationStatus::Cancelled);
        } else {
            self.fail(trouble, guest);
        }
    }

    fn fail(&self, trouble: &Trouble, guest: GuestAfter) {
        let (kind, reason) = match trouble {
            Trouble::Image(error) => (FailureKind::Image, error.to_string()),
            Trouble::Machine(error) => (FailureKind::Machine, error.to_string()),
            Trouble::Log(error) => (FailureKind::Machine, error.to_string()),
        };
        let path = self.path.display();
        let sentence = format!("cannot save the guest to {path}: {reason}; {}", guest.sentence());
        self.recorder.fail(FailureView { kind, guest }, sentence);
    }
}
