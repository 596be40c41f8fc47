//! How fast memory is saved, verified and loaded: `speed FOLDER MEBIBYTES [compress]`.
#![allow(clippy::unwrap_used, reason = "it is run by hand")]

use std::os::unix::fs::FileExt as _;
use std::time::Instant;

use switchover_image::Tally;
use switchover_image::reader::Image;
use switchover_image::sections::{Origin, Sections};
use switchover_image::writer::{ImageWriter, Options};
use switchover_pager::ram::Ram;
use switchover_wire::description::MachineDescription;
use switchover_wire::types::PageCount;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let path = std::path::Path::new(&arguments[1]).join("speed.image");
    let mib: u64 = arguments[2].parse().unwrap();
    let ram = Ram::new(PageCount(mib * 256)).unwrap();
    let mut noise = vec![0; 1 << 20];
    for chunk in 0..mib {
        blake3::Hasher::new().update(&chunk.to_le_bytes()).finalize_xof().fill(&mut noise);
        ram.file().write_all_at(&noise, chunk << 20).unwrap();
    }
    let sections = Sections {
        machine: MachineDescription::of_memory_alone("none", ram.pages()),
        state: Vec::new(),
        was_running: true,
        first_pages: Vec::new(),
        origin: Origin { version: "speed".to_owned(), saved_at: 0 },
    };
    let rate = |since: Instant| (mib as f64 / 1024.0) / since.elapsed().as_secs_f64();
    let start = Instant::now();
    let writer = ImageWriter::create(&path, ram.pages(), Options { compress: arguments.len() > 3 }).unwrap();
    writer.write_memory(ram.file(), &Tally::default()).unwrap();
    let written = rate(start);
    writer.commit(&sections).unwrap();
    print!("memory {written:.2} GiB/s, durable {:.2} GiB/s", rate(start));
    let image = Image::open(&path).unwrap();
    let start = Instant::now();
    image.verify(&Tally::default()).unwrap();
    print!(", verified {:.2} GiB/s", rate(start));
    let there = Ram::new(ram.pages()).unwrap();
    let start = Instant::now();
    image.load(there.file(), &Tally::default()).unwrap();
    println!(", loaded {:.2} GiB/s", rate(start));
    std::fs::remove_file(&path).unwrap();
}
