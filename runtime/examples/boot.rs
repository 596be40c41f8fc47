//! Boots a kernel on the bare machine, without a controller: `boot KERNEL [COMMAND-LINE [MIB [VCPUS]]]`.

use std::error::Error;
use std::process::ExitCode;

use switchover_runtime::config::{DirtyTracking, SerialTarget, VmConfig};
use switchover_runtime::run_state::ExitReason;
use switchover_runtime::vm::Vm;
use switchover_wire::types::PageCount;

fn main() -> ExitCode {
    boot().unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::FAILURE
    })
}

fn boot() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let kernel = arguments.next().ok_or("usage: boot KERNEL [COMMAND-LINE [MIB [VCPUS]]]")?;
    let append = arguments.next().unwrap_or_default();
    let mebibytes: u64 = arguments.next().map_or(Ok(64), |text| text.parse())?;
    let vcpus = arguments.next().map_or(Ok(1), |text| text.parse())?;
    let vm = Vm::boot(&VmConfig {
        kernel: Some(kernel.into()),
        append,
        initrd: None,
        memory: PageCount(mebibytes * 256),
        vcpus,
        serial: SerialTarget::Stdio,
        lazy_memory: false,
        host_files: None,
        dirty_tracking: DirtyTracking::Auto,
    })?;
    vm.cont()?;
    match vm.wait_exit() {
        ExitReason::Guest(status) => Ok(ExitCode::from(u8::try_from(status & 0xff)?)),
        reason => Err(format!("{reason:?}").into()),
    }
}
