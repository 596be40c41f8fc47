//! Is this file a kernel that can be booted? Asked before any of it is loaded, so that the answer names what is wrong.
//!
//! Layouts: System V ABI, "Object Files"; the PVH note: Xen's `xen/include/public/elfnote.h`.

use thiserror::Error;

/// Why a file cannot be booted.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ElfError {
    /// Some other kind of file.
    #[error("it is not an ELF file{hint}")]
    NotElf {
        /// What it may be instead.
        hint: &'static str,
    },
    /// An ELF file for another machine.
    #[error("it is an ELF file, but not a 64-bit little-endian executable for x86-64")]
    WrongKind,
    /// It ends before what its headers announce.
    #[error("the file is truncated: it has {have} bytes, its {what} reaches to byte {needed}")]
    Truncated {
        /// The file's length.
        have: u64,
        /// What does not fit in it.
        what: &'static str,
        /// Where that ends.
        needed: u64,
    },
    /// Its headers contradict themselves.
    #[error("its headers make no sense: {what}")]
    Headers {
        /// Which.
        what: &'static str,
    },
    /// It does not say where to start it.
    #[error(
        "it has no PVH note (type 18, name \"Xen\"): build a Linux kernel with CONFIG_PVH=y, or boot the uncompressed \
         vmlinux"
    )]
    NoPvhNote,
}

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_NAME: &[u8] = b"Xen\0";
/// No kernel has nearly as many.
const MOST_SEGMENTS: u16 = 256;

/// A part of the file that goes to memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Guest-physical address of its first byte.
    pub address: u64,
    /// Bytes in memory; what the file does not fill is zero.
    pub size: u64,
}

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    /// What goes to memory.
    pub segments: Vec<Segment>,
    /// Guest-physical address of the PVH entry point.
    pub entry: u32,
}

/// Looks at the bytes of a file.
///
/// # Errors
/// When it cannot be booted.
pub fn inspect(file: &[u8]) -> Result<Image, ElfError> {
    let file = File(file);
    if !file.0.starts_with(b"\x7fELF") {
        let boots_as_bzimage = file.0.get(0x202..0x206) == Some(b"HdrS");
        let hint = if boots_as_bzimage { ", but a compressed Linux kernel: give its uncompressed vmlinux" } else { "" };
        return Err(ElfError::NotElf { hint });
    }
    file.check_end(0, HEADER as u64, "ELF header")?;
    if file.0.get(4..6) != Some(&[2, 1]) || file.u16(18) != MACHINE_X86_64 {
        return Err(ElfError::WrongKind);
    }
    let (table, entry_size, count) = (file.u64(32), file.u16(54), file.u16(56));
    if usize::from(entry_size) != PROGRAM_HEADER || count == 0 || count > MOST_SEGMENTS || table < HEADER as u64 {
        return Err(ElfError::Headers { what: "the program header table's place, entry size or length" });
    }
    file.check_end(table, u64::from(count) * PROGRAM_HEADER as u64, "program header table")?;

    let mut segments = Vec::new();
    let mut entry = None;
    for index in 0..usize::from(count) {
        let at = usize::try_from(table).unwrap_or(usize::MAX).saturating_add(index * PROGRAM_HEADER);
        let (offset, address) = (file.u64(at + 8), file.u64(at + 24));
        let (in_file, in_memory) = (file.u64(at + 32), file.u64(at + 40));
        match file.u32(at) {
            SEGMENT_LOAD if in_memory > 0 => {
                file.check_end(offset, in_file, "segment")?;
                if in_file > in_memory {
                    return Err(ElfError::Headers { what: "a segment is longer in the file than in memory" });
                }
                segments.push(Segment { address, size: in_memory });
            }
            SEGMENT_NOTE => {
                file.check_end(offset, in_file, "note segment")?;
                entry = entry.or_else(|| file.range(offset, in_file).and_then(pvh_entry));
            }
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err(ElfError::Headers { what: "there is no segment to load" });
    }
    Ok(Image { segments, entry: entry.ok_or(ElfError::NoPvhNote)? })
}

/// Looks for the PVH note among those of a note segment.
fn pvh_entry(notes: &[u8]) -> Option<u32> {
    let notes = File(notes);
    let mut at: usize = 0;
    while at.checked_add(12)? <= notes.0.len() {
        let (name_size, size, kind) = (notes.u32(at), notes.u32(at + 4), notes.u32(at + 8));
        let name = at + 12;
        let contents = name.checked_add(padded(name_size)?)?;
        if kind == NOTE_PHYS32_ENTRY && size >= 4 && notes.0.get(name..name.checked_add(4)?)? == NOTE_NAME {
            return notes.0.get(contents..contents.checked_add(4)?).map(|_| notes.u32(contents));
        }
        at = contents.checked_add(padded(size)?)?;
    }
    None
}

/// Names and contents of notes are padded to 4 bytes.
fn padded(size: u32) -> Option<usize> {
    usize::try_from(size).ok()?.checked_next_multiple_of(4)
}

struct File<'a>(&'a [u8]);

impl<'a> File<'a> {
    fn check_end(&self, offset: u64, length: u64, what: &'static str) -> Result<(), ElfError> {
        let have = self.0.len() as u64;
        match offset.checked_add(length) {
            Some(needed) if needed <= have => Ok(()),
            needed => Err(ElfError::Truncated { have, what, needed: needed.unwrap_or(u64::MAX) }),
        }
    }

    fn range(&self, offset: u64, length: u64) -> Option<&'a [u8]> {
        let start = usize::try_from(offset).ok()?;
        self.0.get(start..start.checked_add(usize::try_from(length).ok()?)?)
    }

    /// The number of `N` bytes at `at`; its callers have checked that it is there.
    fn number<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some(there) = at.checked_add(N).and_then(|end| self.0.get(at..end)) {
            bytes.copy_from_slice(there);
        }
        bytes
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.number(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.number(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.number(at))
    }
}
