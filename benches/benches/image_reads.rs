//! How the pages of an image come into guest memory: read (`pread`), by an io_uring, out of a mapping of the file; from the page cache,
//! and from the disk. Each is hashed and written to a memfd, as a lazy restore does it: a chunk that a fault waits for, and the recorded
//! pages, which lie anywhere, in batches.

use std::fs::File;
use std::hint::black_box;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;

use io_uring::{IoUring, opcode, types};
use memmap2::{Advice, Mmap};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use switchover_benches::{show, time};
use switchover_pager::ram::Ram;
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageCount};

/// 512 MiB: what is read in one repetition is scattered over all of it.
const PAGES: u64 = 1 << 17;
/// What an image vouches for: 1 MiB.
const CHUNK: usize = 256 * PAGE_SIZE;
/// Recorded pages that are brought at a time.
const BATCH: usize = 64;
/// Chunks, and batches, of one repetition.
const CHUNKS: usize = 32;
const BATCHES: usize = 8;

type Outcome = io::Result<()>;
/// How a chunk at one place is brought.
type ChunkWay = fn(&Ways, u64) -> Outcome;
/// How the pages at many places are.
type PagesWay = fn(&Ways, &[u64]) -> Outcome;

fn main() -> Outcome {
    let mut file = tempfile::tempfile()?;
    let mut chunk = vec![0; CHUNK];
    for number in 0..PAGES / 256 {
        chunk
            .as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip(number << 20..)
            .for_each(|(word, value)| *word = value.to_ne_bytes());
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    let ram = Ram::new(PageCount(PAGES)).map_err(io::Error::other)?;
    // Its memory is there: what the kernel takes to find some is the same for all, and much.
    for number in 0..PAGES / 256 {
        ram.file().write_all_at(&chunk, number * CHUNK as u64)?;
    }
    let ways = Ways::new(file, ram)?;
    for (cache, cold) in [("page cache", false), ("disk", true)] {
        let chunks: [(&str, ChunkWay); 3] =
            [("read", Ways::read_chunk), ("io_uring", Ways::ring_chunk), ("mapping", Ways::map_chunk)];
        for (name, way) in chunks {
            let places: Vec<_> = scattered(CHUNKS, PAGES / 256).map(|number| number * CHUNK as u64).collect();
            ways.measure(&format!("a chunk out of the {cache}: {name}"), "chunk", cold, CHUNKS, || {
                places.iter().try_for_each(|at| way(&ways, *at))
            });
        }
        let pages: [(&str, PagesWay); 4] = [
            ("read", Ways::read_pages),
            ("read, announced", Ways::read_announced),
            ("io_uring, all at once", Ways::ring_pages),
            ("mapping", Ways::map_pages),
        ];
        for (name, way) in pages {
            let places: Vec<_> = scattered(BATCHES * BATCH, PAGES).map(|page| page * PAGE_SIZE_U64).collect();
            ways.measure(&format!("{BATCH} pages out of the {cache}: {name}"), "page", cold, BATCHES * BATCH, || {
                places.chunks_exact(BATCH).try_for_each(|batch| way(&ways, batch))
            });
        }
    }
    Ok(())
}

/// `count` numbers below `end`, none twice, in no order.
fn scattered(count: usize, end: u64) -> impl Iterator<Item = u64> {
    // `end` is a power of two, and the factor is odd.
    (0..count as u64).map(move |at| at.wrapping_mul(0x9E37_79B9_7F4A_7C15) % end)
}

struct Ways {
    file: File,
    ram: Ram,
    map: Mmap,
    ring: std::cell::RefCell<IoUring>,
    bytes: std::cell::RefCell<Vec<u8>>,
}

impl Ways {
    fn new(file: File, ram: Ram) -> io::Result<Self> {
        // SAFETY: a file without a name, which nobody else can change or cut short.
        let map = unsafe { Mmap::map(&file)? };
        // Faults on what was not read ahead are what a restore would have.
        map.advise(Advice::Random)?;
        let ring = IoUring::new(BATCH.try_into().map_err(io::Error::other)?)?;
        Ok(Self { file, ram, map, ring: ring.into(), bytes: vec![0; CHUNK].into() })
    }

    fn measure(&self, case: &str, step: &str, cold: bool, steps: usize, mut work: impl FnMut() -> Outcome) {
        let prepare = || {
            if cold {
                // What is mapped stays in the cache.
                // SAFETY: of a file's mapping, which is read again from the file.
                let unmapped = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
                let dropped = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
                assert!(unmapped.is_ok() && dropped.is_ok(), "the page cache cannot be emptied");
            }
        };
        let mut failed = None;
        let cost = time(steps as u64, prepare, || {
            if let Err(error) = work() {
                failed = Some(error);
            }
        });
        match failed {
            None => show(case, step, &cost),
            Some(error) => println!("SKIP {case}: {error}"),
        }
    }

    /// Compares, and writes to memory.
    fn take(&self, bytes: &[u8], at: u64) -> Outcome {
        black_box(blake3::hash(bytes));
        self.ram.file().write_all_at(bytes, at)
    }

    fn read_chunk(&self, at: u64) -> Outcome {
        let bytes = &mut *self.bytes.borrow_mut();
        self.file.read_exact_at(bytes, at)?;
        self.take(bytes, at)
    }

    fn map_chunk(&self, at: u64) -> Outcome {
        self.take(self.mapped(at, CHUNK)?, at)
    }

    fn ring_chunk(&self, at: u64) -> Outcome {
        let bytes = &mut *self.bytes.borrow_mut();
        self.ring_reads(bytes, CHUNK, &[at])?;
        self.take(bytes, at)
    }

    fn read_pages(&self, places: &[u64]) -> Outcome {
        let bytes = &mut self.bytes.borrow_mut()[..PAGE_SIZE];
        places.iter().try_for_each(|at| {
            self.file.read_exact_at(bytes, *at)?;
            self.take(bytes, *at)
        })
    }

    /// The kernel is told first what is going to be read, and begins to.
    fn read_announced(&self, places: &[u64]) -> Outcome {
        let length = PAGE_SIZE_U64.cast_signed();
        for at in places {
            posix_fadvise(&self.file, at.cast_signed(), length, PosixFadviseAdvice::POSIX_FADV_WILLNEED)?;
        }
        self.read_pages(places)
    }

    fn map_pages(&self, places: &[u64]) -> Outcome {
        places.iter().try_for_each(|at| self.take(self.mapped(*at, PAGE_SIZE)?, *at))
    }

    fn ring_pages(&self, places: &[u64]) -> Outcome {
        let bytes = &mut *self.bytes.borrow_mut();
        self.ring_reads(bytes, PAGE_SIZE, places)?;
        bytes.chunks_exact(PAGE_SIZE).zip(places).try_for_each(|(page, at)| self.take(page, *at))
    }

    fn mapped(&self, at: u64, length: usize) -> io::Result<&[u8]> {
        let at = usize::try_from(at).map_err(io::Error::other)?;
        self.map.get(at..at + length).ok_or_else(|| io::Error::other("beyond the end of the mapping"))
    }

    /// Reads `length` bytes from each of `places`, one behind the other, and waits for all.
    fn ring_reads(&self, bytes: &mut [u8], length: usize, places: &[u64]) -> Outcome {
        let ring = &mut *self.ring.borrow_mut();
        let count = u32::try_from(length).map_err(io::Error::other)?;
        let fd = types::Fd(self.file.as_raw_fd());
        for (part, at) in bytes.chunks_exact_mut(length).zip(places) {
            let read = opcode::Read::new(fd, part.as_mut_ptr(), count).offset(*at).build();
            // SAFETY: `bytes` is borrowed until all of them have been waited for, below.
            unsafe { ring.submission().push(&read) }.map_err(io::Error::other)?;
        }
        ring.submit_and_wait(places.len())?;
        ring.completion().map(|done| done.result()).try_for_each(|result| match usize::try_from(result) {
            Ok(read) if read == length => Ok(()),
            _ => Err(io::Error::other(format!("a read ended with {result}"))),
        })
    }
}
