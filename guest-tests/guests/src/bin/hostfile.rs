//! Writes a file of the host in two parts, between which it can be moved or saved.

#![no_std]
#![no_main]

/// What every vCPU runs once it is in ring 3.
// SAFETY: no other symbol has this name: a program defines it once, and the library only declares it.
#[unsafe(no_mangle)]
extern "Rust" fn guest_main(_: usize) -> ! {
    switchover_guests::host_file::run()
}
