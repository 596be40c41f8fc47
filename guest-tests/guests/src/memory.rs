//! Where the working set and the table of expected counters lie.

use core::slice;
use core::sync::atomic::AtomicU64;

use crate::pages::{PAGE_BYTES, Page};
use crate::start_info::StartInfo;

/// Memory that is handed out once, for good.
#[derive(Clone, Copy)]
pub struct Memory {
    /// The counters that the pages should hold; outside the working set.
    pub expected: &'static [AtomicU64],
    /// The working set.
    pub pages: &'static [Page],
}

/// The working set is aligned so that it can be backed by huge pages where a VMM has them.
const ALIGNMENT: u64 = 2 << 20;
/// Below it lie the loader's tables, the trampoline and firmware.
const LOWEST: u64 = 1 << 20;

unsafe extern "C" {
    static image_end: u8;
}

impl Memory {
    /// Finds room for `pages` pages in one region of RAM. Called once, by CPU 0, which then no longer uses `info`.
    pub fn find(info: &StartInfo, pages: usize) -> Option<Self> {
        let image = (&raw const image_end).addr() as u64;
        let table_bytes = (pages * size_of::<AtomicU64>()) as u64;
        let page_bytes = (pages * PAGE_BYTES) as u64;
        for (start, end) in info.ram() {
            let clear_of_image = if start < image { image } else { start };
            let table = clear_of_image.max(LOWEST).next_multiple_of(PAGE_BYTES as u64);
            let first_page = (table + table_bytes).next_multiple_of(ALIGNMENT);
            if first_page + page_bytes <= end {
                let at = |address: u64| usize::try_from(address).unwrap_or(usize::MAX);
                // SAFETY: both ranges are RAM by the loader's map, mapped (`ram` cuts off what is not), above the image
                // and apart from each other; they are handed out once. Atomics allow any bytes and concurrent access.
                return Some(unsafe {
                    Self {
                        expected: slice::from_raw_parts(core::ptr::with_exposed_provenance(at(table)), pages),
                        pages: slice::from_raw_parts(core::ptr::with_exposed_provenance(at(first_page)), pages),
                    }
                });
            }
        }
        None
    }
}
