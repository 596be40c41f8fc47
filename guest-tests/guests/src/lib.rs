//! Small guests that run without an operating system, verify every page they visit, and report every gap they feel.
//!
//! They are the instrument that migrations are measured and judged with: a guest that says `bad 0` has compared what
//! it reads with what it wrote, and the gaps between its visits are what a workload would have felt, by a clock that
//! no VMM has a hand in. The same ELF file boots under `switchover run` and under `qemu-system-x86_64 -kernel`.
//!
//! ```text
//!   boot.s   32-bit PVH entry → long mode → ring 3            (CPU 0; the others from a trampoline, smp.rs)
//!   run.rs   parameters, clock, memory → "R ready"            (start_info.rs, params.rs, clock.rs, memory.rs)
//!   work.rs  choose → verify → write → rdtsc ──────┐          one visit; every vCPU, for ever
//!                 ↑  workload.rs  pages.rs         ↓
//!                 └──── one byte of a line ←── meter.rs       (report.rs, serial.rs; vCPU 0 only)
//! ```
//!
//! Only `boot.s` runs in ring 0, and only for set-up, exceptions and the ticks of the idle guest: all Rust code runs in
//! ring 3, which hosts without hardware virtualisation execute at full speed.
//!
//! # What it prints
//!
//! On the UART at 0x3f8, one line each, all ending in a line feed:
//!
//! - `R ready ws <bytes> tsc_khz <n> vcpus <n>` once, when every page is initialised.
//! - `P <period> visits <n> maxgap_us <n> bad <n> h: <b>:<n> …` every period. `visits` and the histogram belong to
//!   this period and are summed over the vCPUs; `maxgap_us` is the longest gap between two consecutive visits of any
//!   one vCPU that *ended* in this period, in whole microseconds, rounded up; `bad` counts corrupt visits since the
//!   start. `h:` gives the gaps' distribution: `b:n` says that n gaps took at least 2^b and less than 2^(b+1) ticks
//!   of the TSC (b = 0 includes gaps of 0); empty buckets are left out. The sum of the n is `visits`.
//! - `G <period> visits <n> t: <b>:<n> …` after it with `gaps=fine`: how long the visits themselves took, of all vCPUs, in
//!   eight buckets an octave. That is the gap less what the guest did in it on its own account, which is to print, to wait
//!   for its pace, and to sleep: the time from the last reading of the TSC before the visit to the reading after it.
//!   Bucket b = 8·o + s holds times of at least 2^o·(1 + s/8) ticks and less than 2^o·(1 + (s + 1)/8); 0 ticks count as 1;
//!   empty buckets are left out. `visits` is the sum of the n; it is that of the `P` line, but for visits that other vCPUs
//!   made between the two readings, which are in the next period's. A blackout that hits the guest while it waits is in no
//!   `G` line, and in the `P` line.
//! - `V <period> cpu <i> visits <n> maxgap_us <n>` after it for each vCPU but the first, so that a dead one is noticed.
//! - `B page <n> counter <got> expected <n> word <i> got <x> expected <y>` for the first few corrupt visits of each
//!   vCPU. The counter is word 0; the word shown is the first wrong one of those that were compared, or the last
//!   compared where only the counter is wrong.
//! - `E <reason>` where it cannot start, `X …` where it hit an exception or panicked. Both end the guest.
//!
//! The end goes through the debug-exit port 0xf4: 0 after `stop` periods, 1 after `E`, 2 after `X`. The VMM's exit
//! status is twice that plus 1 (under QEMU with `-device isa-debug-exit,iobase=0xf4,iosize=4`).
//!
//! Each byte printed costs an exit to the VMM: 50 to 100 µs on a software-virtualised host, 1 % of a period of 1 s but
//! about all of one of 10 ms.
//!
//! # No blind spot
//!
//! A guest stands still wherever it happens to be, so there is no moment that the meter does not cover. Each visit
//! reads the TSC once, and the gap to the visit before is counted, whatever was done in between: a line is formatted
//! into a buffer and leaves it a byte at a time, at most one access to the UART between two visits (while waiting for
//! its pace, or before it sleeps, a guest prints as much as it can). No timestamp is ever reset. A period ends at the
//! first visit after its time is up; one that was overrun by a whole period or more is as long as it is, the next one
//! starts from now, and its number is one higher. A period stays open while the buffer has no room for its lines. Of
//! other vCPUs, what a report narrowly misses is in the next one. A TSC that steps back shows as an absurdly long
//! gap, on purpose.
//!
//! # Parameters
//!
//! On the command line, separated by spaces, the last of a kind counting; anything unknown or malformed ends the guest:
//!
//! | parameter | default | |
//! |---|---|---|
//! | `ws=` | `256M` | working set in bytes, a multiple of 4096; `K`, `M`, `G` are understood |
//! | `vcpus=` | `1` | vCPUs that share it (APIC ids from 0 on) |
//! | `pace=` | `0` | at least so many ns between two visits of a vCPU (`once`: default 100000) |
//! | `period=` | `1000` | ms between reports, from 10 on |
//! | `seed=` | `1` | of page contents and of every random choice |
//! | `tsc_khz=` | `0` | 0: measured against the PIT |
//! | `hot=`, `hotvisits=` | `10`, `90` | `hotset`: so many percent of the visits go to so many percent of the pages |
//! | `writes=` | `5`, `100` | `reader`, `hotset`: percentage of visits that write |
//! | `gaps=` | `octaves` | `fine`: report the times of visits too, in `G` lines |
//! | `stop=` | `0` | end after so many periods; 0: never |
//! | `corrupt=` | `0` | at this visit of vCPU 0, flip a bit first, to prove that it is noticed; 0: never |

#![no_std]

mod clock;
mod cpu;
pub mod host_file;
mod lapic;
mod memory;
mod meter;
mod pages;
mod params;
mod platform;
mod report;
mod rng;
mod run;
mod serial;
mod smp;
mod start_info;
mod symbols;
mod traps;
mod work;
pub mod workload;

pub use params::Params;
pub use run::run;

/// Makes a program of a [`workload::Workload`].
#[macro_export]
macro_rules! guest {
    ($workload:ty) => {
        /// What every vCPU runs once it is in ring 3.
        // SAFETY: no other symbol has this name: a program contains this macro once, and the library only declares it.
        #[unsafe(no_mangle)]
        extern "Rust" fn guest_main(cpu: usize) -> ! {
            $crate::run::<$workload>(cpu)
        }
    };
}
