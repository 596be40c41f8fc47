//! What a guest asks for, as it lies in guest memory.
//!
//! | byte | what |
//! |---|---|
//! | 0 | the operation, 64 bits |
//! | 8 | the result, 64 bits with a sign: as of the system call of that name on Linux, an error as its negative number |
//! | 16 | four arguments of 64 bits |
//!
//! | number | operation | arguments |
//! |---|---|---|
//! | 1 | open | address of the path, its length in bytes, flags, mode, the last two as Linux has them |
//! | 2 | read | file, address, bytes |
//! | 3 | write | file, address, bytes |
//! | 4 | close | file |
//! | 5 | save the guest | |
//!
//! All numbers are little-endian and of guest-physical addresses.

use vm_memory::{Bytes as _, GuestAddress};

use crate::memory::GuestMemory;

/// Bytes of a request.
pub const REQUEST_BYTES: usize = 48;
const RESULT_AT: u64 = 8;

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Open a file.
    Open {
        /// Where the path lies, without a zero behind it.
        path: u64,
        /// Its length in bytes.
        length: u32,
        /// `O_RDWR` and so on.
        flags: u32,
        /// Permissions of a file that is made.
        mode: u32,
    },
    /// Read from where the guest is in the file.
    Read {
        /// As [`Open`](Self::Open) returned it.
        file: u32,
        /// Where the bytes go.
        address: u64,
        /// At most so many.
        count: u32,
    },
    /// Write where the guest is in the file.
    Write {
        /// As [`Open`](Self::Open) returned it.
        file: u32,
        /// Where the bytes lie.
        address: u64,
        /// At most so many.
        count: u32,
    },
    /// Close a file.
    Close {
        /// As [`Open`](Self::Open) returned it.
        file: u32,
    },
    /// Save the guest itself.
    Save,
    /// Something that this device does not do.
    Unknown(u32),
}

/// A request, and where it lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    address: u64,
    /// What is to be done.
    pub operation: Operation,
}

impl Request {
    /// The one at `address`; `None` where that is not memory, or not a multiple of 8.
    #[must_use]
    pub fn read(memory: &GuestMemory, address: u64) -> Option<Self> {
        if !address.is_multiple_of(8) || !memory.holds(address, REQUEST_BYTES as u64) {
            return None;
        }
        let mut bytes = [0; REQUEST_BYTES];
        memory.mapped().read_slice(&mut bytes, GuestAddress(address)).ok()?;
        Some(Self { address, operation: Operation::from_bytes(&bytes) })
    }

    /// Gives the guest the result.
    pub fn answer(&self, memory: &GuestMemory, result: i64) {
        // It was memory when the request was read, and memory does not go away.
        let _ = memory.mapped().write_slice(&result.to_le_bytes(), GuestAddress(self.address + RESULT_AT));
    }
}

impl Operation {
    fn from_bytes(bytes: &[u8; REQUEST_BYTES]) -> Self {
        let mut words = [0; REQUEST_BYTES / 8];
        words.iter_mut().zip(bytes.as_chunks().0).for_each(|(word, bytes)| *word = u64::from_le_bytes(*bytes));
        let [number, _result, first, second, third, fourth] = words;
        // What is too large for its type is too large for a length, and no flag, mode or file of anybody's.
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        match number {
            1 => Self::Open { path: first, length: small(second), flags: small(third), mode: small(fourth) },
            2 => Self::Read { file: small(first), address: second, count: small(third) },
            3 => Self::Write { file: small(first), address: second, count: small(third) },
            4 => Self::Close { file: small(first) },
            5 => Self::Save,
            other => Self::Unknown(small(other)),
        }
    }
}
