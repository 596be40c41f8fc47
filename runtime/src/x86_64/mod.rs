//! Everything that depends on the CPU architecture, for x86-64.
//!
//! The rest of the crate uses what is named here and nothing else, so that another architecture is another module of the same
//! shape: what memory looks like, how a kernel is started, what a vCPU's and a chipset's state are, what a guest's first
//! pages are.

mod boot;
mod chipset;
mod clock;
mod cpuid;
mod elf;
mod ioctls;
mod layout;
mod msrs;
mod platform;
mod ports;
mod saved;
mod start;
mod vcpu_state;
mod walk;

pub use boot::BootError;
#[doc(hidden)]
pub use boot::load as load_kernel;
pub use elf::ElfError;
pub use layout::{LEAST_MEMORY, MOST_MEMORY, ram_regions};
pub use platform::Platform;
pub use ports::Ports;
#[doc(hidden)]
pub use saved::{Parts, SavedMachine};
pub use vcpu_state::CpuStateError;
