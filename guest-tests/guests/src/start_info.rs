//! What the loader tells: the command line and the memory map, by the PVH boot protocol
//! (Xen, `xen/include/public/arch-x86/hvm/start_info.h`).

use core::sync::atomic::Ordering::SeqCst;

use crate::cpu::{MAPPED, START_INFO};

/// The start of `hvm_start_info`, version 1.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// An entry of the memory map.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

/// Longer command lines and memory maps are refused: the loader's page would be broken.
pub const COMMAND_LINE_MAX: usize = 4096;
const ENTRIES_MAX: u32 = 128;

/// The loader's information. It lies in ordinary memory that nothing reserves: all of it is read before any memory
/// beyond the image is written.
pub struct StartInfo(Header);

impl StartInfo {
    /// Finds it.
    ///
    /// # Errors
    /// A sentence, where the loader did not keep to the protocol.
    pub fn find() -> Result<Self, &'static str> {
        let address = u64::from(START_INFO.load(SeqCst));
        // SAFETY: the address is what the loader passed in ebx, below 4 GiB and hence mapped; any bytes are a valid
        // `Header`, and nothing writes there yet.
        let header = unsafe { read::<Header>(address) };
        if header.magic != MAGIC {
            return Err("the loader passed no hvm_start_info in ebx");
        }
        if header.version < 1 || header.memory_map_entries == 0 {
            return Err("the loader passed no memory map (hvm_start_info version 1 has one)");
        }
        if header.memory_map_entries > ENTRIES_MAX
            || header.memory_map > MAPPED - u64::from(ENTRIES_MAX) * size_of::<Entry>() as u64
            || header.command_line > MAPPED - COMMAND_LINE_MAX as u64
        {
            return Err("the loader's hvm_start_info points beyond what is mapped, or its memory map is too long");
        }
        Ok(Self(header))
    }

    /// Copies the command line into `buffer`.
    ///
    /// # Errors
    /// A sentence, where it is longer than that.
    pub fn command_line<'a>(&self, buffer: &'a mut [u8; COMMAND_LINE_MAX]) -> Result<&'a [u8], &'static str> {
        if self.0.command_line == 0 {
            return Ok(&[]);
        }
        for (at, byte) in (self.0.command_line..).zip(buffer.iter_mut()) {
            // SAFETY: `find` has checked that so many bytes from there on are mapped; nothing writes there yet.
            *byte = unsafe { read(at) };
            if *byte == 0 {
                break;
            }
        }
        let length = buffer.iter().position(|&b| b == 0).ok_or("the command line is longer than 4095 bytes")?;
        Ok(&buffer[..length])
    }

    /// Start and end of each region of RAM, as far as it is mapped.
    pub fn ram(&self) -> impl Iterator<Item = (u64, u64)> {
        let first = self.0.memory_map;
        (0..u64::from(self.0.memory_map_entries))
            // SAFETY: `find` has checked that so many entries are mapped; nothing writes there yet.
            .map(move |i| unsafe { read::<Entry>(first + i * size_of::<Entry>() as u64) })
            .filter(|entry| entry.kind == RAM)
            .map(|entry| (entry.address, entry.address.saturating_add(entry.size).min(MAPPED)))
    }
}

/// Reads a value from a physical address.
///
/// # Safety
/// The bytes must be mapped, be a valid `T`, and not be written meanwhile.
unsafe fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the caller's promise. The address may be 0, which `read_volatile` does not mind for mapped memory outside
    // of any Rust allocation; alignment is not assumed, hence the packed wrapper.
    unsafe {
        #[repr(C, packed)]
        struct Unaligned<T>(T);
        core::ptr::with_exposed_provenance::<Unaligned<T>>(usize::try_from(address).unwrap_or(0)).read_volatile().0
    }
}
