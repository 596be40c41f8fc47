//! What crosses the network.

pub mod address;
pub mod clock;
pub mod counters;
pub mod description;
pub mod frame;
pub mod message;
pub mod ring;
pub mod socket;
pub mod types;
