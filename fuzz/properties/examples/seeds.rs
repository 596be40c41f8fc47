//! Writes what the fuzz targets begin with into `fuzz/corpus`: one input of each form that is written somewhere. Needs KVM, for a
//! machine's saved state.
#![allow(clippy::unwrap_used, reason = "it is run by hand")]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde_json::json;
use switchover_hybrid::machine::Machine as _;
use switchover_hybrid::trace::{Epoch, Trace};
use switchover_image::Tally;
use switchover_image::sections::{Origin, Sections};
use switchover_image::working_set::{MAGIC, VERSION};
use switchover_image::writer::{ImageWriter, Options};
use switchover_pager::ram::Ram;
use switchover_runtime::config::{DirtyTracking, SerialTarget, VmConfig};
use switchover_runtime::vm::Vm;
use switchover_wire::bitmap;
use switchover_wire::checksum::Checksum;
use switchover_wire::clock::HostClock;
use switchover_wire::description::{CpuidLeaf, MachineDescription, RamRegion};
use switchover_wire::encoding::{Encoding, Page, PageEncoder, PayloadWriter};
use switchover_wire::frame::bulk::{BulkFrame, FrameFlags, Taken};
use switchover_wire::frame::fault::{FaultReply, FaultRequest, ReplyContent};
use switchover_wire::handshake::{Hello, LaneCounts, Welcome};
use switchover_wire::message::ControlMessage;
use switchover_wire::types::{LaneId, LaneRole, PAGE_SIZE, PageCount, PageIndex, SessionId};

fn write(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("corpus").join(target);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(format!("seed-{name}")), bytes).unwrap();
}

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("image") => {
            images();
            return increments();
        }
        Some("working_set") => return working_sets(),
        _ => {}
    }
    frames();
    handshake();
    tls();
    control();
    pages();
    sets();
    qmp();
    images();
    increments();
    working_sets();
    let kernel = kernel();
    write("kernel", "smallest", &kernel);
    state(&kernel);
}

fn frames() {
    let ram = 1000_u64.to_le_bytes();
    let flags = FrameFlags { precopy: true, acknowledge: true };
    for (name, frame) in [
        ("chunk", BulkFrame::Chunk { first: PageIndex(64), data: 5, zero: 2 }),
        ("zeros", BulkFrame::Zeros { first: PageIndex(3), count: PageCount(90) }),
        ("packed", BulkFrame::Packed { first: PageIndex(128), data: 3, zero: 4, payload: 100 }),
        ("check", BulkFrame::Check),
        ("end", BulkFrame::End { pages: 9 }),
    ] {
        let sum = if frame.payload() == 0 { Checksum::NONE } else { Checksum::of([&b"pages"[..]]) };
        write("frames", name, &[&ram[..], &frame.encode(flags, sum)].concat());
    }
    let page = PageIndex(7);
    write("frames", "request", &[&ram[..], &FaultRequest { page, tag: 3 }.encode()].concat());
    let sum = Checksum::of([&b"a page"[..]]);
    for (name, content, sum) in [("raw", ReplyContent::Raw, sum), ("zero", ReplyContent::Zero, Checksum::NONE)] {
        write("frames", name, &[&ram[..], &FaultReply { page, tag: 3, content }.encode(sum)].concat());
    }
    write("frames", "taken", &[&ram[..], &Taken { frames: 12 }.encode()].concat());
}

/// The first byte says who hears it: a destination (which has heard the type of a first record), a source, or one that has had its
/// handshake.
fn tls() {
    let random: Vec<u8> = (0..32).collect();
    // A ClientHello and a ServerHello of TLS 1.3, without extensions.
    let client = [&[0, 0, 3, 1, 0, 0x2f, 1, 0, 0, 0x2b, 3, 3][..], &random, &[0, 0, 2, 0x13, 2, 1, 0, 0, 0]].concat();
    write("tls", "client-hello", &client);
    let server = [&[1, 0, 22, 3, 3, 0, 0x2c, 2, 0, 0, 0x28, 3, 3][..], &random, &[0, 0x13, 2, 0, 0, 0]].concat();
    write("tls", "server-hello", &server);
    write("tls", "alert", &[1, 0, 21, 3, 3, 0, 2, 2, 40]);
    write("tls", "record", &[&[2, 7, 23, 3, 3, 0, 40][..], &[0; 40]].concat());
    write("tls", "nothing-more", &[2, 200]);
}

fn machine() -> MachineDescription {
    MachineDescription {
        architecture: "x86_64".to_owned(),
        page_size: 4096,
        ram: vec![
            RamRegion { guest_address: 0, pages: PageCount(0xC_0000) },
            RamRegion { guest_address: 1 << 32, pages: PageCount(0x4_0000) },
        ],
        vcpus: 2,
        cpuid: vec![CpuidLeaf { function: 1, index: 0, registers: [0, 0, 0x8000_0001, 0x0780_FBFF] }],
        xcr0: 7,
        msrs: vec![0x10, 0x1B, 0xC000_0080],
        tsc_khz: 2_445_000,
        devices: vec!["ioapic".to_owned(), "serial".to_owned()],
        state_version: 1,
    }
}

/// Images of four pages, two of which are zero, in both layouts. The first byte says which hashes are made right.
fn images() {
    let ram = Ram::new(PageCount(4)).unwrap();
    for (page, byte) in [(1, 0x5A), (3, 0xC3)] {
        ram.file().write_all_at(&[byte; PAGE_SIZE], PageIndex(page).offset()).unwrap();
    }
    let machine = MachineDescription { ram: vec![RamRegion { guest_address: 0, pages: ram.pages() }], ..machine() };
    let origin = Origin { version: "seeds".to_owned(), saved_at: 1_764_000_000 };
    let first_pages = vec![PageIndex(1)];
    let sections = Sections { machine, state: b"state".to_vec(), was_running: true, first_pages, origin };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for (name, compress) in [("in-place", false), ("packed", true)] {
        let writer = ImageWriter::create(&path, ram.pages(), Options { compress }).unwrap();
        writer.write_memory(ram.file(), &Tally::default()).unwrap();
        writer.commit(&sections).unwrap();
        let image = fs::read(&path).unwrap();
        let hashed = compress.then_some(("hashed", 3));
        for (how, mended) in [("as-it-is", 0), ("rooted", 1)].into_iter().chain(hashed) {
            write("image", &format!("{name}-{how}"), &[&[mended][..], &image].concat());
        }
    }
}

/// The differences to the property's base: a page that is another, and one that is zero.
fn increments() {
    let folder = tempfile::tempdir().unwrap();
    let base = switchover_properties::image::base(folder.path());
    let path = folder.path().join("image");
    let read = |first: PageIndex, bytes: &mut [u8]| {
        for (page, bytes) in (first.0..).zip(bytes.chunks_mut(PAGE_SIZE)) {
            bytes.fill(if page == 1 { 0x5A } else { 0 });
        }
        Ok(())
    };
    let writer = ImageWriter::create_on(base, &path, PageCount(4)).unwrap();
    writer.rewrite(&read, &[0b1010], &|_, _| Ok(()), &Tally::default()).unwrap();
    writer.settle(&Tally::default()).unwrap();
    writer.commit(&switchover_properties::image::sections()).unwrap();
    let image = fs::read(&path).unwrap();
    for (how, mended) in [("as-it-is", 0), ("rooted", 1)] {
        write("image", &format!("increment-{how}"), &[&[mended][..], &image].concat());
    }
}

/// Working sets of the property's image. The first byte says what is made right: its root hash, and the hash at the end.
fn working_sets() {
    let file = |pages: &[u32]| {
        let entries = u32::try_from(pages.len()).unwrap();
        let header = MAGIC.into_iter().chain(VERSION.to_le_bytes()).chain(entries.to_le_bytes()).chain([0; 32]);
        let entry = |page: &u32| page.to_le_bytes().into_iter().chain([0xA5; 16]);
        header.chain(pages.iter().flat_map(entry)).chain([0; 32]).collect::<Vec<u8>>()
    };
    for (name, pages) in [("none", &[][..]), ("three", &[7, 299, 1]), ("zero-page", &[7, 2]), ("twice", &[7, 9, 7])] {
        write("working_set", name, &[&[3][..], &file(pages)].concat());
    }
    write("working_set", "another-image", &[&[2][..], &file(&[7])].concat());
}

fn handshake() {
    let clock = HostClock { boot_id: "9a0c32d1-9f4e-4c0f-8f3e-0b9b6d0c7a11".to_owned() };
    let hello = |role, description| Hello {
        version_min: 3,
        version_max: 3,
        session: SessionId([9; 16]),
        lane: LaneId { role, index: 0 },
        lanes: LaneCounts { fault: 1, bulk: 2 },
        description,
        clock: clock.clone(),
        capabilities: 5,
        proof: None,
    };
    let body = |value: &Hello| postcard::to_stdvec(value).unwrap();
    let wrapped = |how: u8, body: &[u8]| [&[how], body].concat();
    write("handshake", "control", &wrapped(2, &body(&hello(LaneRole::Control, Some(machine())))));
    write("handshake", "bulk", &wrapped(2, &body(&hello(LaneRole::Bulk, None))));
    let welcome = postcard::to_stdvec(&(0_u8, Welcome { version: 3, clock: clock.clone() })).unwrap();
    write("handshake", "welcome", &wrapped(3, &welcome));
    write("handshake", "refused", &wrapped(3, &postcard::to_stdvec(&(1_u8, "it has no memory\n")).unwrap()));
    write("handshake", "challenge", &wrapped(3, &[&[2][..], &[7; 32]].concat()));
    write("handshake", "foreign", b"\x00GET / HTTP/1.1\r\n\r\n");
    let text = body(&hello(LaneRole::Fault, None));
    let length = u32::try_from(text.len()).unwrap().to_le_bytes();
    let whole = [b"\x00\x93SWOVR\r\n", &length[..], &crc32fast::hash(&text).to_le_bytes(), &text].concat();
    write("handshake", "whole", &whole);
}

fn control() {
    let set = bitmap::encode(&[0, 5, u64::MAX, u64::MAX]);
    for message in [
        ControlMessage::Prepared { clock: HostClock { boot_id: "a boot".to_owned() } },
        ControlMessage::State { state: vec![3; 40], was_running: true },
        ControlMessage::Refused { reason: "no\u{7} memory".to_owned() },
        ControlMessage::Commit,
        ControlMessage::Drained { first_entry_ns: Some(5), last_page_ns: 1 << 40 },
        ControlMessage::Missing { first: PageIndex(64), pages: PageCount(256), set, complete_first: false },
    ] {
        write("control", &message.name().to_lowercase(), &postcard::to_stdvec(&message).unwrap());
    }
}

fn pages() {
    let mut page: Page = [0; PAGE_SIZE];
    page.iter_mut().zip((0..=u8::MAX).cycle()).for_each(|(place, number)| *place = number & 0xF0);
    let old = page;
    page[100..108].copy_from_slice(b"changed!");
    page[3000] = 1;
    let (mut encoder, mut writer) = (PageEncoder::new(1), PayloadWriter::default());
    writer.begin(0, 4);
    assert!(encoder.lz4(&page, PAGE_SIZE, writer.body()));
    writer.finish_page(Encoding::Lz4);
    assert!(encoder.zstd(&page, PAGE_SIZE, writer.body()));
    writer.finish_page(Encoding::Zstd);
    assert!(encoder.delta(&old, &page, PAGE_SIZE, writer.body()));
    writer.finish_page(Encoding::Delta);
    PageEncoder::same(PageIndex(6), &blake3::hash(&old), writer.body());
    writer.finish_page(Encoding::Same);
    let masks = [0b10_1011_u64.to_le_bytes(), 0b100_u64.to_le_bytes()].concat();
    write("payload", "packed", &[&masks, &*writer.bytes()].concat());
    writer.begin(0, 1);
    writer.body().extend_from_slice(&page);
    writer.finish_page(Encoding::Raw);
    write("payload", "raw", &[&1_u64.to_le_bytes(), &[0; 8][..], writer.bytes()].concat());
    write("pages", "changes", &[0, 100, 0, 4, b'a', b'b', b'c', b'd', 0, 12, 2, b'e', b'f']);
    write("pages", "anew", b"\x01some text again and again, ");
    write("pages", "zero", &[1, 0]);
}

fn sets() {
    let words = [0, 0, 5, u64::MAX, u64::MAX, 0x8000_0000_0000_0001];
    let set = bitmap::encode(&words);
    let length = |bytes: &[u8]| u16::try_from(bytes.len()).unwrap().to_le_bytes();
    write("bitmap", "runs", &[&6_u16.to_le_bytes(), &set[..]].concat());
    write("bitmap", "words", &[&0_u16.to_le_bytes()[..], &words.map(u64::to_le_bytes).concat()].concat());
    let stretch = |pages: u32, words: &[u64]| {
        let set = bitmap::encode(words);
        [&[0], &pages.to_le_bytes()[..], &length(&set), &set].concat()
    };
    let told = [&450_u32.to_le_bytes()[..], &stretch(128, &[5, 0]), &stretch(322, &words)].concat();
    write("missing", "two-stretches", &told);
    let elsewhere = [&[1], &0_u64.to_le_bytes()[..], &64_u32.to_le_bytes(), &length(&[4]), &[4]].concat();
    write("missing", "not-in-order", &[&450_u32.to_le_bytes()[..], &stretch(128, &[5, 0]), &elsewhere].concat());
    let mut trace = Trace::new("a seed", 384);
    trace.epochs.push(Epoch::new(5_000_000, &words, &[], None));
    trace.epochs.push(Epoch::new(7_000_000, &[1; 6], &[3; 6], Some(12.5)));
    write("trace", "two-epochs", trace.to_json().unwrap().as_bytes());
    trace.epochs[0].duration_ns = 0;
    write("trace", "no-length", trace.to_json().unwrap().as_bytes());
}

fn qmp() {
    write("framing", "commands", b"\x07{\"execute\": \"qmp_capabilities\"}\n{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"tcp:h:1\"},\"id\":[1,\"a\"]}");
    write("framing", "odd", b"\x01[1, 2.5e3, \"}\\\"{\"] true {\"a\": nul} \"never closed\n{}");
    for (name, members) in [
        ("uri", json!({"uri": "tcp:[::1]:4444", "detach": true})),
        (
            "channels",
            json!({"channels": [{"channel-type": "main", "addr":
            {"transport": "socket", "type": "inet", "host": "::1", "port": "4444"}}]}),
        ),
        (
            "path",
            json!({"channels": [{"channel-type": "main", "addr":
            {"transport": "socket", "type": "unix", "path": "/run/m"}}]}),
        ),
        (
            "capabilities",
            json!({"capabilities": [{"capability": "postcopy-ram", "state": true},
            {"capability": "multifd", "state": true}]}),
        ),
        (
            "parameters",
            json!({"max-bandwidth": 1_u64 << 40, "downtime-limit": 300, "multifd-channels": 4,
            "multifd-compression": "zstd", "xbzrle-cache-size": 1 << 26, "x-switchover-mode": "hybrid",
            "x-switchover-blackout": 5, "x-switchover-compression": "lz4", "cpu-throttle-initial": 20}),
        ),
    ] {
        write("arguments", name, members.to_string().as_bytes());
    }
}

/// An ELF file of one segment at 1 MiB that halts, and a PVH note.
fn kernel() -> Vec<u8> {
    const CODE: [u8; 4] = [0xF4, 0xEB, 0xFD, 0x90];
    let note =
        [&4_u32.to_le_bytes()[..], &4_u32.to_le_bytes(), &18_u32.to_le_bytes(), b"Xen\0", &0x10_0000_u32.to_le_bytes()]
            .concat();
    let segment = |kind: u32, offset: u64, address: u64, bytes: &[u8]| {
        let length = bytes.len() as u64;
        let numbers = [offset, address, address, length, length, 4].map(u64::to_le_bytes).concat();
        [&kind.to_le_bytes()[..], &7_u32.to_le_bytes(), &numbers].concat()
    };
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    file.extend([0x10_0000_u64, 64, 0].map(u64::to_le_bytes).concat());
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let bodies = 64 + 2 * 56;
    file.extend(segment(1, bodies, 0x10_0000, &CODE));
    file.extend(segment(4, bodies + CODE.len() as u64, 0, &note));
    [file, CODE.to_vec(), note].concat()
}

/// The state of a machine that never ran.
fn state(kernel: &[u8]) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), kernel).unwrap();
    let config = VmConfig {
        kernel: Some(file.path().to_owned()),
        append: String::new(),
        initrd: None,
        memory: PageCount(1024),
        vcpus: 1,
        serial: SerialTarget::Null,
        lazy_memory: false,
        host_files: None,
        dirty_tracking: DirtyTracking::Auto,
    };
    let vm = Vm::boot(&config).unwrap();
    vm.pause().unwrap();
    let state = vm.save_state().unwrap();
    write("state", "sealed", &[&[0x80], &state[..]].concat());
    write("state", "header", &[&[0x00], &state[..200]].concat());
}
