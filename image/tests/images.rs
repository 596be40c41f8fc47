//! Images of memory that is not a guest's: written, read, compared, altered at every place.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking; its helpers are tests too")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use switchover_image::base::Base;
use switchover_image::error::ImageError;
use switchover_image::folder::FolderLock;
use switchover_image::merge::{flatten, merge_with_base, prune, thin_out};
use switchover_image::reader::Image;
use switchover_image::sections::{Origin, Sections};
use switchover_image::working_set::{WorkingSet, WorkingSetError, page_hash};
use switchover_image::writer::{ImageWriter, Options, Written};
use switchover_image::{Tally, differences};
use switchover_pager::ram::Ram;
use switchover_wire::description::MachineDescription;
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64, PageCount, PageIndex};
use tempfile::TempDir;

const IN_PLACE: Options = Options { compress: false };
const PACKED: Options = Options { compress: true };

/// A page of memory: its number and what fills it.
type Content = (u64, Vec<u8>);

fn memory(pages: u64, contents: &[Content]) -> Ram {
    let ram = Ram::new(PageCount(pages)).unwrap();
    for (page, pattern) in contents {
        let bytes: Vec<u8> = pattern.iter().copied().cycle().take(PAGE_SIZE).collect();
        ram.file().write_all_at(&bytes, PageIndex(*page).offset()).unwrap();
    }
    ram
}

fn sections(pages: u64) -> Sections {
    Sections {
        machine: MachineDescription::of_memory_alone("fake", PageCount(pages)),
        state: b"a state".to_vec(),
        was_running: true,
        first_pages: vec![PageIndex(0)],
        origin: Origin { version: "a test".to_owned(), saved_at: 7 },
    }
}

fn save(path: &Path, ram: &Ram, options: Options) -> Written {
    let writer = ImageWriter::create(path, ram.pages(), options).unwrap();
    writer.write_memory(ram.file(), &Tally::default()).unwrap();
    writer.commit(&sections(ram.pages().0)).unwrap()
}

fn bytes_of(file: &File, pages: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(pages * PAGE_SIZE_U64).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A folder on a disk, not in memory: what is written there goes through direct I/O where there is any.
fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn image_in(folder: &TempDir) -> PathBuf {
    folder.path().join("guest.image")
}

/// Opens and verifies.
fn check(path: &Path) -> Result<(), ImageError> {
    Image::open(path)?.verify(&Tally::default())
}

/// Memory with zeros and data over three chunks, the last of them no whole one.
fn mixed() -> (u64, Vec<Content>) {
    let noise = |seed: usize| (0..PAGE_SIZE).map(|at| (at * at / 7 + at * 31 + seed).to_le_bytes()[0] | 1).collect();
    (600, vec![(0, noise(1)), (1, vec![5]), (9, noise(2)), (100, vec![1, 2, 3]), (256, vec![0, 0, 9]), (599, noise(3))])
}

#[test]
fn memory_and_sections_come_back_as_they_were() {
    let (pages, contents) = mixed();
    let (ram, folder) = (memory(pages, &contents), folder());
    for options in [IN_PLACE, PACKED] {
        let path = image_in(&folder);
        let written = save(&path, &ram, options);
        assert_eq!((written.pages, written.present), (PageCount(pages), PageCount(6)));
        assert_eq!(fs::metadata(&path).unwrap().len(), written.file_len);
        let (image, tally) = (Image::open(&path).unwrap(), Tally::default());
        assert_eq!(image.sections(), &sections(pages));
        assert_eq!((image.present_pages(), image.stored_bytes()), (written.present, written.stored));
        assert!(image.holds(PageIndex(599)) && !image.holds(PageIndex(598)) && !image.holds(PageIndex(600)));
        let there = Ram::new(PageCount(pages)).unwrap();
        image.load(there.file(), &tally).unwrap();
        assert!(bytes_of(there.file(), pages) == bytes_of(ram.file(), pages), "{options:?}");
        assert_eq!((tally.data.into_inner(), tally.zero.into_inner()), (6, pages - 6));
        image.verify(&Tally::default()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file is left behind");
    }
}

#[test]
fn what_is_zero_takes_no_room_and_pages_in_place_can_be_mapped() {
    let (pages, contents) = mixed();
    let folder = folder();
    let path = image_in(&folder);
    save(&path, &memory(pages, &contents), IN_PLACE);
    let known = fs::metadata(&path).unwrap();
    assert!(known.blocks() * 512 < 100 * PAGE_SIZE_U64, "{} blocks for six pages", known.blocks());
    let mut page = vec![0; PAGE_SIZE];
    File::open(&path).unwrap().read_exact_at(&mut page, PAGE_SIZE_U64 + 100 * PAGE_SIZE_U64).unwrap();
    assert_eq!(page[..6], [1, 2, 3, 1, 2, 3]);
}

#[test]
fn every_altered_byte_is_found() {
    let (pages, contents) = (5, vec![(1, vec![7, 8, 9]), (3, (0..=255).collect())]);
    let folder = folder();
    for options in [IN_PLACE, PACKED] {
        let path = image_in(&folder);
        save(&path, &memory(pages, &contents), options);
        check(&path).unwrap();
        let whole = fs::read(&path).unwrap();
        // All of what is small, and a sample of what is large and alike.
        for at in (0..whole.len()).filter(|at| !(300..20_000).contains(at) || at % 97 == 0) {
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(&[whole[at] ^ 0x10], at as u64).unwrap();
            let error = check(&path).expect_err(&format!("byte {at} of {}", whole.len())).to_string();
            assert!(error.contains("guest.image"), "{error}");
            file.write_all_at(&whole[at..=at], at as u64).unwrap();
        }
        check(&path).unwrap();
    }
}

#[test]
fn a_damaged_chunk_is_named_and_none_of_it_is_given_out() {
    let (pages, contents) = mixed();
    let folder = folder();
    let path = image_in(&folder);
    save(&path, &memory(pages, &contents), IN_PLACE);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[1], 4096 + 256 * 4096 + 7).unwrap();
    let error = check(&path).unwrap_err();
    assert!(matches!(error, ImageError::Chunk { chunk: 1, first: PageIndex(256), offset: 0x10_1000, .. }), "{error}");
    let there = Ram::new(PageCount(pages)).unwrap();
    Image::open(&path).unwrap().load(there.file(), &Tally::default()).unwrap_err();
    let mut page = vec![0; PAGE_SIZE];
    there.file().read_exact_at(&mut page, 256 * PAGE_SIZE_U64).unwrap();
    assert_eq!(page, vec![0; PAGE_SIZE]);
    // In the place of a zero page.
    save(&path, &memory(pages, &contents), IN_PLACE);
    file_at(&path).write_all_at(&[1], 4096 + 300 * 4096).unwrap();
    let error = check(&path).unwrap_err();
    assert!(matches!(error, ImageError::NotZero { page: PageIndex(300), offset: 0x12_d000, .. }), "{error}");
}

fn file_at(path: &Path) -> File {
    File::options().write(true).open(path).unwrap()
}

#[test]
fn what_is_no_image_is_refused_with_what_it_is() {
    let folder = folder();
    let path = image_in(&folder);
    for (bytes, told) in [
        (&b""[..], "no image of a guest"),
        (b"\x93SW", "has 3 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", "no image of a guest"),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = Image::open(&path).unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
    }
    for other in [Path::new("/dev/zero"), folder.path()] {
        assert!(matches!(Image::open(other), Err(ImageError::Foreign { .. })));
    }
    assert!(Image::open(&folder.path().join("none")).unwrap_err().to_string().contains("open the image"));
    let whole = {
        save(&path, &memory(1, &[(0, vec![4])]), PACKED);
        fs::read(&path).unwrap()
    };
    for length in (0..whole.len()).filter(|length| *length < 70 || *length > 4080 || length % 97 == 0) {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(Image::open(&path).is_err(), "cut off at {length}");
    }
}

#[test]
fn differing_pages_are_found_whatever_the_layout() {
    let (pages, contents) = mixed();
    let folder = folder();
    let (one, other) = (image_in(&folder), folder.path().join("other"));
    save(&one, &memory(pages, &contents), IN_PLACE);
    save(&other, &memory(pages, &contents), PACKED);
    let found = |one: &Path, other: &Path| {
        differences(&Image::open(one).unwrap(), &Image::open(other).unwrap(), &Tally::default()).unwrap()
    };
    assert_eq!(found(&one, &other).ranges, []);
    let mut changed = contents.clone();
    changed[0].1[77] ^= 1;
    changed.remove(1);
    changed.push((256 + 7, vec![1]));
    save(&other, &memory(pages, &changed), PACKED);
    let expected = [(PageIndex(0), PageCount(2)), (PageIndex(263), PageCount(1))];
    assert_eq!(found(&one, &other).ranges, expected);
    assert_eq!(found(&other, &one).pages(), PageCount(3));
    save(&other, &memory(100, &contents[..3]), IN_PLACE);
    let more: Vec<u64> = found(&one, &other).ranges.iter().map(|(first, _)| first.0).collect();
    assert_eq!(more, [100, 256, 599]);
}

#[test]
fn memory_that_changes_meanwhile_is_written_again() {
    let (pages, contents) = mixed();
    let folder = folder();
    let (path, tally) = (image_in(&folder), Tally::default());
    let ram = memory(pages, &contents);
    let writer = ImageWriter::create(&path, ram.pages(), IN_PLACE).unwrap();
    let asked = std::sync::Mutex::new(Vec::new());
    let before = |first: PageIndex, words: &[u64]| {
        asked.lock().unwrap().push((first.0, words.iter().map(|word| word.count_ones()).sum::<u32>()));
        Ok(())
    };
    writer.write_moving(ram.file(), &before, &tally).unwrap();
    asked.lock().unwrap().sort_unstable();
    assert_eq!(*asked.lock().unwrap(), [(0, 256), (256, 256), (512, 256)]);
    asked.lock().unwrap().clear();
    // One that becomes zero, one that does not stay so, one that is another, and all of a chunk's that are left.
    let mut which = vec![0_u64; usize::try_from(pages).unwrap().div_ceil(64)];
    for (page, byte) in [(1, 0), (64, 7), (100, 9), (256, 0)] {
        ram.file().write_all_at(&[byte; PAGE_SIZE], PageIndex(page).offset()).unwrap();
        which[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64);
    }
    let read = |first: PageIndex, bytes: &mut [u8]| ram.file().read_exact_at(bytes, first.offset());
    writer.rewrite(&read, &which, &before, &tally).unwrap();
    asked.lock().unwrap().sort_unstable();
    assert_eq!(*asked.lock().unwrap(), [(0, 3), (256, 1)]);
    writer.settle(&tally).unwrap();
    let written = writer.commit(&sections(pages)).unwrap();
    assert_eq!(written.present, PageCount(5));
    check(&path).unwrap();
    let there = Ram::new(PageCount(pages)).unwrap();
    Image::open(&path).unwrap().load(there.file(), &Tally::default()).unwrap();
    assert!(bytes_of(there.file(), pages) == bytes_of(ram.file(), pages));
}

#[test]
fn one_that_is_called_off_or_dropped_leaves_what_was_there() {
    let folder = folder();
    let path = image_in(&folder);
    save(&path, &memory(3, &[(1, vec![4])]), IN_PLACE);
    let ram = memory(9, &[(1, vec![5])]);
    let (writer, tally) = (ImageWriter::create(&path, ram.pages(), IN_PLACE).unwrap(), Tally::default());
    tally.called_off.store(true, Ordering::Relaxed);
    assert!(matches!(writer.write_memory(ram.file(), &tally), Err(ImageError::Cancelled)));
    drop(writer);
    check(&path).unwrap();
    assert_eq!(Image::open(&path).unwrap().pages(), PageCount(3));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// A series of checkpoints of memory that changes, and what memory was at each.
struct Series {
    folder: TempDir,
    ram: Ram,
    paths: Vec<PathBuf>,
    moments: Vec<Vec<u8>>,
}

impl Series {
    fn new(pages: u64) -> Self {
        Self { folder: folder(), ram: Ram::new(PageCount(pages)).unwrap(), paths: Vec::new(), moments: Vec::new() }
    }

    fn lock(&self) -> FolderLock {
        FolderLock::exclusive(&self.folder.path().join("any")).unwrap()
    }

    /// Writes these pages, each full of a byte, and takes a checkpoint: of everything, or of them alone.
    fn take(&mut self, writes: &[(u64, u8)], whole: bool) {
        let pages = self.ram.pages().0;
        for (page, byte) in writes {
            self.ram.file().write_all_at(&[*byte; PAGE_SIZE], PageIndex(*page).offset()).unwrap();
        }
        let number = self.paths.len();
        let path = self.folder.path().join(format!("{number}.image"));
        let sections = Sections { state: vec![u8::try_from(number).unwrap()], ..sections(pages) };
        let (ram, tally) = (&self.ram, Tally::default());
        match self.paths.last().filter(|_| !whole) {
            None => {
                let writer = ImageWriter::create(&path, ram.pages(), IN_PLACE).unwrap();
                writer.write_memory(ram.file(), &tally).unwrap();
                writer.commit(&sections).unwrap();
            }
            Some(last) => {
                let moment = Image::open(last).unwrap().sections().moment().unwrap();
                let base = Base::at(last, moment).unwrap();
                let writer = ImageWriter::create_on(base, &path, ram.pages()).unwrap();
                let mut which = vec![0_u64; usize::try_from(pages).unwrap().div_ceil(64)];
                writes.iter().for_each(|(page, _)| which[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64));
                let read = |first: PageIndex, bytes: &mut [u8]| ram.file().read_exact_at(bytes, first.offset());
                writer.rewrite(&read, &which, &|_, _| Ok(()), &tally).unwrap();
                writer.settle(&tally).unwrap();
                writer.commit(&sections).unwrap();
            }
        }
        self.paths.push(path);
        self.moments.push(bytes_of(ram.file(), pages));
    }

    /// Every image from number `first` on is whole, and holds what memory was.
    fn check_from(&self, first: usize) {
        self.check_all(&self.paths[first..]);
    }

    /// Whether each of these is what it was when it was taken.
    fn check_all(&self, paths: &[PathBuf]) {
        let pages = self.ram.pages();
        for (path, moment) in self.paths.iter().zip(&self.moments).filter(|(path, _)| paths.contains(path)) {
            check(path).unwrap();
            let (image, there) = (Image::open(path).unwrap(), Ram::new(pages).unwrap());
            image.load(there.file(), &Tally::default()).unwrap();
            assert!(bytes_of(there.file(), pages.0) == *moment, "{path:?}");
            let zero = [0; PAGE_SIZE];
            for (page, bytes) in (0..).zip(moment.chunks_exact(PAGE_SIZE)) {
                assert_eq!(image.holds(PageIndex(page)), bytes != zero, "{path:?} {page}");
                let mut read = zero;
                image.read_unchecked(PageIndex(page), &mut read).unwrap();
                assert!(read == bytes, "{path:?} {page}");
            }
        }
    }
}

#[test]
fn an_increment_holds_what_was_written_and_what_became_zero() {
    let mut series = Series::new(600);
    series.take(&[(0, 1), (5, 2), (300, 3), (599, 4)], true);
    series.take(&[(5, 0), (6, 7), (300, 8)], false);
    series.take(&[(5, 9), (6, 0), (0, 0)], false);
    series.take(&[], false);
    series.check_from(0);
    let second = Image::open(&series.paths[1]).unwrap();
    assert_eq!((second.present_pages(), second.stored_bytes()), (PageCount(4), 2 * PAGE_SIZE_U64));
    assert_eq!(second.base().unwrap().name, "0.image");
    let found = differences(&second, &Image::open(&series.paths[2]).unwrap(), &Tally::default()).unwrap();
    let pages: Vec<u64> = found.ranges.iter().flat_map(|(first, count)| first.0..first.0 + count.0).collect();
    assert_eq!(pages, [0, 5, 6]);
}

#[test]
fn images_are_merged_and_those_above_them_stay_what_they_were() {
    let mut series = Series::new(600);
    series.take(&[(0, 1), (5, 2), (300, 3), (599, 4)], true);
    for step in 1..6 {
        series.take(&[(5, step), (u64::from(step) * 20, step), (0, step % 2), (300, 0)], false);
    }
    // In the middle: number 3 says what 2 said, and is based on 1.
    merge_with_base(&series.lock(), &Image::open(&series.paths[3]).unwrap(), &Tally::default()).unwrap();
    assert_eq!(Image::open(&series.paths[3]).unwrap().base().unwrap().name, "1.image");
    series.check_from(0);
    fs::remove_file(&series.paths[2]).unwrap();
    series.check_from(3);
    // All of one, elsewhere.
    let flat = series.folder.path().join("flat.image");
    flatten(&Image::open(&series.paths[5]).unwrap(), &flat, &Tally::default()).unwrap();
    assert!(Image::open(&flat).unwrap().base().is_none());
    let same = differences(&Image::open(&flat).unwrap(), &Image::open(&series.paths[5]).unwrap(), &Tally::default());
    assert_eq!(same.unwrap().pages(), PageCount(0));
    // The oldest go.
    let mut left: Vec<_> = [0, 1, 3, 4, 5].map(|number| series.paths[number].clone()).into();
    prune(&series.lock(), &mut left, 2, &Tally::default()).unwrap();
    assert_eq!(left, series.paths[4..]);
    assert!(!series.paths[3].exists() && Image::open(&series.paths[4]).unwrap().base().is_none());
    series.check_from(4);
    prune(&series.lock(), &mut left, 0, &Tally::default()).unwrap();
    assert_eq!(left.len(), 1, "one stays");
    series.check_from(5);
}

#[test]
fn nothing_takes_the_place_of_what_it_stands_on() {
    let mut series = Series::new(64);
    series.take(&[(0, 1)], true);
    (1..4).for_each(|page| series.take(&[(page, 1)], false));
    let image = |number: usize| Image::open(&series.paths[number]).unwrap();
    let link = series.folder.path().join("link.image");
    std::os::unix::fs::symlink(&series.paths[1], &link).unwrap();
    for to in [&series.paths[3], &series.paths[0], &series.folder.path().join("./1.image"), &link] {
        let told = Base::of(&image(3), to).unwrap_err().to_string();
        assert!(told.contains("based on"), "{told}");
    }
    assert_eq!(Base::of(&image(3), &series.folder.path().join("4.image")).unwrap().name, "3.image");
    let told = flatten(&image(3), &series.paths[1], &Tally::default()).unwrap_err().to_string();
    assert!(told.contains("based on"), "{told}");
    series.check_from(0);
    flatten(&image(3), &series.paths[3], &Tally::default()).unwrap();
    series.check_from(0);
}

#[test]
fn a_chain_ends_before_it_could_not_be_opened() {
    let mut series = Series::new(1);
    series.take(&[(0, 1)], true);
    (1..64).for_each(|_| series.take(&[(0, 1)], false));
    series.check_from(63);
    let last = Image::open(&series.paths[63]).unwrap();
    let told = Base::of(&last, &series.folder.path().join("64.image")).unwrap_err().to_string();
    assert!(told.contains("64"), "{told}");
}

#[test]
fn a_series_that_grows_is_thinned_out_without_writing_its_base_again() {
    let mut series = Series::new(64);
    let all: Vec<_> = (0..40).map(|page| (page, 1)).collect();
    series.take(&all, true);
    let base = |path: &Path| Image::open(path).unwrap().base().map(|base| base.name.clone());
    let mut left = series.paths.clone();
    for step in 1..12_u64 {
        series.take(&[(step % 4, 2 + u8::try_from(step).unwrap())], false);
        left.push(series.paths.last().unwrap().clone());
        thin_out(&series.lock(), &mut left, 3, &Tally::default()).unwrap();
        // The base, and the newest above it.
        let newest = series.paths.len().saturating_sub(3).max(1);
        let expected: Vec<_> = [&series.paths[..1], &series.paths[newest..]].concat();
        assert_eq!(left, expected, "step {step}");
        assert_eq!(base(&left[1]).as_deref(), Some("0.image"));
        series.check_all(&left);
    }
    // What is above it has come to half of it: it goes.
    let many: Vec<_> = (0..30).map(|page| (page, 99)).collect();
    for (step, writes) in [&many[..], &[(1, 7)], &[(2, 7)], &[(3, 7)]].into_iter().enumerate() {
        series.take(writes, false);
        left.push(series.paths.last().unwrap().clone());
        thin_out(&series.lock(), &mut left, 3, &Tally::default()).unwrap();
        series.check_all(&left);
        assert_eq!(left.len(), if step == 2 { 3 } else { 4 }, "step {step}");
    }
    assert_eq!((base(&left[0]), series.paths[0].exists()), (None, false));
    // A full one comes, as from another process: what it is not based on goes in its time.
    series.take(&[(5, 5)], true);
    for page in 0..3 {
        series.take(&[(page, 6)], false);
    }
    left.extend_from_slice(&series.paths[series.paths.len() - 4..]);
    thin_out(&series.lock(), &mut left, 3, &Tally::default()).unwrap();
    assert_eq!(left, series.paths[series.paths.len() - 4..]);
    series.check_all(&left);
}

#[test]
fn a_series_is_known_by_its_files_and_taken_in_its_order() {
    let mut series = Series::new(64);
    series.take(&[(0, 1)], true);
    (1..4).for_each(|page| series.take(&[(page, 1)], false));
    // The other way round, and one of them twice.
    let mut wrong: Vec<_> = series.paths.iter().rev().cloned().collect();
    let told = prune(&series.lock(), &mut wrong, 1, &Tally::default()).unwrap_err().to_string();
    assert!(told.contains("3.image") && told.contains("oldest first"), "{told}");
    let mut twice = vec![series.paths[0].clone(), series.paths[0].clone()];
    assert!(prune(&series.lock(), &mut twice, 1, &Tally::default()).is_err());
    series.check_from(0);
    // Of another folder.
    let elsewhere = folder();
    let other = elsewhere.path().join("9.image");
    fs::copy(&series.paths[0], &other).unwrap();
    let mut two = vec![series.paths[0].clone(), other];
    let told = prune(&series.lock(), &mut two, 1, &Tally::default()).unwrap_err().to_string();
    assert!(told.contains("9.image") && told.contains("one folder"), "{told}");
    // One name is spelt in another way than the others.
    let mut left = series.paths.clone();
    left[0] = series.folder.path().join("..").join(series.folder.path().file_name().unwrap()).join("0.image");
    prune(&series.lock(), &mut left, 2, &Tally::default()).unwrap();
    assert_eq!(left, series.paths[2..]);
    series.check_from(2);
}

#[test]
fn a_pipe_is_not_waited_for() {
    let folder = folder();
    let pipe = folder.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(Image::open(&pipe), Err(ImageError::Foreign { .. })));
}

#[test]
fn a_locked_folder_is_waited_for() {
    let folder = folder();
    let image = folder.path().join("any");
    let all = [FolderLock::shared(&image).unwrap(), FolderLock::shared(&image).unwrap()];
    assert!(FolderLock::try_exclusive(&image).unwrap().is_none());
    let waiting = std::thread::spawn(move || FolderLock::exclusive(&image).unwrap().folder().to_owned());
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(!waiting.is_finished());
    drop(all);
    assert_eq!(waiting.join().unwrap(), folder.path());
}

#[test]
fn a_chain_that_is_not_whole_is_refused_with_what_is_missing() {
    let mut series = Series::new(64);
    series.take(&[(0, 1)], true);
    series.take(&[(1, 1)], false);
    series.take(&[(2, 1)], false);
    let told = || Image::open(&series.paths[2]).unwrap_err().to_string();
    // Another moment in its place; none; itself; damage below.
    let first = fs::read(&series.paths[0]).unwrap();
    save(&series.paths[0], &series.ram, IN_PLACE);
    assert!(told().contains("another moment of the guest"), "{}", told());
    fs::remove_file(&series.paths[0]).unwrap();
    assert!(told().contains("1.image holds the differences to") && told().contains("0.image"), "{}", told());
    fs::copy(&series.paths[1], &series.paths[0]).unwrap();
    assert!(told().contains("more than 64 images, or of itself"), "{}", told());
    fs::write(&series.paths[0], &first).unwrap();
    series.check_from(0);
    let mut damaged = first;
    damaged[PAGE_SIZE] ^= 1;
    fs::write(&series.paths[0], damaged).unwrap();
    let image = Image::open(&series.paths[2]).unwrap();
    let error = image.verify(&Tally::default()).unwrap_err().to_string();
    assert!(error.contains("0.image is damaged") && error.contains("chunk 0"), "{error}");
    assert!(image.load(Ram::new(PageCount(64)).unwrap().file(), &Tally::default()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn every_checkpoint_of_a_series_stays_what_it_was(
        pages in 1..600_u64,
        steps in prop::collection::vec((prop::collection::vec((0..600_u64, 0..3_u8), 0..12), prop::bool::weighted(0.2)), 1..8),
        keep in 1..5_usize,
        merged in 0..8_usize,
        thinly: bool,
    ) {
        let mut series = Series::new(pages);
        for (writes, whole) in steps {
            let writes: Vec<_> = writes.into_iter().map(|(page, byte)| (page % pages, byte)).collect();
            series.take(&writes, whole);
        }
        series.check_from(0);
        if let Some(path) = series.paths.get(merged) {
            merge_with_base(&series.lock(), &Image::open(path).unwrap(), &Tally::default()).unwrap();
            series.check_from(0);
        }
        let mut left = series.paths.clone();
        if thinly {
            thin_out(&series.lock(), &mut left, keep, &Tally::default()).unwrap();
            prop_assert!(left.len() <= keep.min(series.paths.len()) + 1);
            prop_assert_eq!(series.paths.iter().filter(|path| path.exists()).count(), left.len());
            series.check_all(&left);
        }
        prune(&series.lock(), &mut left, keep, &Tally::default()).unwrap();
        let first = series.paths.len() - left.len();
        prop_assert_eq!(left.len(), keep.min(series.paths.len()));
        prop_assert!(series.paths[..first].iter().all(|path| !path.exists()));
        series.check_from(first);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn whatever_memory_holds_comes_back(
        pages in 1..700_u64,
        contents in prop::collection::vec((0..700_u64, prop::collection::vec(any::<u8>(), 1..4)), 0..40),
        compress: bool,
    ) {
        let contents: Vec<Content> = contents.into_iter().filter(|(page, _)| *page < pages).collect();
        let (ram, folder) = (memory(pages, &contents), folder());
        let path = image_in(&folder);
        save(&path, &ram, Options { compress });
        let there = Ram::new(PageCount(pages)).unwrap();
        Image::open(&path).unwrap().load(there.file(), &Tally::default()).unwrap();
        prop_assert!(bytes_of(there.file(), pages) == bytes_of(ram.file(), pages));
        check(&path).unwrap();
    }
}

/// An image in place of `mixed` memory, and one of its pages more than once touched.
fn recorded(folder: &TempDir) -> (Image, WorkingSet) {
    let (pages, contents) = mixed();
    save(&image_in(folder), &memory(pages, &contents), IN_PLACE);
    let image = Image::open(&image_in(folder)).unwrap();
    let mut set = WorkingSet::default();
    // 5 is zero, 600 is none.
    let touched = [256, 9, 5, 599, 9, 600].map(PageIndex);
    assert_eq!(set.merge(&touched, &image).unwrap(), 3);
    (image, set)
}

fn numbers(set: &WorkingSet) -> Vec<u64> {
    set.pages().iter().map(|recorded| recorded.page.0).collect()
}

#[test]
fn a_working_set_comes_back_and_grows() {
    let folder = folder();
    let (image, mut set) = recorded(&folder);
    assert_eq!(numbers(&set), [256, 9, 599], "in the order in which they were touched");
    for recorded in set.pages() {
        let mut bytes = [0; PAGE_SIZE];
        assert!(image.read_unchecked(recorded.page, &mut bytes).unwrap());
        assert_eq!(page_hash(&bytes), recorded.hash, "{}", recorded.page);
    }
    assert_eq!(WorkingSet::beside(&image), None);
    set.keep(&image).unwrap();
    assert_eq!(WorkingSet::beside(&image), Some(set.clone()));
    assert_eq!(set.merge(&[9, 0, 256, 100].map(PageIndex), &image).unwrap(), 2);
    assert_eq!(numbers(&set), [256, 9, 599, 0, 100]);
    set.keep(&image).unwrap();
    assert_eq!(WorkingSet::beside(&image), Some(set));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left behind");
}

#[test]
fn a_working_set_is_its_images_alone() {
    let (one, two) = (folder(), folder());
    let (image, set) = recorded(&one);
    let (pages, mut contents) = mixed();
    contents[0].1[7] ^= 1;
    save(&image_in(&two), &memory(pages, &contents), IN_PLACE);
    let other = Image::open(&image_in(&two)).unwrap();
    assert_eq!(WorkingSet::decode(&set.encode(&image), &other), Err(WorkingSetError::OtherImage));
    set.keep(&image).unwrap();
    fs::rename(WorkingSet::path_beside(image.path()), WorkingSet::path_beside(other.path())).unwrap();
    assert_eq!(WorkingSet::beside(&other), None);
}

#[test]
fn a_working_set_that_was_altered_or_cut_is_none() {
    let folder = folder();
    let (image, set) = recorded(&folder);
    let whole = set.encode(&image);
    for length in 0..whole.len() {
        assert!(WorkingSet::decode(&whole[..length], &image).is_err(), "cut to {length}");
    }
    assert!(WorkingSet::decode(&[&whole[..], &[0]].concat(), &image).is_err());
    for at in 0..whole.len() {
        let mut altered = whole.clone();
        altered[at] ^= 4;
        assert!(WorkingSet::decode(&altered, &image).is_err(), "altered at {at}");
    }
    // What is wrong, but has the right hash.
    let seal = |mut bytes: Vec<u8>, change: &dyn Fn(&mut Vec<u8>)| {
        bytes.truncate(bytes.len() - blake3::OUT_LEN);
        change(&mut bytes);
        let hash = blake3::hash(&bytes);
        [&bytes[..], hash.as_bytes()].concat()
    };
    let refused = |change: &dyn Fn(&mut Vec<u8>)| WorkingSet::decode(&seal(whole.clone(), change), &image);
    assert!(refused(&|_| ()).is_ok());
    let page = |entry, page| Err(WorkingSetError::Page { entry, page: PageIndex(page) });
    assert_eq!(refused(&|bytes| bytes[48] = 5), page(0, 0x105), "256 with the low byte of a zero page");
    assert_eq!(refused(&|bytes| bytes.copy_within(48..52, 68)), page(1, 256), "the same page twice");
    assert_eq!(refused(&|bytes| bytes[8] = 2), Err(WorkingSetError::Version(2)));
    assert_eq!(refused(&|bytes| bytes[15] = 1), Err(WorkingSetError::TooMany(0x0100_0003)));
    assert_eq!(refused(&|bytes| bytes[12] = 2), Err(WorkingSetError::Length { entries: 2, have: 140, wanted: 120 }));
}
