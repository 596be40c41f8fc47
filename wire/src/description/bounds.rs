//! Whether a description from outside is one of a machine at all.

use thiserror::Error;

use super::{MachineDescription, RamRegion};

/// More than any machine that KVM runs today needs; bounds what is computed and printed.
const MAX_REGIONS: usize = 64;
const MAX_VCPUS: u32 = 1024;
const MAX_LEAVES: usize = 1024;
const MAX_MSRS: usize = 4096;
const MAX_DEVICES: usize = 64;
const MAX_NAME: usize = 64;

/// No architecture has more physical address bits (x86-64 and aarch64 both end at 52).
const MAX_ADDRESS: u64 = 1 << 52;

/// A description that is of no machine.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("the machine description is wrong: {field} is {got}, where {allowed} is allowed")]
pub struct DescriptionError {
    /// Which part of it.
    pub field: &'static str,
    /// What was read.
    pub got: String,
    /// What could have been.
    pub allowed: String,
}

fn refuse<T>(field: &'static str, got: impl Into<String>, allowed: impl Into<String>) -> Result<T, DescriptionError> {
    Err(DescriptionError { field, got: got.into(), allowed: allowed.into() })
}

pub(super) fn check(machine: &MachineDescription) -> Result<(), DescriptionError> {
    // First, because the other fields are printed when they are wrong.
    length("the length of the list of RAM regions", machine.ram.len(), 1, MAX_REGIONS)?;
    length("the length of the list of CPUID leaves", machine.cpuid.len(), 0, MAX_LEAVES)?;
    length("the length of the list of MSRs", machine.msrs.len(), 0, MAX_MSRS)?;
    length("the length of the list of devices", machine.devices.len(), 0, MAX_DEVICES)?;
    name("the architecture", &machine.architecture)?;
    machine.devices.iter().try_for_each(|device| name("a device's name", device))?;
    if !machine.page_size.is_power_of_two() || machine.page_size < 4096 {
        return refuse("the page size", machine.page_size.to_string(), "a power of two from 4096");
    }
    if !(1..=MAX_VCPUS).contains(&machine.vcpus) {
        return refuse("the number of vCPUs", machine.vcpus.to_string(), format!("1 to {MAX_VCPUS}"));
    }
    regions(&machine.ram, u64::from(machine.page_size))?;
    if let Some(pair) = machine.msrs.windows(2).find(|pair| pair[0] >= pair[1]) {
        return refuse("the list of MSRs", format!("{:#x} before {:#x}", pair[0], pair[1]), "ascending order");
    }
    let mut leaves: Vec<_> = machine.cpuid.iter().map(|leaf| (leaf.function, leaf.index)).collect();
    leaves.sort_unstable();
    if let Some(pair) = leaves.windows(2).find(|pair| pair[0] == pair[1]) {
        let (function, index) = pair[0];
        return refuse("the list of CPUID leaves", format!("leaf {function:#x}.{index} twice"), "each leaf once");
    }
    Ok(())
}

fn length(field: &'static str, got: usize, min: usize, max: usize) -> Result<(), DescriptionError> {
    if (min..=max).contains(&got) { Ok(()) } else { refuse(field, got.to_string(), format!("{min} to {max}")) }
}

fn name(field: &'static str, name: &str) -> Result<(), DescriptionError> {
    // They end up in messages on a terminal.
    if !name.is_empty() && name.len() <= MAX_NAME && name.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME).collect();
    refuse(field, format!("{shown:?}"), format!("1 to {MAX_NAME} printable ASCII characters"))
}

fn regions(ram: &[RamRegion], page_size: u64) -> Result<(), DescriptionError> {
    const FIELD: &str = "a RAM region";
    let mut end = 0;
    for region in ram {
        let RamRegion { guest_address, pages } = *region;
        let shown = || format!("{:#x} pages at {guest_address:#x}", pages.0);
        if !guest_address.is_multiple_of(page_size) {
            return refuse(FIELD, shown(), format!("a start at a multiple of {page_size}"));
        }
        if pages.0 == 0 {
            return refuse(FIELD, shown(), "at least one page");
        }
        if guest_address < end {
            return refuse(FIELD, shown(), format!("a start from {end:#x}, where the region before it ends"));
        }
        let reach = pages.0.checked_mul(page_size).and_then(|bytes| guest_address.checked_add(bytes));
        end = match reach {
            Some(reach) if reach <= MAX_ADDRESS => reach,
            _ => return refuse(FIELD, shown(), format!("an end up to {MAX_ADDRESS:#x}")),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::description::tests::sample;
    use crate::types::PageCount;

    #[test]
    fn each_bound_has_its_refusal() {
        let region = |guest_address, pages| RamRegion { guest_address, pages: PageCount(pages) };
        type Change = Box<dyn Fn(&mut MachineDescription)>;
        let set_ram = |ram: Vec<RamRegion>| -> Change { Box::new(move |machine| machine.ram.clone_from(&ram)) };
        let cases: Vec<(Change, &str)> = vec![
            (set_ram(vec![]), "0, where 1 to 64"),
            (set_ram((0..65).map(|n| region(n << 12, 1)).collect()), "65, where 1 to 64"),
            (set_ram(vec![region(0x800, 1)]), "a start at a multiple of 4096"),
            (set_ram(vec![region(0, 0)]), "at least one page"),
            (set_ram(vec![region(0, 2), region(0x1000, 1)]), "a start from 0x2000"),
            (set_ram(vec![region(0x10000, 1), region(0, 1)]), "a start from 0x11000"),
            (set_ram(vec![region(0, u64::MAX)]), "an end up to"),
            (set_ram(vec![region(0, (1 << 40) + 1)]), "an end up to"),
            (set_ram(vec![region(!0xFFF, 2)]), "an end up to"),
            (Box::new(|machine| machine.vcpus = 0), "the number of vCPUs is 0"),
            (Box::new(|machine| machine.vcpus = 1025), "the number of vCPUs is 1025"),
            (Box::new(|machine| machine.page_size = 0), "the page size is 0"),
            (Box::new(|machine| machine.page_size = 12288), "the page size is 12288"),
            (Box::new(|machine| machine.msrs = vec![2, 1]), "0x2 before 0x1"),
            (Box::new(|machine| machine.msrs = vec![2, 2]), "ascending order"),
            (Box::new(|machine| machine.msrs = (0..5000).collect()), "5000, where 0 to 4096"),
            (Box::new(|machine| machine.cpuid = vec![machine.cpuid[0]; 2]), "leaf 0x1.0 twice"),
            (Box::new(|machine| machine.cpuid = vec![machine.cpuid[0]; 1025]), "1025, where 0 to 1024"),
            (Box::new(|machine| machine.devices = vec!["x".to_owned(); 65]), "65, where 0 to 64"),
            (Box::new(|machine| machine.devices = vec!["x".repeat(65)]), "a device's name"),
            (Box::new(|machine| machine.devices = vec!["\u{1b}[2J".to_owned()]), "printable"),
            (Box::new(|machine| machine.architecture.clear()), "the architecture is \"\""),
        ];
        sample().check_bounds().unwrap();
        for (change, expected) in cases {
            let mut machine = sample();
            change(&mut machine);
            let error = machine.check_bounds().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains('\u{1b}'), "control characters are escaped");
        }
    }

    #[test]
    fn regions_may_touch() {
        let mut machine = sample();
        machine.ram = vec![
            RamRegion { guest_address: 0, pages: PageCount(1) },
            RamRegion { guest_address: 4096, pages: PageCount((1 << 40) - 1) },
        ];
        machine.check_bounds().unwrap();
    }
}
