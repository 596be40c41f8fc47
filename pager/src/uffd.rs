//! The userfaultfds that watch guest RAM, and what their return codes mean.
//!
//! This module (with [`device`] and [`mod@write`]) is the only one that calls userfaultfd. What holds here:
//! - The watched range is the whole guest mapping of one [`Ram`], which [`Watch`] keeps alive. Each page of it is registered
//!   with the userfaultfd of its shard, and every call about it goes to that one: another would wake nobody.
//! - Addresses are made from page indices that were checked against the RAM's size.
//! - No descriptor is closed before all of the range is unregistered, or the process ends: closing it earlier would
//!   answer every pending fault with a zero page. A [`Watch`] that is dropped while registered leaks them on purpose.

pub mod device;
pub mod waiting;
pub mod write;

use std::ffi::c_void;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};
use thiserror::Error;
use userfaultfd::{Error as UffdError, Event, EventBuffer, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::ram::Ram;
use crate::stripes::Stripes;

/// `UFFD_FEATURE_MINOR_SHMEM` of linux/userfaultfd.h, which the crate does not name.
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;

/// How often a call that the kernel answers with "try again" is tried before it counts as broken. Each try that
/// makes no progress yields the CPU; the kernel asks for this only while it changes the address space.
const RETRY_LIMIT: u32 = 100_000;

/// How many faults are taken from the kernel in one read.
const FAULTS_PER_READ: usize = 64;

/// Userfaultfd could not do its part.
#[derive(Debug, Error)]
pub enum WatchError {
    /// No userfaultfd could be made.
    #[error(
        "cannot open a userfaultfd: {0}; it needs CAP_SYS_PTRACE, or access to /dev/userfaultfd, and Linux 5.14 or \
         later for minor faults on shared memory (`switchover check` tells)"
    )]
    Open(#[source] UffdError),
    /// No userfaultfd could be made that protects shared memory.
    #[error(
        "cannot open a userfaultfd that makes writes to guest RAM wait: {0}; it needs CAP_SYS_PTRACE, or access to \
         /dev/userfaultfd, and Linux 5.19 or later (`switchover check` tells)"
    )]
    Protect(#[source] UffdError),
    /// Guest RAM could not be registered.
    #[error("cannot register {pages} of guest RAM with userfaultfd: {source}")]
    Register {
        /// The RAM's size.
        pages: PageCount,
        /// The kernel's answer.
        source: UffdError,
    },
    /// A page could not be mapped.
    #[error("cannot {attempted} {count} from {first}: {source}")]
    Place {
        /// "map", "map zeros at", "unmap", "wake", "protect", "let go of".
        attempted: &'static str,
        /// The first page.
        first: PageIndex,
        /// How many.
        count: PageCount,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Faults could not be read.
    #[error("cannot read faults from the userfaultfd: {0}")]
    Read(#[source] UffdError),
    /// The kernel reported a fault outside guest RAM, or an event that was never asked for.
    #[error("the userfaultfd reported something that was never registered: {0}")]
    Unexpected(String),
    /// Bytes that a pager has brought before lie in it, and would be taken for this guest's.
    #[error("this guest RAM was watched before: a migration needs RAM that nothing was ever loaded into")]
    UsedBefore,
    /// The range could not be unregistered.
    #[error("cannot unregister guest RAM from userfaultfd: {0}")]
    Unregister(#[source] UffdError),
}

/// What the kernel's answer to a placement means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    /// This many bytes are mapped now; go on behind them.
    Mapped(u64),
    /// The first page of the rest is mapped already: wake who waits for it and go on behind it.
    AlreadyMapped,
    /// The address space is changing: try again.
    TryAgain,
    /// There is no page in the file to map.
    Hole,
    /// Anything else: this cannot be repaired.
    Broken(i32),
}

/// The one place where userfaultfd's return codes get their meaning (linux/mm/userfaultfd.c, fs/userfaultfd.c).
fn classify(result: Result<u64, i32>) -> Answer {
    match result {
        Ok(0) | Err(libc::EAGAIN) => Answer::TryAgain,
        Ok(mapped) => Answer::Mapped(mapped),
        Err(libc::EEXIST) => Answer::AlreadyMapped,
        Err(libc::EFAULT) => Answer::Hole,
        Err(errno) => Answer::Broken(errno),
    }
}

fn errno_of(error: &UffdError) -> i32 {
    match error {
        UffdError::SystemError(errno) | UffdError::CopyFailed(errno) | UffdError::ZeropageFailed(errno) => {
            // An enum whose discriminants are the kernel's numbers.
            *errno as i32
        }
        UffdError::PartiallyCopied(_) => libc::EAGAIN,
        _ => libc::EIO,
    }
}

/// Guest RAM under userfaultfd.
#[derive(Debug)]
pub struct Watch {
    /// One for each shard.
    uffds: ManuallyDrop<Box<[Uffd]>>,
    stripes: Stripes,
    ram: Ram,
    /// So many stripes, from the first on, are watched no more, or are about to be.
    ended: AtomicU64,
    ending: Mutex<()>,
}

impl Watch {
    /// Registers the whole guest mapping for missing and minor faults, with one userfaultfd.
    ///
    /// # Errors
    /// See [`register_sharded`](Self::register_sharded).
    pub fn register(ram: Ram) -> Result<Self, WatchError> {
        Self::register_sharded(ram, 1)
    }

    /// Registers the whole guest mapping for missing and minor faults, with one userfaultfd for each of `shards`. From here on
    /// whoever touches a page that is not mapped sleeps until it is placed.
    ///
    /// # Errors
    /// When the kernel has no userfaultfd for this process, or lacks minor faults on shared memory.
    pub fn register_sharded(ram: Ram, shards: u8) -> Result<Self, WatchError> {
        let stripes = Stripes::new(ram.pages(), shards);
        let uffds = (0..stripes.shards()).map(|_| open()).collect::<Result<Box<[_]>, _>>();
        let uffds = uffds.map_err(WatchError::Open)?;
        if !ram.take_for_watching() {
            return Err(WatchError::UsedBefore);
        }
        let watch =
            Self { uffds: ManuallyDrop::new(uffds), stripes, ram, ended: AtomicU64::new(0), ending: Mutex::new(()) };
        for index in 0..stripes.count() {
            let (uffd, start, length) = watch.stripe(index);
            if let Err(source) = uffd.register_with_mode(start, length, RegisterMode::MISSING | RegisterMode::MINOR) {
                // Nobody runs on it yet, and no page was placed: it may be let go of, and tried again.
                watch.ended.store(stripes.count(), Ordering::Release);
                let ram = watch.ram.clone();
                drop(watch);
                ram.was_not_watched();
                return Err(WatchError::Register { pages: ram.pages(), source });
            }
        }
        Ok(watch)
    }

    /// The RAM that is watched.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// How many userfaultfds watch it.
    #[must_use]
    pub fn shards(&self) -> usize {
        self.stripes.shards()
    }

    /// The shard that `page` belongs to, counted from 0.
    #[must_use]
    pub fn shard_of(&self, page: PageIndex) -> usize {
        self.stripes.shard_of(page)
    }

    /// The descriptor of a shard, to be polled for faults.
    ///
    /// # Panics
    /// When there is no such shard.
    #[must_use]
    pub fn fd(&self, shard: usize) -> BorrowedFd<'_> {
        self.uffds[shard].as_fd()
    }

    /// Maps `count` pages whose bytes are in the alias, and wakes who waits for them unless `quiet`.
    ///
    /// Pages that are mapped already are passed over (and whoever waits for them woken, as a fault may have come
    /// between the mapping and this call). A page that has no memory behind it fails: see [`map_zero`](Self::map_zero).
    ///
    /// # Errors
    /// When a page has no memory behind it, or the kernel refuses for good.
    pub fn map(&self, first: PageIndex, count: PageCount, wake: bool) -> Result<(), WatchError> {
        self.place("map", first, count, |uffd, address, length| uffd.r#continue(address, length, wake), None)
    }

    /// Maps `count` pages that are zero: the file's own pages where it has them, fresh zero pages where it has
    /// none. Wakes who waits for them.
    ///
    /// # Errors
    /// When the kernel refuses for good.
    pub fn map_zero(&self, first: PageIndex, count: PageCount) -> Result<(), WatchError> {
        self.place(
            "map zeros at",
            first,
            count,
            |uffd, address, length| uffd.r#continue(address, length, true),
            Some(&|uffd, address| {
                // SAFETY: the address is that of a page of the guest mapping, which this object keeps mapped and
                // registered; the page is not mapped yet, or the kernel answers EEXIST and changes nothing.
                unsafe { uffd.zeropage(address, PAGE_SIZE, true) }.map(|bytes| bytes as u64)
            }),
        )
    }

    /// Wakes whoever waits for `page`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn wake(&self, page: PageIndex) -> Result<(), WatchError> {
        self.uffds[self.shard_of(page)].wake(self.address(page), PAGE_SIZE).map_err(|error| WatchError::Place {
            attempted: "wake",
            first: page,
            count: PageCount(1),
            source: io::Error::from_raw_os_error(errno_of(&error)),
        })
    }

    /// Takes the faults on a shard's pages that are waiting, appending their pages to `faults`.
    ///
    /// # Errors
    /// When the descriptor fails, or tells of something that was never registered.
    ///
    /// # Panics
    /// When there is no such shard.
    pub fn take_faults(
        &self,
        shard: usize,
        buffer: &mut FaultBuffer,
        faults: &mut Vec<PageIndex>,
    ) -> Result<(), WatchError> {
        take_faults(&self.uffds[shard], &self.ram, buffer, faults)
    }

    /// Takes `count` pages out of the guest mapping, so that touching them faults again. Their bytes stay in the file.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unmap(&self, first: PageIndex, count: PageCount) -> Result<(), WatchError> {
        let length = bytes(count);
        // SAFETY: the range lies inside the guest mapping, which `ram` keeps mapped. It is a shared mapping of a file: its
        // pages are unmapped, never freed, so nobody who holds an address into it loses a byte.
        let done = unsafe { libc::madvise(self.address(first), length, libc::MADV_DONTNEED) };
        if done == 0 {
            return Ok(());
        }
        Err(WatchError::Place { attempted: "unmap", first, count, source: io::Error::last_os_error() })
    }

    /// Whether it goes on, for any page.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        self.watches(self.stripes.count().saturating_sub(1))
    }

    /// Whether it goes on for a stripe.
    fn watches(&self, stripe: u64) -> bool {
        stripe >= self.ended.load(Ordering::Acquire)
    }

    /// Ends the watch: nobody can fault any more, and what is not mapped is simply what the file holds. Only for
    /// RAM that is complete. Safe to repeat.
    ///
    /// # Errors
    /// When the kernel refuses; the watch then goes on, for the rest at least.
    pub fn unregister(&self) -> Result<(), WatchError> {
        let _ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        for index in self.ended.load(Ordering::Acquire)..self.stripes.count() {
            // Told first: whoever is about to map a page of complete memory must know why the kernel refuses.
            self.ended.store(index + 1, Ordering::Release);
            let (uffd, start, length) = self.stripe(index);
            unregister(uffd, start, length).inspect_err(|_| self.ended.store(index, Ordering::Release))?;
        }
        self.ram.end_of_watch();
        Ok(())
    }

    /// A stripe's userfaultfd, address and length.
    fn stripe(&self, index: u64) -> (&Uffd, *mut c_void, usize) {
        let (first, count) = self.stripes.range(index);
        (&self.uffds[self.stripes.owner(index)], self.address(first), bytes(count))
    }

    fn place(
        &self,
        attempted: &'static str,
        first: PageIndex,
        count: PageCount,
        map: impl Fn(&Uffd, *mut c_void, usize) -> Result<u64, UffdError>,
        fill_hole: Option<FillHole<'_>>,
    ) -> Result<(), WatchError> {
        // Two stripes are two mappings, which no call may span.
        let mut pieces = self.stripes.cut(first, count);
        pieces
            .try_for_each(|(stripe, first, count)| self.place_within(attempted, stripe, first, count, &map, fill_hole))
    }

    fn place_within(
        &self,
        attempted: &'static str,
        stripe: u64,
        first: PageIndex,
        count: PageCount,
        map: &impl Fn(&Uffd, *mut c_void, usize) -> Result<u64, UffdError>,
        fill_hole: Option<FillHole<'_>>,
    ) -> Result<(), WatchError> {
        let uffd = &self.uffds[self.stripes.owner(stripe)];
        let mut rest: Range<u64> = first.0..first.0 + count.0;
        let mut tries = 0;
        let broken = |rest: &Range<u64>, errno| WatchError::Place {
            attempted,
            first: PageIndex(rest.start),
            count: PageCount(rest.end - rest.start),
            source: io::Error::from_raw_os_error(errno),
        };
        while rest.start < rest.end {
            let page = PageIndex(rest.start);
            let address = self.address(page);
            let length = bytes(PageCount(rest.end - rest.start));
            let mut answer = classify(map(uffd, address, length).map_err(|error| errno_of(&error)));
            if let (Answer::Hole, Some(fill)) = (answer, fill_hole) {
                answer = classify(fill(uffd, address).map_err(|error| errno_of(&error)));
            }
            match answer {
                Answer::Mapped(bytes) => {
                    rest.start += bytes / PAGE_SIZE_U64;
                    tries = 0;
                }
                Answer::AlreadyMapped => {
                    if let Err(error) = self.wake(page)
                        && self.watches(stripe)
                    {
                        return Err(error);
                    }
                    rest.start += 1;
                    tries = 0;
                }
                Answer::TryAgain => {
                    tries += 1;
                    if tries > RETRY_LIMIT {
                        return Err(broken(&rest, libc::EAGAIN));
                    }
                    std::thread::yield_now();
                }
                // The watch has ended: memory is complete, and nobody can wait for a page of it.
                Answer::Hole | Answer::Broken(_) if !self.watches(stripe) => return Ok(()),
                Answer::Hole => return Err(broken(&rest, libc::EFAULT)),
                Answer::Broken(errno) => return Err(broken(&rest, errno)),
            }
        }
        Ok(())
    }

    fn address(&self, page: PageIndex) -> *mut c_void {
        let offset = usize::try_from(page.offset()).unwrap_or(usize::MAX);
        self.ram.guest_base().wrapping_add(offset).cast::<c_void>()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.is_registered() {
            // SAFETY: `uffds` are not used again: this is the only place that drops them, and it runs once.
            unsafe { ManuallyDrop::drop(&mut self.uffds) };
        }
    }
}

/// How a page is mapped that has no memory behind it.
type FillHole<'a> = &'a dyn Fn(&Uffd, *mut c_void) -> Result<u64, UffdError>;

fn open() -> Result<Uffd, UffdError> {
    open_with(FeatureFlags::MISSING_SHMEM | FeatureFlags::from_bits_retain(FEATURE_MINOR_SHMEM))
}

fn open_with(features: FeatureFlags) -> Result<Uffd, UffdError> {
    if let Some(device) = device::kept() {
        return device::open(device, features.bits()).map_err(UffdError::OpenDevUserfaultfd);
    }
    UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        // KVM takes guest page faults in the kernel.
        .user_mode_only(false)
        .require_features(features)
        .create()
}

/// Takes the faults that wait at a userfaultfd, all of them: a poll tells of new ones only, not of those that were left.
fn take_faults(
    uffd: &Uffd,
    ram: &Ram,
    buffer: &mut FaultBuffer,
    faults: &mut Vec<PageIndex>,
) -> Result<(), WatchError> {
    loop {
        let mut read = 0;
        for event in uffd.read_events(&mut buffer.0).map_err(WatchError::Read)? {
            match event.map_err(WatchError::Read)? {
                Event::Pagefault { addr, .. } => faults.push(page_at(ram, addr as usize)?),
                other => return Err(WatchError::Unexpected(format!("{other:?}"))),
            }
            read += 1;
        }
        if read < FAULTS_PER_READ {
            return Ok(());
        }
    }
}

/// Ends the watch of a mapping. The kernel wakes whoever waits before it locks the mapping against faults (fs/userfaultfd.c): who came
/// in between waits behind that, and nobody would ever answer.
fn unregister(uffd: &Uffd, start: *mut c_void, length: usize) -> Result<(), WatchError> {
    uffd.unregister(start, length).and_then(|()| uffd.wake(start, length)).map_err(WatchError::Unregister)
}

fn page_at(ram: &Ram, address: usize) -> Result<PageIndex, WatchError> {
    address
        .checked_sub(ram.guest_base() as usize)
        .filter(|offset| *offset < ram.len_bytes())
        .map(|offset| PageIndex::containing(offset as u64))
        .ok_or_else(|| WatchError::Unexpected(format!("a fault at address {address:#x}, outside guest RAM")))
}

fn bytes(count: PageCount) -> usize {
    usize::try_from(count.bytes()).unwrap_or(usize::MAX)
}

/// Room for the faults of one read.
pub struct FaultBuffer(EventBuffer);

impl Default for FaultBuffer {
    fn default() -> Self {
        Self(EventBuffer::new(FAULTS_PER_READ))
    }
}

// SAFETY: the buffer holds plain messages that the kernel has written, raw addresses among them, and is only ever
// handed out by unique reference; nothing in it belongs to a thread.
unsafe impl Send for FaultBuffer {}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    /// A watch over `pages` pages, or `None` (said visibly) where the host has no userfaultfd.
    fn watch(test: &str, pages: u64) -> Option<Watch> {
        sharded(test, pages, 1)
    }

    fn sharded(test: &str, pages: u64, shards: u8) -> Option<Watch> {
        match Watch::register_sharded(Ram::new(PageCount(pages)).unwrap(), shards) {
            Ok(watch) => Some(watch),
            Err(error) => {
                println!("SKIP {test}: {error}");
                None
            }
        }
    }

    fn write_alias(ram: &Ram, page: PageIndex, value: u8) {
        // SAFETY: the test is the only one that touches this page's alias.
        unsafe { ram.alias_of(page).unwrap().write_bytes(value, PAGE_SIZE) };
    }

    fn read_guest(ram: &Ram, page: PageIndex) -> u8 {
        let offset = usize::try_from(page.offset()).unwrap();
        // SAFETY: inside the live guest mapping; volatile because another thread or the kernel fills it.
        unsafe { ram.guest_base().add(offset).read_volatile() }
    }

    fn wait_for_fault(watch: &Watch, shard: usize) -> PageIndex {
        let (mut buffer, mut faults) = (FaultBuffer::default(), Vec::new());
        let deadline = Instant::now() + Duration::from_secs(10);
        while faults.is_empty() {
            assert!(Instant::now() < deadline, "no fault came");
            watch.take_faults(shard, &mut buffer, &mut faults).unwrap();
            thread::yield_now();
        }
        faults[0]
    }

    #[test]
    fn return_codes_mean_what_the_kernel_means() {
        assert_eq!(classify(Ok(8192)), Answer::Mapped(8192));
        assert_eq!(classify(Ok(0)), Answer::TryAgain);
        assert_eq!(classify(Err(libc::EAGAIN)), Answer::TryAgain);
        assert_eq!(classify(Err(libc::EEXIST)), Answer::AlreadyMapped);
        assert_eq!(classify(Err(libc::EFAULT)), Answer::Hole);
        assert_eq!(classify(Err(libc::ESRCH)), Answer::Broken(libc::ESRCH));
        assert_eq!(errno_of(&UffdError::PartiallyCopied(usize::MAX)), libc::EAGAIN);
    }

    #[test]
    fn a_sleeping_reader_gets_the_page_from_the_alias() {
        let Some(watch) = watch("a_sleeping_reader_gets_the_page_from_the_alias", 8) else { return };
        let ram = watch.ram().clone();
        ram.populate().unwrap();
        let reader = thread::spawn(move || read_guest(&ram, PageIndex(5)));
        assert_eq!(wait_for_fault(&watch, 0), PageIndex(5));
        write_alias(watch.ram(), PageIndex(5), 42);
        watch.map(PageIndex(5), PageCount(1), true).unwrap();
        assert_eq!(reader.join().unwrap(), 42);
        watch.unregister().unwrap();
    }

    #[test]
    fn a_run_passes_over_pages_that_are_mapped_already() {
        let Some(watch) = watch("a_run_passes_over_pages_that_are_mapped_already", 8) else { return };
        watch.ram().populate().unwrap();
        for page in 0..8 {
            write_alias(watch.ram(), PageIndex(page), 7);
        }
        watch.map(PageIndex(3), PageCount(1), true).unwrap();
        watch.map(PageIndex(0), PageCount(8), true).unwrap();
        assert!((0..8).all(|page| read_guest(watch.ram(), PageIndex(page)) == 7));
        watch.unregister().unwrap();
    }

    #[test]
    fn a_hole_cannot_be_mapped_as_data_but_as_zero() {
        let Some(watch) = watch("a_hole_cannot_be_mapped_as_data_but_as_zero", 4) else { return };
        assert!(matches!(watch.map(PageIndex(1), PageCount(1), true), Err(WatchError::Place { .. })));
        write_alias(watch.ram(), PageIndex(2), 0);
        watch.map_zero(PageIndex(0), PageCount(4)).unwrap();
        assert!((0..4).all(|page| read_guest(watch.ram(), PageIndex(page)) == 0));
        watch.unregister().unwrap();
    }

    #[test]
    fn an_unmapped_page_faults_again_and_keeps_its_bytes() {
        let Some(watch) = watch("an_unmapped_page_faults_again_and_keeps_its_bytes", 4) else { return };
        let ram = watch.ram().clone();
        for page in 0..4 {
            write_alias(&ram, PageIndex(page), 7);
        }
        watch.map(PageIndex(0), PageCount(4), true).unwrap();
        assert_eq!(read_guest(&ram, PageIndex(1)), 7);
        watch.unmap(PageIndex(1), PageCount(2)).unwrap();
        let reader = thread::spawn(move || read_guest(&ram, PageIndex(1)));
        assert_eq!(wait_for_fault(&watch, 0), PageIndex(1));
        write_alias(watch.ram(), PageIndex(1), 8);
        watch.map(PageIndex(1), PageCount(1), true).unwrap();
        assert_eq!(reader.join().unwrap(), 8);
        watch.unregister().unwrap();
    }

    #[test]
    fn a_page_that_is_mapped_when_the_watch_has_ended_is_no_failure() {
        let Some(watch) = watch("a_page_that_is_mapped_when_the_watch_has_ended_is_no_failure", 2) else { return };
        watch.ram().populate().unwrap();
        watch.unregister().unwrap();
        watch.unregister().unwrap();
        watch.map(PageIndex(0), PageCount(2), true).unwrap();
        watch.map_zero(PageIndex(1), PageCount(1)).unwrap();
    }

    #[test]
    fn a_quiet_mapping_wakes_only_when_told() {
        let Some(watch) = watch("a_quiet_mapping_wakes_only_when_told", 2) else { return };
        let ram = watch.ram().clone();
        let reader = thread::spawn(move || read_guest(&ram, PageIndex(0)));
        assert_eq!(wait_for_fault(&watch, 0), PageIndex(0));
        write_alias(watch.ram(), PageIndex(0), 9);
        watch.map(PageIndex(0), PageCount(1), false).unwrap();
        assert!(!reader.is_finished());
        watch.wake(PageIndex(0)).unwrap();
        assert_eq!(reader.join().unwrap(), 9);
        watch.unregister().unwrap();
    }

    #[test]
    fn a_watch_dropped_too_early_keeps_its_descriptors() {
        let Some(watch) = sharded("a_watch_dropped_too_early_keeps_its_descriptors", 6, 3) else { return };
        let descriptors = [0, 1, 2].map(|shard| std::os::fd::AsRawFd::as_raw_fd(&watch.fd(shard)));
        drop(watch);
        for descriptor in descriptors {
            // SAFETY: F_GETFD only asks whether the number is an open descriptor.
            let flags = unsafe { libc::fcntl(descriptor, libc::F_GETFD) };
            assert!(flags >= 0, "closing it would have fed zeros to whoever waits");
        }
    }

    /// Readers of the first and the last page of each of four stripes of four pages, all of them waiting.
    fn readers_at_borders(watch: &Watch) -> Vec<(PageIndex, thread::JoinHandle<u8>)> {
        let pages = (0..16).filter(|page| page % 4 == 0 || page % 4 == 3).map(PageIndex);
        let reader = |page| {
            let ram = watch.ram().clone();
            let reader = thread::spawn(move || read_guest(&ram, page));
            assert_eq!(wait_for_fault(watch, watch.shard_of(page)), page);
            (page, reader)
        };
        pages.map(reader).collect()
    }

    #[test]
    fn a_run_across_shards_is_mapped_whole_and_wakes_everyone() {
        let Some(watch) = sharded("a_run_across_shards_is_mapped_whole_and_wakes_everyone", 16, 3) else { return };
        assert_eq!((watch.shards(), watch.shard_of(PageIndex(15))), (3, 0));
        let readers = readers_at_borders(&watch);
        (0_u8..16).for_each(|page| write_alias(watch.ram(), PageIndex(page.into()), page + 1));
        watch.map(PageIndex(3), PageCount(11), true).unwrap();
        watch.map(PageIndex(0), PageCount(16), true).unwrap();
        for (page, reader) in readers {
            assert_eq!(u64::from(reader.join().unwrap()), page.0 + 1);
        }
        // The kernel knows where each of them lies.
        watch.unmap(PageIndex(2), PageCount(12)).unwrap();
        let ram = watch.ram().clone();
        let reader = thread::spawn(move || read_guest(&ram, PageIndex(8)));
        assert_eq!(wait_for_fault(&watch, 2), PageIndex(8));
        watch.map(PageIndex(8), PageCount(1), false).unwrap();
        watch.wake(PageIndex(8)).unwrap();
        assert_eq!(reader.join().unwrap(), 9);
        watch.unregister().unwrap();
    }

    #[test]
    fn holes_across_shards_are_mapped_as_zeros() {
        let Some(watch) = sharded("holes_across_shards_are_mapped_as_zeros", 16, 4) else { return };
        let readers = readers_at_borders(&watch);
        watch.map_zero(PageIndex(0), PageCount(16)).unwrap();
        for (page, reader) in readers {
            assert_eq!(reader.join().unwrap(), 0, "{page}");
        }
        watch.unregister().unwrap();
    }

    #[test]
    fn the_end_of_a_watch_is_the_end_for_every_shard() {
        let Some(watch) = sharded("the_end_of_a_watch_is_the_end_for_every_shard", 16, 4) else { return };
        let ram = watch.ram().clone();
        ram.populate().unwrap();
        assert!(watch.is_registered());
        watch.unregister().unwrap();
        watch.unregister().unwrap();
        assert!(!watch.is_registered());
        // Nobody would answer a fault.
        assert!((0..16).all(|page| read_guest(&ram, PageIndex(page)) == 0));
        watch.unmap(PageIndex(0), PageCount(16)).unwrap();
        watch.map(PageIndex(2), PageCount(12), true).unwrap();
    }

    /// A fault that begins while the kernel unregisters may be queued behind its own waking of whoever waits.
    #[test]
    fn whoever_faults_while_the_watch_ends_is_not_left_waiting() {
        const ROUNDS: u64 = 2_000;
        let ended = (0..ROUNDS).all(|_| {
            let Some(watch) = watch("whoever_faults_while_the_watch_ends_is_not_left_waiting", 64) else {
                return false;
            };
            watch.ram().populate().unwrap();
            let (ram, (tell, told)) = (watch.ram().clone(), std::sync::mpsc::channel());
            let reader = thread::spawn(move || {
                tell.send(()).unwrap();
                (0..64).map(PageIndex).for_each(|page| assert_eq!(read_guest(&ram, page), 0));
            });
            told.recv().unwrap();
            watch.unregister().unwrap();
            let deadline = Instant::now() + Duration::from_secs(10);
            while !reader.is_finished() {
                assert!(Instant::now() < deadline, "it waits for ever");
                thread::yield_now();
            }
            true
        });
        if ended {
            println!("{ROUNDS} readers went on");
        }
    }
}
