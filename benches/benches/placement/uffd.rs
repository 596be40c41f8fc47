//! Private memory behind a userfaultfd, filled by `UFFDIO_COPY` or `UFFDIO_MOVE`: the ways to place a page that the pager does not
//! use. The one unsafe module of these benchmarks.

use std::error::Error;
use std::ffi::c_void;
use std::os::fd::AsRawFd as _;

use memmap2::{Advice, MmapMut, MmapOptions};
use userfaultfd::{FeatureFlags, Uffd, UffdBuilder};

/// Bytes of a huge page, to which all memory here is aligned.
pub const HUGE: usize = 2 << 20;
/// UFFD_FEATURE_MOVE (linux/userfaultfd.h, Linux 6.8).
const FEATURE_MOVE: u64 = 1 << 16;

/// `struct uffdio_move`.
#[repr(C)]
struct UffdioMove {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

nix::ioctl_readwrite!(uffdio_move, 0xaa, 0x05, UffdioMove);

/// Private anonymous memory whose first huge page is aligned.
struct Memory {
    mapping: MmapMut,
    start: usize,
    len: usize,
}

impl Memory {
    fn new(len: usize, huge: bool) -> Result<Self, Box<dyn Error>> {
        let mut mapping = MmapOptions::new().len(len + HUGE).map_anon()?;
        let start = mapping.as_mut_ptr().align_offset(HUGE);
        mapping.advise(if huge { Advice::HugePage } else { Advice::NoHugePage })?;
        Ok(Self { mapping, start, len })
    }

    fn populate(&self) -> std::io::Result<()> {
        self.mapping.advise_range(Advice::PopulateWrite, self.start, self.len)
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset <= self.len && len <= self.len - offset, "outside of the memory");
        self.mapping.as_ptr().cast_mut().wrapping_add(self.start + offset)
    }
}

/// Guest memory in which nothing is, and a buffer in which all of its pages are.
pub struct Pair {
    // Before the memory: nobody faults any more.
    uffd: Uffd,
    guest: Memory,
    buffer: Memory,
}

impl Pair {
    /// Of `len` bytes; the buffer, and whatever is moved out of it, of huge pages or not.
    pub fn new(len: usize, huge: bool) -> Result<Self, Box<dyn Error>> {
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .require_features(FeatureFlags::from_bits_retain(FEATURE_MOVE))
            .create()?;
        let (guest, buffer) = (Memory::new(len, huge)?, Memory::new(len, huge)?);
        uffd.register(guest.at(0, len).cast::<c_void>(), len)?;
        let pair = Self { uffd, guest, buffer };
        pair.fill_buffer()?;
        Ok(pair)
    }

    /// Gives the buffer pages where it has none.
    pub fn fill_buffer(&self) -> std::io::Result<()> {
        self.buffer.populate()
    }

    /// Copies `len` bytes at `offset` into the guest's memory. Says whether all of them came there.
    pub fn copy(&self, offset: usize, len: usize) -> bool {
        let (from, to) = (self.buffer.at(offset, len), self.guest.at(offset, len));
        // SAFETY: both ranges lie in mappings that this object keeps, as `at` checks, and nobody holds references into them.
        unsafe { self.uffd.copy(from.cast::<c_void>(), to.cast::<c_void>(), len, true) }.is_ok()
    }

    /// Moves the pages of `len` bytes at `offset` into the guest's memory. Says whether all of them came there.
    pub fn move_pages(&self, offset: usize, len: usize) -> bool {
        let (from, to) = (self.buffer.at(offset, len), self.guest.at(offset, len));
        let mut order = UffdioMove { dst: to as u64, src: from as u64, len: len as u64, mode: 0, moved: 0 };
        // SAFETY: the structure is the kernel's, borrowed for the call. Both ranges lie in mappings that this object keeps, and
        // nobody holds references into them: that their pages change hands surprises nobody.
        let moved = unsafe { uffdio_move(self.uffd.as_raw_fd(), &raw mut order) };
        moved.is_ok() && usize::try_from(order.moved) == Ok(len)
    }
}
