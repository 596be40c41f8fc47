//! Guest RAM: one memfd, mapped twice.
//!
//! The *guest mapping* is what vCPUs and device models use and what userfaultfd watches. The *alias* is what
//! only the pager writes: a page that arrives is received into the alias and then mapped into the guest mapping
//! by `UFFDIO_CONTINUE`, with no copy between.

mod huge;
mod mapping;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use nix::sys::memfd::{MFdFlags, memfd_create};
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};
use thiserror::Error;

use self::huge::PIECE_BYTES;
pub(crate) use self::huge::Refusals;
use self::mapping::Mapping;

/// What can go wrong with guest RAM.
#[derive(Debug, Error)]
pub enum RamError {
    /// The memfd could not be made or sized.
    #[error("cannot create a memfd of {size} bytes for guest RAM: {source}")]
    Create {
        /// The size asked for.
        size: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A mapping of it failed.
    #[error("cannot map {size} bytes of guest RAM: {source}; is the address space limited (`ulimit -v`)?")]
    Map {
        /// The size asked for.
        size: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The pages could not be reserved.
    #[error(
        "cannot reserve {size} bytes of guest RAM: {source}; free memory on this host, or accept the risk of \
         running out of it after the handoff with --lazy-memory"
    )]
    Populate {
        /// The size asked for.
        size: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A size that is no whole number of pages, or none at all.
    #[error("guest RAM of {size} bytes is not a positive whole number of {PAGE_SIZE}-byte pages")]
    Size {
        /// The size asked for.
        size: u64,
    },
}

/// Guest RAM. Clones share the same memory, which lives as long as any of them.
#[derive(Clone, Debug)]
pub struct Ram {
    inner: Arc<Mappings>,
}

#[derive(Debug)]
struct Mappings {
    file: File,
    guest: Mapping,
    alias: Mapping,
    pages: PageCount,
    /// One of the three below.
    watch: AtomicU8,
    /// Which pieces of 2 MiB were reserved on a huge page.
    huge: Box<[AtomicBool]>,
}

/// Nobody has watched it yet.
const NEVER_WATCHED: u8 = 0;
/// Touching the guest mapping may wait for a page.
const WATCHED: u8 = 1;
/// It is complete, and the guest mapping is like any other.
const WATCH_OVER: u8 = 2;

impl Ram {
    /// New RAM, all zero, none of it allocated yet.
    ///
    /// # Errors
    /// When the memfd cannot be made, sized or mapped.
    pub fn new(pages: PageCount) -> Result<Self, RamError> {
        let size = pages.bytes();
        let create = |source| RamError::Create { size, source };
        let fd = memfd_create(c"guest-ram", MFdFlags::MFD_CLOEXEC).map_err(|errno| create(errno.into()))?;
        let file = File::from(fd);
        file.set_len(size).map_err(create)?;
        Self::from_memfd(file)
    }

    /// RAM over a memfd (or any shared-memory file) that the caller made; its length is the RAM's size.
    ///
    /// # Errors
    /// When the file's length is no whole number of pages, or it cannot be mapped.
    pub fn from_memfd(file: File) -> Result<Self, RamError> {
        let size = file.metadata().map_err(|source| RamError::Map { size: 0, source })?.len();
        let length = usize::try_from(size).map_err(|_| RamError::Size { size })?;
        let pages = PageCount::from_bytes(size).filter(|pages| pages.0 > 0).ok_or(RamError::Size { size })?;
        let map = || Mapping::new(&file, length).map_err(|source| RamError::Map { size, source });
        let (guest, alias) = (map()?, map()?);
        // A child process must not share the guest's memory, and a core dump of gigabytes helps nobody.
        for mapping in [&guest, &alias] {
            let _ = mapping.advise(0, length, libc::MADV_DONTFORK);
            let _ = mapping.advise(0, length, libc::MADV_DONTDUMP);
        }
        let huge = (0..length / PIECE_BYTES).map(|_| AtomicBool::new(false)).collect();
        let watch = AtomicU8::new(NEVER_WATCHED);
        Ok(Self { inner: Arc::new(Mappings { file, guest, alias, pages, watch, huge }) })
    }

    /// Its size.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        self.inner.pages
    }

    /// Its size in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.inner.guest.len()
    }

    /// The memfd behind both mappings.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.inner.file
    }

    /// First byte of the guest mapping: what KVM memory slots and device models use.
    #[must_use]
    pub fn guest_base(&self) -> *mut u8 {
        self.inner.guest.base()
    }

    /// First byte of the alias.
    #[must_use]
    pub fn alias_base(&self) -> *mut u8 {
        self.inner.alias.base()
    }

    /// The address of `page` in the alias, or `None` past the end of RAM. Whoever writes there must hold the
    /// page's claim.
    #[must_use]
    pub fn alias_of(&self, page: PageIndex) -> Option<*mut u8> {
        self.within(&self.inner.alias, page)
    }

    fn within(&self, mapping: &Mapping, page: PageIndex) -> Option<*mut u8> {
        (page.0 < self.inner.pages.0).then(|| {
            let offset = usize::try_from(page.offset()).unwrap_or(usize::MAX);
            mapping.base().wrapping_add(offset)
        })
    }

    /// Whether it is watched for the first time now. What a failed migration has brought stays mapped, where no fault
    /// would tell of it.
    pub(crate) fn take_for_watching(&self) -> bool {
        let never = self.inner.watch.compare_exchange(NEVER_WATCHED, WATCHED, Ordering::AcqRel, Ordering::Acquire);
        never.is_ok()
    }

    /// It could not be watched after all, and nothing has come into it: the next one may.
    pub(crate) fn was_not_watched(&self) {
        self.inner.watch.store(NEVER_WATCHED, Ordering::Release);
    }

    /// Nobody watches it any more.
    pub(crate) fn end_of_watch(&self) {
        self.inner.watch.store(WATCH_OVER, Ordering::Release);
    }

    /// Where to read the bytes of `page` while its guest is paused, or `None` past the end of RAM. What the guest has touched is
    /// mapped in its own mapping; in the alias, reading it first would cost a fault for every sixteen pages (measured: a seventh of
    /// what pushing them takes). A mapping that is watched is not read: it might wait for a page.
    #[must_use]
    pub fn readable(&self, page: PageIndex) -> Option<*const u8> {
        let mapping = match self.inner.watch.load(Ordering::Acquire) {
            WATCHED => &self.inner.alias,
            _ => &self.inner.guest,
        };
        self.within(mapping, page).map(<*mut u8>::cast_const)
    }

    /// Allocates every page now, so that none can be missing later. On huge pages where there are any, so that
    /// [`Collapse`](crate::collapse::Collapse) has little to do.
    ///
    /// # Errors
    /// When the host has not the memory for it.
    pub fn populate(&self) -> Result<(), RamError> {
        self.populate_hugely();
        let (size, alias) = (self.inner.pages.bytes(), &self.inner.alias);
        alias.advise(0, alias.len(), libc::MADV_POPULATE_WRITE).map_err(|source| RamError::Populate { size, source })
    }

    /// Writes to every page without changing it. Where this host is itself a guest, pages that were populated some seconds
    /// ago may have been taken by *its* host meanwhile, and are slow to write once: 5 Gbit/s against 25 (measured on
    /// loopback, 256 MiB idle for 4 s). Elsewhere it costs some ten nanoseconds a page.
    pub fn touch(&self) {
        // Hidden from the compiler, which would turn the addition of a known 0 into a mere load.
        let nothing = std::hint::black_box(0);
        for page in 0..self.inner.pages.0 {
            if let Some(address) = self.alias_of(PageIndex(page)) {
                // SAFETY: a page's address is aligned for any integer and lies in the alias, which `self` keeps mapped;
                // every access to the alias here is atomic, and adding nothing changes nothing for whoever else reads.
                unsafe { AtomicU64::from_ptr(address.cast()) }.fetch_add(nothing, Ordering::Relaxed);
            }
        }
    }

    /// Copies `page` out of the alias, whoever may write it meanwhile: what is copied may be torn then. `false` past the end
    /// of RAM.
    pub fn copy_page(&self, page: PageIndex, bytes: &mut [u8; PAGE_SIZE]) -> bool {
        let Some(alias) = self.alias_of(page) else { return false };
        // SAFETY: a whole page of the alias, which `self` keeps mapped; aligned for any integer, of which every bit pattern is
        // a number, and only loaded atomically.
        let words = unsafe { &*alias.cast::<[AtomicU64; PAGE_SIZE / 8]>() };
        for (to, from) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&from.load(Ordering::Relaxed).to_ne_bytes());
        }
        true
    }

    /// Gives every page back to the host: RAM reads as zero again.
    ///
    /// # Errors
    /// When the kernel refuses.
    ///
    /// # Safety
    /// Nothing may hold a reference into either mapping, and no guest may run on it.
    pub unsafe fn clear(&self) -> Result<(), RamError> {
        let (size, alias) = (self.inner.pages.bytes(), &self.inner.alias);
        // SAFETY: the range is the alias, which `self` keeps mapped, and the caller promises that nobody relies on the contents;
        // on a shared mapping MADV_REMOVE frees the pages of the file, so both mappings read zeros afterwards.
        let done = unsafe { libc::madvise(alias.base().cast(), alias.len(), libc::MADV_REMOVE) };
        if done == 0 { Ok(()) } else { Err(RamError::Populate { size, source: io::Error::last_os_error() }) }
    }
}

/// [`Ram`] that its last user may take away.
#[derive(Clone, Debug)]
pub(crate) struct WeakRam(Weak<Mappings>);

impl Ram {
    pub(crate) fn downgrade(&self) -> WeakRam {
        WeakRam(Arc::downgrade(&self.inner))
    }
}

impl WeakRam {
    pub(crate) fn upgrade(&self) -> Option<Ram> {
        self.0.upgrade().map(|inner| Ram { inner })
    }
}

/// How many of `count` pages from `first` on are in memory, where the kernel can tell (cachestat(2), Linux 6.5). What is swapped
/// out does not count, nor does a hole.
#[must_use]
pub fn cached_pages(file: &File, first: PageIndex, count: PageCount) -> Option<PageCount> {
    let range = CacheRange { offset: first.offset(), bytes: count.bytes() };
    let mut statistics = CacheStatistics::default();
    // SAFETY: the kernel reads one live structure and writes another, both of its own layout.
    let done = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut statistics, 0) };
    (done == 0).then_some(PageCount(statistics.cached))
}

/// The same number on every architecture; libc has it for some.
const SYS_CACHESTAT: libc::c_long = 451;

/// The kernel's `struct cachestat_range`.
#[repr(C)]
struct CacheRange {
    offset: u64,
    bytes: u64,
}

/// The kernel's `struct cachestat`.
#[repr(C)]
#[derive(Default)]
struct CacheStatistics {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_mappings_show_the_same_memory() {
        let ram = Ram::new(PageCount(4)).unwrap();
        let alias = ram.alias_of(PageIndex(2)).unwrap();
        // SAFETY: both addresses lie in live mappings of four pages that only this test uses.
        unsafe {
            alias.write(7);
            assert_eq!(ram.guest_base().add(2 * PAGE_SIZE).read(), 7);
            ram.clear().unwrap();
            assert_eq!(ram.guest_base().add(2 * PAGE_SIZE).read(), 0);
        }
    }

    #[test]
    fn touching_changes_nothing() {
        let ram = Ram::new(PageCount(2)).unwrap();
        // SAFETY: the mapping is live and this test's own.
        unsafe { ram.alias_of(PageIndex(1)).unwrap().write(9) };
        ram.touch();
        // SAFETY: as above.
        assert_eq!(unsafe { ram.alias_of(PageIndex(1)).unwrap().read() }, 9);
    }

    #[test]
    fn what_is_watched_is_read_through_the_alias_and_nothing_else_is() {
        let ram = Ram::new(PageCount(4)).unwrap();
        let (guest, alias) = (ram.guest_base().cast_const(), ram.alias_base().cast_const());
        let page = |base: *const u8| Some(base.wrapping_add(PAGE_SIZE));
        assert_eq!(ram.readable(PageIndex(1)), page(guest));
        assert!(ram.take_for_watching());
        ram.was_not_watched();
        assert!(ram.take_for_watching() && !ram.take_for_watching());
        assert_eq!(ram.readable(PageIndex(1)), page(alias));
        ram.end_of_watch();
        assert_eq!(ram.readable(PageIndex(1)), page(guest));
        assert!(!ram.take_for_watching(), "it may hold another guest's bytes");
        assert_eq!(ram.readable(PageIndex(4)), None);
    }

    #[test]
    fn an_address_past_the_end_is_refused() {
        let ram = Ram::new(PageCount(4)).unwrap();
        assert_eq!(ram.alias_of(PageIndex(4)), None);
        assert_eq!(ram.alias_of(PageIndex(u64::MAX)), None);
    }

    #[test]
    fn no_memory_is_no_ram() {
        assert!(matches!(Ram::new(PageCount(0)), Err(RamError::Size { size: 0 })));
    }
}
