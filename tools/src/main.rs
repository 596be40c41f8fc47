//! `switchover`: moves a running KVM guest.

fn main() {}
