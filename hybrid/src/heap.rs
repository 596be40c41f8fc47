//! Memory for the handoff, taken before it.

use switchover_wire::types::{PAGE_SIZE, PageCount};

/// How many sets of pages, a bit a page, a side makes on its way through the handoff: the book's, what is left, what is under way,
/// copies of these, and what is told of them; rounded up.
const SETS: usize = 16;
/// For states and messages.
const MORE: u64 = 1 << 20;

/// Has the allocator keep memory for this thread that the kernel has given already. A first touch costs microseconds, up to 18
/// where the host is itself a guest, and sets of pages grow with the guest: of 8 GiB, one is 64 first touches long.
///
/// For this the allocator must not give large blocks back to the kernel, nor ask it for each: see mallopt(3),
/// `M_MMAP_THRESHOLD` and `M_TRIM_THRESHOLD`. Where it does, this is of no use.
pub fn warm_up(pages: PageCount) {
    let block = |bytes: u64| {
        let mut block = Vec::<u8>::with_capacity(usize::try_from(bytes).unwrap_or(0));
        block.spare_capacity_mut().iter_mut().step_by(PAGE_SIZE).for_each(|page| _ = page.write(0));
        block
    };
    // One by one, as they will be needed: a block larger than the allocator's bound would come from the kernel, and go back to it.
    let set = pages.0.div_ceil(8);
    let blocks: Vec<_> = std::iter::repeat_n(set, SETS).chain([MORE]).map(block).collect();
    // Or else the compiler would see that nobody reads them.
    std::hint::black_box(blocks);
}
