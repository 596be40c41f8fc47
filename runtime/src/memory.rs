//! Guest RAM where the guest sees it.
//!
//! The pager's [`Ram`] is one run of pages; the guest sees it in one or two pieces, split where the platform keeps
//! its devices. Everything here goes through the guest mapping: the mapping that userfaultfd watches.
//!
//! Unsafety in this file rests on one thing: every pointer handed out lies inside a mapping that the [`Ram`] kept
//! beside it owns.

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use switchover_pager::ram::Ram;
use switchover_wire::description::RamRegion;
use switchover_wire::types::{PAGE_SIZE_U64, PageIndex};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::dirty::book::{Book, BookFrom};
use crate::dirty::span::SlotSpan;
use crate::error::VmError;

/// Guest RAM by guest-physical address. Clones share the memory and keep it alive.
#[derive(Clone)]
pub struct GuestMemory {
    // Declared before `ram`: it must be gone before the mapping that it points into.
    mapped: Arc<GuestMemoryMmap<BookFrom>>,
    regions: Arc<[RamRegion]>,
    book: Arc<Book>,
    ram: Ram,
}

impl GuestMemory {
    /// Lays `ram` out over `regions`, which count as many pages as it has.
    ///
    /// # Errors
    /// When the regions do not add up, or overlap.
    pub fn new(ram: Ram, regions: Vec<RamRegion>) -> Result<Self, VmError> {
        let refused = |why: String| VmError::Host {
            attempted: "lay out guest RAM".to_owned(),
            source: std::io::Error::new(std::io::ErrorKind::InvalidInput, why),
        };
        let total: u64 = regions.iter().map(|region| region.pages.0).sum();
        if total != ram.pages().0 {
            return Err(refused(format!("{total} pages laid out, {} there are", ram.pages().0)));
        }
        let book = Arc::new(Book::new(ram.pages()));
        let mut mapped = Vec::new();
        let mut offset = 0;
        for region in &regions {
            let size = usize::try_from(region.pages.bytes()).map_err(|_| refused("too large".to_owned()))?;
            let base = ram.guest_base().wrapping_add(offset);
            let bitmap = BookFrom::new(Arc::clone(&book), offset);
            // SAFETY: `base` is the start of RAM plus the regions before this one, and all regions together are as
            // long as RAM: the range lies inside its guest mapping, which `ram`, kept beside it, owns.
            let builder = unsafe { MmapRegionBuilder::new_with_bitmap(size, bitmap).with_raw_mmap_pointer(base) };
            let mapping = builder
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .build()
                .map_err(|error| refused(error.to_string()))?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(region.guest_address))
                .ok_or_else(|| refused("a region past the end of the address space".to_owned()))?;
            mapped.push(region);
            offset += size;
        }
        let mapped = GuestMemoryMmap::from_regions(mapped).map_err(|error| refused(error.to_string()))?;
        Ok(Self { mapped: Arc::new(mapped), regions: regions.into(), book, ram })
    }

    /// Gives the guest its RAM: one slot a region.
    ///
    /// The memory must outlive the VM's file descriptor; whoever keeps that keeps a clone of this.
    ///
    /// # Errors
    /// When KVM refuses a slot.
    pub fn register(&self, vm: &VmFd) -> Result<(), VmError> {
        self.set_slots(vm, 0)
    }

    /// Has KVM note from now on which pages are written, or note it no more. The guest may run meanwhile.
    ///
    /// # Errors
    /// When KVM refuses; some slots may have changed.
    pub fn log_writes(&self, vm: &VmFd, on: bool) -> Result<(), VmError> {
        self.set_slots(vm, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    fn set_slots(&self, vm: &VmFd, flags: u32) -> Result<(), VmError> {
        let mut base = self.ram.guest_base();
        for (slot, region) in (0..).zip(self.regions.iter()) {
            let bytes = region.pages.bytes();
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.guest_address,
                memory_size: bytes,
                userspace_addr: base as u64,
            };
            // SAFETY: the range lies inside the guest mapping, as in `new`; it stays mapped as long as a clone of
            // this lives, and the slots of one VM do not overlap because the regions do not.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(VmError::kvm(format!("give the guest RAM at {:#x}", region.guest_address)))?;
            base = base.wrapping_add(usize::try_from(bytes).unwrap_or(usize::MAX));
        }
        Ok(())
    }

    /// The memory behind it.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The guest-physical ranges, in the order in which pages are counted.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The memory as other crates of rust-vmm want it.
    #[must_use]
    pub fn mapped(&self) -> &GuestMemoryMmap<BookFrom> {
        &self.mapped
    }

    /// The pages that were written through [`Self::mapped`].
    #[must_use]
    pub fn book(&self) -> &Book {
        &self.book
    }

    /// The pages of each slot.
    pub(crate) fn spans(&self) -> impl Iterator<Item = SlotSpan> {
        self.regions.iter().zip(0..).scan(0, |before, (region, slot)| {
            let span = SlotSpan { slot, first: *before, pages: region.pages.0 };
            *before += region.pages.0;
            Some(span)
        })
    }

    /// The page that holds a guest-physical address; `None` where there is no RAM.
    #[must_use]
    pub fn page_of(&self, address: u64) -> Option<PageIndex> {
        let mut before = 0;
        for region in self.regions.iter() {
            if let Some(offset) = address.checked_sub(region.guest_address)
                && offset < region.pages.bytes()
            {
                return Some(PageIndex(before + offset / PAGE_SIZE_U64));
            }
            before += region.pages.0;
        }
        None
    }

    /// Whether `length` bytes of RAM start at `address`, in one piece.
    #[must_use]
    pub fn holds(&self, address: u64, length: u64) -> bool {
        self.regions.iter().any(|region| {
            address
                .checked_sub(region.guest_address)
                .and_then(|offset| offset.checked_add(length))
                .is_some_and(|end| end <= region.pages.bytes())
        })
    }

    /// The little-endian number at `address`; `None` where there is no RAM.
    #[must_use]
    pub fn read_u64(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.mapped.read_slice(&mut bytes, GuestAddress(address)).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    /// Highest guest-physical address of RAM plus one.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.mapped.last_addr().0.saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use switchover_wire::types::PageCount;

    #[test]
    fn pages_are_counted_on_behind_the_hole() {
        let regions = vec![
            RamRegion { guest_address: 0, pages: PageCount(4) },
            RamRegion { guest_address: 1 << 32, pages: PageCount(2) },
        ];
        let memory = GuestMemory::new(Ram::new(PageCount(6)).unwrap(), regions).unwrap();
        assert_eq!(memory.page_of(0x3fff), Some(PageIndex(3)));
        assert_eq!(memory.page_of(0x4000), None);
        assert_eq!(memory.page_of((1 << 32) + 0x1000), Some(PageIndex(5)));
        assert_eq!(memory.page_of((1 << 32) + 0x2000), None);
        assert!(memory.holds(0x3000, 0x1000));
        assert!(!memory.holds(0x3000, 0x1001));
        assert!(!memory.holds(u64::MAX, 2));

        // The alias shows what was written through the guest mapping behind the hole.
        memory.mapped().write_slice(&[9], GuestAddress((1 << 32) + 0x1000)).unwrap();
        let alias = memory.ram().alias_of(PageIndex(5)).unwrap();
        // SAFETY: the alias of page 5 of 6, which nothing else uses.
        assert_eq!(unsafe { alias.read() }, 9);
    }

    #[test]
    fn regions_that_do_not_add_up_are_refused() {
        let regions = vec![RamRegion { guest_address: 0, pages: PageCount(5) }];
        assert!(GuestMemory::new(Ram::new(PageCount(6)).unwrap(), regions).is_err());
    }
}
