//! How the process that holds a machine manages its memory.

/// The most that glibc takes for this threshold.
const LARGE: libc::c_int = 32 << 20;

/// Large blocks come from the heap and stay there: one that comes fresh from the kernel costs a fault for each of its pages, and a
/// handoff needs a few whose size grows with the guest's.
pub fn keep_large_blocks() {
    for (option, value) in [(libc::M_MMAP_THRESHOLD, LARGE), (libc::M_TRIM_THRESHOLD, libc::c_int::MAX)] {
        // SAFETY: sets a number in the allocator, under its lock.
        if unsafe { libc::mallopt(option, value) } == 0 {
            tracing::debug!(option, "the allocator cannot be told to keep large blocks");
        }
    }
}
