//! The pages that a paused guest's first instructions will want.
//!
//! For each vCPU: the code under RIP, the stack under RSP, the descriptor tables and the task state that an interrupt
//! looks at, and the page-table pages that lead there. The processor, and KVM on its behalf, needs all of them at once;
//! fetched one fault after the other they would be the first dozen round trips of the guest's new life.

use kvm_bindings::{kvm_regs, kvm_sregs};
use switchover_wire::frame::bulk::CHUNK_PAGES;
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageIndex};

use crate::memory::GuestMemory;

const CR0_PAGING: u64 = 1 << 31;
const CR4_FIVE_LEVELS: u64 = 1 << 12;
const EFER_LONG_MODE: u64 = 1 << 10;
const ENTRY_PRESENT: u64 = 1;
/// The entry maps a page itself, and does not lead to a table.
const ENTRY_LARGE: u64 = 1 << 7;
const ENTRY_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Where a 64-bit task state holds the stack for interrupts from user mode.
const TASK_STACK: u64 = 4;
/// What is sent with the code: a bulk frame's worth, 0.2 ms at 10 Gbit/s, while the state is on its way.
const CHUNK_BYTES: u64 = CHUNK_PAGES * PAGE_SIZE_U64;
/// No hint is worth more pages than this.
const MOST_PAGES: usize = 512;

/// The registers that may hold addresses.
const fn pointers(regs: &kvm_regs) -> [u64; 15] {
    let kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15, .. } = *regs;
    [rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15]
}

/// The pages wanted by vCPUs in these states, most urgent first, each once.
#[must_use]
pub fn first_pages<'a>(
    memory: &GuestMemory,
    vcpus: impl Iterator<Item = (&'a kvm_regs, &'a kvm_sregs)>,
) -> Vec<PageIndex> {
    let mut found = Found { memory, pages: Vec::new() };
    // What each of them needs at once goes before what any may need next.
    let code: Vec<u64> = vcpus.filter_map(|(regs, sregs)| found.vcpu(regs, sregs)).collect();
    code.into_iter().for_each(|at| found.around(at));
    found.pages
}

struct Found<'a> {
    memory: &'a GuestMemory,
    pages: Vec<PageIndex>,
}

impl Found<'_> {
    /// What one vCPU needs. Answers the guest-physical address of its next instruction.
    fn vcpu(&mut self, regs: &kvm_regs, sregs: &kvm_sregs) -> Option<u64> {
        let long_mode = sregs.efer & EFER_LONG_MODE != 0;
        let (code_base, stack_base) = if long_mode { (0, 0) } else { (sregs.cs.base, sregs.ss.base) };
        let code = code_base.wrapping_add(regs.rip);
        let stack = stack_base.wrapping_add(regs.rsp);
        let at = self.linear(sregs, code);
        self.linear(sregs, stack);
        // What the instruction was about to touch, or the next one is: addresses are kept in registers. A number that is none
        // leads nowhere, or to a page that is sent a little early.
        for address in pointers(regs).into_iter().filter(|address| *address >= PAGE_SIZE_U64) {
            self.linear(sregs, address);
        }
        for table in [sregs.gdt.base, sregs.idt.base, sregs.tr.base] {
            self.linear(sregs, table);
        }
        if long_mode
            && let Some(task) = self.linear(sregs, sregs.tr.base.wrapping_add(TASK_STACK))
            && let Some(stack) = self.memory.read_u64(task)
        {
            // The stack grows down from there: its first push is in the page below.
            self.linear(sregs, stack.wrapping_sub(1));
        }
        // Straight-line code runs on into the next page; a call pushes below the stack pointer.
        self.linear(sregs, code.wrapping_add(PAGE_SIZE_U64));
        self.linear(sregs, stack.wrapping_sub(PAGE_SIZE_U64));
        at
    }

    /// A program's code, constants and variables lie together.
    fn around(&mut self, at: u64) {
        let chunk = at & !(CHUNK_BYTES - 1);
        (0..CHUNK_BYTES).step_by(PAGE_SIZE).for_each(|offset| self.note(chunk + offset));
    }

    /// Notes the page under a linear address, and the tables that lead there. Answers the guest-physical address.
    fn linear(&mut self, sregs: &kvm_sregs, address: u64) -> Option<u64> {
        if sregs.cr0 & CR0_PAGING == 0 {
            self.note(address);
            return Some(address);
        }
        let mut table = sregs.cr3 & ENTRY_ADDRESS;
        self.note(table);
        if sregs.efer & EFER_LONG_MODE == 0 {
            // 32-bit paging: a guest is in it for an instant while it starts.
            return None;
        }
        let top = if sregs.cr4 & CR4_FIVE_LEVELS == 0 { 3 } else { 4 };
        for level in (0..=top).rev() {
            let shift = 12 + 9 * level;
            let entry = self.memory.read_u64(table + (address >> shift & 0x1ff) * 8)?;
            if entry & ENTRY_PRESENT == 0 {
                return None;
            }
            let inside = (1_u64 << shift) - 1;
            if level == 0 || (level <= 2 && entry & ENTRY_LARGE != 0) {
                let physical = entry & ENTRY_ADDRESS & !inside | address & inside;
                self.note(physical);
                return Some(physical);
            }
            table = entry & ENTRY_ADDRESS;
            self.note(table);
        }
        None
    }

    fn note(&mut self, physical: u64) {
        if let Some(page) = self.memory.page_of(physical)
            && self.pages.len() < MOST_PAGES
            && !self.pages.contains(&page)
        {
            self.pages.push(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use switchover_pager::ram::Ram;
    use switchover_wire::description::RamRegion;
    use switchover_wire::types::PageCount;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> GuestMemory {
        let regions = vec![RamRegion { guest_address: 0, pages: PageCount(64) }];
        GuestMemory::new(Ram::new(PageCount(64)).unwrap(), regions).unwrap()
    }

    fn long_mode(cr3: u64) -> kvm_sregs {
        kvm_sregs { cr0: CR0_PAGING | 1, cr3, efer: EFER_LONG_MODE, ..Default::default() }
    }

    #[test]
    fn the_tables_on_the_way_come_before_the_page() {
        let memory = memory();
        let write = |at: u64, entry: u64| memory.mapped().write_obj(entry, GuestAddress(at)).unwrap();
        write(0x1000 + 8, 0x2003);
        write(0x2000 + 2 * 8, 0x3003);
        write(0x3000 + 3 * 8, 0x4003);
        write(0x4000 + 4 * 8, 0x8000_0000_0000_7003);
        let rip = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 0x123;
        let regs = kvm_regs { rip, rsp: 0xdead_0000_0000, ..Default::default() };
        let pages = first_pages(&memory, [(&regs, &long_mode(0x1000))].into_iter());
        assert_eq!(pages[..5], [1, 2, 3, 4, 7].map(PageIndex));
    }

    #[test]
    fn large_pages_end_the_walk() {
        let memory = memory();
        memory.mapped().write_obj(0x2003_u64, GuestAddress(0x1000)).unwrap();
        memory.mapped().write_obj(ENTRY_LARGE | 3, GuestAddress(0x2000)).unwrap();
        let regs = kvm_regs { rip: 0x9000, rsp: 0xa008, ..Default::default() };
        let pages = first_pages(&memory, [(&regs, &long_mode(0x1000))].into_iter());
        assert_eq!(pages[..4], [1, 2, 9, 10].map(PageIndex));
    }

    #[test]
    fn without_paging_addresses_are_physical_and_nothing_out_of_range_is_hinted() {
        let regs = kvm_regs { rip: 0x5000, rsp: u64::MAX, ..Default::default() };
        let pages = first_pages(&memory(), [(&regs, &kvm_sregs::default())].into_iter());
        assert_eq!(pages[..3], [5, 0, 6].map(PageIndex));
        assert!(pages.iter().all(|page| page.0 < 64), "{pages:?}");
    }

    #[test]
    fn what_registers_point_at_comes_before_what_lies_around_the_code() {
        let regs = kvm_regs { rip: 0x5000, rsp: 0x9000, rax: 0x20_008, rsi: 7, r15: 0x30_000, ..Default::default() };
        let pages = first_pages(&memory(), [(&regs, &kvm_sregs::default())].into_iter());
        assert_eq!(pages[..4], [5, 9, 0x20, 0x30].map(PageIndex));
        let (mut all, chunk) = (pages.clone(), (0..64).map(PageIndex).collect::<Vec<_>>());
        all.sort_unstable();
        assert_eq!(all, chunk, "each page once");
    }

    #[test]
    fn tables_that_lead_in_circles_are_no_trouble() {
        let memory = memory();
        for entry in 0..512 {
            memory.mapped().write_obj(0x1003_u64, GuestAddress(0x1000 + entry * 8)).unwrap();
        }
        let regs = kvm_regs { rip: u64::MAX, rsp: 8, ..Default::default() };
        let pages = first_pages(&memory, [(&regs, &long_mode(0x1000))].into_iter());
        // Around which lies all of this memory.
        assert_eq!((pages.first(), pages.len()), (Some(&PageIndex(1)), 64));
    }
}
