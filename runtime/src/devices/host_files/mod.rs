//! Files of the host that a guest may open, read and write: a paravirtual device behind one port.
//!
//! The guest writes the guest-physical address of a [`request`] to the port, 32 bits at once, and finds the result in the
//! request when the instruction is over. What it opens lies under one directory (`directory.rs`); nothing else of the host can be
//! reached. Which files are open, how, and where in them the guest is travels with the guest (`table.rs`): the other side opens them
//! again under its own directory, which must hold the same files.
//!
//! What the device writes into guest memory counts as written by the guest, for whoever keeps the book of dirty pages.

mod directory;
pub mod log;
pub mod request;
mod table;
mod wish;

use std::fmt;
use std::path::Path;
use std::sync::Mutex;

use nix::errno::Errno;
use vm_memory::{Bytes as _, GuestAddress};

use self::directory::Directory;
use self::log::Log;
use self::request::{Operation, Request};
pub use self::table::{OpenFiles, SavedHostFiles};
use self::wish::Wish;
use crate::error::VmError;
use crate::lock;
use crate::memory::GuestMemory;

/// Where a guest writes a request's address.
pub const HOST_FILES_PORT: u16 = 0x5c0;
/// Its name in a machine's description.
pub const NAME: &str = "host-files";

/// The most bytes that one request reads or writes: a vCPU that is in here cannot be paused.
pub const MOST_AT_ONCE: u32 = 1 << 20;

/// The device. Any thread may use it.
pub struct HostFiles {
    memory: GuestMemory,
    directory: Directory,
    files: Mutex<OpenFiles>,
    wish: Wish,
    log: Log,
}

impl fmt::Debug for HostFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostFiles").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl HostFiles {
    /// A device whose files lie under `directory`. Each request is noted in the `log`, in a line of its own.
    ///
    /// # Errors
    /// When the directory cannot be opened.
    pub fn new(memory: GuestMemory, directory: &Path, log: Log) -> Result<Self, VmError> {
        let opened = Directory::open(directory);
        let directory =
            opened.map_err(|source| VmError::HostFiles { path: directory.to_owned(), source: source.into() })?;
        Ok(Self { memory, directory, files: Mutex::default(), wish: Wish::default(), log })
    }

    /// The guest writes to the port. A vCPU that asks for its guest to be saved stays in here until it is `leaving` the guest.
    pub fn write(&self, data: &[u8], leaving: &dyn Fn() -> bool) {
        let Ok(address) = <[u8; 4]>::try_from(data).map(|bytes| u64::from(u32::from_le_bytes(bytes))) else {
            tracing::debug!(bytes = data.len(), "a request for a host file whose address is not of 32 bits");
            return;
        };
        let Some(request) = Request::read(&self.memory, address) else {
            tracing::debug!(address, "a request for a host file that lies outside of memory");
            return;
        };
        if request.operation == Operation::Save {
            return self.save_guest(&request, leaving);
        }
        let (result, line) = self.perform(&request);
        let value = match result {
            Ok(value) => i64::from(value),
            Err(errno) => -i64::from(errno as i32),
        };
        request.answer(&self.memory, value);
        self.log.note(format_args!("{line} - return {value}"));
    }

    /// What is printed of it.
    #[must_use]
    pub const fn log(&self) -> &Log {
        &self.log
    }

    /// Somebody saves the guest when it asks for that: `heard` is called then, and must not wait for it.
    pub fn tell_of_wishes(&self, heard: impl Fn() + Send + Sync + 'static) {
        self.wish.tell(heard);
    }

    /// The guest goes on, and was not saved if it wished to be.
    pub fn refuse_to_save(&self, errno: Errno) {
        self.wish.refuse(errno, &self.memory, || {
            self.log.note(format_args!("SAVE OPERATION - return {}", -i64::from(errno as i32)));
        });
    }

    /// Keeps a vCPU from running on that has asked for its guest to be saved, until it is `leaving` the guest again or has its answer.
    /// Called on its thread, before it enters the guest.
    pub fn hold(&self, leaving: &dyn Fn() -> bool) {
        self.wish.hold(leaving);
    }

    /// The guest was saved as it wished.
    pub fn saved(&self) {
        self.wish.fulfil();
    }

    fn save_guest(&self, request: &Request, leaving: &dyn Fn() -> bool) {
        match self.wish.ask(request, &self.memory, || self.log.note(format_args!("SAVE OPERATION"))) {
            Ok(()) => self.wish.hold(leaving),
            Err(errno) => {
                let value = -i64::from(errno as i32);
                request.answer(&self.memory, value);
                self.log.note(format_args!("SAVE OPERATION - return {value}"));
            }
        }
    }

    /// What came of a request, and how the log calls it.
    fn perform(&self, request: &Request) -> (Result<u32, Errno>, String) {
        match request.operation {
            Operation::Open { path, length, flags, mode } => {
                let path = self.path(path, length);
                let named = path.as_ref().map_or_else(|_| "?".to_owned(), |path| path.escape_debug().to_string());
                let opened = path.and_then(|path| lock(&self.files).open(&self.directory, path, flags, mode));
                (opened, format!("OPEN {named} {flags} {mode}"))
            }
            Operation::Read { file, address, count } => {
                (self.read(file, address, count), format!("READ {file} {address:x} {count}"))
            }
            Operation::Write { file, address, count } => {
                (self.write_file(file, address, count), format!("WRITE {file} {address:x} {count}"))
            }
            Operation::Close { file } => (lock(&self.files).close(file).map(|()| 0), format!("CLOSE {file}")),
            // Not a matter of a file: it never gets here.
            Operation::Save => (Err(Errno::ENOTSUP), "SAVE OPERATION".to_owned()),
            Operation::Unknown(number) => (Err(Errno::ENOSYS), format!("OPERATION {number}")),
        }
    }

    fn path(&self, address: u64, length: u32) -> Result<String, Errno> {
        if length > directory::LONGEST_PATH {
            return Err(Errno::ENAMETOOLONG);
        }
        String::from_utf8(self.bytes(address, length)?).map_err(|_| Errno::EILSEQ)
    }

    /// A copy, so that no page of the guest is waited for while a file is locked.
    fn bytes(&self, address: u64, count: u32) -> Result<Vec<u8>, Errno> {
        if !self.memory.holds(address, u64::from(count)) {
            return Err(Errno::EFAULT);
        }
        let mut bytes = vec![0; count as usize];
        self.memory.mapped().read_slice(&mut bytes, GuestAddress(address)).map_err(|_| Errno::EFAULT)?;
        Ok(bytes)
    }

    fn read(&self, file: u32, address: u64, count: u32) -> Result<u32, Errno> {
        let count = count.min(MOST_AT_ONCE);
        // Before anything is read: what a file gave once it may not give again.
        if !self.memory.holds(address, u64::from(count)) {
            return Err(Errno::EFAULT);
        }
        let mut bytes = vec![0; count as usize];
        let got = lock(&self.files).read(file, &mut bytes)?;
        let read = bytes.get(..got as usize).unwrap_or_default();
        self.memory.mapped().write_slice(read, GuestAddress(address)).map_err(|_| Errno::EFAULT)?;
        Ok(got)
    }

    fn write_file(&self, file: u32, address: u64, count: u32) -> Result<u32, Errno> {
        let bytes = self.bytes(address, count.min(MOST_AT_ONCE))?;
        lock(&self.files).write(file, &bytes)
    }

    /// The files that the guest has open. Called while no vCPU runs.
    ///
    /// # Errors
    /// When the host does not say where in a file the guest is.
    pub fn save(&self) -> Result<SavedHostFiles, String> {
        lock(&self.files).save()
    }

    /// Opens again what was open when it was saved, and changes nothing yet.
    ///
    /// # Errors
    /// When a file cannot be opened under this side's directory, or what was saved makes no sense.
    pub fn reopen(&self, saved: &SavedHostFiles) -> Result<OpenFiles, String> {
        OpenFiles::reopen(&self.directory, saved)
    }

    /// Gives the guest these open files.
    pub fn load(&self, files: OpenFiles) {
        *lock(&self.files) = files;
        self.log.note(format_args!("RESTORE OPERATION"));
    }
}

#[cfg(test)]
mod tests;
