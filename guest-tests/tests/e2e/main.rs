//! Guests move, on real KVM, by the built binary. The harness is described in the library of this package.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic here is a test's failure")]

mod audit;
mod beside_qemu;
mod breaking;
mod certificates;
mod chain;
mod checkpoints;
mod commands;
mod confined;
mod failures;
mod fault_lanes;
mod figures;
mod foreign;
mod guests;
mod host_files;
mod huge_pages;
mod image;
mod impostors;
mod lazy;
mod moments;
mod precopy;
mod qmp;
mod qmp_python;
mod qmp_recovery;
mod qmp_together;
mod refusing;
mod rollback;
mod running;
mod save_operation;
mod strangers;
mod tls;

/// The test's corner of the host, or its end where the host cannot do it.
macro_rules! lab {
    ($name:literal) => {
        match switchover_guest_tests::lab::Lab::open($name) {
            Some(lab) => lab,
            None => return,
        }
    };
}
use lab;
