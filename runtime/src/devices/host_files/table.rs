//! Which files a guest has open.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use super::directory::{Directory, LONGEST_PATH};

/// The first number that is given: those below it are standard input, output and error to most programs.
const FIRST: u32 = 3;
/// As many files a guest may have open.
const MOST: u32 = 256;
/// What is done once, when a guest opens a file, and not again by the side that it moves to.
const ONCE: OFlag = OFlag::O_CREAT.union(OFlag::O_EXCL).union(OFlag::O_TRUNC);

/// The files by their numbers.
#[derive(Debug, Default)]
pub struct OpenFiles(BTreeMap<u32, OpenFile>);

#[derive(Debug)]
struct OpenFile {
    file: File,
    path: String,
    flags: u32,
}

/// The open files of a guest, in a saved state.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SavedHostFiles(Vec<SavedFile>);

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct SavedFile {
    number: u32,
    path: String,
    flags: u32,
    /// Where in it the guest is, in bytes.
    offset: u64,
}

impl OpenFiles {
    /// Opens a file and gives it the lowest free number.
    ///
    /// # Errors
    /// As open(2), `EINVAL` and `EPERM` for what is not for guests, and `EMFILE` where the guest has too many open.
    pub fn open(&mut self, directory: &Directory, path: String, flags: u32, mode: u32) -> Result<u32, Errno> {
        let number = (FIRST..FIRST + MOST).find(|number| !self.0.contains_key(number)).ok_or(Errno::EMFILE)?;
        let file = directory.file(&path, flags, mode)?;
        self.0.insert(number, OpenFile { file, path, flags });
        Ok(number)
    }

    /// Reads from where the guest is in a file, as read(2).
    ///
    /// # Errors
    /// The kernel's, and `EBADF` where no file has the number.
    pub fn read(&mut self, number: u32, bytes: &mut [u8]) -> Result<u32, Errno> {
        let open = self.0.get_mut(&number).ok_or(Errno::EBADF)?;
        counted(retry(|| open.file.read(bytes)))
    }

    /// Writes where the guest is in a file, as write(2).
    ///
    /// # Errors
    /// The kernel's, and `EBADF` where no file has the number.
    pub fn write(&mut self, number: u32, bytes: &[u8]) -> Result<u32, Errno> {
        let open = self.0.get_mut(&number).ok_or(Errno::EBADF)?;
        counted(retry(|| open.file.write(bytes)))
    }

    /// Closes a file.
    ///
    /// # Errors
    /// `EBADF` where no file has the number.
    pub fn close(&mut self, number: u32) -> Result<(), Errno> {
        self.0.remove(&number).map(drop).ok_or(Errno::EBADF)
    }

    /// Which files are open, how, and where in them the guest is.
    ///
    /// # Errors
    /// A sentence, where the host does not say where.
    pub fn save(&mut self) -> Result<SavedHostFiles, String> {
        let saved = self.0.iter_mut().map(|(number, open)| {
            let offset = open.file.stream_position().map_err(|error| {
                format!("where the guest is in the host file {:?} cannot be found out: {error}", open.path)
            })?;
            Ok(SavedFile { number: *number, path: open.path.clone(), flags: open.flags, offset })
        });
        saved.collect::<Result<_, _>>().map(SavedHostFiles)
    }

    /// The files of `saved`, opened again under this directory.
    ///
    /// # Errors
    /// A sentence that names the file.
    pub fn reopen(directory: &Directory, saved: &SavedHostFiles) -> Result<Self, String> {
        let mut files = Self::default();
        for SavedFile { number, path, flags, offset } in &saved.0 {
            if !(FIRST..FIRST + MOST).contains(number) || path.len() > LONGEST_PATH as usize {
                return Err(format!("a host file of the number {number} with a path of {} bytes is none", path.len()));
            }
            let failed = |what: &str, error: &dyn std::fmt::Display| {
                format!(
                    "the guest has the host file {path:?} open, which cannot be {what} under this side's --host-files: \
                     {error}; both sides must see the same files"
                )
            };
            let again = flags & !ONCE.bits().cast_unsigned();
            let mut file = directory.file(path, again, 0).map_err(|error| failed("opened", &error))?;
            file.seek(SeekFrom::Start(*offset)).map_err(|error| failed("gone on with", &error))?;
            if files.0.insert(*number, OpenFile { file, path: path.clone(), flags: *flags }).is_some() {
                return Err(format!("two host files have the number {number}"));
            }
        }
        Ok(files)
    }
}

fn retry(mut attempt: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn counted(result: io::Result<usize>) -> Result<u32, Errno> {
    match result {
        // Never more than was asked for, which fits.
        Ok(count) => u32::try_from(count).map_err(|_| Errno::EOVERFLOW),
        Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}
