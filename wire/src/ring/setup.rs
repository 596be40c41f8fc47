//! Making a ring: with the best flags that the kernel takes, disabled, and restricted to what lanes do.
//!
//! In two steps, since they may be taken by two processes: a descriptor is [made](make), and [mapped](Made::map) by whoever uses it.

use std::array;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, Parameters, opcode};
use nix::errno::Errno;

/// How many numbers the kernel's `struct io_uring_params` has (linux/io_uring.h).
pub const PARAMETERS: usize = 30;
/// Where in it are the size of the completion queue and the flags.
const CQ_ENTRIES: usize = 1;
const FLAGS: usize = 2;

// Flags of linux/io_uring.h.
const SETUP_CQSIZE: u32 = 1 << 3;
const SETUP_R_DISABLED: u32 = 1 << 6;
const SETUP_SUBMIT_ALL: u32 = 1 << 7;
const SETUP_COOP_TASKRUN: u32 = 1 << 8;
const SETUP_TASKRUN_FLAG: u32 = 1 << 9;
const SETUP_SINGLE_ISSUER: u32 = 1 << 12;
const SETUP_DEFER_TASKRUN: u32 = 1 << 13;

/// `IORING_REGISTER_RESTRICTIONS` of linux/io_uring.h.
const REGISTER_RESTRICTIONS: u32 = 11;

/// The best flags first.
const ATTEMPTS: [u32; 3] = [
    // Linux 6.1.
    SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_TASKRUN_FLAG | SETUP_SUBMIT_ALL,
    // Linux 5.19.
    SETUP_COOP_TASKRUN | SETUP_TASKRUN_FLAG | SETUP_SUBMIT_ALL,
    0,
];

/// All that a ring may be asked to do.
const OPERATIONS: [u8; 6] = [
    opcode::Send::CODE,
    opcode::Recv::CODE,
    opcode::SendMsg::CODE,
    opcode::RecvMsg::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];

/// There is no ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetupError {
    /// The kernel gave none, or does not restrict it.
    Refused(Errno),
    /// Somebody enabled it before it was restricted, and could do anything with it.
    EnabledMeanwhile,
}

impl From<SetupError> for io::Error {
    fn from(error: SetupError) -> Self {
        match error {
            SetupError::Refused(errno) => errno.into(),
            SetupError::EnabledMeanwhile => Errno::EBADFD.into(),
        }
    }
}

/// A ring that nobody has mapped yet.
#[derive(Debug)]
pub struct Made {
    /// Its descriptor.
    pub ring: OwnedFd,
    /// What the kernel says of it.
    pub parameters: [u32; PARAMETERS],
}

/// A disabled, restricted ring with the best flags that the kernel takes. Allocates nothing.
pub fn make(entries: u32) -> Result<Made, SetupError> {
    for flags in ATTEMPTS {
        let mut parameters = [0; PARAMETERS];
        parameters[FLAGS] = flags | SETUP_CQSIZE | SETUP_R_DISABLED;
        // Completions may outnumber submissions (multishot polls), so their queue is larger.
        parameters[CQ_ENTRIES] = entries.saturating_mul(4);
        // SAFETY: the kernel reads and writes a live structure, which is nothing but these numbers.
        let made = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, parameters.as_mut_ptr()) };
        match Errno::result(made).map(i32::try_from) {
            Ok(Ok(descriptor)) => {
                // SAFETY: the kernel has just made it, and nobody else owns it.
                let ring = unsafe { OwnedFd::from_raw_fd(descriptor) };
                return restrict(&ring).map(|()| Made { ring, parameters });
            }
            // A flag that this kernel does not know.
            Err(Errno::EINVAL) => {}
            Ok(Err(_)) => return Err(SetupError::Refused(Errno::EOVERFLOW)),
            Err(errno) => return Err(SetupError::Refused(errno)),
        }
    }
    Err(SetupError::Refused(Errno::EINVAL))
}

/// Allows a disabled ring those [`OPERATIONS`], without links, fixed files or any other flag, and nothing to be registered.
fn restrict(ring: &OwnedFd) -> Result<(), SetupError> {
    let mut allowed: [Restriction; OPERATIONS.len() + 1] = array::from_fn(|index| match OPERATIONS.get(index) {
        Some(operation) => Restriction::sqe_op(*operation),
        None => Restriction::sqe_flags_allowed(0),
    });
    let (rules, count) = (allowed.as_mut_ptr(), allowed.len());
    // SAFETY: the kernel reads so many live structures, which `Restriction` is documented to be laid out as.
    let done =
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), REGISTER_RESTRICTIONS, rules, count) };
    match Errno::result(done) {
        Ok(_) => Ok(()),
        // It is not disabled any more; or it is another thread's, whose ring it becomes that way.
        Err(Errno::EBADFD | Errno::EEXIST) => Err(SetupError::EnabledMeanwhile),
        Err(errno) => Err(SetupError::Refused(errno)),
    }
}

impl Made {
    /// Maps its queues into this process.
    pub fn map(self) -> io::Result<IoUring> {
        // SAFETY: `Parameters` may be created from its representation, as its documentation says, which is these numbers.
        let parameters = unsafe { mem::transmute::<[u32; PARAMETERS], Parameters>(self.parameters) };
        // SAFETY: the descriptor is owned, and these are the parameters that the kernel filled in when it made it.
        unsafe { IoUring::from_fd(self.ring.into_raw_fd(), parameters) }
    }
}
