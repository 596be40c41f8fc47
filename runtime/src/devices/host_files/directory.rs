//! The one directory whose files a guest may have.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, SFlag, fstat};

/// Longer paths no host has (`PATH_MAX`, without the zero).
pub const LONGEST_PATH: u32 = 4095;

/// What a guest may ask for. Whatever is left out either leads around the directory, or has the host wait, or means nothing for an
/// ordinary file.
const ALLOWED: OFlag = OFlag::O_ACCMODE
    .union(OFlag::O_CREAT)
    .union(OFlag::O_EXCL)
    .union(OFlag::O_TRUNC)
    .union(OFlag::O_APPEND)
    .union(OFlag::O_SYNC)
    .union(OFlag::O_DSYNC)
    .union(OFlag::O_CLOEXEC);
/// "Large files", as 64-bit Linux understands it: nothing, where all may be large. The C library's headers say 0.
const LARGE_FILE: u32 = 0x8000;

/// An open directory.
#[derive(Debug)]
pub struct Directory(OwnedFd);

impl Directory {
    /// The directory at `path`.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn open(path: &Path) -> Result<Self, Errno> {
        open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).map(Self)
    }

    /// Opens an ordinary file under the directory. No part of the path leads out of it, by `..` or by a link, even while somebody
    /// else moves things about (`RESOLVE_BENEATH`).
    ///
    /// # Errors
    /// As open(2) has them, and `EINVAL` for flags that are not for a guest, `EPERM` for what is no ordinary file.
    pub fn file(&self, path: &str, flags: u32, mode: u32) -> Result<File, Errno> {
        let flags = OFlag::from_bits((flags & !LARGE_FILE).cast_signed()).filter(|flags| ALLOWED.contains(*flags));
        let flags = flags.ok_or(Errno::EINVAL)?;
        let made = flags.contains(OFlag::O_CREAT);
        let mode = if made { Mode::from_bits_truncate(mode & 0o777) } else { Mode::empty() };
        let how = OpenHow::new()
            // A pipe that nobody writes to would keep the vCPU; what is no ordinary file is closed again below. Emptying waits
            // until that is known.
            .flags((flags - OFlag::O_TRUNC) | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
            .mode(mode)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let file = File::from(openat2(&self.0, path, how)?);
        let kind = SFlag::from_bits_truncate(fstat(&file)?.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFREG {
            return Err(if kind == SFlag::S_IFDIR { Errno::EISDIR } else { Errno::EPERM });
        }
        if flags.contains(OFlag::O_TRUNC) {
            nix::unistd::ftruncate(&file, 0)?;
        }
        Ok(file)
    }
}
