//! A file that appears under its name when it is whole.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::error::ImageError;

/// Guest memory is its owner's business: passwords and keys are in it.
const MODE: u32 = 0o600;

/// A file under a temporary name. It is removed unless it is [kept](Self::keep).
#[derive(Debug)]
pub(crate) struct Partial {
    /// Locked as long as this process lives: who finds it without a lock knows that its writer has gone.
    file: Flock<File>,
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
        let folder = folder_of(&target);
        remove_stale(folder, name);
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
        let locked = Flock::lock(file, FlockArg::LockExclusive);
        let file = locked.map_err(|(_, errno)| ImageError::io("lock", &path)(errno.into()))?;
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
        sync(&self.folder).map_err(ImageError::io("make durable the name of the image in", &self.folder))
    }
}

/// The folder that `path` lies in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes the names in a folder durable.
pub(crate) fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all())
}

/// How long nobody takes a new file for one that was left behind: it is there for a moment before it is locked.
const YOUNG: Duration = Duration::from_secs(2);

/// Removes what writers of the same image have left behind that were killed.
fn remove_stale(folder: &Path, name: &OsStr) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let of_image = |entry: &fs::DirEntry| {
        let file = entry.file_name();
        let middle = file.as_bytes().strip_prefix(b".").and_then(|rest| rest.strip_prefix(name.as_bytes()));
        let random = middle.and_then(|rest| rest.strip_suffix(b".partial")).and_then(|rest| rest.strip_prefix(b"."));
        random.is_some_and(|random| random.len() == 16 && random.iter().all(u8::is_ascii_hexdigit))
    };
    for entry in entries.filter_map(Result::ok).filter(of_image) {
        let path = entry.path();
        let Ok(file) = File::open(&path) else { continue };
        let old = file
            .metadata()
            .and_then(|known| known.modified())
            .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > YOUNG));
        if old && Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok() && fs::remove_file(&path).is_ok() {
            tracing::info!(path = %path.display(), "removed what a writer that was killed had left behind");
        }
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
    fn what_a_killed_writer_has_left_is_removed_and_what_others_write_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a.image");
        let other = Partial::create(&target).unwrap();
        let make = |name: &str| File::create(folder.path().join(name)).unwrap();
        let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
        let old = |file: &File| file.set_modified(hour_ago).unwrap();
        old(other.file());
        old(&make(".a.image.0123456789abcdef.partial"));
        make(".a.image.1123456789abcdef.partial");
        for name in [".b.image.0123456789abcdef.partial", ".a.image.0123.partial", "a.image.0123456789abcdef.partial"] {
            old(&make(name));
        }
        let partial = Partial::create(&target).unwrap();
        let left = names(folder.path());
        assert!(!left.contains(&".a.image.0123456789abcdef.partial".to_owned()), "{left:?}");
        assert_eq!(left.len(), 6, "{left:?}");
        other.keep().unwrap();
        drop(partial);
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
