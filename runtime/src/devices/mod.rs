//! The devices that are not KVM's own.

pub mod debug_exit;
pub mod input;
pub mod output;
pub mod serial;
