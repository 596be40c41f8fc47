//! Which pages were written: by the guest, by KVM for it, and by this process.
//!
//! KVM tells of the guest's writes and its own; what this process writes through [`GuestMemory`](crate::memory::GuestMemory)
//! is in the [`book`] that hangs on the mapping. A page is noted when either says so.
//!
//! ```text
//!   guest, KVM ──▶ bitmap of each slot ([`log`])  ──┐
//!   devices    ──▶ book of own writes ([`book`])  ──┴──▶ peek
//! ```

pub mod book;
mod ioctls;
pub mod log;
pub(crate) mod span;
