//! `switchover bench`: migrates real guests and tells how it went.

pub mod aggregate;
pub mod figures;
pub mod format;
pub mod guest_lines;
pub mod guest_trace;
pub mod hdr_files;
pub mod host_info;
pub mod html;
pub mod latency;
pub mod plots;
pub mod schema;
pub mod serial_log;
#[cfg(test)]
mod synthetic;
pub mod table;
