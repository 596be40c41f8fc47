//! One at a time in a folder of images that are based on each other.
//!
//! Taking an image out of a series rewrites those above it and then removes it. Two that did so at once could each remove what the other
//! has just made its own image stand on.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::error::ImageError;
use crate::partial::folder_of;

/// A folder that nobody else who locks it takes images out of, or merges images in. Ends with it, or with the process.
#[derive(Debug)]
pub struct FolderLock {
    _file: Flock<File>,
    folder: PathBuf,
}

impl FolderLock {
    /// Waits until the folder of `image` is nobody else's.
    ///
    /// # Errors
    /// When there is no such folder, or it cannot be locked.
    pub fn exclusive(image: &Path) -> Result<Self, ImageError> {
        Self::take(image, FlockArg::LockExclusive).map_err(|(error, _)| error)
    }

    /// The same at once, or `None` while somebody else has it.
    ///
    /// # Errors
    /// As [`exclusive`](Self::exclusive).
    pub fn try_exclusive(image: &Path) -> Result<Option<Self>, ImageError> {
        Self::at_once(image, FlockArg::LockExclusiveNonblock)
    }

    /// Waits until nobody changes what is in the folder of `image`: it stays so, for everybody who only wants that.
    ///
    /// # Errors
    /// As [`exclusive`](Self::exclusive).
    pub fn shared(image: &Path) -> Result<Self, ImageError> {
        Self::take(image, FlockArg::LockShared).map_err(|(error, _)| error)
    }

    /// The same at once, or `None` while somebody changes something there.
    ///
    /// # Errors
    /// As [`exclusive`](Self::exclusive).
    pub fn try_shared(image: &Path) -> Result<Option<Self>, ImageError> {
        Self::at_once(image, FlockArg::LockSharedNonblock)
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn at_once(image: &Path, how: FlockArg) -> Result<Option<Self>, ImageError> {
        match Self::take(image, how) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, Some(Errno::EWOULDBLOCK))) => Ok(None),
            Err((error, _)) => Err(error),
        }
    }

    /// On failure with what the lock itself was refused for.
    fn take(image: &Path, how: FlockArg) -> Result<Self, (ImageError, Option<Errno>)> {
        let folder = folder_of(image);
        let opened = File::open(folder).map_err(|error| (ImageError::io("open the folder", folder)(error), None))?;
        let file = Flock::lock(opened, how)
            .map_err(|(_, errno)| (ImageError::io("lock", folder)(errno.into()), Some(errno)))?;
        Ok(Self { _file: file, folder: folder.to_owned() })
    }
}

/// Whether both names lead to one file, whatever they look like.
pub(crate) fn is_one_file(one: &Path, other: &Path) -> bool {
    let known = |path| fs::metadata(path).map(|known| (known.dev(), known.ino())).ok();
    known(one).is_some_and(|one| known(other) == Some(one))
}
