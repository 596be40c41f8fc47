//! The local APIC, by its registers at their architectural address: starting other CPUs, and their tick.

use core::ptr::with_exposed_provenance_mut;

use crate::traps::{LAPIC_SPURIOUS, LAPIC_VECTOR};

const BASE: usize = 0xfee0_0000;
const SPURIOUS: usize = 0xf0;
const COMMAND: usize = 0x300;
const COMMAND_TARGET: usize = 0x310;
const TIMER: usize = 0x320;
const TIMER_INITIAL: usize = 0x380;
const TIMER_DIVIDE: usize = 0x3e0;

/// KVM's timer counts nanoseconds.
const TICK: u32 = 1_000_000;

fn write(register: usize, value: u32) {
    // SAFETY: the page is mapped, and no Rust object lies there. No command that this module writes makes the APIC
    // touch memory.
    unsafe { with_exposed_provenance_mut::<u32>(BASE + register).write_volatile(value) }
}

/// Turns this CPU's local APIC on.
pub fn enable() {
    write(SPURIOUS, 0x100 | u32::from(LAPIC_SPURIOUS));
}

/// Resets another CPU.
pub fn send_init(apic_id: u8) {
    send(apic_id, 0x4500);
}

/// Starts another CPU at a page below 1 MiB.
pub fn send_startup(apic_id: u8, page: u8) {
    send(apic_id, 0x4600 | u32::from(page));
}

fn send(apic_id: u8, command: u32) {
    write(COMMAND_TARGET, u32::from(apic_id) << 24);
    write(COMMAND, command);
}

/// Starts a tick of 1000 Hz on this CPU, which ends its [`halt`](crate::cpu::halt).
pub fn start_tick() {
    const DIVIDE_BY_1: u32 = 0xb;
    const PERIODIC: u32 = 1 << 17;
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(TIMER, PERIODIC | u32::from(LAPIC_VECTOR));
    write(TIMER_INITIAL, TICK);
}
