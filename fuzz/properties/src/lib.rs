//! What must hold for every decoder of what comes from outside, whatever bytes it is given.
//!
//! Each property takes arbitrary bytes and panics where something does not hold: a decoder panics itself, or takes more work or
//! memory than its input is worth; what was encoded decodes to something else; what was decoded does not survive being
//! encoded again. The fuzz targets beside this crate search for such bytes; its test replays those that were kept in
//! `fuzz/corpus`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a property fails by panicking")]

mod bitmap;
mod control;
mod frames;
mod handshake;
/// Images of guests, and what one is made of that is an increment.
pub mod image;
mod input;
mod kernel;
mod missing;
mod payload;
mod qmp;
mod state;
mod tls;
mod trace;
mod working_set;

pub use bitmap::bitmap;
pub use control::control;
pub use frames::frames;
pub use handshake::handshake;
pub use image::image;
pub use kernel::kernel;
pub use missing::missing;
pub use payload::{pages, payload};
pub use qmp::{arguments, framing};
pub use state::state;
pub use tls::tls;
pub use trace::trace;
pub use working_set::working_set;

/// A property: it panics where it does not hold.
pub type Property = fn(&[u8]);

/// All properties, by the names of their targets and of their folders in `fuzz/corpus`.
pub const TARGETS: [(&str, Property); 15] = [
    ("arguments", arguments),
    ("bitmap", bitmap),
    ("control", control),
    ("frames", frames),
    ("framing", framing),
    ("handshake", handshake),
    ("image", image),
    ("kernel", kernel),
    ("missing", missing),
    ("pages", pages),
    ("payload", payload),
    ("state", state),
    ("tls", tls),
    ("trace", trace),
    ("working_set", working_set),
];
