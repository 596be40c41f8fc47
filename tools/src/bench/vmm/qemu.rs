//! QEMU's machines: the same guest, memory and vCPUs, on KVM.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use switchover_hybrid::report::SideReport;
use switchover_wire::clock::Nanos;

use super::{Account, Machine, Peer, Vmm};
use crate::bench::modes::SOURCE;
use crate::bench::run_error::RunError;
use crate::qmp_client::QmpClient;

mod event;
mod find;
mod ways;

/// What the bench knows of QEMU.
pub const PEER: Peer = Peer { name: NAME, title: "QEMU", modes: ways::ALL, find: find::find };

const NAME: &str = "qemu";

/// One program, started as a source and as a destination.
#[derive(Clone, Debug)]
struct Qemu {
    program: PathBuf,
}

impl Vmm for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    /// As `debug-threads=on` names them: `CPU 0/KVM`.
    fn is_vcpu_thread(&self, name: &str) -> bool {
        name.strip_prefix("CPU ").is_some_and(|rest| rest.ends_with("/KVM"))
    }

    fn source(&self, machine: &Machine, qmp: &Path) -> Command {
        let mut command = self.machine(machine, qmp);
        command.arg("-kernel").arg(&machine.kernel).arg("-append").arg(&machine.append);
        command
    }

    fn destination(&self, machine: &Machine, qmp: &Path) -> Command {
        let mut command = self.machine(machine, qmp);
        command.args(["-incoming", "defer"]);
        command
    }

    fn report(&self, _who: &'static str, _qmp: &mut QmpClient) -> Result<Option<SideReport>, RunError> {
        Ok(None)
    }

    fn account(&self, source: &mut QmpClient, destination: &mut QmpClient) -> Result<Account, RunError> {
        let answer = source.execute("query-migrate", json!({})).map_err(RunError::on(SOURCE))?;
        Ok(account(&answer, &destination.take_events()))
    }
}

impl Qemu {
    fn machine(&self, machine: &Machine, qmp: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["-name", "debug-threads=on", "-nodefaults", "-no-user-config", "-display", "none"]);
        // Host CPUs that KVM knows only in part are no trouble to this model; its nested virtualisation would be.
        command.args(["-machine", "pc", "-accel", "kvm", "-cpu", "qemu64,-svm"]);
        command.args(["-smp", &machine.vcpus.to_string(), "-m", &format!("{}B", machine.memory.0.bytes())]);
        command.args(["-chardev", "stdio,id=serial0,signal=off", "-serial", "chardev:serial0"]);
        let mut socket = OsString::from("unix:");
        socket.push(qmp);
        socket.push(",server=on,wait=off");
        command.arg("-qmp").arg(socket);
        command
    }
}

/// What the source's `query-migrate` and the destination's events tell.
fn account(answer: &Value, destination: &[Value]) -> Account {
    let ms = |key: &str| answer.get(key).and_then(Value::as_u64).and_then(|ms| ms.checked_mul(1_000_000));
    let ram = |key: &str| answer.get("ram").and_then(|ram| ram.get(key)).and_then(Value::as_u64);
    let drain_bytes = ram("postcopy-bytes").filter(|bytes| *bytes > 0);
    // Not from `RESUME` on: on a busy host that comes late, when much has crossed already.
    let listens = event::at(destination, |event| event::is_migration(event, "postcopy-active"));
    let completed = event::at(destination, |event| event::is_migration(event, "completed"));
    let drain = listens.zip(completed).and_then(|(Nanos(from), Nanos(to))| to.checked_sub(from));
    Account {
        own_downtime_ns: ms("downtime"),
        total_ns: ms("total-time"),
        setup_ns: ms("setup-time"),
        drain_ns: drain.filter(|_| drain_bytes.is_some()),
        drain_bytes,
        wire_bytes: ram("transferred"),
        page_requests: ram("postcopy-requests"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(command: &Command) -> Vec<String> {
        command.get_args().map(|word| word.to_string_lossy().into_owned()).collect()
    }

    fn machine() -> Machine {
        Machine {
            kernel: "/guest.elf".into(),
            append: "ws=1M vcpus=2".to_owned(),
            memory: "512M".parse().unwrap(),
            vcpus: 2,
        }
    }

    #[test]
    fn both_ends_are_the_same_machine_and_only_the_source_boots() {
        let qemu = Qemu { program: "/bin/qemu".into() };
        let source = qemu.source(&machine(), Path::new("/s.qmp"));
        let (source_words, there) = (words(&source), words(&qemu.destination(&machine(), Path::new("/s.qmp"))));
        assert_eq!(source.get_program(), "/bin/qemu");
        let same = source_words.len() - 4;
        assert_eq!(source_words[..same], there[..same]);
        assert_eq!(source_words[same..], ["-kernel", "/guest.elf", "-append", "ws=1M vcpus=2"]);
        assert_eq!(there[same..], ["-incoming", "defer"]);
        for pair in [
            ["-smp", "2"],
            ["-m", "536870912B"],
            ["-accel", "kvm"],
            ["-cpu", "qemu64,-svm"],
            ["-serial", "chardev:serial0"],
            ["-qmp", "unix:/s.qmp,server=on,wait=off"],
        ] {
            assert!(there.windows(2).any(|words| words == pair), "{pair:?} is not in {there:?}");
        }
    }

    #[test]
    fn vcpus_are_told_from_other_threads() {
        let qemu = Qemu { program: "/bin/qemu".into() };
        for (name, vcpu) in
            [("CPU 0/KVM", true), ("CPU 11/KVM", true), ("qemu-system-x86", false), ("live_migration", false)]
        {
            assert_eq!(qemu.is_vcpu_thread(name), vcpu, "{name}");
        }
    }

    fn said(event: &str, data: &Value, micros: u64) -> Value {
        json!({ "event": event, "data": data, "timestamp": { "seconds": 1_000, "microseconds": micros } })
    }

    #[test]
    fn the_drain_is_as_long_as_pages_can_come_after_the_handoff() {
        let answer = json!({
            "status": "completed", "downtime": 2, "total-time": 489, "setup-time": 3,
            "ram": { "transferred": 273_334_106, "postcopy-bytes": 250_000_000, "postcopy-requests": 70 },
        });
        let events = [
            said("MIGRATION", &json!({ "status": "active" }), 2_100),
            said("MIGRATION", &json!({ "status": "postcopy-active" }), 75_000),
            said("RESUME", &Value::Null, 78_000),
            said("MIGRATION", &json!({ "status": "completed" }), 475_000),
        ];
        let found = account(&answer, &events);
        assert_eq!((found.drain_ns, found.drain_bytes), (Some(400_000_000), Some(250_000_000)));
        assert_eq!((found.own_downtime_ns, found.total_ns), (Some(2_000_000), Some(489_000_000)));
        assert_eq!((found.setup_ns, found.page_requests), (Some(3_000_000), Some(70)));
        assert_eq!(account(&answer, &events[..3]).drain_ns, None);
    }

    #[test]
    fn a_pre_copy_drains_nothing() {
        let answer = json!({ "downtime": 118, "ram": { "transferred": 604_675_293, "postcopy-bytes": 0 } });
        let events = [said("RESUME", &Value::Null, 1), said("MIGRATION", &json!({ "status": "completed" }), 2)];
        let found = account(&answer, &events);
        assert_eq!((found.drain_ns, found.drain_bytes, found.wire_bytes), (None, None, Some(604_675_293)));
    }
}
