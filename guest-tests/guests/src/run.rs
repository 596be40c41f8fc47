//! From the first instruction in ring 3 to the first visit.

use core::fmt;
use core::hint::spin_loop;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::SeqCst};

use crate::clock::Clock;
use crate::memory::Memory;
use crate::pages::{PAGE_BYTES, Part};
use crate::params::Params;
use crate::platform::{self, EXIT_REFUSED};
use crate::report::Reporter;
use crate::start_info::{COMMAND_LINE_MAX, StartInfo};
use crate::work::work;
use crate::workload::Workload;
use crate::{cpu, lapic, serial, smp, traps};

/// What all vCPUs must know.
struct Plan {
    params: Params,
    clock: Clock,
    memory: Memory,
}

static PLAN: AtomicPtr<Plan> = AtomicPtr::new(ptr::null_mut());
static FILLED: AtomicUsize = AtomicUsize::new(0);
static GO: AtomicBool = AtomicBool::new(false);

/// What every vCPU runs, from its arrival in ring 3 on.
pub fn run<W: Workload>(cpu: usize) -> ! {
    if cpu == 0 { first::<W>() } else { other::<W>(cpu) }
}

fn first<W: Workload>() -> ! {
    traps::init();
    platform::quiet();
    serial::init();
    let mut plan = plan::<W>();
    let (params, clock) = (plan.params, plan.clock);

    PLAN.store(&raw mut plan, SeqCst);
    lapic::enable();
    for cpu in 1..params.vcpus {
        if !smp::start(cpu, clock) {
            refuse(format_args!("vCPU {cpu} does not start: has the machine so many?"));
        }
    }
    let part = part(&plan, 0);
    part.fill();
    FILLED.fetch_add(1, SeqCst);
    while FILLED.load(SeqCst) < params.vcpus {
        spin_loop();
    }
    if W::SLEEPS {
        platform::start_tick();
    }
    let now = cpu::tsc();
    let mut reporter = Reporter::new(clock, &params, now);
    let ws = params.pages * PAGE_BYTES;
    reporter.line(format_args!("R ready ws {ws} tsc_khz {} vcpus {}", clock.khz(), params.vcpus));
    GO.store(true, SeqCst);
    work::<W>(0, &params, clock, part, Some(&mut reporter), now)
}

fn other<W: Workload>(cpu: usize) -> ! {
    smp::arrived();
    lapic::enable();
    // SAFETY: it was stored before this CPU was started, and lives as long as the guest: `first` never returns. Both
    // CPUs only read it from then on.
    let plan = unsafe { &*PLAN.load(SeqCst) };
    let part = part(plan, cpu);
    part.fill();
    if W::SLEEPS {
        lapic::start_tick();
    }
    FILLED.fetch_add(1, SeqCst);
    while !GO.load(SeqCst) {
        spin_loop();
    }
    work::<W>(cpu, &plan.params, plan.clock, part, None, cpu::tsc())
}

fn part(plan: &Plan, cpu: usize) -> Part {
    Part::new(plan.memory, cpu, plan.params.vcpus, plan.params.seed)
}

fn refuse(reason: fmt::Arguments<'_>) -> ! {
    platform::fail(EXIT_REFUSED, format_args!("E {reason}"))
}

/// Gathers what is asked for and what there is; ends the guest where they do not fit.
fn plan<W: Workload>() -> Plan {
    let info = StartInfo::find().unwrap_or_else(|reason| refuse(format_args!("{reason}")));
    let mut buffer = [0; COMMAND_LINE_MAX];
    let line = info.command_line(&mut buffer).unwrap_or_else(|reason| refuse(format_args!("{reason}")));
    let params = Params::parse(line, W::PACE_NS).unwrap_or_else(|malformed| refuse(format_args!("{malformed}")));
    let Some(memory) = Memory::find(&info, params.pages) else {
        let ws = params.pages * PAGE_BYTES;
        refuse(format_args!("no region of RAM has room for a working set of {ws} bytes beside the image and a table"))
    };
    let clock = match params.tsc_khz {
        0 => Clock::measure(),
        khz => Some(Clock::new(khz)),
    };
    let Some(clock) = clock else {
        refuse(format_args!("no PIT to measure the TSC's frequency with: give it as tsc_khz="))
    };
    Plan { params, clock, memory }
}
