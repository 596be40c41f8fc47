//! Memory that arrives while the guest runs.

pub mod cpu;
pub mod destination;
pub mod lane;
mod pace;
pub mod ram;
mod runs;
mod sent;
pub mod source;
pub mod state;
pub mod stats;
mod sync;
pub mod uffd;
mod zero;
