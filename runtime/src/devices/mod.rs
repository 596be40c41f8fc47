//! The devices that are not KVM's own.

pub mod debug_exit;
pub mod host_files;
pub mod input;
pub mod output;
pub mod serial;
