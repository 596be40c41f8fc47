//! `switchover floor`: what this machine can do at best.

mod percentiles;
mod report;

pub use percentiles::Percentiles;
#[cfg(test)]
pub use report::synthetic;
pub use report::{FloorReport, FloorSum, Measured, Ways};
