//! What keeps a guest of one machine from going on on another.

use std::fmt::Display;

use thiserror::Error;

use super::features::{FEATURE_REGISTERS, XCR0_NAMES};
use super::{MachineDescription, RamRegion};

/// How far two TSC frequencies may lie apart, in millionths: what KVM too treats as the same frequency
/// (its parameter `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// How many items of a list a sentence shows.
const SHOWN: usize = 8;

/// One difference that matters, as a sentence with both sides' values.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Mismatch {
    /// Another instruction set.
    #[error("the source is {source_value}, the destination {destination}")]
    Architecture {
        /// The source's.
        source_value: String,
        /// The destination's.
        destination: String,
    },
    /// Memory is counted in other units.
    #[error("the source has pages of {source_value} bytes, the destination of {destination}")]
    PageSize {
        /// The source's.
        source_value: u32,
        /// The destination's.
        destination: u32,
    },
    /// RAM differs in size or place.
    #[error("the source has {source_value} of RAM, the destination {destination} (`--memory`)")]
    Ram {
        /// The source's size and regions.
        source_value: String,
        /// The destination's.
        destination: String,
    },
    /// Another number of vCPUs.
    #[error("the source has {source_value} vCPUs, the destination {destination} (`--vcpus`)")]
    Vcpus {
        /// The source's.
        source_value: u32,
        /// The destination's.
        destination: u32,
    },
    /// Features that the guest may be using.
    #[error("the destination's CPU lacks features that the source's guest may be using: {missing}")]
    CpuFeatures {
        /// By name, or by register and bit, with the whole registers of both sides.
        missing: String,
    },
    /// Extended states that the guest may have switched on.
    #[error(
        "the source's guest may use the extended states {source_value:#x} (XCR0), the destination has \
         {destination:#x} and lacks {missing}"
    )]
    Xcr0 {
        /// The source's.
        source_value: u64,
        /// The destination's.
        destination: u64,
        /// Those missing, by name.
        missing: String,
    },
    /// Model-specific registers that the state carries.
    #[error("the source's state carries {source_value} MSRs, and the destination does not have these: {missing}")]
    Msrs {
        /// How many the source has.
        source_value: usize,
        /// The first ones missing.
        missing: String,
    },
    /// The guest's time would run at another speed.
    #[error(
        "the source's TSC runs at {source_value} kHz, the destination's at {destination} kHz, more than \
         {TSC_TOLERANCE_PPM} ppm apart"
    )]
    Tsc {
        /// The source's.
        source_value: u32,
        /// The destination's.
        destination: u32,
    },
    /// Other devices.
    #[error("the source has the devices {source_value}, the destination {destination}")]
    Devices {
        /// The source's.
        source_value: String,
        /// The destination's.
        destination: String,
    },
    /// Another layout of the saved state.
    #[error("the source saves its state in version {source_value}, the destination reads version {destination}")]
    StateVersion {
        /// The source's.
        source_value: u32,
        /// The destination's.
        destination: u32,
    },
}

/// All of them in one sentence, for a refusal.
#[must_use]
pub fn describe_mismatches(mismatches: &[Mismatch]) -> String {
    format!("the machines differ: {}", join(mismatches.iter(), "; ", usize::MAX))
}

pub(super) fn compare(destination: &MachineDescription, source: &MachineDescription) -> Vec<Mismatch> {
    let mut found = Vec::new();
    if source.architecture != destination.architecture {
        found.push(Mismatch::Architecture {
            source_value: source.architecture.clone(),
            destination: destination.architecture.clone(),
        });
        // Registers of two architectures have nothing to be compared.
        return found;
    }
    if source.page_size != destination.page_size {
        found.push(Mismatch::PageSize { source_value: source.page_size, destination: destination.page_size });
    }
    if source.ram != destination.ram {
        found.push(Mismatch::Ram { source_value: ram(source), destination: ram(destination) });
    }
    if source.vcpus != destination.vcpus {
        found.push(Mismatch::Vcpus { source_value: source.vcpus, destination: destination.vcpus });
    }
    let missing = missing_features(destination, source);
    if !missing.is_empty() {
        // The whole list: these names are what a CPU model is chosen by.
        found.push(Mismatch::CpuFeatures { missing: join(missing.iter(), ", ", usize::MAX) });
    }
    let states = source.xcr0 & !destination.xcr0;
    if states != 0 {
        let names = bits(states).map(|bit| {
            XCR0_NAMES
                .iter()
                .find(|(known, _)| *known == bit)
                .map_or(format!("bit {bit}"), |(_, name)| (*name).to_owned())
        });
        let missing = join(names, ", ", usize::MAX);
        found.push(Mismatch::Xcr0 { source_value: source.xcr0, destination: destination.xcr0, missing });
    }
    let missing: Vec<_> = source.msrs.iter().filter(|msr| !destination.msrs.contains(msr)).collect();
    if !missing.is_empty() {
        let missing = join(missing.iter().map(|msr| format!("{msr:#x}")), ", ", SHOWN);
        found.push(Mismatch::Msrs { source_value: source.msrs.len(), missing });
    }
    let apart = u64::from(source.tsc_khz.abs_diff(destination.tsc_khz));
    if apart * 1_000_000 > u64::from(source.tsc_khz) * TSC_TOLERANCE_PPM {
        found.push(Mismatch::Tsc { source_value: source.tsc_khz, destination: destination.tsc_khz });
    }
    // State is found by name, so that the order does not matter.
    if sorted(&source.devices) != sorted(&destination.devices) {
        found
            .push(Mismatch::Devices { source_value: names(&source.devices), destination: names(&destination.devices) });
    }
    if source.state_version != destination.state_version {
        found.push(Mismatch::StateVersion {
            source_value: source.state_version,
            destination: destination.state_version,
        });
    }
    found
}

fn missing_features(destination: &MachineDescription, source: &MachineDescription) -> Vec<String> {
    let mut missing = Vec::new();
    for place in FEATURE_REGISTERS {
        // A leaf that a machine has not reads as zero.
        let read = |machine: &MachineDescription| {
            let leaf = machine.cpuid.iter().find(|leaf| (leaf.function, leaf.index) == (place.function, place.index));
            leaf.map_or(0, |leaf| leaf.registers[place.register])
        };
        let (has, wants) = (read(destination), read(source));
        let lacking = wants & !has & !place.dynamic;
        if lacking != 0 {
            let names =
                bits(u64::from(lacking)).map(|bit| place.bit_name(bit).map_or(format!("bit {bit}"), ToOwned::to_owned));
            missing.push(format!(
                "{} (CPUID {:#x}.{} {}: source {wants:#010x}, destination {has:#010x})",
                join(names, " ", usize::MAX),
                place.function,
                place.index,
                place.register_name(),
            ));
        }
    }
    missing
}

fn bits(mask: u64) -> impl Iterator<Item = u32> {
    (0..u64::BITS).filter(move |bit| mask >> bit & 1 == 1)
}

fn ram(machine: &MachineDescription) -> String {
    let size = u64::from(machine.page_size);
    let bytes = u128::from(machine.pages().0) * u128::from(size);
    let amount = if bytes.is_multiple_of(1 << 20) { format!("{} MiB", bytes >> 20) } else { format!("{bytes} bytes") };
    let region = |region: &RamRegion| {
        let end = u128::from(region.guest_address) + u128::from(region.pages.0) * u128::from(size);
        format!("{:#x}..{end:#x}", region.guest_address)
    };
    format!("{amount} at {}", join(machine.ram.iter().map(region), ", ", SHOWN))
}

fn sorted(names: &[String]) -> Vec<&String> {
    let mut names: Vec<_> = names.iter().collect();
    names.sort_unstable();
    names
}

fn names(names: &[String]) -> String {
    if names.is_empty() { "(none)".to_owned() } else { join(sorted(names).iter(), ", ", usize::MAX) }
}

/// `items` with `between` between them; those past `most` are only counted.
fn join(items: impl Iterator<Item = impl Display>, between: &str, most: usize) -> String {
    let mut text = String::new();
    let mut left_out = 0_usize;
    for (at, item) in items.enumerate() {
        if at >= most {
            left_out += 1;
            continue;
        }
        if at > 0 {
            text.push_str(between);
        }
        text.push_str(&item.to_string());
    }
    if left_out > 0 {
        text.push_str(&format!(" and {left_out} more"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::description::CpuidLeaf;
    use crate::description::tests::sample;
    use crate::types::PageCount;

    /// What a destination changed by `change` says of the sample as a source.
    fn said(change: impl Fn(&mut MachineDescription)) -> Vec<String> {
        let mut destination = sample();
        change(&mut destination);
        destination.mismatches(&sample()).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn like_machines_match() {
        assert!(said(|_| {}).is_empty());
    }

    #[test]
    fn each_difference_is_a_sentence_with_both_values() {
        assert_eq!(said(|d| d.architecture = "aarch64".to_owned()), ["the source is x86_64, the destination aarch64"]);
        assert_eq!(said(|d| d.page_size = 16384)[0], "the source has pages of 4096 bytes, the destination of 16384");
        assert_eq!(
            said(|d| d.ram[1].pages = PageCount(0x2_0000)),
            ["the source has 4096 MiB at 0x0..0xc0000000, 0x100000000..0x140000000 of RAM, the destination 3584 MiB \
              at 0x0..0xc0000000, 0x100000000..0x120000000 (`--memory`)"]
        );
        assert_eq!(said(|d| d.ram[1].guest_address = 1 << 33).len(), 1, "another place is another RAM");
        assert_eq!(said(|d| d.vcpus = 1), ["the source has 2 vCPUs, the destination 1 (`--vcpus`)"]);
        assert_eq!(
            said(|d| d.xcr0 = 0b10_0000_0011),
            ["the source's guest may use the extended states 0x7 (XCR0), the destination has 0x203 and lacks AVX"]
        );
        assert_eq!(
            said(|d| d.msrs = vec![0x10]),
            ["the source's state carries 3 MSRs, and the destination does not have these: 0x1b, 0xc0000080"]
        );
        assert_eq!(
            said(|d| {
                d.devices.pop();
            }),
            ["the source has the devices ioapic, serial, the destination ioapic"]
        );
        assert_eq!(
            said(|d| d.state_version = 2),
            ["the source saves its state in version 1, the destination reads version 2"]
        );
    }

    #[test]
    fn missing_cpu_features_are_named() {
        assert_eq!(
            said(|d| {
                d.cpuid[0].registers[2] = 1;
                d.cpuid[1].registers[1] = 0;
                d.cpuid.pop();
            }),
            [
                "the destination's CPU lacks features that the source's guest may be using: hypervisor (CPUID 0x1.0 ECX: \
              source 0x80000001, destination 0x00000001), avx2 (CPUID 0x7.0 EBX: source 0x00000020, destination \
              0x00000000), lahf_lm (CPUID 0x80000001.0 ECX: source 0x00000001, destination 0x00000000), syscall nx lm \
              (CPUID 0x80000001.0 EDX: source 0x20100800, destination 0x00000000)"
            ]
        );
        // A bit without a name.
        let mut source = sample();
        source.cpuid[1].registers[1] |= 1 << 6;
        assert!(describe_mismatches(&sample().mismatches(&source)).contains("bit 6 (CPUID 0x7.0 EBX"));
    }

    #[test]
    fn every_feature_register_is_compared() {
        for place in FEATURE_REGISTERS {
            let mut source = sample();
            let at = source.cpuid.iter().position(|leaf| (leaf.function, leaf.index) == (place.function, place.index));
            let at = at.unwrap_or_else(|| {
                source.cpuid.push(CpuidLeaf { function: place.function, index: place.index, registers: [0; 4] });
                source.cpuid.len() - 1
            });
            source.cpuid[at].registers[place.register] = u32::MAX;
            assert_eq!(sample().mismatches(&source).len(), 1, "{:#x}.{}", place.function, place.index);
            assert!(source.mismatches(&sample()).is_empty(), "more than the guest knows of is no harm");
        }
    }

    #[test]
    fn what_the_guest_switched_on_is_no_feature() {
        let mut source = sample();
        source.cpuid[0].registers[2] |= 1 << 27;
        source.cpuid[1].registers[2] |= 1 << 4;
        assert!(sample().mismatches(&source).is_empty());
    }

    #[test]
    fn more_on_the_destination_is_no_harm() {
        let more = said(|d| {
            d.xcr0 = u64::MAX;
            d.msrs.push(0xC000_0103);
            d.cpuid.iter_mut().for_each(|leaf| leaf.registers = [u32::MAX; 4]);
            d.devices.reverse();
        });
        assert!(more.is_empty(), "{more:?}");
    }

    #[test]
    fn tsc_frequencies_may_differ_a_little() {
        assert!(said(|d| d.tsc_khz += 611).is_empty());
        assert!(said(|d| d.tsc_khz -= 611).is_empty());
        assert_eq!(
            said(|d| d.tsc_khz += 612),
            ["the source's TSC runs at 2445000 kHz, the destination's at 2445612 kHz, more than 250 ppm apart"]
        );
        assert_eq!(said(|d| d.tsc_khz = 0).len(), 1);
    }

    #[test]
    fn long_lists_are_cut() {
        let mut source = sample();
        source.msrs = (0..100).collect();
        let text = describe_mismatches(&sample().mismatches(&source));
        assert!(text.starts_with("the machines differ: the source's state carries 100 MSRs"), "{text}");
        assert!(text.ends_with(" and 90 more"), "{text}");
    }
}
