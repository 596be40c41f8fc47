//! Brings pages from the image into memory that is watched.

use std::collections::VecDeque;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use switchover_image::error::ImageError;
use switchover_image::layout::CHUNK_PAGES;
use switchover_image::reader::{ChunkReader, Image};
use switchover_image::working_set::{Recorded, WorkingSet, page_hash};
use switchover_pager::cpu;
use switchover_pager::ram::Ram;
use switchover_pager::state::{Arrival, Claim, FaultVerdict, LaneTag, PageStates};
use switchover_pager::stats::FaultStats;
use switchover_pager::uffd::Watch;
use switchover_wire::clock::Nanos;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

use super::known::Known;
use super::window::{Closing, Window};
use super::{Lazily, LazyError};

/// Who claims pages.
pub const FAULTS: LaneTag = LaneTag::FIRST;
const PUSHER: LaneTag = match LaneTag::new(1) {
    Some(tag) => tag,
    None => LaneTag::FIRST,
};

/// Recorded pages that are brought at a time, by the pusher, and by a fault on the first of them: what a guest touched next the last
/// time it wants next again. Few enough that a fault on another page does not wait long, some 5 µs each.
const BATCH: usize = 64;
/// Recorded pages that are announced to the kernel before they are read, so that a disk fetches many at a time: measured, a seventh of
/// what they take one by one (`benches/benches/image_reads.rs`).
const PAGES_AHEAD: usize = 8 * BATCH;
/// Chunks, too.
const CHUNKS_AHEAD: usize = 4;
/// How long recorded pages are brought before the guest starts.
const HEAD_START: Duration = Duration::from_millis(2);
/// Between two looks at what another thread has to end first.
const LOOK: Duration = Duration::from_micros(200);

/// Nobody has read this chunk.
const UNREAD: u8 = 0;
/// Somebody reads it, and places what is not here.
const BEING_READ: u8 = 1;
/// Every page of it is here, or claimed by whoever brings it.
const READ: u8 = 2;

/// Guest memory that an image fills.
pub struct LazyMemory {
    image: Image,
    watch: Watch,
    states: PageStates,
    chunks: Box<[AtomicU8]>,
    known: Option<Known>,
    window: Window,
    /// Pages that are not zero and not here.
    missing: AtomicU64,
    pushed: AtomicU64,
    requested: AtomicU64,
    /// Pages that were brought by themselves, as recorded.
    recorded: AtomicU64,
    last_placed: AtomicU64,
    stats: Mutex<FaultStats>,
    failed: AtomicBool,
    failure: Mutex<Option<LazyError>>,
    /// The guest may run.
    started: AtomicBool,
}

/// What one thread needs to bring pages.
pub struct Hands<'a> {
    reader: ChunkReader<'a>,
    tag: LaneTag,
    pages: Vec<PageIndex>,
    bytes: Vec<u8>,
}

impl LazyMemory {
    /// Watches `ram`, which is zero throughout, for the guest of `image`.
    pub fn new(image: Image, ram: Ram, how: Lazily) -> Result<Self, LazyError> {
        let set = how.working_set.then(|| WorkingSet::beside(&image)).flatten();
        let window = Window::new(how.working_set, set.is_none());
        Ok(Self {
            states: PageStates::new(ram.pages()),
            watch: Watch::register(ram)?,
            chunks: (0..image.header().chunks()).map(|_| AtomicU8::new(UNREAD)).collect(),
            missing: AtomicU64::new(image.present_pages().0),
            known: set.map(Known::new),
            window,
            image,
            pushed: AtomicU64::new(0),
            requested: AtomicU64::new(0),
            recorded: AtomicU64::new(0),
            last_placed: AtomicU64::new(0),
            stats: Mutex::new(FaultStats::new()),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            started: AtomicBool::new(false),
        })
    }

    pub fn image(&self) -> &Image {
        &self.image
    }

    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// What faults have cost. Not held across a system call.
    pub fn stats(&self) -> MutexGuard<'_, FaultStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages that are not here, pages that the pusher brought, and pages that faults did.
    pub fn counts(&self) -> (u64, u64, u64) {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (read(&self.missing), read(&self.pushed), read(&self.requested))
    }

    /// Pages that are zero.
    pub fn zero_pages(&self) -> u64 {
        self.image.pages().0 - self.image.present_pages().0
    }

    /// Pages that were brought by themselves because they were recorded.
    pub fn recorded(&self) -> u64 {
        self.recorded.load(Ordering::Relaxed)
    }

    pub fn last_placed(&self) -> Option<Nanos> {
        match self.last_placed.load(Ordering::Acquire) {
            0 => None,
            at => Some(Nanos(at)),
        }
    }

    /// Memory cannot be completed. The first reason stays. Before the guest [may run](Self::let_run) whoever waits for a page is let
    /// go, with zeros: it is the host, which loads a state that nobody will use.
    pub fn fail(&self, error: LazyError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        // Told before it is asked, and the other way round in `let_run`: one of the two sees the other.
        self.failed.store(true, Ordering::SeqCst);
        if !self.started.load(Ordering::SeqCst)
            && let Err(error) = self.watch.unregister()
        {
            tracing::error!(%error, "whoever loads the guest's state may wait for ever");
        }
    }

    /// From here on the guest may run: nobody gets zeros any more for a page that cannot be had.
    ///
    /// # Errors
    /// When one could not be had before. The guest must not run then.
    pub fn let_run(&self) -> Result<(), LazyError> {
        self.started.store(true, Ordering::SeqCst);
        self.check()
    }

    fn check(&self) -> Result<(), LazyError> {
        if !self.failed.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }

    pub fn hands(&self, tag: LaneTag) -> Result<Hands<'_>, LazyError> {
        let bytes = vec![0; BATCH * PAGE_SIZE];
        Ok(Hands { reader: self.image.reader()?, tag, pages: Vec::with_capacity(BATCH), bytes })
    }

    /// What an earlier guest touched first, for a moment: before this one starts.
    pub fn head_start(&self) -> Result<(), LazyError> {
        let (Some(known), false) = (&self.known, self.image.header().is_packed()) else { return Ok(()) };
        let (begun, mut hands, mut at) = (Instant::now(), self.hands(PUSHER)?, 0);
        // As many as it may come to: the guest waits for this.
        self.announce(known.at(0..2 * BATCH));
        while at < known.set().pages().len() && begun.elapsed() < HEAD_START {
            self.bring_recorded(known, at, &mut hands)?;
            at += BATCH;
        }
        Ok(())
    }

    /// Brings all that is missing, and returns when all of memory is here and nobody watches it any more. On success
    /// everything is as it was written; on failure the watch goes on, so that nobody reads what is not here.
    pub fn push(&self) -> Result<(), LazyError> {
        let begun = Instant::now();
        let mut hands = self.hands(PUSHER)?;
        if let Some(known) = &self.known {
            known.sort();
            if !self.image.header().is_packed() {
                self.announce(known.at(0..PAGES_AHEAD));
                for at in (0..known.set().pages().len()).step_by(BATCH) {
                    self.check()?;
                    self.announce(known.at(at + PAGES_AHEAD..at + PAGES_AHEAD + BATCH));
                    self.bring_dense(known, at, &mut hands)?;
                    self.bring_recorded(known, at, &mut hands)?;
                }
                // Nobody waits for the rest: a guest may want the processor.
                cpu::yield_to_others();
            }
            self.bring_chunks(known.set().pages().iter().map(|recorded| chunk_of(recorded.page)), &mut hands)?;
        }
        cpu::yield_to_others();
        self.bring_chunks(0..self.image.header().chunks(), &mut hands)?;
        while self.missing.load(Ordering::Acquire) > 0 {
            self.check()?;
            thread::sleep(LOOK);
        }
        let mut closing = Closing::new(&self.window, begun, Instant::now());
        while self.window.is_open() && !closing.is_due(&self.window, Instant::now()) {
            self.check()?;
            thread::sleep(LOOK);
        }
        self.window.close();
        self.check()?;
        Ok(self.watch.unregister()?)
    }

    /// Brings the chunks `numbers`, announcing each some time before it is read.
    fn bring_chunks(&self, numbers: impl Iterator<Item = u64>, hands: &mut Hands<'_>) -> Result<(), LazyError> {
        let unread = |number: &u64| self.chunk(*number).is_some_and(|chunk| chunk.load(Ordering::Relaxed) == UNREAD);
        let mut numbers = numbers.filter(unread).inspect(|number| self.image.announce_chunk(*number));
        let mut ahead: VecDeque<_> = numbers.by_ref().take(CHUNKS_AHEAD).collect();
        while let Some(number) = ahead.pop_front() {
            self.check()?;
            ahead.extend(numbers.next());
            self.bring_chunk(number, hands)?;
        }
        Ok(())
    }

    /// These are going to be read one by one, as far as they are not here.
    fn announce(&self, recorded: &[Recorded]) {
        for one in recorded.iter().filter(|one| !self.states.is_resident(one.page)) {
            self.image.announce(one.page);
        }
    }

    /// Adds what was touched to the working set that is kept beside the image. What goes wrong costs the next restore time only.
    pub fn keep_working_set(&self) {
        let Some(touched) = self.window.take() else { return };
        let mut set = self.known.as_ref().map(|known| known.set().clone()).unwrap_or_default();
        let kept =
            set.merge(&touched, &self.image).and_then(|new| if new > 0 { set.keep(&self.image) } else { Ok(()) });
        if let Err(error) = kept {
            tracing::warn!(%error, "what the guest touched first is not kept for the next restore");
        }
    }

    /// Somebody waits for `page`, since `taken` at the latest.
    pub fn serve(&self, page: PageIndex, taken: Nanos, hands: &mut Hands<'_>) -> Result<(), LazyError> {
        if !self.image.holds(page) {
            // It may have been claimed before: two faults may come for one page.
            let _ = self.states.claim_zero(page);
            self.watch.map_zero(page, PageCount(1))?;
            self.stats().record_local(taken, Nanos::now());
            return Ok(());
        }
        self.window.note(page);
        match self.states.fault(page) {
            FaultVerdict::Ask => {
                let submitted = Nanos::now();
                self.bring(page, hands)?;
                let now = Nanos::now();
                // Placing is part of bringing: there is no wire.
                self.stats().record_remote(switchover_pager::stats::FaultTimes {
                    taken,
                    submitted,
                    arrived: now,
                    placed: now,
                    woken: now,
                });
            }
            FaultVerdict::AlreadyAsked => self.stats().joined += 1,
            FaultVerdict::Landing => self.stats().record_raced(taken, None),
            FaultVerdict::Map | FaultVerdict::MapZero => {
                self.watch.map(page, PageCount(1), true)?;
                if !self.window.is_open() {
                    self.map_around(page)?;
                }
                self.stats().record_local(taken, Nanos::now());
            }
        }
        Ok(())
    }

    fn bring(&self, page: PageIndex, hands: &mut Hands<'_>) -> Result<(), LazyError> {
        if let Some(known) = &self.known
            && let Some(at) = known.place_of(page)
            && !known.is_dense(chunk_of(page))
        {
            self.bring_recorded(known, at, hands)?;
            if self.states.is_resident(page) {
                return Ok(());
            }
        }
        // Where another thread reads it, that one finds the page asked for.
        self.bring_chunk(chunk_of(page), hands)
    }

    /// Maps all that is here of a chunk that was read while pages were mapped one by one.
    fn map_around(&self, page: PageIndex) -> Result<(), LazyError> {
        let first = chunk_of(page) * CHUNK_PAGES as u64;
        let pages = first..(first + CHUNK_PAGES as u64).min(self.image.pages().0);
        let mut run = pages.start..pages.start;
        for index in pages.clone() {
            if self.states.is_present(PageIndex(index)) {
                run.end = index + 1;
                continue;
            }
            self.map_run(run)?;
            run = index + 1..index + 1;
        }
        self.map_run(run)
    }

    fn map_run(&self, run: std::ops::Range<u64>) -> Result<(), LazyError> {
        if run.is_empty() {
            return Ok(());
        }
        Ok(self.watch.map(PageIndex(run.start), PageCount(run.end - run.start), true)?)
    }

    /// Brings the chunks whole of which much is recorded, among them one of the recorded pages from number `at` on.
    fn bring_dense(&self, known: &Known, at: usize, hands: &mut Hands<'_>) -> Result<(), LazyError> {
        let chunks = known.at(at..at + BATCH).iter().map(|one| chunk_of(one.page));
        chunks.filter(|chunk| known.is_dense(*chunk)).try_for_each(|chunk| self.bring_chunk(chunk, hands))
    }

    /// Brings the recorded pages from number `at` on that are not here, each compared with its own hash. One that is another than
    /// was recorded is left to its chunk, which tells whether the image is damaged.
    fn bring_recorded(&self, known: &Known, at: usize, hands: &mut Hands<'_>) -> Result<(), LazyError> {
        let recorded = known.at(at..at + BATCH);
        if hands.tag == FAULTS {
            // The pusher did so before.
            self.announce(recorded);
        }
        let Hands { tag, pages, bytes, .. } = hands;
        pages.clear();
        for one in recorded.iter().filter(|one| !self.states.is_resident(one.page)) {
            let Some(room) = bytes[pages.len() * PAGE_SIZE..].first_chunk_mut() else { break };
            if self.image.read_unchecked(one.page, room)? && page_hash(room) == one.hash {
                pages.push(one.page);
            }
        }
        let mut rest = 0;
        while rest < pages.len() {
            let first = pages[rest];
            let count = (rest..pages.len()).take_while(|at| pages[*at].0 == first.0 + (*at - rest) as u64).count();
            let placed = self.place(first, &bytes[rest * PAGE_SIZE..(rest + count) * PAGE_SIZE], *tag)?;
            self.recorded.fetch_add(placed, Ordering::Relaxed);
            rest += count;
        }
        Ok(())
    }

    /// Whether somebody has read chunk `number`; `None` where there is no such chunk.
    fn chunk(&self, number: u64) -> Option<&AtomicU8> {
        usize::try_from(number).ok().and_then(|number| self.chunks.get(number))
    }

    /// Brings what is not here of a chunk, unless somebody did or does.
    fn bring_chunk(&self, number: u64, hands: &mut Hands<'_>) -> Result<(), LazyError> {
        let Some(chunk) = self.chunk(number) else { return Ok(()) };
        let taken = chunk.compare_exchange(UNREAD, BEING_READ, Ordering::AcqRel, Ordering::Acquire);
        if taken.is_err() {
            return Ok(());
        }
        let read = hands.reader.read(number)?;
        for (first, bytes) in read.runs() {
            self.place(first, bytes, hands.tag)?;
        }
        chunk.store(READ, Ordering::Release);
        Ok(())
    }

    /// Places those of the pages from `first` on that nobody has claimed. `bytes` are theirs, and compared with a hash. Says how
    /// many it placed.
    fn place(&self, first: PageIndex, bytes: &[u8], tag: LaneTag) -> Result<u64, LazyError> {
        let page = |at: usize| PageIndex(first.0 + at as u64);
        let (count, mut at, mut all) = (bytes.len() / PAGE_SIZE, 0, 0);
        while at < count {
            let start = at;
            while at < count && matches!(self.states.claim(page(at), tag), Claim::Won { .. }) {
                at += 1;
            }
            if at > start {
                self.place_claimed(page(start), &bytes[start * PAGE_SIZE..at * PAGE_SIZE], tag)?;
                all += (at - start) as u64;
            }
            // The one whose claim was lost.
            at += 1;
        }
        Ok(all)
    }

    fn place_claimed(&self, first: PageIndex, bytes: &[u8], tag: LaneTag) -> Result<(), LazyError> {
        let ram = self.watch.ram();
        ram.file().write_all_at(bytes, first.offset()).map_err(|source| ImageError::Memory {
            attempted: "write",
            page: first,
            source,
        })?;
        let count = (bytes.len() / PAGE_SIZE) as u64;
        let one_by_one = self.window.is_open();
        for page in (first.0..first.0 + count).map(PageIndex) {
            if let Arrival::Present { wanted: true } = self.states.arrived(page, tag)
                && one_by_one
            {
                self.watch.map(page, PageCount(1), true)?;
            }
        }
        if !one_by_one {
            self.watch.map(first, PageCount(count), true)?;
        }
        let counter = if tag == FAULTS { &self.requested } else { &self.pushed };
        counter.fetch_add(count, Ordering::Relaxed);
        self.last_placed.fetch_max(Nanos::now().0, Ordering::AcqRel);
        self.missing.fetch_sub(count, Ordering::AcqRel);
        Ok(())
    }
}

fn chunk_of(page: PageIndex) -> u64 {
    page.0 / CHUNK_PAGES as u64
}
