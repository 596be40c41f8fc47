//! What a source can ask of a destination, one bit each in the handshake.

/// The source may hand off before its memory has arrived.
pub const POSTCOPY: u64 = 1;

/// The lanes are opened in place of those that were lost, of a session whose commit the source has sent. A destination that does
/// not know the session says so, which is no refusal of the guest.
pub const REJOIN: u64 = 2;

/// The payloads on fault and bulk lanes carry checksums. Not asked for where something below the lane notices what was damaged.
pub const CHECKSUMS: u64 = 4;

/// Guest memory is compared: the destination digests what it gives the guest, and says so before it says that it has all.
pub const COMPARE: u64 = 8;

/// All that this version understands. A destination refuses a source that asks for more.
pub const KNOWN: u64 = POSTCOPY | REJOIN | CHECKSUMS | COMPARE;
