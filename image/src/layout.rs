//! Where what lies in an image, and its header.
//!
//! ```text
//! 0            header: one block of 4096 bytes
//! 0x1000       memory: page N at 0x1000 + N × 4096 (holes where pages are zero); or, packed, chunks without gaps
//! + memory     sections: description, state and so on
//! + sections   bitmap: a bit for each page that is not zero; of an increment, a second one: for each page that it says anything of
//! + bitmap     index: 48 bytes for each chunk of 256 pages
//! ```

use std::path::Path;

use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageIndex};

use crate::error::ImageError;

/// What an image begins with. Not text, and damaged by whoever converts line ends.
pub const MAGIC: [u8; 8] = *b"\x93SWOVI\r\n";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Bytes of the header's block.
pub const HEADER_LEN: usize = PAGE_SIZE;
/// Where memory begins.
pub const MEMORY_OFFSET: u64 = HEADER_LEN as u64;
/// Pages in a chunk, which is what is hashed and compressed at a time: 1 MiB. Large enough for disks and for LZ4, small enough
/// that whoever needs one page does not wait long for its chunk.
pub const CHUNK_PAGES: usize = 256;
/// Bytes of a chunk.
pub const CHUNK_LEN: usize = CHUNK_PAGES * PAGE_SIZE;
/// Bytes of a chunk's entry in the index.
pub const INDEX_ENTRY: usize = 48;
/// The most pages that an image has: 16 TiB, which bounds its tables.
pub const MOST_PAGES: u64 = 1 << 32;
/// The most bytes of all sections together: the largest state that a session sends, and as much for all others.
pub const MOST_SECTIONS: usize = 2 * switchover_wire::message::MAX_MESSAGE;
/// Feature bit: memory is not in place, but packed chunk by chunk, each compressed where that pays.
pub const PACKED: u64 = 1;

/// Feature bit: the image holds the differences to another one, its base.
pub const INCREMENT: u64 = 2;

const KNOWN_FEATURES: u64 = PACKED | INCREMENT;
const PAGE_SIZE_U32: u32 = 4096;
const _: () = assert!(PAGE_SIZE_U32 as usize == PAGE_SIZE);

/// Where the root hash is in the header.
pub const ROOT_AT: usize = 56;
const FIELDS_END: usize = ROOT_AT + blake3::OUT_LEN;

/// A header that fits together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Feature bits.
    pub features: u64,
    /// Pages of guest memory.
    pub pages: u64,
    /// Bytes of the file that memory takes, holes included.
    pub memory_len: u64,
    /// Bytes of all sections.
    pub sections_len: u64,
    /// The root hash: of the header with zeros in its place, sections, bitmap and index.
    pub root: [u8; blake3::OUT_LEN],
}

impl Header {
    /// Whether memory is packed.
    #[must_use]
    pub const fn is_packed(&self) -> bool {
        self.features & PACKED != 0
    }

    /// Whether it holds differences to another image.
    #[must_use]
    pub const fn is_increment(&self) -> bool {
        self.features & INCREMENT != 0
    }

    /// How many chunks memory has.
    #[must_use]
    pub const fn chunks(&self) -> u64 {
        self.pages.div_ceil(CHUNK_PAGES as u64)
    }

    /// Where the sections begin.
    #[must_use]
    pub const fn sections_at(&self) -> u64 {
        MEMORY_OFFSET.saturating_add(self.memory_len)
    }

    /// Where the bitmap begins.
    #[must_use]
    pub const fn bitmap_at(&self) -> u64 {
        self.sections_at().saturating_add(self.sections_len)
    }

    /// Bytes of the bitmap, or of both: words of 64 pages.
    #[must_use]
    pub const fn bitmap_len(&self) -> u64 {
        let one = self.pages.div_ceil(64) * 8;
        if self.is_increment() { 2 * one } else { one }
    }

    /// Where the index begins.
    #[must_use]
    pub const fn index_at(&self) -> u64 {
        self.bitmap_at().saturating_add(self.bitmap_len())
    }

    /// Bytes of the index.
    #[must_use]
    pub const fn index_len(&self) -> u64 {
        self.chunks() * INDEX_ENTRY as u64
    }

    /// Bytes of the whole file.
    #[must_use]
    pub const fn file_len(&self) -> u64 {
        self.index_at().saturating_add(self.index_len())
    }

    /// The header's block.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut block = [0; HEADER_LEN];
        let fields = MAGIC.into_iter().chain(VERSION.to_le_bytes()).chain(PAGE_SIZE_U32.to_le_bytes());
        let numbers = [self.features, self.pages, self.memory_len, self.sections_len, self.file_len()];
        let fields = fields.chain(numbers.into_iter().flat_map(u64::to_le_bytes)).chain(self.root);
        for (to, from) in block.iter_mut().zip(fields) {
            *to = from;
        }
        block
    }

    /// Reads a header's block, of the file `path` with `file_len` bytes.
    ///
    /// # Errors
    /// When it is none, or of another version, or does not fit together, or the file is not as long as it says.
    pub fn decode(block: &[u8; HEADER_LEN], path: &Path, file_len: u64) -> Result<Self, ImageError> {
        if block[..8] != MAGIC {
            return Err(ImageError::Foreign { path: path.to_owned() });
        }
        let found = u32_at(block, 8);
        if found != VERSION {
            return Err(ImageError::Version { path: path.to_owned(), found, known: VERSION });
        }
        let field = |offset: u64, what: &str, got: u64, allowed: String| ImageError::Field {
            path: path.to_owned(),
            offset,
            what: what.to_owned(),
            got: got.to_string(),
            allowed,
        };
        let page_size = u32_at(block, 12);
        if page_size != PAGE_SIZE_U32 {
            return Err(field(12, "the page size", page_size.into(), PAGE_SIZE.to_string()));
        }
        let mut root = [0; blake3::OUT_LEN];
        root.copy_from_slice(&block[ROOT_AT..FIELDS_END]);
        let header = Self {
            features: u64_at(block, 16),
            pages: u64_at(block, 24),
            memory_len: u64_at(block, 32),
            sections_len: u64_at(block, 40),
            root,
        };
        if header.features & !KNOWN_FEATURES != 0 {
            let bits = header.features & !KNOWN_FEATURES;
            return Err(ImageError::Features { path: path.to_owned(), bits });
        }
        if !(1..=MOST_PAGES).contains(&header.pages) {
            return Err(field(24, "the number of pages", header.pages, format!("1 to {MOST_PAGES}")));
        }
        let whole = header.pages * PAGE_SIZE_U64;
        let fits = if header.is_packed() { header.memory_len <= whole } else { header.memory_len == whole };
        if !fits {
            let allowed = format!("{}{whole}", if header.is_packed() { "at most " } else { "" });
            return Err(field(32, "the length of memory", header.memory_len, allowed));
        }
        if header.sections_len > MOST_SECTIONS as u64 {
            return Err(field(
                40,
                "the length of the sections",
                header.sections_len,
                format!("at most {MOST_SECTIONS}"),
            ));
        }
        let said = u64_at(block, 48);
        if said != header.file_len() {
            return Err(field(
                48,
                "the length of the file",
                said,
                format!("{}, the sum of its parts,", header.file_len()),
            ));
        }
        if file_len != said {
            return Err(ImageError::Length { path: path.to_owned(), have: file_len, wanted: said });
        }
        if let Some(at) = block[FIELDS_END..].iter().position(|byte| *byte != 0) {
            let at = FIELDS_END + at;
            return Err(field(at as u64, "a byte behind the header's fields", block[at].into(), "0".to_owned()));
        }
        Ok(header)
    }

    /// What [`Self::root`] must be, of an image with these tables.
    #[must_use]
    pub fn root_of(&self, sections: &[u8], bitmap: &[u8], index: &[u8]) -> [u8; blake3::OUT_LEN] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&Self { root: [0; blake3::OUT_LEN], ..*self }.encode());
        hasher.update(sections).update(bitmap).update(index);
        *hasher.finalize().as_bytes()
    }
}

/// Where `page` lies in an image whose memory is in place.
#[must_use]
pub const fn place_of(page: PageIndex) -> u64 {
    MEMORY_OFFSET + page.offset()
}

fn u32_at(block: &[u8; HEADER_LEN], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&block[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn u64_at(block: &[u8; HEADER_LEN], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header { features: 0, pages: 300, memory_len: 300 * PAGE_SIZE_U64, sections_len: 70, root: [7; 32] }
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let (path, packed) = (Path::new("an.image"), Header { features: PACKED, memory_len: 99, ..header() });
        for header in [header(), packed] {
            assert_eq!(Header::decode(&header.encode(), path, header.file_len()).unwrap(), header);
        }
        assert_eq!(header().file_len(), 4096 + 300 * 4096 + 70 + 40 + 2 * 48);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let path = Path::new("an.image");
        for (at, byte, told) in [
            (0, 1, "no image of a guest"),
            (8, 2, "an image of version 2"),
            (12, 1, "at byte 0xc, the page size is 4097"),
            (16, 2, "the length of the file is"),
            (23, 0x80, "needs the features 0x8000000000000000"),
            (31, 9, "at byte 0x18, the number of pages is"),
            (38, 1, "at byte 0x20, the length of memory is"),
            (44, 1, "at byte 0x28, the length of the sections is"),
            (54, 1, "at byte 0x30, the length of the file is"),
            (200, 1, "at byte 0xc8, a byte behind the header's fields is 1"),
        ] {
            let mut block = header().encode();
            block[at] = byte;
            let error = Header::decode(&block, path, header().file_len()).unwrap_err().to_string();
            assert!(error.starts_with("an.image ") && error.contains(told), "{error}");
        }
        let error = Header::decode(&header().encode(), path, 5000).unwrap_err().to_string();
        assert!(error.contains("has 5000 bytes"), "{error}");
    }
}
