//! Where the serial port's bytes go.
//!
//! A byte is written through before the guest's next instruction, so that nothing is lost when the process ends and the order
//! is the guest's. But a reader that has stopped reading must not stop the guest: after a while the output counts as stuck,
//! and bytes are dropped until it takes some again.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::VmError;
use crate::lock;

/// How long one byte may keep the guest waiting, once, before the output counts as stuck. Well below the time that a pause
/// waits for a vCPU.
const PATIENCE: Duration = Duration::from_millis(100);

/// An output. Clones lead to the same one.
#[derive(Clone, Debug)]
pub struct Output {
    sink: Arc<Mutex<Sink>>,
}

#[derive(Debug)]
struct Sink {
    /// `None` leads nowhere.
    file: Option<File>,
    stuck: bool,
    lost: u64,
}

impl Output {
    /// Nowhere.
    #[must_use]
    pub fn null() -> Self {
        Self::to(None)
    }

    /// This process' standard output.
    ///
    /// # Errors
    /// When its descriptor cannot be duplicated.
    pub fn stdout() -> Result<Self, VmError> {
        let source = |source| VmError::Host { attempted: "duplicate standard output".to_owned(), source };
        let fd = io::stdout().as_fd().try_clone_to_owned().map_err(source)?;
        Ok(Self::to(Some(File::from(fd))))
    }

    /// A file, emptied first.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn file(path: &Path) -> Result<Self, VmError> {
        let file = File::create(path).map_err(|source| VmError::SerialFile { path: path.to_owned(), source })?;
        Ok(Self::to(Some(file)))
    }

    fn to(file: Option<File>) -> Self {
        Self { sink: Arc::new(Mutex::new(Sink { file, stuck: false, lost: 0 })) }
    }
}

impl Write for Output {
    /// Never fails: what cannot be written is dropped.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.sink).write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let patience = if self.stuck { Duration::ZERO } else { PATIENCE };
            let written = match &mut self.file {
                None => return,
                Some(file) => ready(file.as_fd(), patience) && file.write_all(&[*byte]).is_ok(),
            };
            if written && self.stuck {
                tracing::warn!(lost = self.lost, "the serial output goes on; some of it was lost while nobody read it");
            }
            if !written && !self.stuck {
                tracing::warn!("nobody reads the serial output: it is dropped until somebody does");
            }
            self.stuck = !written;
            self.lost = if written { 0 } else { self.lost + 1 };
        }
    }
}

/// Whether `fd` takes a byte without blocking, now or within `patience`. A closed pipe does, and the write says so.
fn ready(fd: BorrowedFd<'_>, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], left) {
            Ok(ready) => return ready > 0,
            // The vCPU is being kicked out; it comes after this byte.
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_pipe_that_nobody_reads_costs_bytes_and_not_the_guest() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut output = Output::to(Some(File::from(std::os::fd::OwnedFd::from(writer))));
        let start = Instant::now();
        for _ in 0..300_000 {
            output.write_all(b"x").unwrap();
        }
        assert!(start.elapsed() < Duration::from_secs(20));
        let kept = 300_000 - lock(&output.sink).lost;
        assert!(lock(&output.sink).stuck);

        // It goes on as soon as somebody reads.
        let mut some = vec![0; 65_536];
        let read = reader.read(&mut some).unwrap();
        output.write_all(b"y").unwrap();
        assert!(!lock(&output.sink).stuck);
        drop(output);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        assert_eq!(u64::try_from(read + rest.len()).unwrap(), kept + 1);
        assert_eq!(rest.last(), Some(&b'y'));
    }

    #[test]
    fn a_file_holds_what_was_written_at_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut output = Output::file(file.path()).unwrap();
        output.write_all(b"hello").unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"hello");
    }
}
