//! Starting the other CPUs.

use core::hint::spin_loop;
use core::ptr::{self, with_exposed_provenance_mut};
use core::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use crate::clock::Clock;
use crate::cpu::{TRAMPOLINE_PAGE, prepare_start, tsc};
use crate::lapic;

/// CPUs that have reached ring 3.
static ARRIVED: AtomicUsize = AtomicUsize::new(1);

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
}

/// To be called by each CPU that was started, first of all.
pub fn arrived() {
    ARRIVED.fetch_add(1, SeqCst);
}

/// Starts CPU `cpu`, whose APIC id is that number; false if it did not come up in time. CPUs are started one by one,
/// in order.
pub fn start(cpu: usize, clock: Clock) -> bool {
    // Start-up in emulated ring 0 takes a fraction of a millisecond; a host that is out of CPUs can take long to give
    // it one.
    const INIT_NS: u64 = 10_000_000;
    const STARTUP_NS: u64 = 200_000_000;
    const TRIES: usize = 25;
    let Ok(apic_id) = u8::try_from(cpu) else { return false };
    place_trampoline();
    prepare_start(cpu);
    let up = || ARRIVED.load(SeqCst) > cpu;
    lapic::send_init(apic_id);
    wait(clock, INIT_NS, || false);
    // A CPU that runs already ignores a second start-up command.
    for _ in 0..TRIES {
        lapic::send_startup(apic_id, TRAMPOLINE_PAGE);
        if wait(clock, STARTUP_NS, up) {
            return true;
        }
    }
    false
}

fn wait(clock: Clock, ns: u64, over: impl Fn() -> bool) -> bool {
    let start = tsc();
    let ticks = clock.ticks_of_ns(ns);
    while tsc().wrapping_sub(start) < ticks {
        if over() {
            return true;
        }
        spin_loop();
    }
    over()
}

fn place_trampoline() {
    let code = &raw const ap_trampoline;
    let bytes = (&raw const ap_trampoline_end).addr() - code.addr();
    // SAFETY: the code lies in the image between its two symbols. The memory below 1 MiB is mapped, holds no Rust
    // object, and what the loader had put there has been read by now.
    unsafe { ptr::copy_nonoverlapping(code, with_exposed_provenance_mut(usize::from(TRAMPOLINE_PAGE) << 12), bytes) }
}
