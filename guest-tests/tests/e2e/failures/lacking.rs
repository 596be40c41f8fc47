//! A host that runs out of something: memory, or room for what is logged.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use switchover_guest_tests::lab::binary;
use switchover_guest_tests::link::Ended;
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::waiting::until;

use super::cell::{CELLS, Cell, GUEST, Phase, Place, Plan};
use crate::lab;

/// A bound on what a process may still take of the host's memory: a control group, gone when it is dropped.
struct MemoryBound {
    path: PathBuf,
}

impl MemoryBound {
    /// Where the host has control groups of memory that this process may make.
    fn new(name: &str, bytes: u64) -> Option<Self> {
        let (first, second) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
        let (parent, limit) = if first.is_dir() { (first, "memory.limit_in_bytes") } else { (second, "memory.max") };
        let path = parent.join(format!("switchover-{name}-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        let bound = Self { path };
        fs::write(bound.path.join(limit), bytes.to_string()).ok()?;
        // Who asks for more shall be told so; where that cannot be set, it is killed, which must do no harm either.
        let _ = fs::write(bound.path.join("memory.oom_control"), "1");
        Some(bound)
    }

    fn take_in(&self, machine: &Machine) {
        fs::write(self.path.join("cgroup.procs"), machine.pid().to_string()).unwrap();
    }
}

impl Drop for MemoryBound {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

/// Memory for the guest is reserved before a destination listens, and is then the guest's, whatever the host has left.
#[test]
fn a_destination_without_memory_for_the_guest_does_not_begin() {
    let lab = lab!("a_destination_without_memory_for_the_guest_does_not_begin");
    let Some(bound) = MemoryBound::new("populate", 24 << 20) else {
        println!("SKIP a_destination_without_memory_for_the_guest_does_not_begin: no control groups of memory");
        return;
    };
    let incoming = format!("unix:{}", lab.path("lane").display());
    let script = "echo $$ > \"$0\" && exec \"$@\"";
    let ended = Command::new("sh")
        .args(["-c", script, bound.path.join("cgroup.procs").to_str().unwrap(), binary().to_str().unwrap()])
        .args(["run", "--memory", "64M", "--incoming", &incoming])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    // Where the kernel's killer cannot be switched off, it is quicker than any sentence.
    assert!(!ended.status.success(), "{said}");
    if let Some(status) = ended.status.code() {
        assert!(status == 1 && said.contains("cannot reserve 67108864 bytes of guest RAM"), "{said}");
    }
    for plan in [Plan::Postcopy, Plan::StopAndCopy] {
        let cell = Cell::begin(&lab, plan, Phase::Acknowledged, &lab.guest("random", GUEST));
        bound.take_in(&cell.there);
        let cell = cell.come_to_phase();
        cell.link.let_go();
        cell.ends_well();
    }
}

/// Lets a process have no more address space than it has.
fn take_address_space(machine: &Machine, limit: Option<u64>) {
    let limit = limit.map_or_else(|| "unlimited".to_owned(), |bytes| bytes.to_string());
    let pid = machine.pid().to_string();
    let done = Command::new("prlimit").args(["--pid", &pid, &format!("--as={limit}:unlimited")]).status();
    assert!(done.unwrap().success());
}

fn address_space(machine: &Machine) -> u64 {
    let pages = fs::read_to_string(format!("/proc/{}/statm", machine.pid())).unwrap();
    pages.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096
}

/// Whatever of its own a destination can no longer allocate: it does without, or fails as one that is killed does.
#[test]
fn a_destination_that_can_allocate_no_more() {
    let lab = lab!("a_destination_that_can_allocate_no_more");
    for (plan, phase) in CELLS {
        let mut cell = Cell::reach(&lab, plan, phase);
        take_address_space(&cell.there, Some(address_space(&cell.there)));
        match (plan, phase) {
            (Plan::Rounds, _) => {
                cell.source.execute("migrate_cancel", json!({}));
                cell.link.let_go();
                cell.source_goes_on("cancelled");
                until("the destination has ended", || cell.there.has_ended());
                continue;
            }
            (_, Phase::Handshake) => cell.source.execute("migrate-start-postcopy", json!({})),
            _ => json!({}),
        };
        cell.link.let_go();
        let (status, _) = Cell::status(&mut cell.source, &["completed", "failed", "postcopy-paused"]);
        match (&*status, cell.there.has_ended()) {
            ("failed", _) => {
                // In its handshake it may still wait for another source, as far as it can.
                if phase == Phase::Handshake && cell.there.has_ended().is_none() {
                    cell.there.kill();
                }
                until("the destination has ended", || cell.there.has_ended());
                assert!(matches!(cell.place(), Place::Source | Place::SourceAlone | Place::Nowhere));
                assert!(cell.there.serial().to_end().is_empty(), "a guest ran at both sides");
                cell.source_runs();
                cell.moves_after_all(&lab);
            }
            ("completed", _) => cell.ends_well(),
            (_, None) => {
                take_address_space(&cell.there, None);
                let to = cell.link.address().to_owned();
                cell.join_again(&to);
                cell.ends_well();
            }
            (_, Some(how)) => {
                println!("   the destination has ended: {how}");
                cell.source.execute("x-switchover-reclaim", json!({}));
                cell.source_runs();
            }
        }
    }
}

#[test]
fn a_disk_that_is_full_of_logs_changes_nothing() {
    let lab = lab!("a_disk_that_is_full_of_logs_changes_nothing");
    let spec = Spec { no_room_for_logs: true, ..lab.guest("random", GUEST) };
    for (plan, phase) in CELLS {
        println!("-- {plan:?}, {phase:?}");
        let mut cell = Cell::begin(&lab, plan, phase, &spec).come_to_phase();
        match (plan, phase, cell.place()) {
            (Plan::Rounds, ..) | (_, Phase::Handshake, _) => {
                cell.source.execute("migrate_cancel", json!({}));
                cell.link.let_go();
                cell.source_goes_on("cancelled");
                if phase != Phase::Handshake {
                    assert_eq!(cell.there.wait_end(), 1);
                }
                cell.moves_after_all(&lab);
            }
            (_, _, Place::Split) => {
                cell.link.cut(Ended::Reset);
                cell.source_waits();
                cell.link.mend();
                let to = cell.link.address().to_owned();
                cell.join_again(&to);
                cell.ends_well();
            }
            _ => {
                cell.link.let_go();
                cell.ends_well();
            }
        }
    }
}
