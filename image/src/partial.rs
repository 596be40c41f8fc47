//! A file that appears under its name when it is whole.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::error::ImageError;

/// Guest memory is its owner's business: passwords and keys are in it.
const MODE: u32 = 0o600;

/// A file under a temporary name. It is removed unless it is [kept](Self::keep).
#[derive(Debug)]
pub(crate) struct Partial {
    file: File,
    path: PathBuf,
    target: PathBuf,
    folder: PathBuf,
    kept: bool,
}

impl Partial {
    /// A new file in the folder of `target`.
    pub(crate) fn create(target: &Path) -> Result<Self, ImageError> {
        // Of a symbolic link, what it leads to is replaced.
        let target = fs::canonicalize(target).unwrap_or_else(|_| target.to_owned());
        let place = |why| ImageError::Place { path: target.clone(), why };
        if fs::metadata(&target).is_ok_and(|there| !there.is_file()) {
            return Err(place("what is there is no regular file"));
        }
        let name = target.file_name().ok_or_else(|| place("that is no name of a file"))?;
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let random = getrandom::u64().map_err(|error| {
            let source = io::Error::other(error.to_string());
            ImageError::Io { attempted: "find a temporary name beside", path: target.clone(), source }
        })?;
        let mut partial = std::ffi::OsString::from(".");
        partial.push(name);
        partial.push(format!(".{random:016x}.partial"));
        let (path, folder) = (folder.join(partial), folder.to_owned());
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(MODE).open(&path);
        let file = file.map_err(ImageError::io("create", &path))?;
        Ok(Self { file, path, target, folder, kept: false })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The same file once more, for writes that go past the page cache; `None` where the file system has no such.
    pub(crate) fn open_direct(&self) -> Option<File> {
        OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&self.path).ok()
    }

    /// Gives the file its name, once what is in it would survive the loss of power; so does the name when this is back.
    pub(crate) fn keep(mut self) -> Result<(), ImageError> {
        self.file.sync_data().map_err(ImageError::io("make durable", &self.path))?;
        fs::rename(&self.path, &self.target).map_err(ImageError::io("give its name to", &self.target))?;
        self.kept = true;
        File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(ImageError::io("make durable the name of the image in", &self.folder))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished image is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn what_is_not_kept_leaves_nothing_and_what_is_replaces_what_was() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a.image");
        fs::write(&target, "old").unwrap();
        let partial = Partial::create(&target).unwrap();
        assert_eq!(names(folder.path()).len(), 2);
        drop(partial);
        assert_eq!((names(folder.path()).len(), fs::read(&target).unwrap()), (1, b"old".to_vec()));
        let partial = Partial::create(&target).unwrap();
        partial.file().write_all(b"new").unwrap();
        partial.keep().unwrap();
        assert_eq!((names(folder.path()).len(), fs::read(&target).unwrap()), (1, b"new".to_vec()));
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, MODE);
    }

    #[test]
    fn a_name_that_cannot_be_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let told = |path: &Path| Partial::create(path).unwrap_err().to_string();
        assert!(told(&folder.path().join("none/a.image")).contains("does the folder exist?"));
        assert!(told(folder.path()).contains("no regular file"));
        assert!(told(Path::new("/dev/null")).contains("no regular file"));
    }
}
