//! Writes an image: memory by several threads, then the tables, then the header, then the name.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lz4_flex::block::{compress_into, get_maximum_output_size};
use switchover_pager::zero::Holes;
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};

use crate::base::Base;
use crate::buffer::ChunkBuffer;
use crate::chunk::{Encoding, Entry, Hash, Present, count_of, first_of, place_of};
use crate::crew::{Tally, share_out, threads_for};
use crate::error::ImageError;
use crate::layout::{CHUNK_LEN, CHUNK_PAGES, Header, INCREMENT, MEMORY_OFFSET, MOST_PAGES, PACKED};
use crate::leaves::Leaves;
use crate::partial::Partial;
use crate::sections::Sections;

/// Absent pages between present ones that are written as zeros, because one large write takes less time than two small ones and
/// what lies between: 32 KiB.
const GAP: usize = 8;

/// Writes shorter than this go through the page cache, which gathers them: a disk does few of them in a second by themselves.
const LEAST_DIRECT: usize = 64 << 10;

/// How an image is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// Compress memory, chunk by chunk, with LZ4. The file is smaller then, and cannot be mapped.
    pub compress: bool,
}

/// An image that is being written. Dropped before [`commit`](Self::commit), it leaves nothing.
pub struct ImageWriter {
    partial: Partial,
    /// For writes past the page cache; unset where the file system refuses them, or is memory itself.
    direct: Option<File>,
    /// It has refused one.
    direct_refused: AtomicBool,
    pages: u64,
    packed: bool,
    base: Option<Base>,
    /// Packed: where the next chunk goes.
    end: AtomicU64,
    slots: Box<[Mutex<Slot>]>,
}

/// What has been written of a chunk.
#[derive(Default)]
struct Slot {
    present: Present,
    /// Pages that were written, as zeros or otherwise.
    own: Present,
    /// Pages in whose places there are, or were, other bytes than zeros.
    touched: Present,
    entry: Entry,
    /// Pages of it were written again, and the entry is of those before.
    stale: bool,
    /// Where pages of it may be written again: what its hash is made of, unless they have moved since.
    leaves: Option<Leaves>,
}

/// Called with the first page of a chunk and bits for some of its pages, before these are read.
pub type BeforeRead<'a> = &'a (dyn Fn(PageIndex, &[u64]) -> Result<(), ImageError> + Sync);

/// Reads pages from the first one on, as many as there is room for.
pub type ReadPages<'a> = &'a (dyn Fn(PageIndex, &mut [u8]) -> io::Result<()> + Sync);

/// What an image has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    /// Pages of memory.
    pub pages: PageCount,
    /// Pages that are not zero.
    pub present: PageCount,
    /// Bytes of memory that are stored.
    pub stored: u64,
    /// Length of the file, holes included.
    pub file_len: u64,
}

/// What a thread writes chunks with.
struct Tool<'a> {
    memory: &'a File,
    holes: Holes<'a>,
    chunk: ChunkBuffer,
    /// Packed: the present pages, one behind the other, and their LZ4 block.
    gathered: Vec<u8>,
    compressed: Vec<u8>,
}

impl ImageWriter {
    /// Begins an image that will be called `path`, of memory with so many pages. Nothing is there under that name, or what was
    /// there stays, until [`commit`](Self::commit).
    ///
    /// # Errors
    /// When no file can be made there.
    pub fn create(path: &Path, pages: PageCount, options: Options) -> Result<Self, ImageError> {
        Self::begin(path, pages, options, None)
    }

    /// Begins one that will hold the differences to `base` only: the pages that are [rewritten](Self::rewrite), and no others.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_on(base: Base, path: &Path, pages: PageCount) -> Result<Self, ImageError> {
        Self::begin(path, pages, Options::default(), Some(base))
    }

    fn begin(path: &Path, pages: PageCount, options: Options, base: Option<Base>) -> Result<Self, ImageError> {
        let pages = pages.0;
        if !(1..=MOST_PAGES).contains(&pages) {
            return Err(ImageError::Size { pages, most: MOST_PAGES });
        }
        let partial = Partial::create(path)?;
        let memory_end = MEMORY_OFFSET + if options.compress { 0 } else { pages * PAGE_SIZE_U64 };
        partial.file().set_len(memory_end).map_err(ImageError::io("make room in", partial.path()))?;
        // What is packed begins anywhere, and direct I/O begins at blocks.
        let direct = if options.compress { None } else { partial.open_direct() };
        let chunks = pages.div_ceil(CHUNK_PAGES as u64);
        Ok(Self {
            partial,
            direct,
            direct_refused: AtomicBool::new(false),
            pages,
            packed: options.compress,
            base,
            end: AtomicU64::new(MEMORY_OFFSET),
            slots: (0..chunks).map(|_| Mutex::default()).collect(),
        })
    }

    /// Writes all of `memory`, a memfd with as many pages as were announced, which nobody changes meanwhile.
    ///
    /// # Errors
    /// When memory cannot be read or the file not be written, or it is called off.
    pub fn write_memory(&self, memory: &File, tally: &Tally) -> Result<(), ImageError> {
        self.write_all(memory, &|_, _| Ok(()), false, tally)
    }

    /// The same of memory that changes meanwhile. What is written to a page after `before` was called for it has to be written
    /// again, with [`rewrite`](Self::rewrite).
    ///
    /// # Errors
    /// As [`write_memory`](Self::write_memory), and those of `before`.
    pub fn write_moving(&self, memory: &File, before: BeforeRead<'_>, tally: &Tally) -> Result<(), ImageError> {
        self.write_all(memory, before, true, tally)
    }

    fn write_all(&self, memory: &File, before: BeforeRead<'_>, moving: bool, tally: &Tally) -> Result<(), ImageError> {
        let chunks = self.slots.len() as u64;
        let work = |tool: &mut Tool<'_>, number| {
            before(first_of(number, self.pages), &[u64::MAX; CHUNK_PAGES / 64])?;
            self.write_chunk(tool, number, moving, tally)
        };
        share_out(threads_for(chunks), chunks, tally, || self.tool(memory), work)
    }

    /// Writes those pages again that have a bit in `which`, as `read` finds them. Not into a compressed image.
    ///
    /// # Errors
    /// As [`write_moving`](Self::write_moving).
    pub fn rewrite(
        &self,
        read: ReadPages<'_>,
        which: &[u64],
        before: BeforeRead<'_>,
        tally: &Tally,
    ) -> Result<(), ImageError> {
        let chunks = self.slots.len() as u64;
        let work = |tool: &mut Tool<'_>, number| {
            let first_word = usize::try_from(number).unwrap_or(0) * (CHUNK_PAGES / 64);
            let mut asked = Present::of_words(&mut which.iter().skip(first_word).copied());
            (count_of(number, self.pages)..CHUNK_PAGES).for_each(|page| asked.remove(page));
            if asked.is_empty() {
                return Ok(());
            }
            before(first_of(number, self.pages), &asked.0)?;
            self.rewrite_chunk(tool, number, asked, read, tally)
        };
        share_out(threads_for(chunks), chunks, tally, || self.tool(self.partial.file()), work)
    }

    /// Hashes the chunks anew in which pages were written again, reading those whose pages have moved. To be called when nothing will be
    /// written any more.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn settle(&self, tally: &Tally) -> Result<(), ImageError> {
        let chunks = self.slots.len() as u64;
        let work = |tool: &mut Tool<'_>, number| {
            let Some(slot) = self.slot(number) else { return Ok(()) };
            let mut slot = lock(slot);
            if !slot.stale {
                return Ok(());
            }
            let hash = match slot.leaves.take().map(|leaves| leaves.hash()) {
                Some(hash) => hash,
                None => self.hash_written(tool, number, slot.present)?,
            };
            slot.stale = false;
            slot.entry = match slot.present.is_empty() {
                true => Entry::default(),
                false => Entry::in_place(number, self.pages, hash),
            };
            Ok(())
        };
        share_out(threads_for(chunks), chunks, tally, || self.tool(self.partial.file()), work)
    }

    /// The hash of a chunk's pages as they are in the file.
    fn hash_written(&self, tool: &mut Tool<'_>, number: u64, present: Present) -> Result<Hash, ImageError> {
        let (file, at) = (self.partial.file(), place_of(number, self.pages));
        let bytes = tool.chunk.bytes_mut();
        for run in present.byte_runs(1) {
            let read = file.read_exact_at(&mut bytes[run.clone()], at + run.start as u64);
            read.map_err(ImageError::io("read back", self.partial.path()))?;
        }
        Ok(present.hash(bytes))
    }

    /// Writes the tables and the header, makes all of it durable and gives it its name.
    ///
    /// # Errors
    /// When that fails; nothing is left of it then.
    pub fn commit(self, sections: &Sections) -> Result<Written, ImageError> {
        let sections = sections.encode_on(self.base.as_ref())?;
        let memory_len =
            if self.packed { self.end.load(Ordering::SeqCst) - MEMORY_OFFSET } else { self.pages * PAGE_SIZE_U64 };
        let (mut bitmap, mut owned, mut index, mut present, mut stored) = (Vec::new(), Vec::new(), Vec::new(), 0, 0);
        for slot in &self.slots {
            let slot = lock(slot);
            let (pages, own, entry) = (slot.present, slot.own, &slot.entry);
            bitmap.extend(pages.0.into_iter().flat_map(u64::to_le_bytes));
            owned.extend(own.0.into_iter().flat_map(u64::to_le_bytes));
            index.extend(entry.encode());
            present += pages.count() as u64;
            stored += match entry.encoding {
                Encoding::InPlace => pages.count() as u64 * PAGE_SIZE_U64,
                Encoding::None | Encoding::Raw | Encoding::Lz4 => entry.length.into(),
            };
        }
        let features = if self.packed { PACKED } else { 0 } | if self.base.is_some() { INCREMENT } else { 0 };
        let sections_len = sections.len() as u64;
        let mut header = Header { features, pages: self.pages, memory_len, sections_len, root: [0; blake3::OUT_LEN] };
        // The last chunk's words may go further than memory.
        let one = usize::try_from(self.pages.div_ceil(64) * 8).unwrap_or(usize::MAX);
        bitmap.truncate(one);
        if header.is_increment() {
            owned.truncate(one);
            bitmap.append(&mut owned);
        }
        header.root = header.root_of(&sections, &bitmap, &index);
        let write = |bytes: &[u8], at| {
            self.partial.file().write_all_at(bytes, at).map_err(ImageError::io("write", self.partial.path()))
        };
        write(&sections, header.sections_at())?;
        write(&bitmap, header.bitmap_at())?;
        write(&index, header.index_at())?;
        write(&header.encode(), 0)?;
        self.partial.keep()?;
        Ok(Written { pages: PageCount(self.pages), present: PageCount(present), stored, file_len: header.file_len() })
    }

    fn tool<'a>(&self, memory: &'a File) -> Result<Tool<'a>, ImageError> {
        let no_memory = |source| ImageError::Io { attempted: "get memory to write", path: self.path(), source };
        let room = if self.packed { get_maximum_output_size(CHUNK_LEN) } else { 0 };
        Ok(Tool {
            memory,
            holes: Holes::new(memory, PageCount(self.pages)),
            chunk: ChunkBuffer::new().map_err(no_memory)?,
            gathered: Vec::new(),
            compressed: vec![0; room],
        })
    }

    fn path(&self) -> std::path::PathBuf {
        self.partial.path().to_owned()
    }

    fn write_chunk(&self, tool: &mut Tool<'_>, number: u64, moving: bool, tally: &Tally) -> Result<(), ImageError> {
        let (first, count) = (first_of(number, self.pages), count_of(number, self.pages));
        let present = if tool.holes.run_from(first).0 >= count as u64 {
            Present::default()
        } else {
            let bytes = &mut tool.chunk.bytes_mut()[..count * PAGE_SIZE];
            let read = tool.memory.read_exact_at(bytes, first.offset());
            read.map_err(|source| ImageError::Memory { attempted: "read", page: first, source })?;
            Present::of(bytes, 0..count)
        };
        let mut leaves = None;
        let (entry, bytes) = if present.is_empty() {
            (Entry::default(), 0)
        } else if self.packed {
            self.pack(tool, present)?
        } else {
            let chunk = tool.chunk.bytes();
            leaves = moving.then(|| Leaves::of(present, chunk)).flatten();
            let hash = leaves.as_ref().map_or_else(|| present.hash(chunk), Leaves::hash);
            self.write_in_place(chunk, number, present, hash)?
        };
        let own = Present::first(count);
        self.set_slot(number, Slot { present, own, touched: present, entry, stale: false, leaves });
        tally.note(count - present.count(), present.count(), bytes);
        Ok(())
    }

    fn rewrite_chunk(
        &self,
        tool: &mut Tool<'_>,
        number: u64,
        asked: Present,
        read: ReadPages<'_>,
        tally: &Tally,
    ) -> Result<(), ImageError> {
        // One thread at a time has a chunk.
        let Some(slot) = self.slot(number) else { return Ok(()) };
        let mut slot = lock(slot);
        let chunk_first = first_of(number, self.pages);
        let bytes = tool.chunk.bytes_mut();
        let mut to_write = Present::default();
        for run in asked.runs(1) {
            let first = PageIndex(chunk_first.0 + run.start as u64);
            let within = run.start * PAGE_SIZE..run.end * PAGE_SIZE;
            read(first, &mut bytes[within]).map_err(|source| ImageError::Memory {
                attempted: "read",
                page: first,
                source,
            })?;
            let present = Present::of(bytes, run.clone());
            for page in run {
                slot.own.insert(page);
                if present.contains(page) {
                    slot.present.insert(page);
                    slot.touched.insert(page);
                } else {
                    slot.present.remove(page);
                }
                // Zeros need to be written only over something else.
                if slot.touched.contains(page) {
                    to_write.insert(page);
                }
            }
        }
        let at = place_of(number, self.pages);
        let mut written = 0;
        for run in to_write.byte_runs(1) {
            self.write_run(&bytes[run.clone()], at + run.start as u64)?;
            written += run.len();
        }
        slot.stale = true;
        slot.leaves = Leaves::rewritten(slot.leaves.take(), slot.present, asked, bytes);
        drop(slot);
        tally.note(0, 0, written);
        Ok(())
    }

    fn slot(&self, number: u64) -> Option<&Mutex<Slot>> {
        usize::try_from(number).ok().and_then(|number| self.slots.get(number))
    }

    fn set_slot(&self, number: u64, slot: Slot) {
        if let Some(place) = self.slot(number) {
            *lock(place) = slot;
        }
    }

    fn write_in_place(
        &self,
        chunk: &[u8],
        number: u64,
        present: Present,
        hash: Hash,
    ) -> Result<(Entry, usize), ImageError> {
        let entry = Entry::in_place(number, self.pages, hash);
        let mut written = 0;
        for run in present.byte_runs(GAP) {
            self.write_run(&chunk[run.clone()], entry.offset + run.start as u64)?;
            written += run.len();
        }
        Ok((entry, written))
    }

    fn write_run(&self, bytes: &[u8], at: u64) -> Result<(), ImageError> {
        let direct = self.direct.as_ref().filter(|_| bytes.len() >= LEAST_DIRECT);
        if let Some(direct) = direct.filter(|_| !self.direct_refused.load(Ordering::Relaxed)) {
            match direct.write_all_at(bytes, at) {
                // Some file systems let such a file be opened, and written never.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    self.direct_refused.store(true, Ordering::Relaxed);
                }
                done => return done.map_err(ImageError::io("write", self.partial.path())),
            }
        }
        self.partial.file().write_all_at(bytes, at).map_err(ImageError::io("write", self.partial.path()))
    }

    fn pack(&self, tool: &mut Tool<'_>, present: Present) -> Result<(Entry, usize), ImageError> {
        tool.gathered.clear();
        for run in present.byte_runs(1) {
            tool.gathered.extend_from_slice(&tool.chunk.bytes()[run]);
        }
        let (encoding, stored) = match compress_into(&tool.gathered, &mut tool.compressed) {
            Ok(length) if length < tool.gathered.len() => (Encoding::Lz4, &tool.compressed[..length]),
            _ => (Encoding::Raw, &tool.gathered[..]),
        };
        let offset = self.end.fetch_add(stored.len() as u64, Ordering::SeqCst);
        self.partial.file().write_all_at(stored, offset).map_err(ImageError::io("write", self.partial.path()))?;
        // At most a chunk.
        let length = u32::try_from(stored.len()).unwrap_or(u32::MAX);
        Ok((Entry { offset, length, encoding, hash: *blake3::hash(stored).as_bytes() }, stored.len()))
    }
}

fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}
