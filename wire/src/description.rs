//! What a machine is, as far as the other side must match it.

use serde::{Deserialize, Serialize};

use crate::types::PageCount;

/// A run of guest-physical addresses backed by RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RamRegion {
    /// The guest-physical address of its first byte, page-aligned.
    pub guest_address: u64,
    /// Its length.
    pub pages: PageCount,
}

/// One entry of the CPUID table that the guest sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry, where the leaf looks at it; otherwise 0.
    pub index: u32,
    /// EAX, EBX, ECX and EDX on return.
    pub registers: [u32; 4],
}

/// A machine as the handshake compares it, before the guest is touched.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineDescription {
    /// `x86_64` and so on, as Rust's `std::env::consts::ARCH` says.
    pub architecture: String,
    /// Bytes in a page.
    pub page_size: u32,
    /// RAM in the order in which [`crate::types::PageIndex`] counts it.
    pub ram: Vec<RamRegion>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The leaves whose feature bits matter, as the guest of this machine sees them.
    pub cpuid: Vec<CpuidLeaf>,
    /// The extended states that the guest may turn on (XCR0 bits).
    pub xcr0: u64,
    /// The model-specific registers that a state section carries, sorted.
    pub msrs: Vec<u32>,
    /// Guest TSC frequency.
    pub tsc_khz: u32,
    /// The devices whose state travels, by name.
    pub devices: Vec<String>,
    /// The version of the saved state's sections.
    pub state_version: u32,
}

impl MachineDescription {
    /// All pages of RAM.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        PageCount(self.ram.iter().fold(0, |sum: u64, region| sum.saturating_add(region.pages.0)))
    }
}
