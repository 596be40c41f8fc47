//! What a call that is not on the list comes to: its name on standard error, and the end of the process.
//!
//! The process ends, however little went wrong: what it does next cannot be trusted. A destination's userfaultfds go with its memory
//! and its vCPUs, so no guest sees a page that has not come.
//!
//! Unsafe, for it is a signal handler: it runs wherever the call was made, whatever locks that holds, and so it neither allocates
//! nor locks.

use std::ffi::c_void;

use libc::{c_int, siginfo_t};
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::names::name_of;

const BEFORE: &[u8] = b"switchover: this process made the system call `";
const AFTER: &[u8] =
    b"`, or with arguments, that no machine makes (see `switchover run --help`, --seccomp): it ends at once\n";

/// Where `siginfo_t` of SIGSYS has the call's number (`_sigsys._syscall` of asm-generic/siginfo.h, on 64 bits).
const NUMBER_AT: usize = 24;

/// Has every call that a filter traps named on standard error, and the process ended as by `abort`.
///
/// # Errors
/// When the kernel does not take the handler.
pub fn name_calls_and_end() -> Result<(), Errno> {
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK | SaFlags::SA_NODEFER;
    let action = SigAction::new(SigHandler::SigAction(trapped), flags, SigSet::empty());
    // SAFETY: the handler calls nothing but `write` and `abort`, which may be called from one.
    unsafe { sigaction(Signal::SIGSYS, &action) }.map(drop)
}

extern "C" fn trapped(_: c_int, information: *mut siginfo_t, _: *mut c_void) {
    const { assert!(NUMBER_AT + size_of::<c_int>() <= size_of::<siginfo_t>()) };
    // SAFETY: the kernel gives a handler with SA_SIGINFO a live structure, which is larger than that and aligned for it. Where the
    // signal comes from `kill`, the number means nothing, and is a number still.
    let number = unsafe { information.cast::<u8>().add(NUMBER_AT).cast::<c_int>().read() };
    let mut digits = [0; DIGITS];
    let name = match name_of(number.into()) {
        Some(name) => name.as_bytes(),
        None => decimal(number.unsigned_abs(), &mut digits),
    };
    for part in [BEFORE, name, AFTER] {
        // SAFETY: the part is readable. Where standard error takes nothing, nothing can be said.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    // SAFETY: it may be called from a handler, and does not return.
    unsafe { libc::abort() }
}

/// The digits of the largest number.
const DIGITS: usize = 10;

/// A number in decimal, in this buffer.
fn decimal(mut number: u32, digits: &mut [u8; DIGITS]) -> &[u8] {
    let mut first = DIGITS;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (number % 10).to_le_bytes()[0];
        number /= 10;
        first -= 1;
        if number == 0 {
            break;
        }
    }
    digits.get(first..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_without_a_name_are_written_out() {
        let mut digits = [0; DIGITS];
        for number in [0, 7, 10, 999, u32::MAX] {
            assert_eq!(decimal(number, &mut digits), number.to_string().as_bytes());
        }
    }
}
