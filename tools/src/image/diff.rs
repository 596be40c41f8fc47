//! Where two images differ.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use indicatif::HumanCount;
use switchover_image::error::ImageError;
use switchover_image::reader::Image;
use switchover_image::{Tally, differences};
use switchover_runtime::state;
use switchover_wire::description::MachineDescription;

/// How many stretches of pages are listed.
const SHOWN: usize = 20;

/// What came of a comparison.
pub(super) struct Found {
    pub(super) same: bool,
    /// For people.
    pub(super) text: String,
}

/// Compares all that two images hold of their guests.
///
/// # Errors
/// When one of them is damaged.
pub(super) fn diff(one: &Image, other: &Image) -> Result<Found, ImageError> {
    let (here, there) = (one.sections(), other.sections());
    let mut text = String::new();
    let mut line = |what: &str, how: String| {
        let _ = writeln!(text, "{what:8} {how}");
    };
    let machine = machine_differences(&here.machine, &there.machine);
    if !machine.is_empty() {
        line("machine", machine.join(", "));
    }
    let state = state_differences(&here.state, &there.state);
    if !state.is_empty() {
        line("state", state.join(", "));
    }
    if here.was_running != there.was_running {
        let how = |running| if running { "running" } else { "paused" };
        line("guest", format!("{} in the first, {} in the second", how(here.was_running), how(there.was_running)));
    }
    let memory = differences(one, other, &Tally::default())?;
    if !memory.ranges.is_empty() {
        let shown = memory.ranges.iter().take(SHOWN).map(|(first, count)| match count.0 {
            1 => format!("{:#x}", first.0),
            count => format!("{:#x} to {:#x}", first.0, first.0 + count - 1),
        });
        let more = memory.ranges.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!(" and {more} more stretches") } else { String::new() };
        let pages = HumanCount(memory.pages().0);
        line("memory", format!("{pages} pages: {}{more}", shown.collect::<Vec<_>>().join(", ")));
    }
    let same = text.is_empty();
    if same {
        text.push_str("the same guest\n");
    }
    Ok(Found { same, text })
}

/// What differs of the machines that the guests need.
fn machine_differences(one: &MachineDescription, other: &MachineDescription) -> Vec<&'static str> {
    let parts = [
        ("architecture", one.architecture != other.architecture),
        ("size or place of memory", (one.page_size, &one.ram) != (other.page_size, &other.ram)),
        ("number of vCPUs", one.vcpus != other.vcpus),
        ("CPU features", (&one.cpuid, one.xcr0) != (&other.cpuid, other.xcr0)),
        ("MSRs", one.msrs != other.msrs),
        ("TSC frequency", one.tsc_khz != other.tsc_khz),
        ("devices", one.devices != other.devices),
        ("version of the state", one.state_version != other.state_version),
    ];
    parts.into_iter().filter_map(|(name, differs)| differs.then_some(name)).collect()
}

/// The sections of two states that differ, by name; or the state as a whole, where its sections are not known here.
fn state_differences(one: &[u8], other: &[u8]) -> Vec<String> {
    if one == other {
        return Vec::new();
    }
    let (Ok(here), Ok(there)) = (state::sections(one), state::sections(other)) else {
        return vec!["all of it, which is of another version than this build reads".to_owned()];
    };
    let mut sections: BTreeMap<String, [Option<&[u8]>; 2]> = BTreeMap::new();
    for (side, list) in [here, there].into_iter().enumerate() {
        for (section, contents) in list {
            sections.entry(section.to_string()).or_default()[side] = Some(contents);
        }
    }
    let named = |(name, sides): (String, [Option<&[u8]>; 2])| match sides {
        [Some(here), Some(there)] if here == there => None,
        [Some(_), Some(_)] => Some(name),
        [_, None] => Some(format!("{name} (only in the first)")),
        [None, _] => Some(format!("{name} (only in the second)")),
    };
    sections.into_iter().filter_map(named).collect()
}

#[cfg(test)]
mod tests {
    use switchover_runtime::state::{Kind, SectionId, StateWriter};

    use super::*;

    fn state(sections: &[(Kind, u16, u32)]) -> Vec<u8> {
        let mut writer = StateWriter::new();
        for (kind, number, value) in sections {
            writer.add(SectionId::new(*kind, *number), value).unwrap();
        }
        writer.finish()
    }

    #[test]
    fn sections_that_differ_are_named() {
        let one = state(&[(Kind::Vcpu, 0, 1), (Kind::Vcpu, 1, 5), (Kind::Pit, 0, 7)]);
        let other = state(&[(Kind::Vcpu, 0, 2), (Kind::Pit, 0, 7), (Kind::Serial, 0, 3)]);
        assert_eq!(state_differences(&one, &one), [""; 0]);
        let told = ["serial port 0 (only in the second)", "vCPU 0", "vCPU 1 (only in the first)"];
        assert_eq!(state_differences(&one, &other), told);
        assert!(state_differences(&one, b"something").concat().contains("another version"));
    }
}
