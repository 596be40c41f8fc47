//! What crosses the network.

pub mod clock;
pub mod description;
pub mod types;
