//! Userfaultfds from a device that was opened before.
//!
//! Whoever may open `/dev/userfaultfd` may have userfaultfds that take the kernel's own faults, KVM's among them. A process that
//! gives up the rights that it was started with opens it first, and [keeps](keep) it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::OnceLock;

use userfaultfd::Uffd;

const PATH: &str = "/dev/userfaultfd";

/// `USERFAULTFD_IOC_NEW` and `UFFDIO_API` of linux/userfaultfd.h.
const NEW: libc::Ioctl = 0xaa00;
const API: libc::Ioctl = 0xc018_aa3f;

/// The version of the interface (`UFFD_API`).
const VERSION: u64 = 0xaa;

static KEPT: OnceLock<File> = OnceLock::new();

/// The kernel's `struct uffdio_api`.
#[repr(C)]
struct Version {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// Opens the device for all further userfaultfds of this process. `false` where this host has none (it came with Linux 6.1): each is
/// asked for by a system call then, which needs CAP_SYS_PTRACE or `sysctl vm.unprivileged_userfaultfd=1`.
///
/// # Errors
/// When the device is there and cannot be opened.
pub fn keep() -> io::Result<bool> {
    if KEPT.get().is_some() {
        return Ok(true);
    }
    match File::options().read(true).write(true).open(PATH) {
        Ok(device) => {
            // Who was faster has opened the same.
            let _ = KEPT.set(device);
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

pub(super) fn kept() -> Option<&'static File> {
    KEPT.get()
}

/// A userfaultfd with these features, closed when another program is started, read without waiting.
pub(super) fn open(device: &File, features: u64) -> io::Result<Uffd> {
    let done = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    // SAFETY: the request takes flags, by value, and nothing else.
    let descriptor: RawFd = done(unsafe { libc::ioctl(device.as_raw_fd(), NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) })?;
    // SAFETY: the kernel has just made it, and nobody else owns it.
    let uffd = unsafe { Uffd::from_raw_fd(descriptor) };
    let mut version = Version { api: VERSION, features, ioctls: 0 };
    // SAFETY: the kernel reads and writes a live structure of its own layout.
    done(unsafe { libc::ioctl(descriptor, API, &raw mut version) })?;
    Ok(uffd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_device_gives_userfaultfds_as_often_as_they_are_asked_for() {
        match keep() {
            Ok(true) => {}
            other => {
                return println!("SKIP a_kept_device_gives_userfaultfds_as_often_as_they_are_asked_for: {other:?}");
            }
        }
        let device = kept().unwrap();
        for _ in 0..2 {
            let uffd = open(device, 0).unwrap();
            assert!(uffd.read_event().unwrap().is_none(), "it does not wait");
        }
        assert!(open(device, 1 << 63).is_err(), "a feature that no kernel has");
    }
}
