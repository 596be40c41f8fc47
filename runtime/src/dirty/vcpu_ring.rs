//! The ring in which KVM tells what one vCPU wrote.
//!
//! KVM pushes an entry when it makes a page writable for the vCPU, and marks it *dirty*. Whoever harvests an entry marks it
//! *to reset*; KVM_RESET_DIRTY_RINGS then protects its page again and gives the entry back to KVM. Both sides go through
//! the ring in order, and flags change hands by release and acquire (Documentation/virt/kvm/api.rst, 8.29).
//!
//! Unsafety in this file: the entries of the mapping that [`VcpuRing`] owns. KVM writes an entry's slot and offset before
//! it releases the flags that say so, and not again before the entry was given back.

use std::io;
use std::mem::{offset_of, size_of};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;
use memmap2::{MmapOptions, MmapRaw};
use switchover_wire::types::PAGE_SIZE;

/// The entry tells of a page (`KVM_DIRTY_GFN_F_DIRTY`; not in kvm-bindings, being an expression).
const DIRTY: u32 = 1;
/// The entry has been harvested (`KVM_DIRTY_GFN_F_RESET`).
const RESET: u32 = 2;

/// Bytes of an entry.
pub const ENTRY_SIZE: usize = size_of::<kvm_dirty_gfn>();

/// A page that a vCPU wrote: which slot, and which page of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    /// KVM's number of the slot; the address space is in its upper half.
    pub slot: u32,
    /// Counted in the slot.
    pub page: u64,
}

/// A vCPU's ring. Entries are counted from its beginning, never wrapping.
#[derive(Debug)]
pub struct VcpuRing {
    mapping: MmapRaw,
    /// How many fit, a power of two.
    room: u64,
    /// Harvested so far.
    harvested: u64,
    /// Seen so far, harvested or not.
    seen: u64,
}

impl VcpuRing {
    /// That of `vcpu`, which is of a VM with rings of so many bytes each.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub fn of(vcpu: &VcpuFd, bytes: usize) -> io::Result<Self> {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as u64;
        let mapping = MmapOptions::new().len(bytes).offset(offset).map_raw(vcpu)?;
        Ok(Self { mapping, room: (bytes / ENTRY_SIZE) as u64, harvested: 0, seen: 0 })
    }

    /// Takes the next entry out, if there is one. The page stays writable until the rings are reset.
    pub fn harvest(&mut self) -> Option<Written> {
        let entry = self.entry(self.harvested);
        // Acquire: slot and offset are not read before KVM has written them.
        if self.flags(entry).load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
            return None;
        }
        // SAFETY: `entry` is inside the mapping and aligned; the flags say that KVM is done with it.
        let found = unsafe { entry.read_volatile() };
        // Release: KVM does not reuse the entry before it has been read.
        self.flags(entry).store(RESET, Ordering::Release);
        self.harvested += 1;
        self.seen = self.seen.max(self.harvested);
        Some(Written { slot: found.slot, page: found.offset })
    }

    /// How many entries it has.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.room
    }

    /// Marks the next half of the ring harvested, whatever it tells. For a ring that KVM calls full, so that it holds more
    /// than that, and whose entries are useless.
    pub fn give_up_half(&mut self) {
        for _ in 0..self.room / 2 {
            self.flags(self.entry(self.harvested)).store(RESET, Ordering::Release);
            self.harvested += 1;
        }
        self.seen = self.seen.max(self.harvested);
    }

    /// How many entries KVM has pushed since the beginning. Harvests none: no page is protected again for it.
    pub fn pushed(&mut self) -> u64 {
        while self.seen < self.harvested + self.room
            && self.flags(self.entry(self.seen)).load(Ordering::Acquire) & (DIRTY | RESET) == DIRTY
        {
            self.seen += 1;
        }
        self.seen
    }

    fn entry(&self, count: u64) -> *mut kvm_dirty_gfn {
        let index = usize::try_from(count % self.room).unwrap_or(0);
        self.mapping.as_mut_ptr().cast::<kvm_dirty_gfn>().wrapping_add(index)
    }

    fn flags(&self, entry: *mut kvm_dirty_gfn) -> &AtomicU32 {
        let flags = entry.cast::<u8>().wrapping_add(offset_of!(kvm_dirty_gfn, flags)).cast::<u32>();
        // SAFETY: `entry` is one of the entries in the mapping that `self` owns, and aligned as the mapping is; through
        // it the flags are only ever changed as this atomic.
        unsafe { AtomicU32::from_ptr(flags) }
    }
}
