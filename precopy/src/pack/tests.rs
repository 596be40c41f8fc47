//! The packer against a model of both sides.

#![allow(clippy::cast_possible_truncation, reason = "indices of a small model")]

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use switchover_wire::clock::Nanos;
use switchover_wire::encoding::{Encoding, Page, PageDecoder, Payload};
use switchover_wire::frame::bulk::{BulkFrame, CHUNK_PAGES, FrameFlags};
use switchover_wire::types::{PAGE_SIZE, PageCount};

use super::delta_cache::bits;
use super::*;

const RAM: PageCount = PageCount(4096 * CHUNK_PAGES);

/// 1 Gbit/s, in nanoseconds a byte, and a link that nothing can keep up with.
const GIGABIT: u64 = 8;
const UNLIMITED: u64 = 0;

/// A clock by which everything that is timed takes 300 ns.
fn clock() -> Nanos {
    thread_local!(static NOW: Cell<u64> = const { Cell::new(0) });
    NOW.set(NOW.get() + 300);
    Nanos(NOW.get())
}

fn lane(settings: PackSettings, versions: &Arc<SentVersions>, ns_per_byte: u64) -> Packer {
    let mut lane = Packer::with_clock(settings, versions.clone(), clock);
    lane.sent(1 << 20, Duration::from_nanos((1 << 20) * ns_per_byte));
    lane
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

fn text(seed: u64) -> Page {
    let line = format!("line {seed} of what a guest may write into its memory; ");
    let mut page = [0; PAGE_SIZE];
    page.chunks_mut(line.len()).for_each(|part| part.copy_from_slice(&line.as_bytes()[..part.len()]));
    page
}

/// What the destination holds.
#[derive(Default)]
struct Destination {
    pages: HashMap<PageIndex, Box<Page>>,
    decoder: PageDecoder,
}

impl Destination {
    fn page(&self, page: PageIndex) -> Page {
        self.pages.get(&page).map_or([0; PAGE_SIZE], |page| **page)
    }

    fn packed(&mut self, bytes: &[u8]) -> Vec<Encoding> {
        let (header, payload) = bytes.split_first_chunk().unwrap();
        let (frame, flags, checksum) = BulkFrame::decode(header, RAM).unwrap();
        checksum.check(frame.name(), [payload]).unwrap();
        assert_eq!((flags, frame.payload()), (FrameFlags { precopy: true, acknowledge: true }, payload.len()));
        let BulkFrame::Packed { first, data, zero, .. } = frame else { panic!("{frame:?}") };
        let payload = Payload::parse(first, data, zero, payload, RAM).unwrap();
        for entry in payload.entries() {
            let mut page = Box::new(self.page(entry.page()));
            let mut held = |other: PageIndex, page: &mut Page| {
                *page = self.pages.get(&other).map_or([0; PAGE_SIZE], |page| **page);
                true
            };
            self.decoder.decode(&entry, &mut page, &mut held).unwrap();
            self.pages.insert(entry.page(), page);
        }
        self.zeros(first, zero);
        payload.entries().map(|entry| entry.encoding()).collect()
    }

    fn zeros(&mut self, first: PageIndex, zero: u64) {
        bits(zero).for_each(|bit| drop(self.pages.remove(&PageIndex(first.0 + bit as u64))));
    }
}

/// Sends a chunk of `pages` as a lane would, at once acknowledged. Returns bytes on the wire, and how.
fn send(
    lane: &mut Packer,
    versions: &SentVersions,
    to: &mut Destination,
    round: u32,
    chunk: u64,
    pages: &[Page],
) -> (usize, Vec<Encoding>) {
    let first = PageIndex(chunk * CHUNK_PAGES);
    let data = u64::MAX >> (64 - pages.len());
    assert_eq!(versions.withdraw(first, data), 0);
    let flags = FrameFlags { precopy: true, acknowledge: true }.bits();
    let mut read = |page: PageIndex, to: &mut Page| *to = pages[(page.0 - first.0) as usize];
    let packed = if lane.wants(round) { lane.pack(first, data, 0, flags, &mut read) } else { None };
    let result = if let Some(packed) = packed {
        let encodings = to.packed(packed.bytes);
        versions.acknowledged(first, data, packed.pinned);
        (packed.bytes.len(), encodings)
    } else {
        lane.sent_as_is(first, data, 0);
        bits(data).for_each(|bit| drop(to.pages.insert(PageIndex(first.0 + bit as u64), Box::new(pages[bit]))));
        versions.acknowledged(first, data, &[]);
        (BulkFrame::LEN + pages.len() * PAGE_SIZE, vec![])
    };
    for (index, page) in pages.iter().enumerate() {
        assert!(to.page(PageIndex(first.0 + index as u64)) == *page);
    }
    result
}

/// Rounds of a guest with `chunks` of noise that changes pages with `change`. Returns wire bytes of each round's re-sent
/// pages, as a share of raw.
fn rounds(settings: PackSettings, ns_per_byte: u64, chunks: u64, mut change: impl FnMut(u64, &mut Page)) -> Vec<f64> {
    let versions = SentVersions::new(settings);
    let mut lane = lane(settings, &versions, ns_per_byte);
    let mut to = Destination::default();
    let mut guest: Vec<Vec<Page>> =
        (0..chunks).map(|chunk| (0..64).map(|page| noise(chunk * 64 + page + 1)).collect()).collect();
    (1..=6)
        .map(|round| {
            let mut bytes = 0;
            for (chunk, pages) in guest.iter_mut().enumerate() {
                bytes += send(&mut lane, &versions, &mut to, round, chunk as u64, pages).0;
                pages
                    .iter_mut()
                    .enumerate()
                    .for_each(|(page, content)| change(u64::from(round) * 64 + page as u64, content));
            }
            bytes as f64 / (chunks as usize * 64 * PAGE_SIZE) as f64
        })
        .collect()
}

#[test]
fn a_few_changed_words_a_page_cost_a_few_bytes_a_page() {
    let change = |seed: u64, page: &mut Page| {
        for word in 0..4 {
            let at = (seed * 31 + word * 1013) as usize % (PAGE_SIZE - 8);
            page[at..at + 8].copy_from_slice(&(seed * 0x0123_4567_89AB).to_le_bytes());
        }
    };
    let shares = rounds(PackSettings::default(), GIGABIT, 8, change);
    assert!(shares[0] > 0.99, "there is nothing to differ from: {shares:?}");
    assert!(shares[1..].iter().all(|share| *share < 0.05), "of re-sent pages, 70 % must be saved: {shares:?}");
}

#[test]
fn without_a_cache_there_are_no_differences() {
    let settings = PackSettings { delta_cache_bytes: 0, ..PackSettings::default() };
    assert!(rounds(settings, GIGABIT, 2, |_, _| ()).iter().all(|share| *share > 0.99));
}

#[test]
fn noise_on_a_fast_link_is_hardly_ever_read() {
    let settings = PackSettings::default();
    let versions = SentVersions::new(settings);
    let mut lane = lane(settings, &versions, UNLIMITED);
    lane.sent(1 << 20, Duration::from_micros(300));
    let mut reads = 0;
    for chunk in 0..20_000 {
        let first = PageIndex(chunk % 4096 * CHUNK_PAGES);
        let round = 1 + u32::try_from(chunk / 4096).unwrap();
        let mut read = |page: PageIndex, to: &mut Page| {
            reads += 1;
            *to = noise(page.0);
        };
        assert!(!lane.wants(round) || lane.pack(first, u64::MAX, 0, 0, &mut read).is_none());
        lane.sent_as_is(first, u64::MAX, 0);
    }
    assert!((1..256).contains(&reads), "{reads} of 1280000 pages read");
    assert_eq!((lane.counts().raw, lane.counts().bytes_out), (1_280_000, 1_280_000 * PAGE_SIZE_U64));
}

#[test]
fn pages_that_change_all_over_are_soon_not_kept_any_more() {
    let settings = PackSettings::default();
    let versions = SentVersions::new(settings);
    let mut lane = lane(settings, &versions, GIGABIT);
    let mut reads = [0; 12];
    for round in 1..12 {
        for chunk in 0..200 {
            let mut read = |page: PageIndex, to: &mut Page| {
                reads[round as usize] += 1;
                *to = noise(page.0 * 16 + u64::from(round));
            };
            let first = PageIndex(chunk * CHUNK_PAGES);
            let packed = lane.wants(round).then(|| lane.pack(first, u64::MAX, 0, 0, &mut read)).flatten().is_some();
            if !packed {
                lane.sent_as_is(first, u64::MAX, 0);
            }
        }
    }
    assert!(reads[1] > 190 * 64, "on the chance that it pays: {reads:?}");
    assert!(reads[2] < 60 * 64 && reads[4..].iter().all(|reads| *reads < 8 * 64), "{reads:?}");
    assert!(reads[4..].iter().all(|reads| *reads >= 64), "now and then a chunk is still kept: {reads:?}");
}

#[test]
fn text_is_compressed_on_a_slow_link_and_noise_again_is_not() {
    let settings = PackSettings::default();
    let versions = SentVersions::new(settings);
    let mut lane = lane(settings, &versions, GIGABIT);
    let mut to = Destination::default();
    let mut send = |chunk: u64, content: fn(u64) -> Page| {
        let pages: Vec<_> = (0..64).map(|page| content(chunk * 64 + page + 1)).collect();
        send(&mut lane, &versions, &mut to, 1, chunk, &pages).0
    };
    let bytes: usize = (0..50).map(|chunk| send(chunk, text)).sum();
    assert!(bytes < 50 * 64 * PAGE_SIZE / 4, "{bytes}");
    (50..500).for_each(|chunk| _ = send(chunk, noise));
    // Samples have become rare by now, so it takes a while.
    let bytes: usize = (500..1000).map(|chunk| send(chunk, text)).sum();
    assert!(bytes < 500 * 64 * PAGE_SIZE * 3 / 4, "{bytes}");
}

#[test]
fn a_link_that_becomes_slow_makes_a_lane_look_again() {
    let settings = PackSettings::default();
    let versions = SentVersions::new(settings);
    let mut lane = lane(settings, &versions, UNLIMITED);
    let mut to = Destination::default();
    let mut send = |lane: &mut Packer, chunk: u64| {
        let pages: Vec<_> = (0..64).map(|page| text(chunk * 64 + page)).collect();
        send(lane, &versions, &mut to, 1, chunk, &pages).0
    };
    (0..100).for_each(|chunk| assert!(send(&mut lane, chunk) > 64 * PAGE_SIZE));
    lane.sent(1 << 20, Duration::from_millis(8));
    let bytes: usize = (100..110).map(|chunk| send(&mut lane, chunk)).sum();
    assert!(bytes < 10 * 64 * PAGE_SIZE / 3, "{bytes}");
}

#[test]
fn a_chosen_compressor_is_used_whatever_the_link() {
    for (compression, encoding) in [(Compression::Lz4, Encoding::Lz4), (Compression::Zstd, Encoding::Zstd)] {
        let settings = PackSettings { compression, ..PackSettings::default() };
        let versions = SentVersions::new(settings);
        let mut lane = lane(settings, &versions, UNLIMITED);
        let mut to = Destination::default();
        for round in 1..4 {
            let (_, encodings) = send(&mut lane, &versions, &mut to, round, 0, &[text(1), noise(2), text(1)]);
            assert_eq!(encodings, [encoding, Encoding::Raw, encoding]);
            let (_, encodings) = send(&mut lane, &versions, &mut to, round, 1, &[noise(3), noise(3)]);
            assert_eq!(encodings, [], "nothing gets smaller");
        }
    }
}

#[test]
fn off_is_off() {
    let settings = PackSettings { compression: Compression::Off, ..PackSettings::default() };
    let versions = SentVersions::new(settings);
    let mut lane = lane(settings, &versions, 1000);
    assert!((1..5).all(|round| !lane.wants(round)));
    assert!(lane.pack(PageIndex(0), 1, 0, 0, &mut |_, _| panic!("read")).is_none());
}

#[test]
fn copies_of_pages_become_references() {
    let settings = PackSettings::default();
    let versions = SentVersions::new(settings);
    let mut lane = lane(settings, &versions, 10 * GIGABIT);
    let mut to = Destination::default();
    // Half text, so that the lane packs at all; and all pages again and again.
    let content = |page: u64| {
        let mut content = noise(page % 640 + 1);
        content[2048..].copy_from_slice(&text(page % 640)[2048..]);
        content
    };
    let mut last = 0;
    for chunk in 0..300 {
        let pages: Vec<_> = (0..64).map(|page| content(chunk * 64 + page)).collect();
        last = send(&mut lane, &versions, &mut to, 1, chunk, &pages).0;
    }
    assert!(last < 64 * 60, "{last} bytes for 64 copies");
    assert!(lane.counts().same > 10_000, "{:?}", lane.counts());
}

#[test]
fn what_is_sent_anew_is_not_referred_to_even_if_nobody_asked() {
    let settings = PackSettings::default();
    let versions = SentVersions::new(settings);
    let mut lane = lane(settings, &versions, GIGABIT);
    let hash = blake3::hash(b"content");
    for packed in [true, false] {
        versions.same.note(PageIndex(0), &[(7, hash)]);
        versions.acknowledged(PageIndex(0), u64::MAX, &[]);
        assert_eq!(versions.same.find(&hash), Some(PageIndex(7)));
        versions.acknowledged(PageIndex(64), 0, &[PageIndex(7)]);
        if packed {
            let _ = lane.pack(PageIndex(0), 1 << 7, 0, 0, &mut |_, page| *page = noise(1));
        } else {
            lane.sent_as_is(PageIndex(0), 0, 1 << 7);
        }
        assert_eq!(versions.same.find(&hash), None);
    }
}

/// One step of the model below.
#[derive(Clone, Debug)]
enum Step {
    /// The guest writes pages of a chunk.
    Write { chunk: u64, pages: u64, kind: u8, seed: u64 },
    /// A lane sends what is dirty and may be sent of a chunk.
    Send { lane: usize, chunk: u64, pages: u64 },
    /// The destination processes a lane's next frame, and its answer arrives.
    Deliver { lane: usize },
    /// A round ends.
    Round,
    /// A lane's link changes.
    Link { lane: usize, ns_per_byte: u64 },
}

const CHUNKS: u64 = 5;
const LANES: usize = 3;

fn step() -> impl Strategy<Value = Step> {
    let pages = || prop_oneof![Just(u64::MAX), any::<u64>(), (0..64_u32).prop_map(|bit| 1 << bit), Just(0xFF)];
    prop_oneof![
        4 => (0..CHUNKS, pages(), any::<u8>(), 0..6_u64)
            .prop_map(|(chunk, pages, kind, seed)| Step::Write { chunk, pages, kind, seed }),
        5 => (0..LANES, 0..CHUNKS, pages()).prop_map(|(lane, chunk, pages)| Step::Send { lane, chunk, pages }),
        5 => (0..LANES).prop_map(|lane| Step::Deliver { lane }),
        1 => Just(Step::Round),
        1 => (0..LANES, prop::sample::select(vec![0, 1, 8, 80]))
            .prop_map(|(lane, ns_per_byte)| Step::Link { lane, ns_per_byte }),
    ]
}

/// A frame under way.
struct Frame {
    first: PageIndex,
    data: u64,
    zero: u64,
    /// Packed bytes, or pages as they went.
    content: Result<Vec<u8>, Vec<Page>>,
    pinned: Vec<PageIndex>,
}

/// The source and its lanes, with the rules that the engine keeps.
struct Model {
    guest: Vec<Page>,
    dirty: Vec<bool>,
    under_way: Vec<bool>,
    versions: Arc<SentVersions>,
    lanes: Vec<(Packer, VecDeque<Frame>)>,
    to: Destination,
    round: u32,
    used: BTreeMap<u8, u64>,
    /// Whether the guest writes what is being sent.
    writes: bool,
}

impl Model {
    fn new(settings: PackSettings) -> Self {
        let pages = (CHUNKS * CHUNK_PAGES) as usize;
        let versions = SentVersions::new(settings);
        let lanes = (0..LANES).map(|_| (lane(settings, &versions, GIGABIT), VecDeque::new())).collect();
        Self {
            guest: (0..pages as u64).map(|page| noise(page % 100 + 1)).collect(),
            dirty: vec![true; pages],
            under_way: vec![false; pages],
            versions,
            lanes,
            to: Destination::default(),
            round: 1,
            used: BTreeMap::new(),
            writes: true,
        }
    }

    fn write(&mut self, page: usize, kind: u8, seed: u64) {
        let other = self.guest[(page * 7 + seed as usize) % (CHUNKS * CHUNK_PAGES) as usize];
        let content = &mut self.guest[page];
        match kind % 6 {
            0 => *content = [0; PAGE_SIZE],
            1 => *content = noise(seed + 1),
            2 => *content = text(seed),
            // A copy of some other page.
            3 => *content = other,
            _ => {
                for word in 0..seed as usize {
                    let at = (page * 97 + word * 531 + usize::from(kind)) % (PAGE_SIZE - 8);
                    content[at..at + 8].copy_from_slice(&(seed * 0x9E37_79B9 + u64::from(kind)).to_le_bytes());
                }
            }
        }
        self.dirty[page] = true;
    }

    fn send(&mut self, lane: usize, chunk: u64, pages: u64) {
        let first = PageIndex(chunk * CHUNK_PAGES);
        let of = |bit: usize| first.0 as usize + bit;
        let wanted = bits(pages)
            .filter(|&bit| self.dirty[of(bit)] && !self.under_way[of(bit)])
            .fold(0_u64, |mask, bit| mask | 1 << bit);
        let pinned = self.versions.withdraw(first, wanted);
        for bit in bits(wanted) {
            let page = PageIndex(first.0 + bit as u64);
            assert!(pinned >> bit & 1 == u64::from(self.versions.is_pinned(page)));
        }
        let wanted = wanted & !pinned;
        if wanted == 0 {
            return;
        }
        bits(wanted).for_each(|bit| {
            self.dirty[of(bit)] = false;
            self.under_way[of(bit)] = true;
        });
        let zero =
            bits(wanted).filter(|&bit| self.guest[of(bit)] == [0; PAGE_SIZE]).fold(0, |mask, bit| mask | 1 << bit);
        let data = wanted & !zero;
        let mut read_once = 0_u64;
        let (packer, queue) = &mut self.lanes[lane];
        let (guest, dirty, writes) = (&mut self.guest, &mut self.dirty, self.writes);
        // The guest goes on writing: each page that is read changes right after.
        let mut read = |page: PageIndex, to: &mut Page| {
            let (page, bit) = (page.0 as usize, page.0 - first.0);
            assert!(data >> bit & 1 == 1 && read_once >> bit & 1 == 0);
            read_once |= 1 << bit;
            *to = guest[page];
            if writes && page.is_multiple_of(5) {
                guest[page][100] ^= 1;
                dirty[page] = true;
            }
        };
        let flags = FrameFlags { precopy: true, acknowledge: true }.bits();
        let packed = if packer.wants(self.round) { packer.pack(first, data, zero, flags, &mut read) } else { None };
        let frame = if let Some(packed) = packed {
            Frame { first, data, zero, content: Ok(packed.bytes.to_vec()), pinned: packed.pinned.to_vec() }
        } else {
            packer.sent_as_is(first, data, zero);
            // Some are torn: one half as it is now, the other as it is after a write.
            let pages = bits(data).map(|bit| {
                let page = of(bit);
                let mut torn = self.guest[page];
                if self.writes && page.is_multiple_of(3) {
                    self.guest[page] = noise(page as u64);
                    self.dirty[page] = true;
                    torn[2048..].copy_from_slice(&self.guest[page][2048..]);
                }
                torn
            });
            Frame { first, data, zero, content: Err(pages.collect()), pinned: vec![] }
        };
        queue.push_back(frame);
    }

    fn deliver(&mut self, lane: usize) -> bool {
        let Some(frame) = self.lanes[lane].1.pop_front() else { return false };
        match &frame.content {
            Ok(bytes) => {
                for encoding in self.to.packed(bytes) {
                    *self.used.entry(encoding.number()).or_default() += 1;
                }
            }
            Err(pages) => {
                for (bit, page) in bits(frame.data).zip(pages) {
                    self.to.pages.insert(PageIndex(frame.first.0 + bit as u64), Box::new(*page));
                }
                self.to.zeros(frame.first, frame.zero);
            }
        }
        self.versions.acknowledged(frame.first, frame.data, &frame.pinned);
        bits(frame.data | frame.zero).for_each(|bit| self.under_way[frame.first.0 as usize + bit] = false);
        true
    }

    fn deliver_all(&mut self) {
        for lane in 0..LANES {
            while self.deliver(lane) {}
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write { chunk, pages, kind, seed } => {
                bits(pages).for_each(|bit| self.write((chunk * CHUNK_PAGES) as usize + bit, kind, seed));
            }
            Step::Send { lane, chunk, pages } => self.send(lane, chunk, pages),
            Step::Deliver { lane } => _ = self.deliver(lane),
            Step::Round => self.round += 1,
            Step::Link { lane, ns_per_byte } => {
                self.lanes[lane].0.sent(1 << 20, Duration::from_nanos((1 << 20) * ns_per_byte));
            }
        }
    }

    /// The guest stands still: what is dirty is sent, after which nothing may be dirty or pinned.
    fn finish(&mut self) {
        self.writes = false;
        self.deliver_all();
        for chunk in 0..CHUNKS {
            self.send(chunk as usize % LANES, chunk, u64::MAX);
            // A page that a frame refers to is sent when that has arrived.
            self.deliver_all();
            self.send(chunk as usize % LANES, chunk, u64::MAX);
        }
        self.deliver_all();
        for (index, page) in self.guest.iter().enumerate() {
            assert!(!self.dirty[index], "page {index} stays pinned");
            assert!(self.to.page(PageIndex(index as u64)) == *page, "page {index} differs");
        }
        self.versions.kept.held();
    }
}

fn settings() -> impl Strategy<Value = PackSettings> {
    let compression = prop::sample::select(vec![
        Compression::Adaptive,
        Compression::Adaptive,
        Compression::Adaptive,
        Compression::Lz4,
        Compression::Zstd,
        Compression::Off,
    ]);
    (compression, prop::sample::select(vec![0, 40 * 4096, 64 << 20]), any::<bool>()).prop_map(
        |(compression, delta_cache_bytes, same_as)| PackSettings {
            compression,
            zstd_level: 1,
            delta_cache_bytes,
            same_as,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_destination_ends_with_the_guests_memory(
        settings in settings(),
        steps in prop::collection::vec(step(), 1..150),
    ) {
        let mut model = Model::new(settings);
        steps.iter().for_each(|step| model.step(step));
        model.finish();
    }
}

/// The property above proves nothing of an encoding that never occurs in it.
#[test]
fn the_model_sees_every_encoding() {
    let mut model = Model::new(PackSettings::default());
    let mut seed = 1_u64;
    let mut next = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for turn in 0..3000 {
        let (lane, chunk) = (next(3) as usize, next(CHUNKS));
        match next(3) {
            0 => model.step(&Step::Write { chunk, pages: next(1 << 31) << 16, kind: next(256) as u8, seed: next(6) }),
            1 => model.step(&Step::Send { lane, chunk, pages: u64::MAX }),
            _ => model.step(&Step::Deliver { lane }),
        }
        if turn % 200 == 0 {
            model.step(&Step::Round);
        }
    }
    model.finish();
    assert!(Encoding::ALL.iter().all(|encoding| model.used.contains_key(&encoding.number())), "{:?}", model.used);
}
