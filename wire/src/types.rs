//! The kinds of number that cross the network, one type each.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a page. Both sides compare it at the handshake; nothing else is built.
pub const PAGE_SIZE: usize = 4096;

/// [`PAGE_SIZE`] as the `u64` that offsets and lengths of guest memory are counted in.
pub const PAGE_SIZE_U64: u64 = PAGE_SIZE as u64;

/// The index of a page in a machine's RAM, counted from 0 over its RAM regions in order.
///
/// It is *not* a guest frame number: RAM that continues behind a hole below 4 GiB goes on with the next
/// index. [`crate::description::MachineDescription`] says which guest-physical addresses the indices stand for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// The byte offset of this page in RAM.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.0 * PAGE_SIZE_U64
    }

    /// The page that holds the byte at `offset` of RAM.
    #[must_use]
    pub const fn containing(offset: u64) -> Self {
        Self(offset / PAGE_SIZE_U64)
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// A number of pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct PageCount(pub u64);

impl PageCount {
    /// The whole pages in `bytes`, or `None` when `bytes` is not a multiple of the page size.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes.is_multiple_of(PAGE_SIZE_U64) { Some(Self(bytes / PAGE_SIZE_U64)) } else { None }
    }

    /// The bytes in this many pages.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0 * PAGE_SIZE_U64
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages", self.0)
    }
}

/// What a lane is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum LaneRole {
    /// The session's messages: state, commit, acknowledgements.
    Control,
    /// Page requests one way, their pages the other.
    Fault,
    /// Pages that the source pushes unasked.
    Bulk,
}

impl fmt::Display for LaneRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Fault => "fault",
            Self::Bulk => "bulk",
        })
    }
}

/// One lane of a session: its role, and its number among the lanes of that role.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct LaneId {
    /// What the lane is for.
    pub role: LaneRole,
    /// Counted from 0 within the role.
    pub index: u8,
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lane {}", self.role, self.index)
    }
}

/// The random name of one migration. Every lane carries it, so that none can be taken for another's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 16]);

impl SessionId {
    /// A new session's name, from the kernel's random numbers.
    ///
    /// # Errors
    /// When the kernel's random source cannot be read.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl SessionId {
    /// Its beginning, to tell sessions apart by: for those to whom the whole must not be told, because whoever names it may join
    /// its lost link.
    #[must_use]
    pub fn hint(&self) -> String {
        let [a, b, c, d, ..] = self.0;
        format!("{a:02x}{b:02x}{c:02x}{d:02x}…")
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_bytes_convert_both_ways() {
        assert_eq!(PageIndex(3).offset(), 12288);
        assert_eq!(PageIndex::containing(12287), PageIndex(2));
        assert_eq!(PageCount::from_bytes(8192), Some(PageCount(2)));
        assert_eq!(PageCount::from_bytes(8193), None);
    }

    #[test]
    fn two_sessions_differ() {
        assert_ne!(SessionId::random().unwrap(), SessionId::random().unwrap());
    }
}
