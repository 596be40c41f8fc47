//! A machine without KVM: its memory is real, its one vCPU is a thread that writes pages, its state a counter.
//!
//! It exists to test migrations where KVM is not at hand, and to show what an embedder's [`Machine`] must do. Its
//! memory is moved by the real pager; only the guest is made up.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use switchover_pager::ram::{Ram, RamError};
use switchover_precopy::bitmap::{AtomicPageBitmap, PageBitmap};
use switchover_precopy::dirty::{DirtyLog, DirtyLogError};
use switchover_wire::clock::Nanos;
use switchover_wire::description::MachineDescription;
use switchover_wire::types::{PageCount, PageIndex};

use crate::machine::{Machine, MachineError, Paused};

/// The multiplier of a full-period sequence over any power of two (Knuth): the "guest" visits pages in an order that
/// no sweep has.
const STEP: u64 = 6_364_136_223_846_793_005;

/// What one visit of the guest takes, roughly: throttling stretches it.
const VISIT: Duration = Duration::from_micros(20);

/// A machine whose guest is a thread.
pub struct FakeMachine {
    ram: Ram,
    inner: Arc<Inner>,
    dirty: Arc<FakeDirtyLog>,
}

/// A book of written pages that the "guest" itself keeps, after each write.
#[derive(Debug)]
pub struct FakeDirtyLog {
    noted: AtomicPageBitmap,
    kept: AtomicBool,
}

impl FakeDirtyLog {
    /// A book for RAM of this size, closed.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        Self { noted: AtomicPageBitmap::new(pages), kept: AtomicBool::new(false) }
    }

    /// `page` has just been written. After the write: a reader that rearms between the two would otherwise miss it.
    pub fn note(&self, page: PageIndex) {
        if self.kept.load(Ordering::SeqCst) {
            self.noted.insert(page);
        }
    }
}

impl DirtyLog for FakeDirtyLog {
    fn start(&self) -> Result<(), DirtyLogError> {
        self.noted.unite(&PageBitmap::full(self.noted.pages()));
        self.kept.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn peek(&self, noted: &mut PageBitmap) -> Result<(), DirtyLogError> {
        noted.unite(&self.noted.snapshot());
        Ok(())
    }

    fn rearm(&self, first: PageIndex, words: &[u64]) -> Result<(), DirtyLogError> {
        self.noted.remove_words(first, words);
        Ok(())
    }

    fn stop(&self) {
        self.kept.store(false, Ordering::SeqCst);
    }
}

struct Inner {
    control: Mutex<Control>,
    changed: Condvar,
    first_entry: AtomicU64,
    corrupt: AtomicU64,
    ended: AtomicBool,
    throttle: AtomicU8,
    frozen: AtomicBool,
    /// 1 more than the page that is read while the state is loaded; 0 for none.
    touched_on_load: AtomicU64,
}

struct Control {
    has_right: bool,
    run: bool,
    in_guest: bool,
    visits: u64,
    stopped: Option<String>,
}

impl FakeMachine {
    /// A machine that may run, with `pages` (a power of two) of memory; it is paused.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(pages: PageCount) -> Result<Arc<Self>, RamError> {
        Self::build(pages, true)
    }

    /// A machine that waits for a migration.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn incoming(pages: PageCount) -> Result<Arc<Self>, RamError> {
        Self::build(pages, false)
    }

    fn build(pages: PageCount, has_right: bool) -> Result<Arc<Self>, RamError> {
        let ram = Ram::new(pages)?;
        let inner = Arc::new(Inner {
            control: Mutex::new(Control { has_right, run: false, in_guest: false, visits: 0, stopped: None }),
            changed: Condvar::new(),
            first_entry: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            throttle: AtomicU8::new(0),
            frozen: AtomicBool::new(false),
            touched_on_load: AtomicU64::new(0),
        });
        let dirty = Arc::new(FakeDirtyLog::new(pages));
        let (guest, guest_ram, book) = (Arc::clone(&inner), ram.clone(), Arc::clone(&dirty));
        thread::spawn(move || guest.run(&guest_ram, &book));
        Ok(Arc::new(Self { ram, inner, dirty }))
    }

    /// Lets the guest do nothing from now on, even while it runs: its memory stays as it arrived.
    pub fn freeze(&self) {
        self.inner.frozen.store(true, Ordering::Release);
    }

    /// Reads `page` while the state is loaded from now on, as KVM does with those that a guest shares with it.
    pub fn touch_on_load(&self, page: PageIndex) {
        assert!(page.0 < self.ram.pages().0);
        self.inner.touched_on_load.store(page.0 + 1, Ordering::Release);
    }

    /// Visits made so far: each read one page, checked it, and wrote it.
    #[must_use]
    pub fn visits(&self) -> u64 {
        self.inner.lock().visits
    }

    /// Visits that found something else in a page than the visit before had left there.
    #[must_use]
    pub fn corrupt_visits(&self) -> u64 {
        self.inner.corrupt.load(Ordering::Acquire)
    }

    /// Whether the guest runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.inner.lock().run
    }

    /// Why it was stopped for good.
    #[must_use]
    pub fn stopped(&self) -> Option<String> {
        self.inner.lock().stopped.clone()
    }
}

impl Inner {
    /// Waits so long that the visits take only what the throttle leaves of the time.
    fn yield_to_throttle(&self) {
        let percent = u32::from(self.throttle.load(Ordering::Acquire).min(99));
        if percent > 0 {
            thread::sleep(VISIT * percent / (100 - percent));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, ram: &Ram, dirty: &FakeDirtyLog) {
        let pages = ram.pages().0;
        loop {
            let visit = {
                let mut control = self.lock();
                control.in_guest = false;
                self.changed.notify_all();
                while !control.run {
                    if self.ended.load(Ordering::Acquire) {
                        return;
                    }
                    control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
                }
                if self.ended.load(Ordering::Acquire) {
                    return;
                }
                control.in_guest = true;
                control.visits
            };
            let now = Nanos::now().0;
            let _ = self.first_entry.compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire);
            if self.frozen.load(Ordering::Acquire) {
                thread::sleep(VISIT);
                continue;
            }
            // A quarter of memory is never touched, and so stays zero.
            let page = PageIndex(visit.wrapping_mul(STEP) % pages * 3 / 4);
            let word = ram.guest_base().wrapping_add(usize::try_from(page.offset()).unwrap_or(0)).cast::<u64>();
            // SAFETY: the page lies in the guest mapping, which `ram` keeps mapped; this thread is its only writer but
            // for the pager, which writes pages that this thread cannot have seen yet.
            unsafe {
                let seen = word.read_volatile();
                // The page's own word says how often it was visited, tagged with its number.
                if seen != 0 && seen >> 32 != page.0 {
                    self.corrupt.fetch_add(1, Ordering::AcqRel);
                }
                let count = (seen & 0xffff_ffff) + 1;
                word.write_volatile(page.0 << 32 | (count & 0xffff_ffff));
            }
            dirty.note(page);
            self.lock().visits += 1;
            self.yield_to_throttle();
        }
    }
}

impl Machine for FakeMachine {
    fn describe(&self) -> MachineDescription {
        MachineDescription::of_memory_alone("fake", self.ram.pages())
    }

    fn ram(&self) -> Ram {
        self.ram.clone()
    }

    fn dirty_log(&self) -> Arc<dyn DirtyLog> {
        Arc::<FakeDirtyLog>::clone(&self.dirty)
    }

    fn throttle(&self, percent: u8) {
        self.inner.throttle.store(percent, Ordering::Release);
    }

    fn limit_dirty_rate(&self, bytes_per_second: Option<u64>) -> Result<(), MachineError> {
        if bytes_per_second.is_none() {
            return Ok(());
        }
        Err(MachineError::new("limit the vCPU's dirty rate", "the fake machine cannot"))
    }

    fn pause(&self) -> Result<Paused, MachineError> {
        let mut control = self.inner.lock();
        let was_running = control.run;
        control.run = false;
        while control.in_guest {
            control = self.inner.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(Paused { last_exit: Nanos::now(), was_running })
    }

    fn resume(&self) -> Result<(), MachineError> {
        let mut control = self.inner.lock();
        if !control.has_right {
            return Err(MachineError::new("run the guest", "this machine has not the right to run"));
        }
        self.inner.first_entry.store(0, Ordering::Release);
        control.run = true;
        self.inner.changed.notify_all();
        Ok(())
    }

    /// It is paused, and nobody but its embedder runs it.
    fn keep_paused(&self) {}

    fn surrender_right_to_run(&self) {
        self.inner.lock().has_right = false;
    }

    fn take_right_to_run(&self) {
        self.inner.lock().has_right = true;
    }

    fn take_back_right_to_run(&self) {
        self.take_right_to_run();
    }

    fn first_pages(&self) -> Vec<PageIndex> {
        let next = self.visits();
        (next..next + 8).map(|visit| PageIndex(visit.wrapping_mul(STEP) % self.ram.pages().0 * 3 / 4)).collect()
    }

    fn save_state(&self) -> Result<Vec<u8>, MachineError> {
        Ok(self.visits().to_le_bytes().to_vec())
    }

    fn load_state(&self, state: &[u8]) -> Result<(), MachineError> {
        if let Some(page) = self.inner.touched_on_load.load(Ordering::Acquire).checked_sub(1) {
            let offset = usize::try_from(PageIndex(page).offset()).unwrap_or(0);
            // SAFETY: a page of the guest mapping, which `ram` keeps mapped; nobody writes it but the pager, before this can read it.
            unsafe { self.ram.guest_base().wrapping_add(offset).read_volatile() };
        }
        let bytes = state.try_into().map_err(|_| {
            MachineError::new("load the state", format!("it has {} bytes where 8 were expected", state.len()))
        })?;
        self.inner.lock().visits = u64::from_le_bytes(bytes);
        Ok(())
    }

    fn first_entry(&self) -> Option<Nanos> {
        match self.inner.first_entry.load(Ordering::Acquire) {
            0 => None,
            at => Some(Nanos(at)),
        }
    }

    fn stop_for_good(&self, reason: &str) {
        let mut control = self.inner.lock();
        control.run = false;
        control.stopped = Some(reason.to_owned());
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        // Under the lock, or the guest could look before this and wait after it.
        let control = self.inner.lock();
        self.inner.ended.store(true, Ordering::Release);
        self.inner.changed.notify_all();
        drop(control);
    }
}
