//! What encodings cost and give, and what a lane's packer costs where it gains nothing.

use std::hint::black_box;
use std::time::Duration;

use switchover_benches::{show, time};
use switchover_precopy::pack::{PackCounts, PackSettings, Packer, SentVersions};
use switchover_wire::clock::Nanos;
use switchover_wire::encoding::{Encoding, Page, PageDecoder, PageEncoder, Payload, PayloadWriter};
use switchover_wire::frame::bulk::CHUNK_PAGES;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

/// Enough that the last level cache does not hold them: 64 MiB.
const CHUNKS: u64 = 256;
const PAGES: u64 = CHUNKS * CHUNK_PAGES;

fn main() {
    let noise: Vec<Page> = (1..=PAGES).map(noise).collect();
    let text: Vec<Page> = (1..=PAGES).map(text).collect();
    let few: Vec<Page> = noise.iter().zip(0..).map(|(page, seed)| few_words(*page, seed)).collect();

    single_pages("text", &text, &noise);
    single_pages("noise", &noise, &text);
    single_pages("noise, four words changed", &few, &noise);
    overhead(&noise);
    println!("\nchunks of a lane, pages on the wire included (sent again and again, four words a page changed):");
    for (link, ns_per_byte) in [("1 Gbit/s", 8.0), ("10 Gbit/s", 0.8), ("40 Gbit/s", 0.2)] {
        lane(&format!("text, {link}"), &text, ns_per_byte, false);
        lane(&format!("noise, {link}"), &noise, ns_per_byte, false);
        lane(&format!("noise with changes, {link}"), &noise, ns_per_byte, true);
    }
}

/// Each encoding of pages, encoded and decoded.
fn single_pages(what: &str, pages: &[Page], old: &[Page]) {
    let pages = &pages[..1024];
    let mut encoder = PageEncoder::new(1);
    let mut decoder = PageDecoder::new();
    println!("\n{what}:");
    for encoding in [Encoding::Lz4, Encoding::Zstd, Encoding::Delta, Encoding::Same] {
        let mut writer = PayloadWriter::default();
        let mut encode = |index: usize, writer: &mut PayloadWriter| {
            let (page, out) = (&pages[index], writer.body());
            match encoding {
                Encoding::Lz4 => encoder.lz4(page, PAGE_SIZE, out),
                Encoding::Zstd => encoder.zstd(page, PAGE_SIZE, out),
                Encoding::Delta => encoder.delta(&old[index], page, PAGE_SIZE, out),
                _ => {
                    PageEncoder::same(PageIndex(0), &blake3_of(page), out);
                    true
                }
            }
        };
        let cost = time(
            1024,
            || (),
            || {
                (0..1024).for_each(|index| {
                    writer.begin(0, 1);
                    encode(index, &mut writer);
                });
            },
        );
        show(&format!("{encoding}, encode"), "page", &cost);
        // Decoded: a chunk's worth, where it got smaller.
        writer.begin(0, 64);
        let mut bytes = 0;
        if !(0..64).all(|index| {
            encode(index, &mut writer) && {
                bytes += writer.finish_page(encoding);
                true
            }
        }) {
            println!("{encoding}: not smaller");
            continue;
        }
        println!("{encoding}: {} bytes a page", bytes / 64);
        // A reference's page is outside of the frame.
        let first = PageIndex(64);
        if let Ok(payload) = Payload::parse(first, u64::MAX, 0, writer.bytes(), PageCount(1 << 20)) {
            let mut page = [0; PAGE_SIZE];
            let mut held = |_, to: &mut Page| {
                *to = pages[0];
                true
            };
            let cost = time(
                64,
                || (),
                || {
                    payload.entries().for_each(|entry| _ = black_box(decoder.decode(&entry, &mut page, &mut held)));
                },
            );
            show(&format!("{encoding}, decode"), "page", &cost);
        }
    }
}

/// What a lane does for chunks of noise on a link that is faster than any encoding, against copying the chunk once, which
/// is the least that the kernel does to send it.
fn overhead(noise: &[Page]) {
    println!("\nnoise on an unlimited link:");
    let mut socket = vec![0_u8; 64 * PAGE_SIZE];
    let mut copy = |chunk: u64| {
        for (to, page) in socket.as_chunks_mut::<PAGE_SIZE>().0.iter_mut().zip(&noise[index(chunk * 64)..]) {
            *to = *black_box(page);
        }
        black_box(&mut socket);
    };
    let raw = time(CHUNKS, || (), || (0..CHUNKS).for_each(&mut copy));
    show("copied as it is", "chunk", &raw);
    for round in [1, 2, 3, 6] {
        let settings = PackSettings::default();
        let mut lane = Packer::new(settings, SentVersions::new(settings));
        let mut chunks = |copy: &mut dyn FnMut(u64)| {
            for chunk in 0..CHUNKS {
                let (first, start) = (PageIndex(chunk * 64), Nanos::now());
                let mut read = |page: PageIndex, to: &mut Page| *to = noise[index(page.0)];
                if !lane.wants(round) || lane.pack(first, u64::MAX, 0, 0, &mut read).is_none() {
                    lane.sent_as_is(first, u64::MAX, 0);
                }
                let packed = Nanos::now();
                copy(chunk);
                // 25 Gbit/s or so: what loopback gives.
                lane.sent(64 * 4096, Duration::from_nanos(84_000));
                packer_ns(packed.since(start));
            }
        };
        let before = PACKER_NS.get();
        let cost = time(CHUNKS, || (), || chunks(&mut copy));
        show(&format!("with a packer, round {round}"), "chunk", &cost);
        let spent = (PACKER_NS.get() - before) as f64 / 16.0 / CHUNKS as f64;
        let share = spent * 1e5 / raw.median_ps() as f64;
        println!("  of that in the packer: {spent:.0} ns a chunk, {share:.2} % of copying it");
    }
}

thread_local!(static PACKER_NS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });

fn packer_ns(ns: u64) {
    PACKER_NS.set(PACKER_NS.get() + ns);
}

/// A lane that sends all pages in each of some rounds.
fn lane(what: &str, pages: &[Page], ns_per_byte: f64, changes: bool) {
    let mut pages = pages[..4096].to_vec();
    let settings = PackSettings::default();
    let versions = SentVersions::new(settings);
    let mut lane = Packer::new(settings, versions.clone());
    let (mut cpu, mut link) = (0, 0.0);
    let mut counts = PackCounts::default();
    for round in 1..=6 {
        if round == 2 {
            counts = lane.counts();
            (cpu, link) = (0, 0.0);
        }
        for first in (0..4096).step_by(64).map(PageIndex) {
            let start = Nanos::now();
            let mut read = |page: PageIndex, to: &mut Page| *to = pages[index(page.0)];
            let packed = if lane.wants(round) { lane.pack(first, u64::MAX, 0, 0, &mut read) } else { None };
            let bytes = match packed {
                Some(packed) => {
                    versions.acknowledged(first, u64::MAX, packed.pinned);
                    packed.bytes.len()
                }
                None => {
                    lane.sent_as_is(first, u64::MAX, 0);
                    64 * PAGE_SIZE
                }
            };
            cpu += Nanos::now().since(start);
            let ns = bytes as f64 * ns_per_byte;
            link += ns;
            lane.sent(bytes as u64, Duration::from_secs_f64(ns / 1e9));
        }
        if changes {
            pages.iter_mut().zip(0..).for_each(|(page, seed)| *page = few_words(*page, seed * 7 + u64::from(round)));
        }
    }
    let now = lane.counts();
    let sent = (now.bytes_out - counts.bytes_out) as f64 / (now.bytes_in - counts.bytes_in) as f64;
    let (cpu, link, raw) = (cpu as f64 / 20480.0, link / 20480.0, 4096.0 * ns_per_byte);
    println!(
        "{what:<34} {:>5.1} % of the bytes, {cpu:>6.0} ns of work and {link:>6.0} ns on the link a page (raw {raw:.0}); \
         lz4 {} zstd {} delta {} same {} raw {}",
        sent * 100.0,
        now.lz4,
        now.zstd,
        now.delta,
        now.same,
        now.raw,
    );
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn blake3_of(page: &Page) -> blake3::Hash {
    blake3::hash(page)
}

fn noise(seed: u64) -> Page {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut page = [0; PAGE_SIZE];
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes();
    }
    page
}

/// Lines of a log: words that recur, numbers that do not.
fn text(seed: u64) -> Page {
    let mut lines = String::new();
    for line in 0.. {
        if lines.len() >= PAGE_SIZE {
            break;
        }
        let number = seed.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_mul(line * 2 + 1);
        let verb = ["read", "wrote", "mapped", "freed"][index(number >> 62)];
        lines += &format!(
            "{:09} worker {}: {verb} {:#x} of buffer {line}\n",
            number >> 36,
            number >> 60,
            number >> 20 & 0xFFFF_FFFF
        );
    }
    let mut page = [0; PAGE_SIZE];
    page.copy_from_slice(&lines.as_bytes()[..PAGE_SIZE]);
    page
}

fn few_words(mut page: Page, seed: u64) -> Page {
    for word in 0..4_u64 {
        let at = index(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_mul(word * 2 + 1) >> 55) * 8;
        page[at..at + 8].copy_from_slice(&(seed ^ 0x5555_0000_1234).to_le_bytes());
    }
    page
}
