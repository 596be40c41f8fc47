//! A shared mapping of a file that begins where huge pages can.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use super::huge::PIECE_BYTES;

/// A mapping of the whole of a file, readable and writable. It lasts as long as this does.
///
/// The kernel maps 2 MiB of a file in one piece where both the address and the offset are multiples of that. It chooses such
/// addresses by itself only where huge pages of shared memory are turned on for all.
#[derive(Debug)]
pub struct Mapping {
    base: *mut u8,
    length: usize,
}

// SAFETY: it owns a range of addresses, which any thread may use, and gives out no references into it.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing of it changes before it is dropped.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `length` bytes of `file`; `length` is at least a page, and of whole pages.
    pub fn new(file: &File, length: usize) -> io::Result<Self> {
        let reserved = length.checked_add(PIECE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        let protection = libc::PROT_NONE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new range wherever the kernel likes touches nothing that is mapped.
        let range = checked(unsafe { libc::mmap(ptr::null_mut(), reserved, protection, flags, -1, 0) })?;
        let before = range.align_offset(PIECE_BYTES);
        let base = range.wrapping_add(before);
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: `before` is less than a piece, so the `length` bytes from `base` on lie in the range just taken, which
        // nobody else knows of.
        let mapped = checked(unsafe { libc::mmap(base.cast(), length, protection, flags, file.as_raw_fd(), 0) });
        // What is left of the range on both sides is nobody's; all of it where the file could not be mapped.
        let keep = if mapped.is_ok() { length } else { 0 };
        for (rest, bytes) in [(range, before), (base.wrapping_add(keep), reserved - before - keep)] {
            if bytes > 0 {
                // SAFETY: whole pages of the range taken above and not of the mapping, which nothing refers to.
                unsafe { libc::munmap(rest.cast(), bytes) };
            }
        }
        mapped.map(|base| Self { base, length })
    }

    /// Its first byte.
    pub const fn base(&self) -> *mut u8 {
        self.base
    }

    /// Its length in bytes.
    pub const fn len(&self) -> usize {
        self.length
    }

    /// madvise(2) for `length` bytes from `offset` on, both in whole pages, and with advice that changes no byte of memory.
    pub fn advise(&self, offset: usize, length: usize, advice: libc::c_int) -> io::Result<()> {
        if offset.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range lies in this mapping, and by the caller's word no byte changes.
        let done = unsafe { libc::madvise(self.base.wrapping_add(offset).cast(), length, advice) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this object made the mapping and is the last to know of it.
        unsafe { libc::munmap(self.base.cast(), self.length) };
    }
}

fn checked(mapped: *mut libc::c_void) -> io::Result<*mut u8> {
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped.cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    #[test]
    fn it_begins_where_a_huge_page_can_whatever_its_length() {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        for length in [4096, PIECE_BYTES, 3 * PIECE_BYTES + 4096] {
            file.set_len(length as u64).unwrap();
            let mapping = Mapping::new(&file, length).unwrap();
            assert_eq!((mapping.base().align_offset(PIECE_BYTES), mapping.len()), (0, length));
            let last = mapping.base().wrapping_add(length - 1);
            // SAFETY: the last byte of a live mapping that only this test uses.
            unsafe {
                last.write(7);
                assert_eq!(last.read(), 7);
            }
        }
    }

    #[test]
    fn no_advice_is_given_past_its_end() {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(8192).unwrap();
        let mapping = Mapping::new(&file, 8192).unwrap();
        assert!(mapping.advise(4096, 4096, libc::MADV_POPULATE_WRITE).is_ok());
        for (offset, length) in [(4096, 8192), (usize::MAX & !4095, 4096)] {
            let refused = mapping.advise(offset, length, libc::MADV_POPULATE_WRITE);
            assert_eq!(refused.map_err(|error| error.kind()), Err(io::ErrorKind::InvalidInput));
        }
    }
}
