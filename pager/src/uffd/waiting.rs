//! Waiting for faults on one thread, without a ring: for a pager whose pages are on this host.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Wakes whoever waits for faults.
#[derive(Debug)]
pub struct Alarm(EventFd);

impl Alarm {
    /// A new one, silent.
    ///
    /// # Errors
    /// When the kernel has no descriptor for it.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Rings, for ever: whoever [waits](Self::wait) returns, now and later.
    pub fn ring(&self) {
        if let Err(errno) = self.0.write(1) {
            tracing::error!(%errno, "cannot wake the fault thread");
        }
    }

    /// Waits until `faults`, the descriptor of a watch, has some. `false` once it [rings](Self::ring).
    ///
    /// # Errors
    /// When the kernel cannot wait.
    pub fn wait(&self, faults: BorrowedFd<'_>) -> io::Result<bool> {
        let mut both = [PollFd::new(faults, PollFlags::POLLIN), PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut both, PollTimeout::NONE) {
                Ok(_) => return Ok(!both[1].any().unwrap_or(true)),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn what_can_be_read_and_the_alarm_end_the_wait() {
        let (faults, mut writer) = io::pipe().unwrap();
        let alarm = Alarm::new().unwrap();
        writer.write_all(b"a").unwrap();
        assert!(alarm.wait(faults.as_fd()).unwrap());
        alarm.ring();
        assert!(!alarm.wait(faults.as_fd()).unwrap() && !alarm.wait(faults.as_fd()).unwrap());
    }
}
