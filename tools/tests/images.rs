//! `switchover image` on images that are made here.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use switchover_image::Tally;
use switchover_image::sections::{Origin, Sections};
use switchover_image::writer::{ImageWriter, Options};
use switchover_pager::ram::Ram;
use switchover_runtime::state::{Kind, SectionId, StateWriter};
use switchover_wire::description::{MachineDescription, RamRegion};
use switchover_wire::types::{PageCount, PageIndex};

const PAGES: u64 = 300;

/// An image whose page 7 and 299 hold `byte`, and whose serial port does too.
fn make(path: &Path, byte: u8, compress: bool) {
    let ram = Ram::new(PageCount(PAGES)).unwrap();
    for page in [7, 299] {
        ram.file().write_all_at(&[byte; 9], PageIndex(page).offset()).unwrap();
    }
    let mut state = StateWriter::new();
    state.add(SectionId::new(Kind::Vcpu, 0), &1_u32).unwrap();
    state.add(SectionId::new(Kind::Serial, 0), &byte).unwrap();
    let machine = MachineDescription {
        architecture: "x86_64".to_owned(),
        page_size: 4096,
        ram: vec![RamRegion { guest_address: 0, pages: PageCount(PAGES) }],
        vcpus: 1,
        cpuid: Vec::new(),
        xcr0: 7,
        msrs: Vec::new(),
        tsc_khz: 2_000_000,
        devices: vec!["serial".to_owned()],
        state_version: 1,
    };
    let origin = Origin { version: "a test".to_owned(), saved_at: 1_764_000_000 };
    let sections = Sections { machine, state: state.finish(), was_running: true, first_pages: Vec::new(), origin };
    let writer = ImageWriter::create(path, PageCount(PAGES), Options { compress }).unwrap();
    writer.write_memory(ram.file(), &Tally::default()).unwrap();
    writer.commit(&sections).unwrap();
}

fn image(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_switchover"));
    let Output { status, stdout, stderr } = command.arg("image").args(arguments).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn images_are_inspected_verified_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let [one, packed, other] = ["one", "packed", "other"].map(|name| path(name).display().to_string());
    make(one.as_ref(), 5, false);
    make(packed.as_ref(), 5, true);
    make(other.as_ref(), 6, false);

    let (status, text, _) = image(&["inspect", &one]);
    assert_eq!(status, Some(0));
    for part in ["2025-11-24T16:00:00Z by a test, running", "2 of 300 pages are not zero", "vCPU 0 1, serial port 0 1"]
    {
        assert!(text.contains(part), "{text}");
    }
    let (_, text, _) = image(&["inspect", &packed, "--json"]);
    let told: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&told["memory"]["present-pages"], &told["packed"]), (&2.into(), &true.into()), "{told}");
    assert_eq!(told["state-sections"][1]["name"], "serial port 0");

    let (status, text, _) = image(&["verify", &one, &packed, &other]);
    assert_eq!((status, text.lines().count()), (Some(0), 3));
    assert!(text.contains(told["root"].as_str().unwrap()), "{text}");

    let (status, text, _) = image(&["diff", &one, &packed]);
    assert_eq!((status, text.as_str()), (Some(0), "the same guest\n"));
    let (status, text, _) = image(&["diff", &one, &other]);
    assert_eq!(status, Some(1));
    assert_eq!(text, "state    serial port 0\nmemory   2 pages: 0x7, 0x12b\n");

    File::options().write(true).open(&one).unwrap().write_all_at(&[9], 4096 + 7 * 4096).unwrap();
    for arguments in [&["verify", &other, &one][..], &["diff", &other, &one]] {
        let (status, _, error) = image(arguments);
        assert!(status == Some(1) && error.contains("chunk 0 of memory"), "{error}");
    }
    fs::write(&one, "something else").unwrap();
    let (status, _, error) = image(&["inspect", &one]);
    assert!(status == Some(1) && error.contains("no image of a guest"), "{error}");
}
