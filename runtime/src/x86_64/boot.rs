//! A direct start of a kernel by the PVH protocol: 32-bit protected mode, paging off, boot information in memory, its
//! address in EBX.
//!
//! The protocol: Xen's `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`. QEMU's `-kernel` does the
//! same, so a guest cannot tell the two apart by its command line or modules.

use std::io::Cursor;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use switchover_wire::types::PAGE_SIZE_U64;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::elf::{self, ElfError, Segment};
use super::layout;
use crate::memory::GuestMemory;

/// Why a kernel cannot be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// The file.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// It wants to lie where there is no RAM.
    #[error(
        "its segment of {size} bytes at {address:#x} does not fit in the guest's RAM, which ends at {ram_end:#x}: give the \
         guest more memory"
    )]
    DoesNotFit {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
        /// Where RAM ends.
        ram_end: u64,
    },
    /// It wants to lie where the boot information does.
    #[error(
        "its segment of {size} bytes at {address:#x} overlaps the boot information at {:#x}..{:#x}: link it at 1 MiB or above",
        layout::BOOT_INFORMATION.start, layout::BOOT_INFORMATION.end
    )]
    Overlaps {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// The command line is too long.
    #[error("the command line has {length} bytes, there is room for {}", layout::COMMAND_LINE_ROOM - 1)]
    CommandLineTooLong {
        /// Its length.
        length: u64,
    },
    /// The command line would end early.
    #[error("the command line has a zero byte in it, at which the guest would take it to end")]
    CommandLineZero,
    /// The initial RAM disk has no place.
    #[error(
        "the initrd of {size} bytes does not fit between the kernel, which ends at {kernel_end:#x}, and {limit:#x}"
    )]
    InitrdDoesNotFit {
        /// Its size.
        size: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// Where the RAM that it may occupy ends.
        limit: u64,
    },
    /// The loader found something that the inspection did not.
    #[error("it cannot be loaded: {0}")]
    Load(String),
}

/// Magic of `hvm_start_info`: "xEn3" with the highest bit of the E set.
const START_MAGIC: u32 = 0x336e_c578;
/// With a memory map.
const START_VERSION: u32 = 1;
const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

/// Loads a kernel, its command line and its initial RAM disk. Answers where to start.
///
/// # Errors
/// When the file is no bootable kernel, or something does not fit.
pub fn load(memory: &GuestMemory, kernel: &[u8], append: &str, initrd: Option<&[u8]>) -> Result<u32, BootError> {
    let image = elf::inspect(kernel)?;
    for segment in &image.segments {
        check_place(memory, *segment)?;
    }
    let kernel_end = image.segments.iter().map(|segment| segment.address + segment.size).max().unwrap_or(0);
    let load = |error: &dyn std::fmt::Display| BootError::Load(error.to_string());
    Elf::load(memory.mapped(), None, &mut Cursor::new(kernel), None).map_err(|error| load(&error))?;

    let length = append.len() as u64;
    if length >= layout::COMMAND_LINE_ROOM {
        return Err(BootError::CommandLineTooLong { length });
    }
    if append.contains('\0') {
        return Err(BootError::CommandLineZero);
    }
    let line = [append.as_bytes(), &[0]].concat();
    memory.mapped().write_slice(&line, GuestAddress(layout::COMMAND_LINE)).map_err(|error| load(&error))?;

    let module = initrd.map(|initrd| place_initrd(memory, initrd, kernel_end)).transpose()?;
    let map = memory_map(memory);
    let start_info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        cmdline_paddr: layout::COMMAND_LINE,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: if module.is_some() { layout::MODULES } else { 0 },
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    let mut parameters = BootParams::new(&start_info, GuestAddress(layout::START_INFO));
    parameters.set_sections(&map, GuestAddress(layout::MEMORY_MAP));
    if let Some(module) = module {
        parameters.set_modules(&[module], GuestAddress(layout::MODULES));
    }
    PvhBootConfigurator::write_bootparams(&parameters, memory.mapped()).map_err(|error| load(&error))?;
    Ok(image.entry)
}

fn check_place(memory: &GuestMemory, Segment { address, size }: Segment) -> Result<(), BootError> {
    if !memory.holds(address, size) {
        return Err(BootError::DoesNotFit { address, size, ram_end: memory.end() });
    }
    if address < layout::BOOT_INFORMATION.end && address + size > layout::BOOT_INFORMATION.start {
        return Err(BootError::Overlaps { address, size });
    }
    Ok(())
}

/// As high as the guest can use it, out of the way of a kernel that unpacks itself.
fn place_initrd(memory: &GuestMemory, initrd: &[u8], kernel_end: u64) -> Result<hvm_modlist_entry, BootError> {
    let low_end = memory.regions().first().map_or(0, |region| region.pages.bytes());
    let limit = low_end.min(layout::INITRD_END_MAX);
    let size = initrd.len() as u64;
    let no_room = BootError::InitrdDoesNotFit { size, kernel_end, limit };
    let address = match limit.checked_sub(size) {
        Some(address) => address / PAGE_SIZE_U64 * PAGE_SIZE_U64,
        None => return Err(no_room),
    };
    if address < kernel_end.max(layout::EXTENDED_START) {
        return Err(no_room);
    }
    memory.mapped().write_slice(initrd, GuestAddress(address)).map_err(|error| BootError::Load(error.to_string()))?;
    Ok(hvm_modlist_entry { paddr: address, size, ..Default::default() })
}

fn memory_map(memory: &GuestMemory) -> Vec<hvm_memmap_table_entry> {
    let entry =
        |start: u64, end: u64, type_| hvm_memmap_table_entry { addr: start, size: end - start, type_, reserved: 0 };
    let mut map = vec![
        entry(0, layout::CONVENTIONAL_END, MAP_RAM),
        entry(layout::CONVENTIONAL_END, layout::EXTENDED_START, MAP_RESERVED),
        entry(layout::KVM_PAGES.start, layout::KVM_PAGES.end, MAP_RESERVED),
    ];
    for region in memory.regions() {
        let start = region.guest_address.max(layout::EXTENDED_START);
        map.push(entry(start, region.guest_address + region.pages.bytes(), MAP_RAM));
    }
    map.sort_by_key(|entry| entry.addr);
    map
}
