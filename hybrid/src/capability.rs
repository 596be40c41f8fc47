//! What a source can ask of a destination, one bit each in the handshake.

/// The source may hand off before its memory has arrived.
pub const POSTCOPY: u64 = 1;

/// All that this version understands. A destination refuses a source that asks for more.
pub const KNOWN: u64 = POSTCOPY;
