//! A migration from beginning to end.

pub mod capability;
pub mod error;
pub mod fake;
pub mod incoming;
mod lanes;
pub mod machine;
pub mod outgoing;
mod patience;
pub mod progress;
mod reception;
mod recorder;
pub mod report;
pub mod session;
pub mod settings;
pub mod status;
