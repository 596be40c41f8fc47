use std::cell::OnceCell;

use switchover_pager::ram::Ram;
use switchover_runtime::arch::{LEAST_MEMORY, load_kernel, ram_regions};
use switchover_runtime::memory::GuestMemory;

thread_local! {
    /// The smallest RAM that a machine can have.
    static MEMORY: OnceCell<GuestMemory> = const { OnceCell::new() };
}

/// Files that are given as kernels: looked at, and loaded where they look right.
pub fn kernel(bytes: &[u8]) {
    MEMORY.with(|memory| {
        let memory = memory.get_or_init(|| {
            let ram = Ram::new(LEAST_MEMORY).unwrap();
            GuestMemory::new(ram, ram_regions(LEAST_MEMORY).unwrap()).unwrap()
        });
        let _ = load_kernel(memory, bytes, "a command line", Some(&bytes[..bytes.len() / 2]));
    });
}
