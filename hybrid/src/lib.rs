//! A migration from beginning to end.

pub mod machine;
pub mod report;
pub mod status;
