//! Names of files, for other processes.

use std::path::{Path, PathBuf};

/// `path` as it reads from any folder: the machine that is told of it runs in its own. Nothing is looked up.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    // It fails where the path is empty or this process's folder is gone: whoever uses the path will say so.
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
