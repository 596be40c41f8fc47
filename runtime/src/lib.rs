//! The virtual machine on KVM.
