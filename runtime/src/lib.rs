//! The virtual machine on KVM.

pub mod qmp;
