//! Guest RAM in which writes can be made to wait.
//!
//! A page that is *protected* can be read by everyone; whoever writes to it waits, the kernel and with it KVM included, until it is let
//! go. The guest mapping is watched like that, and not the alias.
//!
//! Closing the descriptor early loses nothing here: it lets go of all pages and wakes everybody, and no byte was ever missing.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};
use userfaultfd::{Error as UffdError, FeatureFlags, RegisterMode, Uffd};

use super::{FaultBuffer, RETRY_LIMIT, WatchError, bytes, errno_of, open_with};
use crate::ram::Ram;

/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM` of linux/userfaultfd.h (Linux 5.19), which the crate does not name.
const FEATURE_WP_SHMEM: u64 = 1 << 12;

/// So many pages are unregistered at a time. The kernel keeps everybody's faults waiting meanwhile.
const PIECE: u64 = 1 << 14;

/// RAM whose pages can be protected against writing. Dropped, it lets go of all of them.
#[derive(Debug)]
pub struct WriteWatch {
    uffd: Uffd,
    ram: Ram,
    /// Pages are being let go for good, whoever waits with them.
    ending: AtomicBool,
}

impl WriteWatch {
    /// Registers the whole guest mapping; no page is protected yet.
    ///
    /// # Errors
    /// When the kernel has no userfaultfd for this process, cannot protect shared memory (before Linux 5.19), or another pager watches
    /// this RAM.
    pub fn register(ram: Ram) -> Result<Self, WatchError> {
        let features = FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::from_bits_retain(FEATURE_WP_SHMEM);
        let uffd = open_with(features).map_err(WatchError::Protect)?;
        let watch = Self { uffd, ram, ending: AtomicBool::new(false) };
        let length = watch.ram.len_bytes();
        match watch.uffd.register_with_mode(watch.address(PageIndex(0)), length, RegisterMode::WRITE_PROTECT) {
            Ok(_) => Ok(watch),
            Err(source) => Err(WatchError::Register { pages: watch.ram.pages(), source }),
        }
    }

    /// The RAM that is watched.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The descriptor, to be polled for those who wait.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// Makes writes to `count` pages wait from now on. One that has begun may still be seen for a moment by who reads them at once; one
    /// that begins when this is back waits.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn protect(&self, first: PageIndex, count: PageCount) -> Result<(), WatchError> {
        self.repeat("protect", first, count, |address, length| self.uffd.write_protect(address, length))
    }

    /// Lets writes to `count` pages go on. Pages that [`unregister`](Self::unregister) has let go before, in another thread, are free.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn release(&self, first: PageIndex, count: PageCount) -> Result<(), WatchError> {
        let released = self.repeat("let go of", first, count, |address, length| {
            self.uffd.remove_write_protection(address, length, true)
        });
        match released {
            // The kernel's word for memory that is not registered.
            Err(WatchError::Place { source, .. })
                if source.raw_os_error() == Some(libc::ENOENT) && self.ending.load(Ordering::Acquire) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// Takes the pages that somebody waits to write, appending them to `faults`. One page may come several times.
    ///
    /// # Errors
    /// When the descriptor fails, or tells of something that was never registered.
    pub fn take_faults(&self, buffer: &mut FaultBuffer, faults: &mut Vec<PageIndex>) -> Result<(), WatchError> {
        super::take_faults(&self.uffd, &self.ram, buffer, faults)
    }

    /// Ends it: all writes go on. Safe to repeat.
    ///
    /// # Errors
    /// When the kernel refuses. Dropping it has the same effect then, and takes longer at once.
    pub fn unregister(&self) -> Result<(), WatchError> {
        self.ending.store(true, Ordering::Release);
        let pages = self.ram.pages().0;
        for first in (0..pages).step_by(usize::try_from(PIECE).unwrap_or(usize::MAX)) {
            let (start, length) = (self.address(PageIndex(first)), bytes(PageCount(PIECE.min(pages - first))));
            super::unregister(&self.uffd, start, length)?;
        }
        Ok(())
    }

    fn repeat(
        &self,
        attempted: &'static str,
        first: PageIndex,
        count: PageCount,
        call: impl Fn(*mut c_void, usize) -> Result<(), UffdError>,
    ) -> Result<(), WatchError> {
        let mut tries = 0;
        loop {
            let Err(error) = call(self.address(first), bytes(count)) else { return Ok(()) };
            let errno = errno_of(&error);
            tries += 1;
            if errno != libc::EAGAIN || tries > RETRY_LIMIT {
                return Err(WatchError::Place { attempted, first, count, source: io::Error::from_raw_os_error(errno) });
            }
            std::thread::yield_now();
        }
    }

    fn address(&self, page: PageIndex) -> *mut c_void {
        self.ram.guest_base().wrapping_add(usize::try_from(page.0).unwrap_or(usize::MAX).wrapping_mul(PAGE_SIZE)).cast()
    }
}

#[cfg(test)]
mod tests {
    use std::thread::{self, JoinHandle};
    use std::time::{Duration, Instant};

    use super::*;

    fn watch(test: &str, pages: u64) -> Option<WriteWatch> {
        match WriteWatch::register(Ram::new(PageCount(pages)).unwrap()) {
            Ok(watch) => Some(watch),
            Err(error) => {
                println!("SKIP {test}: {error}");
                None
            }
        }
    }

    fn writer(ram: &Ram, page: u64, value: u8) -> JoinHandle<()> {
        let ram = ram.clone();
        thread::spawn(move || {
            let place = ram.guest_base().wrapping_add(usize::try_from(page).unwrap() * PAGE_SIZE);
            // SAFETY: inside the live guest mapping, which only such threads write, each page once.
            unsafe { place.write_volatile(value) };
        })
    }

    fn value(ram: &Ram, page: u64) -> u8 {
        let mut bytes = [0; PAGE_SIZE];
        assert!(ram.copy_page(PageIndex(page), &mut bytes));
        bytes[0]
    }

    fn wait_for_fault(watch: &WriteWatch) -> PageIndex {
        let (mut buffer, mut faults) = (FaultBuffer::default(), Vec::new());
        let deadline = Instant::now() + Duration::from_secs(10);
        while faults.is_empty() {
            assert!(Instant::now() < deadline, "nobody waited");
            watch.take_faults(&mut buffer, &mut faults).unwrap();
            thread::yield_now();
        }
        faults[0]
    }

    #[test]
    fn who_writes_to_a_protected_page_waits_until_it_is_let_go() {
        let Some(watch) = watch("who_writes_to_a_protected_page_waits_until_it_is_let_go", 8) else { return };
        let ram = watch.ram().clone();
        // One that nobody has touched, and one that is mapped.
        writer(&ram, 5, 1).join().unwrap();
        watch.protect(PageIndex(2), PageCount(4)).unwrap();
        writer(&ram, 6, 9).join().unwrap();
        for page in [3, 5] {
            let waits = writer(&ram, page, 7);
            assert_eq!(wait_for_fault(&watch), PageIndex(page));
            assert_eq!(value(&ram, page), u8::from(page == 5), "it was not written yet");
            watch.release(PageIndex(page), PageCount(1)).unwrap();
            waits.join().unwrap();
            assert_eq!(value(&ram, page), 7);
            // Free from now on.
            writer(&ram, page, 8).join().unwrap();
        }
        let waits = writer(&ram, 2, 7);
        assert_eq!(wait_for_fault(&watch), PageIndex(2), "the others are protected still");
        watch.unregister().unwrap();
        watch.unregister().unwrap();
        waits.join().unwrap();
        writer(&ram, 4, 7).join().unwrap();
        // A thread that took a fault before may come with its answer now.
        watch.release(PageIndex(2), PageCount(1)).unwrap();
    }

    #[test]
    fn a_watch_that_is_dropped_lets_everybody_go() {
        let Some(watch) = watch("a_watch_that_is_dropped_lets_everybody_go", 4) else { return };
        let ram = watch.ram().clone();
        writer(&ram, 1, 3).join().unwrap();
        watch.protect(PageIndex(0), PageCount(4)).unwrap();
        let waits = writer(&ram, 1, 7);
        assert_eq!(wait_for_fault(&watch), PageIndex(1));
        drop(watch);
        waits.join().unwrap();
        assert_eq!(value(&ram, 1), 7);
        // And another can have it.
        let again = WriteWatch::register(ram.clone()).unwrap();
        assert!(WriteWatch::register(ram).is_err(), "one at a time");
        drop(again);
    }
}
