//! What can go wrong with an image.

use std::io;
use std::path::{Path, PathBuf};

use switchover_wire::types::PageIndex;
use thiserror::Error;

/// An image could not be written, or is not one that can be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file system refused.
    #[error("cannot {attempted} {}: {source}{}", path.display(), advice(source))]
    Io {
        /// What was tried, as an infinitive.
        attempted: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A name that no image can be written to.
    #[error("cannot write an image to {}: {why}; name a file that is an image already, or is not there yet", path.display())]
    Place {
        /// The name.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// Images that are no series.
    #[error("{} cannot be taken out of the series: {why}", path.display())]
    Series {
        /// The image that was to be taken out.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// Guest memory could not be read or written.
    #[error("cannot {attempted} guest memory at {page}: {source}{}", advice(source))]
    Memory {
        /// "read" or "write".
        attempted: &'static str,
        /// Where.
        page: PageIndex,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another kind of file.
    #[error("{} is no image of a guest: it does not begin with the magic number of one", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// Of another version.
    #[error(
        "{} is an image of version {found}, and this build reads version {known}: use a switchover that is as new as the one \
         that wrote it", path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The one that would do.
        known: u32,
    },
    /// Makes use of what this build does not know.
    #[error(
        "{} needs the features {bits:#x}, which this build does not know: use a switchover that is as new as the one that wrote it",
        path.display()
    )]
    Features {
        /// The file.
        path: PathBuf,
        /// The unknown ones.
        bits: u64,
    },
    /// Not as long as it says.
    #[error(
        "{} has {have} bytes where its header says {wanted}: it was cut short or added to; restore it from a copy", path.display()
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        have: u64,
        /// The length that it should have.
        wanted: u64,
    },
    /// A part that makes no sense.
    #[error(
        "{} is damaged: at byte {offset:#x}, {what} is {got}, where {allowed} is allowed; restore it from a copy", path.display()
    )]
    Field {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// Which part.
        what: String,
        /// What is there.
        got: String,
        /// What could be.
        allowed: String,
    },
    /// The header, the sections, the bitmap or the index were changed.
    #[error(
        "{} is damaged: its header and tables (bytes 0 to {header_end:#x} and from {tables:#x} on) have not the root hash that \
         the header says; restore it from a copy", path.display()
    )]
    Root {
        /// The file.
        path: PathBuf,
        /// Where the header ends.
        header_end: u64,
        /// Where the tables begin.
        tables: u64,
    },
    /// Memory was changed.
    #[error(
        "{} is damaged: chunk {chunk} of memory ({first} on), stored at byte {offset:#x}, {reason}; restore the file from a copy",
        path.display()
    )]
    Chunk {
        /// The file.
        path: PathBuf,
        /// Which chunk, counted from 0.
        chunk: u64,
        /// Its first page.
        first: PageIndex,
        /// Where it is stored.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// The image that it is an increment on is not there, or cannot be used.
    #[error("{} holds the differences to {}, which it cannot be restored without: {source}", path.display(), base.display())]
    Base {
        /// The file.
        path: PathBuf,
        /// The one that it is based on.
        base: PathBuf,
        /// What is wrong with that.
        source: Box<ImageError>,
    },
    /// The file that it is based on holds something else now.
    #[error(
        "{} holds the differences to another moment of the guest than the one in {}: that file was replaced; restore it from a copy",
        path.display(), base.display()
    )]
    OtherBase {
        /// The file.
        path: PathBuf,
        /// What bears the name of its base.
        base: PathBuf,
    },
    /// Images upon images without an end.
    #[error("{} is made of more than {most} images, or of itself; merge some of them (`switchover image merge`)", path.display())]
    TooManyLayers {
        /// The file that is one too many.
        path: PathBuf,
        /// The most that are possible.
        most: usize,
    },
    /// Bytes where a zero page has none.
    #[error(
        "{} is damaged: {page} is zero by the bitmap, and there are other bytes in its place at {offset:#x}; restore the file \
         from a copy", path.display()
    )]
    NotZero {
        /// The file.
        path: PathBuf,
        /// The page.
        page: PageIndex,
        /// Where.
        offset: u64,
    },
    /// What should be written does not fit into an image.
    #[error("cannot write an image: {what} has {got} bytes, more than the {most} that an image holds")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// Its size.
        got: usize,
        /// The most.
        most: usize,
    },
    /// Guest memory of a size that images are not made for.
    #[error("cannot write an image of {pages} pages of memory: 1 to {most} are possible")]
    Size {
        /// How many there are.
        pages: u64,
        /// The most that are possible.
        most: u64,
    },
    /// Whoever has the memory cannot tell which pages are written meanwhile.
    #[error("cannot keep track of what the guest writes: {0}")]
    Track(Box<dyn std::error::Error + Send + Sync>),
    /// It was called off.
    #[error("it was cancelled")]
    Cancelled,
}

impl ImageError {
    /// For `map_err` on a call about a file or folder.
    pub(crate) fn io(attempted: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { attempted, path, source }
    }
}

/// What to do about it, where that is clear.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free as much room as the guest has memory that is not zero, or name another disk"
        }
        io::ErrorKind::NotFound => "; does the folder exist?",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; give this user the right to it, or name another folder"
        }
        io::ErrorKind::FileTooLarge => "; the file system or `ulimit -f` allows no file as large as guest memory",
        _ => "",
    }
}
