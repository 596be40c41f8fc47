//! Huge mappings for a guest whose memory is complete, so that it runs as fast as on memory that never came page by page.
//!
//! A page that arrived by itself is mapped by itself, in the host's tables and in KVM's. Once nothing is missing and nobody watches
//! any more, a thread replaces 512 such mappings by one, 2 MiB after 2 MiB, where memory was reserved on huge pages
//! (`ram/huge.rs`): no byte is copied for that, and whoever touches the piece waits for some microseconds. Other memory would have
//! to be copied together, milliseconds a piece, which costs the guest more than it wins (docs/performance.md): it is left alone.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::cpu;
use crate::ram::{Ram, Refusals, WeakRam};

/// How much longer than its work the thread sleeps: it takes a twentieth of the time.
const REST: u32 = 19;

/// What has come of it so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Collapsed {
    /// Pieces of 2 MiB that are mapped as one now.
    pub pieces: u64,
    /// Pieces for which the kernel refused.
    pub refused: u64,
}

/// The running thread. Dropping it ends the thread, at the latest when the piece in hand is done.
#[derive(Debug)]
pub struct Collapse {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stopped: Mutex<bool>,
    stop: Condvar,
    pieces: AtomicU64,
    refused: AtomicU64,
}

impl Collapse {
    /// Begins with `ram`, which must be complete and no longer watched. The thread does not keep it: it ends with the memory's
    /// last user.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(ram: &Ram) -> io::Result<Self> {
        Self::resting(ram, |took| took * REST)
    }

    /// The same, with a pause of the caller's after a piece that took so long.
    fn resting(ram: &Ram, pause: impl Fn(Duration) -> Duration + Send + 'static) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let (ram, pieces, its) = (ram.downgrade(), ram.huge_pieces(), Arc::clone(&shared));
        let body = move || {
            cpu::yield_to_others();
            its.run(&ram, &pieces, pause);
            let seen = its.collapsed();
            tracing::debug!(pieces = seen.pieces, refused = seen.refused, "guest memory was mapped as huge pages");
        };
        let thread = thread::Builder::new().name("collapse".to_owned()).spawn(body)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// How far it is.
    #[must_use]
    pub fn collapsed(&self) -> Collapsed {
        self.shared.collapsed()
    }

    /// Whether its thread has come to its end.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Collapse {
    fn drop(&mut self) {
        *self.shared.stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.stop.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that maps memory as huge pages panicked");
        }
    }
}

impl Shared {
    fn run(&self, ram: &WeakRam, pieces: &[usize], pause: impl Fn(Duration) -> Duration) {
        let mut refusals = Refusals::default();
        for piece in pieces {
            // Not held while it sleeps.
            let Some(ram) = ram.upgrade() else { return };
            let began = Instant::now();
            let answer = ram.map_hugely(*piece);
            let took = began.elapsed();
            drop(ram);
            let go_on = refusals.note(&answer);
            self.refused.store(refusals.total, Ordering::Relaxed);
            self.pieces.fetch_add(u64::from(answer.is_ok()), Ordering::Relaxed);
            if !go_on || self.stopped_within(pause(took)) {
                return;
            }
        }
    }

    /// Waits for so long, unless it is told to stop. Says whether it was.
    fn stopped_within(&self, pause: Duration) -> bool {
        let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.stop.wait_timeout_while(stopped, pause, |stopped| !*stopped);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn collapsed(&self) -> Collapsed {
        Collapsed { pieces: self.pieces.load(Ordering::Relaxed), refused: self.refused.load(Ordering::Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uffd::Watch;
    use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

    const PIECE: u64 = 512;
    const PIECES: u64 = 6;

    /// Memory that came page by page: mapped like that, and watched no longer. None where this host has no userfaultfd, or no
    /// huge page.
    fn arrived() -> Option<Ram> {
        let ram = Ram::new(PageCount(PIECES * PIECE + 3)).unwrap();
        ram.populate().unwrap();
        if ram.huge_pieces().len() as u64 != PIECES {
            println!("SKIP: this host has no huge pages to spare");
            return None;
        }
        let Ok(watch) = Watch::register(ram.clone()).inspect_err(|error| println!("SKIP: {error}")) else {
            return None;
        };
        for page in (0..ram.pages().0).map(PageIndex) {
            // SAFETY: a page of the alias that only this test uses.
            unsafe { ram.alias_of(page).unwrap().cast::<u64>().write(mark(page)) };
            watch.map(page, PageCount(1), true).unwrap();
        }
        watch.unregister().unwrap();
        Some(ram)
    }

    fn mark(page: PageIndex) -> u64 {
        (page.0 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Word `word` of a page, as the guest sees it.
    fn word(ram: &Ram, page: PageIndex, word: usize) -> &AtomicU64 {
        let offset = usize::try_from(page.0).unwrap() * PAGE_SIZE + word * 8;
        assert!(offset < ram.len_bytes());
        // SAFETY: an aligned word inside the guest mapping, which `ram` keeps; these tests use it as an atomic only.
        unsafe { AtomicU64::from_ptr(ram.guest_base().wrapping_add(offset).cast()) }
    }

    /// KiB of the guest mapping that are mapped as huge pages.
    fn hugely_mapped(ram: &Ram) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", ram.guest_base().addr());
        let lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let line = lines.skip(1).find_map(|line| line.strip_prefix("ShmemPmdMapped:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    fn wait(collapse: &Collapse) {
        while !collapse.is_over() {
            thread::yield_now();
        }
    }

    #[test]
    fn pieces_become_one_mapping_and_every_byte_stays_while_the_guest_writes() {
        let Some(ram) = arrived() else { return };
        assert_eq!(hugely_mapped(&ram), 0);
        let collapse = Collapse::start(&ram).unwrap();
        let mut rounds = 0;
        loop {
            let last = collapse.is_over();
            rounds += 1;
            (0..ram.pages().0).for_each(|page| _ = word(&ram, PageIndex(page), 511).fetch_add(1, Ordering::Relaxed));
            if last {
                break;
            }
        }
        assert_eq!(collapse.collapsed(), Collapsed { pieces: PIECES, refused: 0 });
        assert_eq!(hugely_mapped(&ram), PIECES * 2048);
        for page in (0..ram.pages().0).map(PageIndex) {
            let seen = [0, 511].map(|at| word(&ram, page, at).load(Ordering::Relaxed));
            assert_eq!(seen, [mark(page), rounds], "{page:?}");
        }
    }

    #[test]
    fn memory_that_would_have_to_be_copied_is_left_alone() {
        let ram = Ram::new(PageCount(2 * PIECE)).unwrap();
        (0..2 * PIECE).for_each(|page| word(&ram, PageIndex(page), 0).store(1, Ordering::Relaxed));
        let collapse = Collapse::start(&ram).unwrap();
        wait(&collapse);
        assert_eq!((collapse.collapsed(), hugely_mapped(&ram)), (Collapsed::default(), 0));
    }

    #[test]
    fn between_two_pieces_it_keeps_no_memory_and_ends_at_once() {
        let Some(ram) = arrived() else { return };
        let memory = ram.downgrade();
        let collapse = Collapse::resting(&ram, |_| Duration::from_secs(3600)).unwrap();
        while collapse.collapsed().pieces == 0 {
            thread::yield_now();
        }
        drop(ram);
        let began = Instant::now();
        while memory.upgrade().is_some() {
            assert!(began.elapsed() < Duration::from_secs(10), "it keeps the memory");
            thread::yield_now();
        }
        assert!(!collapse.is_over());
        let shared = Arc::downgrade(&collapse.shared);
        drop(collapse);
        assert!(shared.upgrade().is_none(), "its thread was not joined");
    }

    #[test]
    fn it_ends_with_the_memory_and_keeps_none_of_it() {
        let Some(ram) = arrived() else { return };
        let memory = ram.downgrade();
        let collapse = Collapse::start(&ram).unwrap();
        drop(ram);
        wait(&collapse);
        assert!(memory.upgrade().is_none());
    }
}
