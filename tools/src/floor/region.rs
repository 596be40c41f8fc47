//! Memory whose pages are there but not mapped: every first touch is a fault that userfaultfd reports.

use std::ffi::c_void;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use memmap2::{MmapOptions, MmapRaw, UncheckedAdvice};
use nix::sys::memfd::{MFdFlags, memfd_create};
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use super::FloorError;

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// UFFD_FEATURE_MINOR_SHMEM, which the crate has no name for (linux/userfaultfd.h).
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;

/// A memfd, filled, mapped once, and registered for minor and missing faults.
pub struct Region {
    mapping: MmapRaw,
    uffd: Uffd,
}

impl Region {
    /// One of `pages` pages, none of them mapped.
    ///
    /// # Errors
    /// When memory or userfaultfd cannot be had.
    pub fn new(pages: usize) -> Result<Self, FloorError> {
        let memory = FloorError::on("make a memfd to fault on");
        let fd = memfd_create(c"floor", MFdFlags::MFD_CLOEXEC).map_err(FloorError::on("make a memfd to fault on"))?;
        let file = File::from(fd);
        // Written through the file, the pages exist without being mapped.
        for page in 0..pages {
            file.write_all_at(&[1; PAGE], (page * PAGE) as u64).map_err(&memory)?;
        }
        let mapping = MmapOptions::new().len(pages * PAGE).map_raw(&file).map_err(&memory)?;
        let opening = "use userfaultfd (`switchover check` says what to change)";
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .require_features(FeatureFlags::MISSING_SHMEM | FeatureFlags::from_bits_retain(FEATURE_MINOR_SHMEM))
            .create()
            .map_err(FloorError::on(opening))?;
        uffd.register_with_mode(
            mapping.as_mut_ptr().cast::<c_void>(),
            mapping.len(),
            RegisterMode::MISSING | RegisterMode::MINOR,
        )
        .map_err(FloorError::on("register memory with userfaultfd"))?;
        Ok(Self { mapping, uffd })
    }

    /// Its userfaultfd.
    #[must_use]
    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Its first byte.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.mapping.as_mut_ptr()
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// Unmaps every page again; their contents stay.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unmap_pages(&self) -> Result<(), FloorError> {
        // SAFETY: on a shared mapping of a file this drops page-table entries only: the bytes stay in the memfd, and
        // no reference into the mapping exists, since it is only ever touched through raw pointers.
        unsafe { self.mapping.unchecked_advise(UncheckedAdvice::DontNeed) }.map_err(FloorError::on("unmap pages again"))
    }

    /// Lets everybody go on who waits for a page, now and ever after.
    pub fn release(&self) {
        let _ = self.uffd.unregister(self.mapping.as_mut_ptr().cast::<c_void>(), self.mapping.len());
    }
}
