//! One lane's packer.

use std::fmt;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use switchover_wire::checksum::Checksum;
use switchover_wire::clock::Nanos;
use switchover_wire::encoding::{Encoding, Page, PageEncoder, PayloadWriter};
use switchover_wire::frame::bulk::{BulkFrame, CHUNK_PAGES, FrameFlags};
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageIndex};

use super::chooser::{Chooser, Method, Why};
use super::delta_cache::{Taken, bits};
use super::{Compression, PackCounts, PackSettings, Packed, SentVersions};

/// Packs a lane's chunks, each page in the way that takes the least time from memory to wire, by what it measures.
pub struct Packer {
    settings: PackSettings,
    versions: Arc<SentVersions>,
    counts: PackCounts,
    chooser: Chooser,
    encoder: PageEncoder,
    writer: PayloadWriter,
    clock: fn() -> Nanos,
    round: u32,
    last_round: bool,
    /// What a page is read into. It changes places with a kept version.
    page: Box<Page>,
    /// What a page is encoded into to be compared with another encoding.
    other: Vec<u8>,
    /// Pages that the frame refers to.
    pinned: Vec<PageIndex>,
    /// Contents of the frame's pages, by their place in the chunk.
    contents: Vec<(usize, blake3::Hash)>,
}

impl Packer {
    /// A packer for one lane; all lanes share `versions`.
    #[must_use]
    pub fn new(settings: PackSettings, versions: Arc<SentVersions>) -> Self {
        Self::with_clock(settings, versions, Nanos::now)
    }

    pub(super) fn with_clock(settings: PackSettings, versions: Arc<SentVersions>, clock: fn() -> Nanos) -> Self {
        Self {
            settings,
            versions,
            counts: PackCounts::default(),
            chooser: Chooser::new(settings),
            encoder: PageEncoder::new(settings.zstd_level),
            writer: PayloadWriter::default(),
            clock,
            round: 1,
            last_round: false,
            page: Box::new([0; PAGE_SIZE]),
            other: Vec::with_capacity(PAGE_SIZE),
            pinned: Vec::new(),
            contents: Vec::new(),
        }
    }

    /// Each page is sent only once from now on: none is kept that was not kept before, and none refers to another.
    pub(super) fn begin_last_round(&mut self) {
        self.last_round = true;
    }

    /// Whether the next chunk, in round `round` (counted from 1), should be packed rather than sent as it is. To be asked
    /// before each chunk.
    #[must_use]
    pub fn wants(&mut self, round: u32) -> bool {
        self.round = round;
        self.chooser.wants(round)
    }

    /// Packs the pages of `data` (bit i: page `first + i`), each read at most once with `read`, and notes those of
    /// `zero`. `flags` go into the header. `None` where it would not gain anything: what was read must then be thrown
    /// away, and the chunk sent as it is (the caller then calls [`sent_as_is`](Self::sent_as_is)). That may turn out after
    /// a page or two, or before any is read.
    ///
    /// A frame that is returned must be sent. It may be longer than the pages by the length of its table, where they are
    /// kept to send differences against.
    pub fn pack(
        &mut self,
        first: PageIndex,
        data: u64,
        zero: u64,
        flags: u8,
        read: &mut dyn FnMut(PageIndex, &mut [u8; PAGE_SIZE]),
    ) -> Option<Packed<'_>> {
        if data == 0 || self.settings.compression == Compression::Off {
            return None;
        }
        self.versions.same.forget(first, data | zero);
        self.pinned.clear();
        self.contents.clear();
        let mut taken = self.take(first, data, zero);
        let worth_a_try = taken.is_some() || self.chooser.packing_pays() || self.chooser.sample_is_due();
        let counted = if worth_a_try { self.encode(first, data, taken.as_mut(), read) } else { None };
        let pages = data.count_ones() as usize;
        let payload = self.writer.bytes().len().saturating_sub(BulkFrame::LEN);
        let Some(counted) = counted.filter(|_| taken.is_some() || payload < pages * PAGE_SIZE) else {
            taken.iter().for_each(|taken| self.versions.kept.give_up(taken));
            self.versions.same.unpin(&self.pinned);
            return None;
        };
        if let Some(taken) = taken {
            self.versions.kept.put(first, self.round, taken);
        }
        self.versions.same.note(first, &self.contents);
        self.counts += PackCounts { bytes_out: payload as u64, ..counted };
        // At most PACKED_LIMIT, as no body is longer than a page.
        let payload = u32::try_from(payload).ok()?;
        let bytes = self.writer.bytes();
        // Next to the encoding it is nothing, so that nobody needs to say whether the lane wants it.
        let checksum = Checksum::of([&bytes[BulkFrame::LEN..]]);
        let header = BulkFrame::Packed { first, data, zero, payload }.encode(flags_of(flags), checksum);
        bytes[..BulkFrame::LEN].copy_from_slice(&header);
        Some(Packed { bytes, pinned: &self.pinned })
    }

    /// A chunk went as it is: no difference can be sent against these pages until they are packed again.
    pub fn sent_as_is(&mut self, first: PageIndex, data: u64, zero: u64) {
        self.versions.kept.forget(first, data | zero);
        self.versions.same.forget(first, data | zero);
        self.chooser.passed(data.count_ones());
        let pages = u64::from(data.count_ones());
        let bytes = pages * PAGE_SIZE_U64;
        self.counts += PackCounts { raw: pages, bytes_in: bytes, bytes_out: bytes, ..PackCounts::default() };
    }

    /// `bytes` of a frame took `elapsed` to be handed to the socket, waiting for a rate limit included.
    pub fn sent(&mut self, bytes: u64, elapsed: Duration) {
        self.chooser.sent(bytes, elapsed);
    }

    /// What it did so far, chunks that went as they are included.
    #[must_use]
    pub fn counts(&self) -> PackCounts {
        self.counts
    }

    /// The kept versions of a chunk's pages, where what is sent now is to be kept too.
    fn take(&mut self, first: PageIndex, data: u64, zero: u64) -> Option<Taken> {
        let chunk = first.0 / CHUNK_PAGES;
        if self.last_round {
            let taken = self.versions.kept.take(first, data, zero, self.round)?;
            if taken.pages.iter().all(Option::is_none) {
                self.versions.kept.give_up(&taken);
                return None;
            }
            return Some(taken);
        }
        if self.chooser.captures(self.round, chunk) {
            self.versions.kept.take(first, data, zero, self.round)
        } else {
            self.versions.kept.forget(first, data | zero);
            None
        }
    }

    /// Writes the payload. `None` where it was given up, because it gains nothing.
    fn encode(
        &mut self,
        first: PageIndex,
        data: u64,
        mut taken: Option<&mut Taken>,
        read: &mut dyn FnMut(PageIndex, &mut [u8; PAGE_SIZE]),
    ) -> Option<PackCounts> {
        let pages = data.count_ones() as usize;
        self.writer.begin(BulkFrame::LEN, pages);
        let mut counts = PackCounts::default();
        for (done, bit) in (1..).zip(bits(data)) {
            let start = (self.clock)();
            // The guest may be writing the page. What is read is one version of it, if a torn one: the page is dirty
            // then, and is sent again. All that follows is made from this one reading.
            read(PageIndex(first.0 + bit as u64), &mut self.page);
            self.chooser.note_read(nanos((self.clock)().since(start)));
            let old = taken.as_mut().and_then(|taken| taken.pages[bit].take());
            let encoding = self.encode_page(bit, old.as_deref(), taken.is_some());
            let length = self.writer.finish_page(encoding);
            if taken.is_some() {
                counts.count_delta(old.is_some(), (encoding == Encoding::Delta).then_some(length));
            }
            self.chooser.passed(1);
            counts.count(encoding);
            if let Some(taken) = &mut taken {
                // What was read becomes the kept version; its old one is what is read into next.
                let page = old.unwrap_or_else(|| Box::new([0; PAGE_SIZE]));
                taken.pages[bit] = Some(mem::replace(&mut self.page, page));
            } else if self.pinned.is_empty() && !self.chooser.sample_is_due() {
                let saved = (done * PAGE_SIZE).saturating_sub(self.writer.bodies());
                if !self.chooser.is_worth_finishing(saved, pages - done) {
                    return None;
                }
            }
        }
        Some(counts)
    }

    /// Appends the body of the page that was read. `captured`: it will be kept.
    fn encode_page(&mut self, bit: usize, old: Option<&Page>, captured: bool) -> Encoding {
        let delta = old.and_then(|old| self.delta(old));
        if captured {
            self.chooser.note_captured(self.round, delta);
        }
        if delta.is_some() {
            return Encoding::Delta;
        }
        if self.same(bit) {
            return Encoding::Same;
        }
        self.compressed().unwrap_or_else(|| {
            self.writer.body().extend_from_slice(&self.page[..]);
            Encoding::Raw
        })
    }

    /// Appends the difference to `old`, where it pays. Returns nanoseconds and bytes.
    fn delta(&mut self, old: &Page) -> Option<(f64, f64)> {
        let (why, limit) = self.chooser.delta()?;
        let before = self.writer.body().len();
        let start = (self.clock)();
        let fits = self.encoder.delta(old, &self.page, limit, self.writer.body());
        let ns = nanos((self.clock)().since(start));
        let length = if fits { self.writer.body().len() - before } else { limit };
        self.chooser.note(Method::Delta, why, ns, length as f64);
        fits.then_some((ns, length as f64))
    }

    /// Appends a reference to a page with the same content, where there is one.
    fn same(&mut self, bit: usize) -> bool {
        let class = class(&self.page);
        if self.last_round || !self.chooser.hashes(class) {
            return false;
        }
        let start = (self.clock)();
        let hash = blake3::hash(&self.page[..]);
        let other = self.versions.same.find(&hash);
        self.chooser.note_hashed(class, nanos((self.clock)().since(start)), other.is_some());
        match other {
            Some(other) => {
                PageEncoder::same(other, &hash, self.writer.body());
                self.pinned.push(other);
            }
            None => self.contents.push((bit, hash)),
        }
        other.is_some()
    }

    /// Appends the page compressed, where that makes it smaller, and tries another compressor where that is due.
    fn compressed(&mut self) -> Option<Encoding> {
        let before = self.writer.body().len();
        let in_use = self.chooser.compressor();
        let sample = self.chooser.sample();
        let mut time = self.chooser.time(0.0, PAGE_SIZE);
        let mut encoding = None;
        if let Some(method) = in_use {
            let (smaller, ns) = self.compress(method, Why::Best, None);
            if smaller {
                encoding = Some(encoding_of(method));
                time = self.chooser.time(ns, self.writer.body().len() - before);
            } else {
                time += ns;
            }
        }
        if let Some(method) = sample {
            let mut other = mem::take(&mut self.other);
            other.clear();
            let (smaller, ns) = self.compress(method, Why::Sample, Some(&mut other));
            if smaller && self.chooser.time(ns, other.len()) < time {
                encoding = Some(encoding_of(method));
                self.writer.body().truncate(before);
                self.writer.body().extend_from_slice(&other);
            }
            self.other = other;
        }
        encoding
    }

    /// Compresses the page to the end of the payload, or to `out`. Says whether it got smaller, and the nanoseconds.
    fn compress(&mut self, method: Method, why: Why, out: Option<&mut Vec<u8>>) -> (bool, f64) {
        let out = out.unwrap_or_else(|| self.writer.body());
        let before = out.len();
        let start = (self.clock)();
        let smaller = match method {
            Method::Zstd => self.encoder.zstd(&self.page, PAGE_SIZE, out),
            _ => self.encoder.lz4(&self.page, PAGE_SIZE, out),
        };
        let ns = nanos((self.clock)().since(start));
        let length = if smaller { out.len() - before } else { PAGE_SIZE };
        self.chooser.note(method, why, ns, length as f64);
        (smaller, ns)
    }
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").field("counts", &self.counts).field("chooser", &self.chooser).finish_non_exhaustive()
    }
}

const fn encoding_of(method: Method) -> Encoding {
    match method {
        Method::Lz4 => Encoding::Lz4,
        Method::Zstd => Encoding::Zstd,
        Method::Delta => Encoding::Delta,
    }
}

fn nanos(span: u64) -> f64 {
    span as f64
}

fn flags_of(bits: u8) -> FrameFlags {
    let has = |flag: FrameFlags| bits & flag.bits() != 0;
    FrameFlags {
        precopy: has(FrameFlags { precopy: true, acknowledge: false }),
        acknowledge: has(FrameFlags { precopy: false, acknowledge: true }),
    }
}

/// A number made of a page's content, quickly: of a word of each cache line.
fn class(page: &Page) -> u64 {
    let lines = page.as_chunks::<64>().0.iter();
    let words = lines.map(|line| line.first_chunk().map_or(0, |word| u64::from_le_bytes(*word)));
    words.fold(0_u64, |mixed, word| (mixed.rotate_left(23) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15)) >> 32
}
