//! The virtual machine on KVM.

pub mod qmp;
pub mod run_state;
