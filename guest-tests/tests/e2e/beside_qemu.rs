//! The same guest moves between two machines of QEMU as between two of ours, and one report has both.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use switchover_guest_tests::lab::{Lab, binary};

use crate::lab;

/// Runs `bench` to its end; every wait within it has a bound of its own.
fn bench(arguments: &[&str], out: &Path, path: Option<&Path>) -> Output {
    let mut command = Command::new(binary());
    command.arg("bench").args(arguments).arg("--out").arg(out);
    if let Some(path) = path {
        command.env("PATH", path);
    }
    command.output().unwrap()
}

/// Says why, and that the test is skipped, where QEMU is missing or too old.
fn is_there(name: &str) -> bool {
    match Command::new("qemu-system-x86_64").arg("--version").output() {
        Ok(said) if said.status.success() => {
            let said = String::from_utf8_lossy(&said.stdout);
            let major = said.split_once("version ").and_then(|(_, rest)| rest.split('.').next()?.parse::<u32>().ok());
            if major.is_some_and(|major| major >= 8) {
                return true;
            }
            println!("SKIP {name}: QEMU is too old, 8.0 is needed: {}", said.lines().next().unwrap_or_default());
        }
        _ => println!(
            "SKIP {name}: there is no qemu-system-x86_64; to change that: apt-get install -t bookworm-backports \
             qemu-system-x86"
        ),
    }
    false
}

#[test]
fn qemus_guests_are_measured_and_verified_as_ours_are() {
    let lab = lab!("qemus_guests_are_measured_and_verified_as_ours_are");
    if !is_there("qemus_guests_are_measured_and_verified_as_ours_are") {
        return;
    }
    let out = lab.path("report");
    // A small and slow guest, so that pre-copy ends in any build; and a link on which it does not before post-copy is begun.
    let guest = ["--memory", "128M", "--append", "ws=16M pace=5000", "--bandwidth", "1G"];
    let runs = ["--runs", "1", "--seed", "5", "--warmup", "0.6", "--after", "0.8"];
    let said = bench(&[&["--peer", "qemu", "--quick"][..], &guest, &runs].concat(), &out, None);
    let (stdout, stderr) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert_eq!(said.status.code(), Some(0), "{stdout}\n{stderr}");
    assert!(stdout.contains("Beside QEMU ") && stdout.contains("qemu postcopy-preempt"), "{stdout}");

    let report: Value = serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    assert_eq!((&report["verified"], &report["settings"]["seed"]), (&Value::Bool(true), &Value::from(5)));
    let modes = report["modes"].as_array().unwrap();
    let names: Vec<_> = modes
        .iter()
        .map(|mode| format!("{} {}", mode["vmm"].as_str().unwrap(), mode["mode"].as_str().unwrap()))
        .collect();
    let all = ["precopy", "multifd", "postcopy", "postcopy-preempt", "precopy-postcopy"];
    let ours = ["precopy", "postcopy", "hybrid"].map(|mode| format!("switchover {mode}"));
    assert_eq!(names, [&ours[..], &all.map(|mode| format!("qemu {mode}"))].concat());
    for mode in modes {
        let run = &mode["runs"][0];
        for figure in ["gap_ns", "lost_s", "lost_around_s", "total_ns", "cpu_s_per_gib", "wire_bytes"] {
            assert!(run["figures"][figure].is_number(), "{figure} is missing of {} {}", mode["vmm"], mode["mode"]);
        }
        // The others may have moved it all before.
        let drains = ["postcopy", "postcopy-preempt"].iter().any(|name| mode["mode"] == *name);
        assert!(!drains || run["figures"]["drain_gbit_s"].as_f64() > Some(0.0), "{} {}", mode["vmm"], mode["mode"]);
        // Lines of both sides, in one stream without a gap: the guest went on where it had been.
        let sides: Vec<_> = run["guest"]["periods"].as_array().unwrap().iter().map(|period| &period["side"]).collect();
        assert_eq!((sides.first(), sides.last()), (Some(&&Value::from("source")), Some(&&Value::from("destination"))));
        // QEMU's word of how long its guest stood still is beside what that says, never in its place.
        assert_eq!(run["figures"]["own_downtime_ns"].is_number(), mode["vmm"] == "qemu");
        assert_eq!(run["figures"]["blackout_ns"].is_number(), mode["vmm"] != "qemu");
    }
    assert!(report["comparison"]["cells"][0]["demands"].as_array().is_some_and(|demands| demands.len() >= 8));
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("Both guests around the move") && page.contains("Blackouts that the guests saw"));
    lab.close();
}

#[test]
fn a_qemu_that_will_not_do_is_said_before_anything_is_measured() {
    let lab = Lab::without_kvm();
    let out = lab.path("report");
    let folder = lab.path("bin");
    fs::create_dir(&folder).unwrap();
    for (script, part) in
        [(None, "there is no qemu-system-x86_64 in PATH"), (Some("echo QEMU emulator version 7.2.22"), "is 7.2.22")]
    {
        if let Some(script) = script {
            let path = folder.join("qemu-system-x86_64");
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let said = bench(&["--peer", "qemu", "--quick"], &out, Some(&folder));
        let stderr = String::from_utf8_lossy(&said.stderr);
        assert_eq!(said.status.code(), Some(2), "{stderr}");
        for part in [part, "8.0 or later", "bookworm-backports", "apt-get install"] {
            assert!(stderr.contains(part), "`{part}` is not in {stderr}");
        }
        assert!(said.stdout.is_empty() && !out.exists(), "something was done before");
    }
}
