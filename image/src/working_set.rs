//! The pages that a guest touched first when it was restored from an image, in that order: a small file beside the image, so that
//! the next restore brings them before the guest asks.
//!
//! ```text
//! 0      magic, version, number of entries       16 bytes
//! 16     the image's root hash                   32
//! 48     an entry a page: its number (4), the first 16 bytes of the BLAKE3 hash of what the image holds of it
//! + 20 × entries   BLAKE3 hash of all before it  32
//! ```
//!
//! An image vouches for whole chunks. With a page's own hash beside it, a page can be read and checked by itself. The hashes are
//! taken from chunks that were compared with theirs, and the file's own hash tells when it was damaged since. It is advice: whatever
//! is wrong with it, the image alone suffices.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use switchover_wire::types::{PAGE_SIZE, PageIndex};
use thiserror::Error;

use crate::error::ImageError;
use crate::layout::CHUNK_PAGES;
use crate::partial::Partial;
use crate::reader::Image;

/// What a file of a working set begins with.
pub const MAGIC: [u8; 8] = *b"\x93SWOVW\r\n";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Bytes before the entries.
pub const HEADER_LEN: usize = 48;
/// Bytes of an entry.
pub const ENTRY_LEN: usize = 20;
/// The most pages that one holds: 512 MiB of guest memory, 2.5 MiB of file. Of more, what comes first is kept.
pub const MOST_PAGES: usize = 1 << 17;

const HASH: usize = blake3::OUT_LEN;

/// The part of a page's BLAKE3 hash that is kept.
pub type PageHash = [u8; 16];

/// A file of a working set is none, or not this image's.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum WorkingSetError {
    /// Another kind of file.
    #[error("it does not begin as a working set does")]
    Foreign,
    /// Another version.
    #[error("it is of version {0}, and this program reads version {VERSION}")]
    Version(u32),
    /// Cut short, or added to.
    #[error("it has {have} bytes where its {entries} pages need {wanted}")]
    Length {
        /// Pages that it says it has.
        entries: u32,
        /// Bytes of the file.
        have: usize,
        /// Bytes that so many pages need.
        wanted: usize,
    },
    /// More pages than are ever written.
    #[error("it says that it has {0} pages, and at most {MOST_PAGES} are written")]
    TooMany(u32),
    /// Altered.
    #[error("it has not the hash that it ends with")]
    Altered,
    /// Recorded with another image, or an earlier one of this name.
    #[error("it was recorded with another image")]
    OtherImage,
    /// A page that the image does not hold, or one that is there twice.
    #[error("entry {entry} is {page}, which the image does not hold or which was there before")]
    Page {
        /// The entry, from 0.
        entry: usize,
        /// What it names.
        page: PageIndex,
    },
}

/// A recorded page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recorded {
    /// Which.
    pub page: PageIndex,
    /// Of its bytes in the image.
    pub hash: PageHash,
}

/// A working set: pages in the order in which they were first touched, none of them twice.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct WorkingSet {
    pages: Vec<Recorded>,
}

impl WorkingSet {
    /// Where that of the image `path` is kept: beside it, under its name with `.working-set` behind it.
    #[must_use]
    pub fn path_beside(path: &Path) -> PathBuf {
        let mut name = OsString::from(path);
        name.push(".working-set");
        name.into()
    }

    /// That which is kept beside `image`, if there is one. One that is damaged or another image's is none, and a warning says so.
    #[must_use]
    pub fn beside(image: &Image) -> Option<Self> {
        let path = Self::path_beside(image.path());
        let read = || -> io::Result<Vec<u8>> {
            // No more than the largest, whatever lies there: a byte more tells that it is too long.
            let most = HEADER_LEN + MOST_PAGES * ENTRY_LEN + HASH + 1;
            let mut bytes = Vec::new();
            // Looked at first: whoever opens a pipe waits for its writer.
            if !fs::metadata(&path)?.is_file() {
                return Err(io::Error::other("it is no regular file"));
            }
            File::open(&path)?.take(most as u64).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let ignored = |reason: String| tracing::warn!(path = %path.display(), reason, "the working set is not used");
        match read() {
            Ok(bytes) => Self::decode(&bytes, image).map_err(|error| ignored(error.to_string())).ok(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                ignored(error.to_string());
                None
            }
        }
    }

    /// Its pages.
    #[must_use]
    pub fn pages(&self) -> &[Recorded] {
        &self.pages
    }

    /// Takes up the pages of `touched` that it does not have, behind those that it has, with what `image` holds of them; of pages
    /// that it does not hold, none. Reads and compares each of their chunks. Says how many it took up.
    ///
    /// # Errors
    /// When a chunk cannot be read, or is damaged. Nothing has changed then.
    pub fn merge(&mut self, touched: &[PageIndex], image: &Image) -> Result<usize, ImageError> {
        let mut known: HashSet<u64> = self.pages.iter().map(|recorded| recorded.page.0).collect();
        let room = MOST_PAGES.saturating_sub(self.pages.len());
        let new = touched.iter().filter(|page| image.holds(**page) && known.insert(page.0)).take(room);
        let mut new: Vec<_> = new.map(|page| Recorded { page: *page, hash: PageHash::default() }).collect();
        // Chunk by chunk, and back into the order in which they came.
        let mut by_chunk: Vec<usize> = (0..new.len()).collect();
        by_chunk.sort_unstable_by_key(|at| new[*at].page.0);
        let mut reader = image.reader()?;
        let chunk_of = |at: &usize, new: &[Recorded]| new[*at].page.0 / CHUNK_PAGES as u64;
        let mut rest = &by_chunk[..];
        while let Some(first) = rest.first() {
            let chunk = chunk_of(first, &new);
            let count = rest.iter().take_while(|at| chunk_of(at, &new) == chunk).count();
            let (own, behind) = rest.split_at(count);
            let read = reader.read(chunk)?;
            for at in own {
                if let Some(bytes) = read.page(new[*at].page) {
                    new[*at].hash = page_hash(bytes);
                }
            }
            rest = behind;
        }
        let count = new.len();
        self.pages.append(&mut new);
        Ok(count)
    }

    /// Its file's bytes, beside `image`.
    #[must_use]
    pub fn encode(&self, image: &Image) -> Vec<u8> {
        // As many as `MOST_PAGES`, which fits.
        let entries = u32::try_from(self.pages.len()).unwrap_or(0);
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.pages.len() * ENTRY_LEN + HASH);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        bytes.extend(image.header().root);
        for recorded in &self.pages {
            // An image has at most 2³² pages.
            bytes.extend(u32::try_from(recorded.page.0).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend(recorded.hash);
        }
        let hash = *blake3::hash(&bytes).as_bytes();
        bytes.extend(hash);
        bytes
    }

    /// Reads one of `image`.
    ///
    /// # Errors
    /// When it is none, or not whole, or another image's.
    pub fn decode(bytes: &[u8], image: &Image) -> Result<Self, WorkingSetError> {
        let header = bytes.first_chunk::<HEADER_LEN>().filter(|header| header.starts_with(&MAGIC));
        let header = header.ok_or(WorkingSetError::Foreign)?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (version, entries) = (word(8), word(12));
        if version != VERSION {
            return Err(WorkingSetError::Version(version));
        }
        let count = usize::try_from(entries).ok().filter(|count| *count <= MOST_PAGES);
        let count = count.ok_or(WorkingSetError::TooMany(entries))?;
        let wanted = HEADER_LEN + count * ENTRY_LEN + HASH;
        if bytes.len() != wanted {
            return Err(WorkingSetError::Length { entries, have: bytes.len(), wanted });
        }
        let (body, hash) = bytes.split_at(wanted - HASH);
        if blake3::hash(body).as_bytes()[..] != *hash {
            return Err(WorkingSetError::Altered);
        }
        if header[16..] != image.header().root {
            return Err(WorkingSetError::OtherImage);
        }
        let (mut pages, mut seen) = (Vec::with_capacity(count), HashSet::with_capacity(count));
        for (entry, bytes) in body[HEADER_LEN..].as_chunks::<ENTRY_LEN>().0.iter().enumerate() {
            let page = PageIndex(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).into());
            if !image.holds(page) || !seen.insert(page.0) {
                return Err(WorkingSetError::Page { entry, page });
            }
            let mut hash = PageHash::default();
            hash.copy_from_slice(&bytes[4..]);
            pages.push(Recorded { page, hash });
        }
        Ok(Self { pages })
    }

    /// Keeps it beside `image`, in place of what was there: under a temporary name first, and made durable.
    ///
    /// # Errors
    /// When the file system refuses. What was there before is whole then.
    pub fn keep(&self, image: &Image) -> Result<(), ImageError> {
        let path = Self::path_beside(image.path());
        let partial = Partial::create(&path)?;
        partial.file().write_all(&self.encode(image)).map_err(ImageError::io("write", partial.path()))?;
        partial.keep()
    }
}

/// The part of a page's hash that is recorded.
#[must_use]
pub fn page_hash(bytes: &[u8; PAGE_SIZE]) -> PageHash {
    let mut hash = PageHash::default();
    hash.copy_from_slice(&blake3::hash(bytes).as_bytes()[..size_of::<PageHash>()]);
    hash
}
