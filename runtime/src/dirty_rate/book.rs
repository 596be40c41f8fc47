//! A machine's book of written pages, opened and closed again.

use std::sync::Arc;

use switchover_hybrid::machine::Machine;
use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::dirty::{DirtyLog, DirtyLogError};
use switchover_wire::types::{PageCount, PageIndex};

/// Words rearmed in one call: 1 GiB of RAM. The machine may hold a lock meanwhile that its vCPUs want.
const WORDS_AT_ONCE: usize = 4096;

/// An open book. Dropping it closes it.
pub struct Book {
    pub(super) log: Arc<dyn DirtyLog>,
    pub(super) pages: PageCount,
}

impl Book {
    /// Opens the book of `machine`. Nobody else may have it open.
    ///
    /// # Errors
    /// When the machine keeps none.
    pub fn open(machine: &dyn Machine) -> Result<Self, DirtyLogError> {
        let log = machine.dirty_log();
        log.start()?;
        Ok(Self { log, pages: machine.ram().pages() })
    }

    /// Arms all pages: what is written from now on is noted.
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn rearm(&self) -> Result<(), DirtyLogError> {
        let all = [u64::MAX; WORDS_AT_ONCE];
        let words = usize::try_from(self.pages.0.div_ceil(64)).unwrap_or(usize::MAX);
        let mut first = PageIndex(0);
        for start in (0..words).step_by(WORDS_AT_ONCE) {
            let these = all.get(..WORDS_AT_ONCE.min(words - start)).unwrap_or(&all);
            self.log.rearm(first, these)?;
            first = PageIndex(first.0 + 64 * these.len() as u64);
        }
        Ok(())
    }

    /// How many pages are noted now.
    ///
    /// # Errors
    /// When the machine cannot tell.
    pub fn noted(&self) -> Result<PageCount, DirtyLogError> {
        let mut noted = PageBitmap::new(self.pages);
        self.log.peek(&mut noted)?;
        Ok(noted.count())
    }
}

impl Drop for Book {
    fn drop(&mut self) {
        self.log.stop();
    }
}
