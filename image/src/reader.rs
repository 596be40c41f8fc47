//! Reads an image: its tables when it is opened, its memory chunk by chunk.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use lz4_flex::block::decompress_into;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use switchover_pager::zero::{Holes, is_zero};
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};

use crate::base::{Base, MOST_LAYERS};
use crate::buffer::ChunkBuffer;
use crate::chunk::{Encoding, Entry, Present, count_of, first_of, pages_of};
use crate::crew::{Tally, share_out, threads_for};
use crate::error::ImageError;
use crate::folder::is_one_file;
use crate::layout::{CHUNK_LEN, CHUNK_PAGES, HEADER_LEN, Header, INDEX_ENTRY, MEMORY_OFFSET, place_of};
use crate::sections::Sections;

/// Absent pages between present ones that are read along.
const GAP: usize = 8;

/// An image whose header, sections, bitmap and index are as they were written. Its memory may still be damaged: every chunk is
/// compared with its hash when it is read.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    header: Header,
    sections: Sections,
    /// What is in this file.
    chunks: Box<[(Present, Entry)]>,
    /// What lies under it, where it is an increment.
    layer: Option<Box<Layer>>,
}

/// What makes an image an increment.
#[derive(Debug)]
struct Layer {
    below: Image,
    base: Base,
    /// The pages that the file itself says what they are, chunk by chunk; and all that are not zero.
    own: Box<[Present]>,
    merged: Box<[Present]>,
}

/// Room for one chunk and what it takes to read it.
pub struct ChunkReader<'a> {
    image: &'a Image,
    chunk: ChunkBuffer,
    stored: Vec<u8>,
    unpacked: Vec<u8>,
    below: Option<Box<ChunkReader<'a>>>,
}

/// A chunk as it was written.
pub struct ReadChunk<'a> {
    first: PageIndex,
    pub(crate) present: Present,
    /// Pages at their places. What lies in the places of absent pages means nothing.
    pub(crate) bytes: &'a [u8],
}

impl ReadChunk<'_> {
    /// Its pages that are not zero, stretch by stretch: the first page of each, and the bytes of all.
    pub fn runs(&self) -> impl Iterator<Item = (PageIndex, &[u8])> {
        let (first, bytes) = (self.first, self.bytes);
        let runs = self.present.runs(1);
        runs.map(move |run| (PageIndex(first.0 + run.start as u64), &bytes[run.start * PAGE_SIZE..run.end * PAGE_SIZE]))
    }

    /// The bytes of `page`, if it is one of its pages and not zero.
    #[must_use]
    pub fn page(&self, page: PageIndex) -> Option<&[u8; PAGE_SIZE]> {
        let within = page.0.checked_sub(self.first.0).and_then(|within| usize::try_from(within).ok());
        let within = within.filter(|within| *within < CHUNK_PAGES && self.present.contains(*within))?;
        self.bytes.get(within * PAGE_SIZE..)?.first_chunk()
    }
}

impl Image {
    /// Opens `path` and reads everything but memory; of an increment, those that it is based on too.
    ///
    /// # Errors
    /// When it is no image, or one of another version, or was altered or cut short, or the same goes for what it is based on.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        Self::open_layer(path, MOST_LAYERS)
    }

    fn open_layer(path: &Path, layers: usize) -> Result<Self, ImageError> {
        if layers == 0 {
            return Err(ImageError::TooManyLayers { path: path.to_owned(), most: MOST_LAYERS });
        }
        // Whoever opens a pipe otherwise waits for its writer.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(ImageError::io("open the image", path))?;
        let known = file.metadata().map_err(ImageError::io("look at the image", path))?;
        if !known.is_file() {
            return Err(ImageError::Foreign { path: path.to_owned() });
        }
        Self::read(file, path.to_owned(), known.len(), layers)
    }

    fn read(file: File, path: PathBuf, file_len: u64, layers: usize) -> Result<Self, ImageError> {
        let mut block = [0; HEADER_LEN];
        if file_len < HEADER_LEN as u64 {
            let mut start = vec![0; usize::try_from(file_len.min(8)).unwrap_or(0)];
            file.read_exact_at(&mut start, 0).map_err(ImageError::io("read", &path))?;
            return Err(if crate::layout::MAGIC.starts_with(&start) && !start.is_empty() {
                ImageError::Length { path, have: file_len, wanted: HEADER_LEN as u64 }
            } else {
                ImageError::Foreign { path }
            });
        }
        file.read_exact_at(&mut block, 0).map_err(ImageError::io("read", &path))?;
        let header = Header::decode(&block, &path, file_len)?;
        // The header says that all of these lie in the file, so that what is allocated is at most as large.
        let table = |at, length: u64| {
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
            file.read_exact_at(&mut bytes, at).map(|()| bytes).map_err(ImageError::io("read", &path))
        };
        let sections = table(header.sections_at(), header.sections_len)?;
        let bitmap = table(header.bitmap_at(), header.bitmap_len())?;
        let index = table(header.index_at(), header.index_len())?;
        if header.root_of(&sections, &bitmap, &index) != header.root {
            return Err(ImageError::Root { header_end: MEMORY_OFFSET, tables: header.sections_at(), path });
        }
        // From here on it is what somebody has written, who need not have been this program.
        let at = header.sections_at();
        let (sections, base) = Sections::decode(&sections, &path, at, header.pages, header.is_increment())?;
        // Of an increment's two bitmaps, the first one.
        let present = if header.is_increment() { &bitmap[..bitmap.len() / 2] } else { &bitmap[..] };
        let chunks = chunks(&header, present, &index, &path)?;
        let layer = base.map(|base| Layer::open(&path, base, &header, &sections, &bitmap, &chunks, layers));
        Ok(Self { layer: layer.transpose()?.map(Box::new), file, path, header, sections, chunks })
    }

    /// What it is based on, if it is an increment.
    #[must_use]
    pub fn base(&self) -> Option<&Base> {
        self.layer.as_ref().map(|layer| &layer.base)
    }

    /// It and all images that it is made of, the last one being complete by itself.
    pub fn layers(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |image| image.layer.as_ref().map(|layer| &layer.below))
    }

    /// Whether `path` is the file of one of the images that it is made of, itself among them.
    #[must_use]
    pub fn stands_on(&self, path: &Path) -> bool {
        self.layers().any(|layer| is_one_file(&layer.path, path))
    }

    /// The pages that this file itself says what they are: bit `i` of word `w` is page `64 w + i`.
    #[must_use]
    pub fn own_words(&self) -> Vec<u64> {
        (0..self.header.chunks()).flat_map(|number| self.own(number).0).collect()
    }

    /// Which pages of a chunk are not zero, by all layers.
    fn present(&self, number: u64) -> Present {
        let Ok(at) = usize::try_from(number) else { return Present::default() };
        match &self.layer {
            Some(layer) => layer.merged.get(at).copied().unwrap_or_default(),
            None => self.chunk(number).0,
        }
    }

    /// Which pages of a chunk this file itself says what they are.
    fn own(&self, number: u64) -> Present {
        match &self.layer {
            Some(layer) => usize::try_from(number).ok().and_then(|at| layer.own.get(at)).copied().unwrap_or_default(),
            None => Present::first(count_of(number, self.header.pages)),
        }
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it holds beside memory.
    #[must_use]
    pub fn sections(&self) -> &Sections {
        &self.sections
    }

    /// Its header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Pages of memory.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        PageCount(self.header.pages)
    }

    /// Pages of memory that are not zero.
    #[must_use]
    pub fn present_pages(&self) -> PageCount {
        PageCount((0..self.header.chunks()).map(|number| self.present(number).count() as u64).sum())
    }

    /// Whether `page` is not zero.
    #[must_use]
    pub fn holds(&self, page: PageIndex) -> bool {
        let (number, within) = within_chunk(page);
        self.present(number).contains(within)
    }

    /// Bytes that its own pages take in the file.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let own: usize = self.chunks.iter().map(|(present, _)| present.count()).sum();
        if self.header.is_packed() { self.header.memory_len } else { own as u64 * PAGE_SIZE_U64 }
    }

    /// Reads all of memory into `memory`, a memfd of that size that is zero throughout. When this is back without an error, all
    /// of it is as it was written.
    ///
    /// # Errors
    /// When a chunk is damaged or cannot be read, memory not be written, or it is called off.
    pub fn load(&self, memory: &File, tally: &Tally) -> Result<(), ImageError> {
        self.each_chunk(tally, |reader, number| {
            let read = reader.read(number)?;
            let first = first_of(number, self.header.pages);
            for run in read.present.byte_runs(1) {
                let at = first.offset() + run.start as u64;
                memory.write_all_at(&read.bytes[run], at).map_err(|source| ImageError::Memory {
                    attempted: "write",
                    page: PageIndex::containing(at),
                    source,
                })?;
            }
            Ok(())
        })
    }

    /// Compares all of memory with its hashes, and looks for bytes in the places of zero pages; so in all images that it is made of.
    ///
    /// # Errors
    /// The first damage that is found.
    pub fn verify(&self, tally: &Tally) -> Result<(), ImageError> {
        for image in self.layers() {
            image.each_chunk(tally, |reader, number| {
                reader.read_own(number)?;
                if image.header.is_packed() { Ok(()) } else { reader.check_zeros(number) }
            })?;
        }
        Ok(())
    }

    fn each_chunk(
        &self,
        tally: &Tally,
        work: impl Fn(&mut ChunkReader<'_>, u64) -> Result<(), ImageError> + Sync,
    ) -> Result<(), ImageError> {
        let count = self.chunks.len() as u64;
        share_out(
            threads_for(count),
            count,
            tally,
            || self.reader(),
            |reader, number| {
                work(reader, number)?;
                let (present, entry) = (self.present(number), self.chunk(number).1);
                let pages = count_of(number, self.header.pages);
                tally.note(pages - present.count(), present.count(), usize::try_from(entry.length).unwrap_or(0));
                Ok(())
            },
        )
    }

    /// What it takes to read chunks on one thread.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn reader(&self) -> Result<ChunkReader<'_>, ImageError> {
        self.reader_of(MOST_LAYERS)
    }

    /// The same for the topmost `layers` alone: of pages that none of them says what they are, it reads nothing, and gives out anything.
    pub(crate) fn reader_of(&self, layers: usize) -> Result<ChunkReader<'_>, ImageError> {
        let chunk = ChunkBuffer::new().map_err(ImageError::io("get memory to read", &self.path))?;
        let below = self.layer.as_ref().filter(|_| layers > 1);
        let below = below.map(|layer| layer.below.reader_of(layers - 1).map(Box::new)).transpose()?;
        Ok(ChunkReader { image: self, chunk, stored: Vec::new(), unpacked: Vec::new(), below })
    }

    /// Reads `page` by itself, without comparing it with anything: whoever uses it has a hash of its own. `false`, and nothing read,
    /// where the image does not hold the page or not in place.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read_unchecked(&self, page: PageIndex, bytes: &mut [u8; PAGE_SIZE]) -> Result<bool, ImageError> {
        let Some(layer) = self.in_place(page) else { return Ok(false) };
        let read = layer.file.read_exact_at(bytes, place_of(page));
        read.map(|()| true).map_err(ImageError::io("read", &layer.path))
    }

    /// The layer that says what `page` is, if it has it in place.
    fn in_place(&self, page: PageIndex) -> Option<&Self> {
        let (number, within) = within_chunk(page);
        let layer = self.layers().find(|layer| layer.own(number).contains(within))?;
        (!layer.header.is_packed() && layer.chunk(number).0.contains(within)).then_some(layer)
    }

    /// Says that `page` is going to be read by itself, so that the kernel fetches it from the disk meanwhile, beside others. Of those
    /// that are in the page cache already it costs some 0.1 µs.
    pub fn announce(&self, page: PageIndex) {
        if let Some(layer) = self.in_place(page) {
            layer.fetch(place_of(page), PAGE_SIZE_U64);
        }
    }

    /// The same of all of chunk `number`.
    pub fn announce_chunk(&self, number: u64) {
        for layer in self.layers() {
            let (present, entry) = layer.chunk(number);
            match entry.encoding {
                Encoding::None => {}
                // Holes would be fetched, too.
                Encoding::InPlace => present
                    .byte_runs(GAP)
                    .for_each(|run| layer.fetch(entry.offset + run.start as u64, run.len() as u64)),
                Encoding::Raw | Encoding::Lz4 => layer.fetch(entry.offset, entry.length.into()),
            }
        }
    }

    fn fetch(&self, at: u64, length: u64) {
        // Advice: where it is not taken, reading takes longer.
        let will_need = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        let _ = posix_fadvise(&self.file, at.cast_signed(), length.cast_signed(), will_need);
    }

    pub(crate) fn chunk(&self, number: u64) -> (Present, Entry) {
        usize::try_from(number).ok().and_then(|number| self.chunks.get(number)).copied().unwrap_or_default()
    }

    fn damaged(&self, number: u64, reason: String) -> ImageError {
        ImageError::Chunk {
            path: self.path.clone(),
            chunk: number,
            first: first_of(number, self.header.pages),
            offset: self.chunk(number).1.offset,
            reason,
        }
    }
}

impl Layer {
    fn open(
        path: &Path,
        base: Base,
        header: &Header,
        sections: &Sections,
        bitmaps: &[u8],
        chunks: &[(Present, Entry)],
        layers: usize,
    ) -> Result<Self, ImageError> {
        let file = base.beside(path);
        let wrong = |source| ImageError::Base { path: path.to_owned(), base: file.clone(), source: Box::new(source) };
        let below = Image::open_layer(&file, layers - 1).map_err(|error| match error {
            // Named once is enough, and each layer would add to it.
            error @ (ImageError::Base { .. } | ImageError::OtherBase { .. } | ImageError::TooManyLayers { .. }) => {
                error
            }
            error => wrong(error),
        })?;
        // The same machine has as many pages.
        if below.sections.moment()? != base.moment || below.sections.machine != sections.machine {
            return Err(ImageError::OtherBase { path: path.to_owned(), base: file });
        }
        let words = bitmaps[bitmaps.len() / 2..].as_chunks::<8>().0;
        let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
        let own: Box<[_]> = chunks.iter().map(|_| Present::of_words(&mut words)).collect();
        let merged: Box<[_]> = (0..)
            .zip(&own)
            .zip(chunks)
            .map(|((number, own), (present, _))| below.present(number).under(*own, *present))
            .collect();
        for (number, (own, (present, _))) in (0..).zip(own.iter().zip(chunks)) {
            let beyond = count_of(number, header.pages)..CHUNK_PAGES;
            let fits = beyond.clone().all(|page| !own.contains(page))
                && (0..CHUNK_PAGES).all(|page| own.contains(page) || !present.contains(page));
            if !fits {
                return Err(ImageError::Field {
                    path: path.to_owned(),
                    offset: header.bitmap_at() + header.bitmap_len() / 2,
                    what: "the bitmap of pages that the image says anything of".to_owned(),
                    got: format!("another in chunk {number}"),
                    allowed: "one with all pages that are not zero, and none behind the last".to_owned(),
                });
            }
        }
        Ok(Self { below, base, own, merged })
    }
}

impl ChunkReader<'_> {
    /// Reads chunk `number` and compares it with its hash, or the parts that it is made of with theirs. One behind the last has no
    /// pages.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged.
    pub fn read(&mut self, number: u64) -> Result<ReadChunk<'_>, ImageError> {
        let image = self.image;
        self.read_own(number)?;
        let own = image.own(number);
        if let Some(below) = &mut self.below
            && own != Present::first(count_of(number, image.header.pages))
        {
            let lower = below.read(number)?;
            for run in lower.present.under(own, Present::default()).byte_runs(1) {
                self.chunk.bytes_mut()[run.clone()].copy_from_slice(&lower.bytes[run]);
            }
        }
        Ok(self.again(number))
    }

    /// Chunk `number`, which is the one that was [read](Self::read) last.
    pub(crate) fn again(&self, number: u64) -> ReadChunk<'_> {
        let image = self.image;
        let first = first_of(number, image.header.pages);
        ReadChunk { first, present: image.present(number), bytes: self.chunk.bytes() }
    }

    /// Reads what the file itself has of chunk `number`, and compares it with its hash.
    fn read_own(&mut self, number: u64) -> Result<(), ImageError> {
        let image = self.image;
        let (present, entry) = image.chunk(number);
        let cannot = ImageError::io("read", &image.path);
        let other_hash = || image.damaged(number, "has not the hash that the index says".to_owned());
        match entry.encoding {
            Encoding::None => {}
            Encoding::InPlace => {
                let file = &image.file;
                let bytes = self.chunk.bytes_mut();
                let mut runs = present.byte_runs(GAP);
                runs.try_for_each(|run| file.read_exact_at(&mut bytes[run.clone()], entry.offset + run.start as u64))
                    .map_err(cannot)?;
                if present.hash(bytes) != entry.hash {
                    return Err(other_hash());
                }
            }
            Encoding::Raw | Encoding::Lz4 => {
                self.stored.resize(usize::try_from(entry.length).unwrap_or(0), 0);
                image.file.read_exact_at(&mut self.stored, entry.offset).map_err(cannot)?;
                if *blake3::hash(&self.stored).as_bytes() != entry.hash {
                    return Err(other_hash());
                }
                self.unpack(number, present, entry.encoding)?;
            }
        }
        Ok(())
    }

    fn unpack(&mut self, number: u64, present: Present, encoding: Encoding) -> Result<(), ImageError> {
        let wanted = present.count() * PAGE_SIZE;
        let pages = if encoding == Encoding::Lz4 {
            self.unpacked.resize(CHUNK_LEN, 0);
            let length = decompress_into(&self.stored, &mut self.unpacked[..wanted])
                .map_err(|error| self.image.damaged(number, format!("is no LZ4 block ({error})")))?;
            &self.unpacked[..length]
        } else {
            &self.stored[..]
        };
        if pages.len() != wanted {
            let reason = format!("holds {} bytes where its pages have {wanted}", pages.len());
            return Err(self.image.damaged(number, reason));
        }
        let mut rest = pages;
        for run in present.byte_runs(1) {
            let (own, behind) = rest.split_at(run.len());
            self.chunk.bytes_mut()[run].copy_from_slice(own);
            rest = behind;
        }
        Ok(())
    }

    /// Looks for bytes in the places of the absent pages of chunk `number`, in place.
    fn check_zeros(&mut self, number: u64) -> Result<(), ImageError> {
        let image = self.image;
        let (present, _) = image.chunk(number);
        let range = pages_of(number, image.header.pages);
        let file_pages = PageCount(image.header.sections_at() / PAGE_SIZE_U64);
        // The file's pages begin with the header's block.
        let header = MEMORY_OFFSET / PAGE_SIZE_U64;
        let mut holes = Holes::new(&image.file, file_pages);
        let mut page = range.start;
        while page < range.end {
            let run = holes.run_from(PageIndex(page + header)).0;
            if run > 0 {
                page = page.saturating_add(run);
                continue;
            }
            if !present.contains(usize::try_from(page - range.start).unwrap_or(0)) {
                let offset = (page + header) * PAGE_SIZE_U64;
                let bytes = &mut self.chunk.bytes_mut()[..PAGE_SIZE];
                image.file.read_exact_at(bytes, offset).map_err(ImageError::io("read", &image.path))?;
                if !is_zero(bytes) {
                    return Err(ImageError::NotZero { path: image.path.clone(), page: PageIndex(page), offset });
                }
            }
            page += 1;
        }
        Ok(())
    }
}

/// The chunks by bitmap and index, if the two fit together and with the header.
fn chunks(header: &Header, bitmap: &[u8], index: &[u8], path: &Path) -> Result<Box<[(Present, Entry)]>, ImageError> {
    let field = |offset: u64, what: String, got: String, allowed: String| ImageError::Field {
        path: path.to_owned(),
        offset,
        what,
        got,
        allowed,
    };
    let mut words = bitmap.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    let mut chunks = Vec::with_capacity(index.len() / INDEX_ENTRY);
    for (number, bytes) in (0..).zip(index.as_chunks::<INDEX_ENTRY>().0) {
        let at = header.index_at() + number * INDEX_ENTRY as u64;
        let wrong =
            |got: String, allowed: String| field(at, format!("the index's entry of chunk {number}"), got, allowed);
        let present = Present::of_words(&mut words);
        if (count_of(number, header.pages)..CHUNK_PAGES).any(|page| present.contains(page)) {
            let at = header.bitmap_at();
            let allowed = format!("none behind page {:#x}", header.pages - 1);
            return Err(field(at, "the bitmap".to_owned(), "one with more pages than memory has".to_owned(), allowed));
        }
        let entry = Entry::decode(bytes).map_err(|got| wrong(got, "an entry of this version".to_owned()))?;
        let most = present.count() * PAGE_SIZE;
        let fits = match entry.encoding {
            Encoding::None => present.is_empty() && entry == Entry::default(),
            _ if present.is_empty() => false,
            Encoding::InPlace => !header.is_packed() && entry == Entry::in_place(number, header.pages, entry.hash),
            Encoding::Raw => header.is_packed() && entry.length as usize == most,
            Encoding::Lz4 => header.is_packed() && (1..most).contains(&(entry.length as usize)),
        };
        if !fits {
            let got = format!("{:?}, {} bytes at {:#x}", entry.encoding, entry.length, entry.offset);
            return Err(wrong(got, format!("what stores {} pages in this layout", present.count())));
        }
        chunks.push((present, entry));
    }
    if header.is_packed() {
        tiled(header, &chunks).map_err(|(number, got, allowed)| {
            let at = header.index_at() + number * INDEX_ENTRY as u64;
            field(at, format!("the place of chunk {number}"), got, allowed)
        })?;
    }
    Ok(chunks.into())
}

/// The chunk that `page` is in, and which of its pages it is.
fn within_chunk(page: PageIndex) -> (u64, usize) {
    (page.0 / CHUNK_PAGES as u64, usize::try_from(page.0 % CHUNK_PAGES as u64).unwrap_or(0))
}

/// Whether packed chunks lie one behind the other, from the beginning of memory to its end. If not: which one, where it is, and
/// where it should be.
fn tiled(header: &Header, chunks: &[(Present, Entry)]) -> Result<(), (u64, String, String)> {
    let mut stored: Vec<(u64, u32, u64)> = (0..)
        .zip(chunks)
        .filter(|(_, (_, entry))| entry.encoding != Encoding::None)
        .map(|(number, (_, entry))| (entry.offset, entry.length, number))
        .collect();
    stored.sort_unstable();
    let mut end = MEMORY_OFFSET;
    for &(offset, length, number) in &stored {
        if offset != end {
            return Err((number, format!("{offset:#x}"), format!("{end:#x}, behind the one before it,")));
        }
        end += u64::from(length);
    }
    if end == header.sections_at() {
        return Ok(());
    }
    let last = stored.last().map_or(0, |(_, _, number)| *number);
    Err((
        last,
        format!("one that ends at {end:#x}"),
        format!("one that ends where memory does, at {:#x},", header.sections_at()),
    ))
}
