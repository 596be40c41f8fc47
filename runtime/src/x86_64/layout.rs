//! Where things are in guest-physical memory.
//!
//! ```text
//! 0            boot information (start info, memory map, command line), then free for the guest
//! 0x9fc00      reserved, as the BIOS data area and ROMs of a PC would be
//! 1 MiB        RAM, up to 3 GiB
//! 3 GiB        nothing, then I/O APIC, KVM's own pages, local APIC
//! 4 GiB        the rest of RAM
//! ```

use switchover_wire::description::RamRegion;
use switchover_wire::types::PageCount;

/// RAM below this address lies at 0; what does not fit continues at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 3 << 30;
/// Where RAM goes on.
pub const HIGH_RAM: u64 = 4 << 30;

/// `hvm_start_info`. The module list follows it in the same page.
pub const START_INFO: u64 = 0x6000;
/// The list of boot modules.
pub const MODULES: u64 = 0x6040;
/// The memory map.
pub const MEMORY_MAP: u64 = 0x7000;
/// The command line, ended by a zero byte.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line, the zero byte included.
pub const COMMAND_LINE_ROOM: u64 = 0x1_0000;
/// What boot information occupies in all. A kernel's segments must stay clear of it.
pub const BOOT_INFORMATION: std::ops::Range<u64> = START_INFO..COMMAND_LINE + COMMAND_LINE_ROOM;

/// Where a PC's conventional memory ends.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Where RAM begins again.
pub const EXTENDED_START: u64 = 0x10_0000;

/// A page that KVM needs on some Intel processors, in a hole where no RAM ever is.
pub const IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three more.
pub const TSS: usize = 0xfeff_d000;
/// Where that hole begins and ends, for the guest's memory map.
pub const KVM_PAGES: std::ops::Range<u64> = 0xfeff_c000..0xff00_0000;

/// Linux wants its initial RAM disk no higher; QEMU puts it no higher either.
pub const INITRD_END_MAX: u64 = 0x3800_0000;

/// The least that a machine can boot with.
pub const LEAST_MEMORY: PageCount = PageCount(512);
/// The most that one can have: 1 TiB, well inside the addresses that every x86-64 processor can form.
pub const MOST_MEMORY: PageCount = PageCount(1 << 28);

/// Lays `pages` out; `None` where that is too little or too much.
#[must_use]
pub fn ram_regions(pages: PageCount) -> Option<Vec<RamRegion>> {
    if pages < LEAST_MEMORY || pages > MOST_MEMORY {
        return None;
    }
    let low = pages.min(PageCount::from_bytes(LOW_RAM_END)?);
    let mut regions = vec![RamRegion { guest_address: 0, pages: low }];
    if pages > low {
        regions.push(RamRegion { guest_address: HIGH_RAM, pages: PageCount(pages.0 - low.0) });
    }
    Some(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_on_behind_the_hole() {
        let small = ram_regions(PageCount(1024)).unwrap();
        assert_eq!(small, [RamRegion { guest_address: 0, pages: PageCount(1024) }]);
        let five_gib = ram_regions(PageCount(5 << 18)).unwrap();
        assert_eq!(five_gib.len(), 2);
        assert_eq!(five_gib[1], RamRegion { guest_address: HIGH_RAM, pages: PageCount(2 << 18) });
        assert_eq!(ram_regions(PageCount(1)), None);
        assert_eq!(ram_regions(PageCount(u64::MAX)), None);
    }
}
