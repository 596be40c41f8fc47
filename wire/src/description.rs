//! What a machine is, as far as the other side must match it.

mod bounds;
mod features;
mod mismatch;

use serde::{Deserialize, Serialize};

pub use self::bounds::DescriptionError;
pub use self::mismatch::{Mismatch, describe_mismatches};
use crate::types::{PAGE_SIZE_U64, PageCount};

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
    /// A machine that has nothing but memory from address 0 on, as of a test or an example: `architecture` is its name.
    #[must_use]
    pub fn of_memory_alone(architecture: &str, pages: PageCount) -> Self {
        Self {
            architecture: architecture.to_owned(),
            page_size: u32::try_from(PAGE_SIZE_U64).unwrap_or(u32::MAX),
            ram: vec![RamRegion { guest_address: 0, pages }],
            vcpus: 1,
            cpuid: Vec::new(),
            xcr0: 0,
            msrs: Vec::new(),
            tsc_khz: 0,
            devices: Vec::new(),
            state_version: 1,
        }
    }

    /// All pages of RAM.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        PageCount(self.ram.iter().fold(0, |sum: u64, region| sum.saturating_add(region.pages.0)))
    }
    /// Checks a description from outside before anything is computed from it: regions page-aligned, not empty,
    /// ascending, apart and within the physical address space; lists bounded and without repetition.
    ///
    /// # Errors
    /// The first rule that is broken, with what broke it.
    pub fn check_bounds(&self) -> Result<(), DescriptionError> {
        bounds::check(self)
    }

    /// Why a guest of `source` cannot go on on this machine, the destination: empty when it can. A destination may
    /// have more features than the guest knows of, never fewer. Both descriptions must have passed
    /// [`check_bounds`](Self::check_bounds).
    #[must_use]
    pub fn mismatches(&self, source: &Self) -> Vec<Mismatch> {
        mismatch::compare(self, source)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::PAGE_SIZE;

    /// A machine like those that are moved: 3 GiB below the hole and 1 GiB above it.
    pub(crate) fn sample() -> MachineDescription {
        let leaf = |function, index, registers| CpuidLeaf { function, index, registers };
        MachineDescription {
            architecture: "x86_64".to_owned(),
            page_size: u32::try_from(PAGE_SIZE).unwrap(),
            ram: vec![
                RamRegion { guest_address: 0, pages: PageCount(0xC_0000) },
                RamRegion { guest_address: 1 << 32, pages: PageCount(0x4_0000) },
            ],
            vcpus: 2,
            cpuid: vec![
                leaf(1, 0, [0, 0, 0x8000_0001, 0x0780_FBFF]),
                leaf(7, 0, [0, 0x20, 0, 0]),
                leaf(0xD, 1, [0xF, 0, 0, 0]),
                leaf(0x8000_0001, 0, [0, 0, 1, 0x2010_0800]),
            ],
            xcr0: 7,
            msrs: vec![0x10, 0x1B, 0xC000_0080],
            tsc_khz: 2_445_000,
            devices: vec!["ioapic".to_owned(), "serial".to_owned()],
            state_version: 1,
        }
    }

    proptest! {
        #[test]
        fn arbitrary_descriptions_never_panic(
            regions in prop::collection::vec((any::<u64>(), any::<u64>()), 0..4),
            page_size: u32, vcpus: u32, tsc_khz: u32, xcr0: u64,
            msrs: Vec<u32>,
            leaves in prop::collection::vec((0..8_u32, 0..2_u32, any::<[u32; 4]>()), 0..6),
            architecture: String,
        ) {
            let ram = regions.iter().map(|&(guest_address, pages)| RamRegion { guest_address, pages: PageCount(pages) });
            let cpuid = leaves.iter().map(|&(function, index, registers)| CpuidLeaf { function, index, registers });
            let other = MachineDescription {
                architecture, page_size, ram: ram.collect(), vcpus, cpuid: cpuid.collect(), xcr0, msrs, tsc_khz,
                ..sample()
            };
            let _ = (other.check_bounds(), other.pages());
            let _ = describe_mismatches(&other.mismatches(&sample()));
            let _ = describe_mismatches(&sample().mismatches(&other));
            prop_assert!(other.mismatches(&other.clone()).is_empty());
        }
    }
}
