//! Hands a guest from machine to machine inside one process, its memory copied while it is paused, and says how long pausing,
//! saving, loading and entering took: `relay KERNEL COMMAND-LINE MIB VCPUS TIMES`. Memory apart, this is the blackout's floor.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use switchover_hybrid::machine::Machine;
use switchover_runtime::config::{DirtyTracking, SerialTarget, VmConfig};
use switchover_runtime::vm::Vm;
use switchover_wire::clock::Nanos;
use switchover_wire::types::PageCount;

/// How long the guest runs on each machine.
const STAY: Duration = Duration::from_millis(50);

fn main() -> ExitCode {
    match relay() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn relay() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [kernel, append, mebibytes, vcpus, times] = arguments.as_slice() else {
        return Err("usage: relay KERNEL COMMAND-LINE MIB VCPUS TIMES".into());
    };
    let config = VmConfig {
        kernel: Some(kernel.into()),
        append: append.clone(),
        initrd: None,
        memory: PageCount(mebibytes.parse::<u64>()? * 256),
        vcpus: vcpus.parse()?,
        serial: SerialTarget::Stdio,
        lazy_memory: false,
        host_files: None,
        dirty_tracking: DirtyTracking::Auto,
    };
    let mut spans: [Vec<u64>; 4] = Default::default();
    let mut vm = Vm::boot(&config)?;
    vm.cont()?;
    for _ in 0..times.parse::<u32>()? {
        std::thread::sleep(STAY);
        let (next, took) = hand_over(&vm, &config)?;
        for (spans, span) in spans.iter_mut().zip(took) {
            spans.push(span);
        }
        vm = next;
    }
    std::thread::sleep(STAY);
    println!("{} at the end{}", vm.run_state(), vm.status_reason().unwrap_or_default());
    for (what, mut spans) in ["pause", "save", "load", "resume to first entry"].into_iter().zip(spans) {
        spans.sort_unstable();
        let (median, worst) = (spans.get(spans.len() / 2), spans.last());
        println!("{what}: median {median:?} ns, worst {worst:?} ns, {} times", spans.len());
    }
    Ok(())
}

fn hand_over(source: &Vm, config: &VmConfig) -> Result<(Arc<Vm>, [u64; 4]), Box<dyn Error>> {
    let destination = Vm::incoming(config)?;
    let asked = Nanos::now();
    source.pause()?;
    let paused = Nanos::now();
    let state = source.save_state()?;
    let saved = Nanos::now();
    let (from, to) = (source.ram(), destination.ram());
    // SAFETY: two live mappings of the same configured length; the source is paused and the destination has not run.
    unsafe { std::ptr::copy_nonoverlapping(from.guest_base(), to.alias_base(), from.len_bytes()) };
    let copied = Nanos::now();
    destination.load_state(&state)?;
    let loaded = Nanos::now();
    source.surrender_right_to_run();
    destination.take_right_to_run();
    let resuming = Nanos::now();
    destination.resume()?;
    let entered = loop {
        match destination.first_entry() {
            Some(entered) => break entered,
            None => std::thread::yield_now(),
        }
    };
    let took = [paused.since(asked), saved.since(paused), loaded.since(copied), entered.since(resuming)];
    Ok((destination, took))
}
