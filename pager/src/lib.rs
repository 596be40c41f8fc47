//! Userfaultfd.

pub mod ram;
