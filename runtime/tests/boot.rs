//! A kernel is booted on real KVM, or refused with a reason.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking; its helpers are tests too")]

mod common;

use std::io::Write;

use common::{Guest, PRINTER, elf, kvm};
use switchover_runtime::error::VmError;
use switchover_runtime::run_state::{ExitReason, RunState};
use switchover_runtime::vm::Vm;
use switchover_wire::types::PageCount;

#[test]
fn a_guest_prints_its_command_line_and_ends() {
    if !kvm("a_guest_prints_its_command_line_and_ends") {
        return;
    }
    let guest = Guest::new(PRINTER);
    let vm = guest.boot(1);
    assert_eq!(vm.run_state(), RunState::Prelaunch);
    vm.cont().unwrap();
    assert_eq!(vm.wait_exit(), ExitReason::Guest(0x21));
    assert_eq!(guest.printed(), "quick brown fox");
    assert_eq!(vm.run_state(), RunState::Shutdown);
}

#[test]
fn the_keyboard_controller_and_a_triple_fault_reset() {
    if !kvm("the_keyboard_controller_and_a_triple_fault_reset") {
        return;
    }
    // mov al, 0xfe; out 0x64, al; hlt — and ud2 without an interrupt table.
    for code in [&[0xb0, 0xfe, 0xe6, 0x64, 0xf4][..], &[0x0f, 0x0b]] {
        let vm = Guest::new(code).boot(1);
        vm.cont().unwrap();
        assert_eq!(vm.wait_exit(), ExitReason::Shutdown);
    }
}

/// The error of booting these bytes.
fn refused(file: &[u8], memory: PageCount) -> String {
    let guest = Guest::new(PRINTER);
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(file).unwrap();
    let mut config = guest.config(1);
    config.kernel = Some(kernel.path().to_owned());
    config.memory = memory;
    match Vm::boot(&config) {
        Err(error @ VmError::Boot { .. }) => error.to_string(),
        other => panic!("{:?}", other.map(|vm| vm.run_state())),
    }
}

#[test]
fn bad_kernels_are_refused_with_a_reason() {
    if !kvm("bad_kernels_are_refused_with_a_reason") {
        return;
    }
    let good = elf(PRINTER);
    let memory = PageCount(1024);
    assert!(refused(b"#!/bin/sh", memory).contains("not an ELF file"));
    for length in [20, 100, 200, good.len() - 1] {
        assert!(refused(&good[..length], memory).contains("truncated"), "of {length} bytes");
    }
    let mut other = good.clone();
    other[18] = 183;
    assert!(refused(&other, memory).contains("x86-64"));
    let mut no_note = good.clone();
    no_note[64 + 56 * 2 + 8] = 17;
    assert!(refused(&no_note, memory).contains("PVH note"));
    // The segment's size in memory.
    let mut large = good.clone();
    large[64 + 40..64 + 48].copy_from_slice(&(64_u64 << 20).to_le_bytes());
    assert!(refused(&large, memory).contains("does not fit in the guest's RAM"));
    let mut low = good;
    low[64 + 24..64 + 32].copy_from_slice(&0x6000_u64.to_le_bytes());
    assert!(refused(&low, memory).contains("overlaps the boot information"));
}

#[test]
fn an_initrd_arrives_as_a_module() {
    if !kvm("an_initrd_arrives_as_a_module") {
        return;
    }
    // mov esi, [ebx + 16]; mov ecx, [esi + 8]; mov esi, [esi]; mov dx, 0x3f8; rep outsb; out 0xf4, al; hlt
    let code = [0x8b, 0x73, 0x10, 0x8b, 0x4e, 0x08, 0x8b, 0x36, 0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e, 0xe6, 0xf4, 0xf4];
    let guest = Guest::new(&code);
    let mut initrd = tempfile::NamedTempFile::new().unwrap();
    let contents: String = (0..5000).map(|n| char::from(b'a' + u8::try_from(n % 26).unwrap())).collect();
    initrd.write_all(contents.as_bytes()).unwrap();
    let mut config = guest.config(1);
    config.initrd = Some(initrd.path().to_owned());
    let vm = Vm::boot(&config).unwrap();
    vm.cont().unwrap();
    assert!(matches!(vm.wait_exit(), ExitReason::Guest(_)));
    assert_eq!(guest.printed(), contents);
}

#[test]
fn what_the_host_cannot_give_is_refused() {
    if !kvm("what_the_host_cannot_give_is_refused") {
        return;
    }
    let guest = Guest::new(PRINTER);
    let refused = |change: &dyn Fn(&mut switchover_runtime::config::VmConfig)| {
        let mut config = guest.config(1);
        change(&mut config);
        Vm::boot(&config).err().unwrap()
    };
    assert!(matches!(refused(&|config| config.vcpus = 0), VmError::VcpuCount { asked: 0, .. }));
    assert!(matches!(refused(&|config| config.memory = PageCount(4)), VmError::MemorySize { .. }));
    assert!(matches!(refused(&|config| config.kernel = None), VmError::NoKernel));
    assert!(matches!(refused(&|config| config.kernel = Some("/does/not/exist".into())), VmError::ReadFile { .. }));
    assert!(matches!(refused(&|config| config.append = "x".repeat(70_000)), VmError::Boot { .. }));
}
