//! The zstd frames that hold a page: which they are, told from their first bytes (RFC 8878, section 3.1.1).

use super::Page;

/// Magic number; a descriptor that says "a single segment, its size in two bytes, no checksum, no dictionary"; the size
/// less 256, as the format has it. A single segment's window is its size, so the decoder needs no more than a page.
const HEADER: [u8; 7] = [0x28, 0xB5, 0x2F, 0xFD, 0x60, 0x00, 0x0F];

const BLOCK_HEADER: usize = 3;

/// The shortest that holds a page: one byte, repeated.
pub(super) const SHORTEST: usize = HEADER.len() + BLOCK_HEADER + 1;

const RAW_BLOCK: u32 = 0;
const REPEATED_BLOCK: u32 = 1;
const COMPRESSED_BLOCK: u32 = 2;

/// Whether `body` begins as one frame that says that it holds a page, of one block that ends where `body` does. More
/// blocks or frames could make a decoder work far longer than a page is worth.
pub(super) fn check(body: &[u8]) -> Result<(), &'static str> {
    let block = body.strip_prefix(&HEADER).ok_or("its frame header is not that of one page")?;
    let (&[low, middle, high], rest) = block.split_first_chunk().ok_or("its block header is cut off")?;
    let header = u32::from_le_bytes([low, middle, high, 0]);
    if header & 1 == 0 {
        return Err("it has more than one block");
    }
    let size = (header >> 3) as usize;
    let fits = match header >> 1 & 3 {
        RAW_BLOCK => size == size_of::<Page>() && rest.len() == size,
        REPEATED_BLOCK => size == size_of::<Page>() && rest.len() == 1,
        COMPRESSED_BLOCK => rest.len() == size,
        _ => return Err("its block is of a reserved type"),
    };
    if fits { Ok(()) } else { Err("its block is not as long as it says") }
}
