//! The userfaultfd that watches guest RAM, and what its return codes mean.
//!
//! This module is the only one that calls userfaultfd. What holds here:
//! - The watched range is the whole guest mapping of one [`Ram`], which [`Watch`] keeps alive.
//! - Addresses are made from page indices that were checked against the RAM's size.
//! - The descriptor is closed only after the range is unregistered, or with the process: closing it earlier would
//!   answer every pending fault with a zero page. A [`Watch`] that is dropped while registered leaks it on purpose.

use std::ffi::c_void;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};
use thiserror::Error;
use userfaultfd::{Error as UffdError, Event, EventBuffer, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::ram::Ram;

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
        /// "map", "map zeros at", "unmap", "wake".
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
    uffd: ManuallyDrop<Uffd>,
    ram: Ram,
    registered: AtomicBool,
}

impl Watch {
    /// Registers the whole guest mapping for missing and minor faults. From here on whoever touches a page that is
    /// not mapped sleeps until it is placed.
    ///
    /// # Errors
    /// When the kernel has no userfaultfd for this process, or lacks minor faults on shared memory.
    pub fn register(ram: Ram) -> Result<Self, WatchError> {
        if !ram.take_for_watching() {
            return Err(WatchError::UsedBefore);
        }
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            // KVM takes guest page faults in the kernel.
            .user_mode_only(false)
            .require_features(FeatureFlags::MISSING_SHMEM | FeatureFlags::from_bits_retain(FEATURE_MINOR_SHMEM))
            .create()
            .map_err(WatchError::Open)?;
        uffd.register_with_mode(
            ram.guest_base().cast::<c_void>(),
            ram.len_bytes(),
            RegisterMode::MISSING | RegisterMode::MINOR,
        )
        .map_err(|source| WatchError::Register { pages: ram.pages(), source })?;
        Ok(Self { uffd: ManuallyDrop::new(uffd), ram, registered: AtomicBool::new(true) })
    }

    /// The RAM that is watched.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The descriptor, to be polled for faults.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// Maps `count` pages whose bytes are in the alias, and wakes who waits for them unless `quiet`.
    ///
    /// Pages that are mapped already are passed over (and whoever waits for them woken, as a fault may have come
    /// between the mapping and this call). A page that has no memory behind it fails: see [`map_zero`](Self::map_zero).
    ///
    /// # Errors
    /// When a page has no memory behind it, or the kernel refuses for good.
    pub fn map(&self, first: PageIndex, count: PageCount, wake: bool) -> Result<(), WatchError> {
        self.place("map", first, count, |address, length| self.uffd.r#continue(address, length, wake), None)
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
            |address, length| self.uffd.r#continue(address, length, true),
            Some(&|address| {
                // SAFETY: the address is that of a page of the guest mapping, which this object keeps mapped and
                // registered; the page is not mapped yet, or the kernel answers EEXIST and changes nothing.
                unsafe { self.uffd.zeropage(address, PAGE_SIZE, true) }.map(|bytes| bytes as u64)
            }),
        )
    }

    /// Wakes whoever waits for `page`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn wake(&self, page: PageIndex) -> Result<(), WatchError> {
        self.uffd.wake(self.address(page), PAGE_SIZE).map_err(|error| WatchError::Place {
            attempted: "wake",
            first: page,
            count: PageCount(1),
            source: io::Error::from_raw_os_error(errno_of(&error)),
        })
    }

    /// Takes the faults that are waiting, appending their pages to `faults`.
    ///
    /// # Errors
    /// When the descriptor fails, or tells of something that was never registered.
    pub fn take_faults(&self, buffer: &mut FaultBuffer, faults: &mut Vec<PageIndex>) -> Result<(), WatchError> {
        // All of them: a poll tells of new faults only, not of those that were left.
        loop {
            let mut read = 0;
            for event in self.uffd.read_events(&mut buffer.0).map_err(WatchError::Read)? {
                match event.map_err(WatchError::Read)? {
                    Event::Pagefault { addr, .. } => faults.push(self.page_at(addr as usize)?),
                    other => return Err(WatchError::Unexpected(format!("{other:?}"))),
                }
                read += 1;
            }
            if read < FAULTS_PER_READ {
                return Ok(());
            }
        }
    }

    /// Takes `count` pages out of the guest mapping, so that touching them faults again. Their bytes stay in the file.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unmap(&self, first: PageIndex, count: PageCount) -> Result<(), WatchError> {
        let length = usize::try_from(count.bytes()).unwrap_or(usize::MAX);
        // SAFETY: the range lies inside the guest mapping, which `ram` keeps mapped. It is a shared mapping of a file: its
        // pages are unmapped, never freed, so nobody who holds an address into it loses a byte.
        let done = unsafe { libc::madvise(self.address(first), length, libc::MADV_DONTNEED) };
        if done == 0 {
            return Ok(());
        }
        Err(WatchError::Place { attempted: "unmap", first, count, source: io::Error::last_os_error() })
    }

    /// Whether it goes on.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        self.registered.load(Ordering::Acquire)
    }

    /// Ends the watch: nobody can fault any more, and what is not mapped is simply what the file holds. Only for
    /// RAM that is complete. Safe to repeat.
    ///
    /// # Errors
    /// When the kernel refuses; the watch then goes on.
    pub fn unregister(&self) -> Result<(), WatchError> {
        // Told first: whoever is about to map a page of complete memory must know why the kernel refuses.
        if !self.registered.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.uffd.unregister(self.ram.guest_base().cast::<c_void>(), self.ram.len_bytes()).map_err(|error| {
            self.registered.store(true, Ordering::Release);
            WatchError::Unregister(error)
        })
    }

    fn place(
        &self,
        attempted: &'static str,
        first: PageIndex,
        count: PageCount,
        map: impl Fn(*mut c_void, usize) -> Result<u64, UffdError>,
        fill_hole: Option<&dyn Fn(*mut c_void) -> Result<u64, UffdError>>,
    ) -> Result<(), WatchError> {
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
            let length = usize::try_from((rest.end - rest.start) * PAGE_SIZE_U64).unwrap_or(usize::MAX);
            let mut answer = classify(map(address, length).map_err(|error| errno_of(&error)));
            if let (Answer::Hole, Some(fill)) = (answer, fill_hole) {
                answer = classify(fill(address).map_err(|error| errno_of(&error)));
            }
            match answer {
                Answer::Mapped(bytes) => {
                    rest.start += bytes / PAGE_SIZE_U64;
                    tries = 0;
                }
                Answer::AlreadyMapped => {
                    if let Err(error) = self.wake(page)
                        && self.is_registered()
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
                Answer::Hole | Answer::Broken(_) if !self.is_registered() => return Ok(()),
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

    fn page_at(&self, address: usize) -> Result<PageIndex, WatchError> {
        address
            .checked_sub(self.ram.guest_base() as usize)
            .filter(|offset| *offset < self.ram.len_bytes())
            .map(|offset| PageIndex::containing(offset as u64))
            .ok_or_else(|| WatchError::Unexpected(format!("a fault at address {address:#x}, outside guest RAM")))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.registered.load(Ordering::Acquire) {
            // SAFETY: `uffd` is not used again: this is the only place that drops it, and it runs once.
            unsafe { ManuallyDrop::drop(&mut self.uffd) };
        }
    }
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
        match Watch::register(Ram::new(PageCount(pages)).unwrap()) {
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

    fn wait_for_fault(watch: &Watch) -> PageIndex {
        let (mut buffer, mut faults) = (FaultBuffer::default(), Vec::new());
        let deadline = Instant::now() + Duration::from_secs(10);
        while faults.is_empty() {
            assert!(Instant::now() < deadline, "no fault came");
            watch.take_faults(&mut buffer, &mut faults).unwrap();
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
        assert_eq!(wait_for_fault(&watch), PageIndex(5));
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
        assert_eq!(wait_for_fault(&watch), PageIndex(1));
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
        assert_eq!(wait_for_fault(&watch), PageIndex(0));
        write_alias(watch.ram(), PageIndex(0), 9);
        watch.map(PageIndex(0), PageCount(1), false).unwrap();
        assert!(!reader.is_finished());
        watch.wake(PageIndex(0)).unwrap();
        assert_eq!(reader.join().unwrap(), 9);
        watch.unregister().unwrap();
    }

    #[test]
    fn a_watch_dropped_too_early_keeps_its_descriptor() {
        let Some(watch) = watch("a_watch_dropped_too_early_keeps_its_descriptor", 2) else { return };
        let fd = std::os::fd::AsRawFd::as_raw_fd(&watch.fd());
        drop(watch);
        // SAFETY: F_GETFD only asks whether the number is an open descriptor.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        assert!(flags >= 0, "closing it would have fed zeros to whoever waits");
    }
}
