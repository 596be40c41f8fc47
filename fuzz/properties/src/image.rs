use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::OnceLock;

use switchover_image::Tally;
use switchover_image::base::Base;
use switchover_image::layout::{HEADER_LEN, Header, INDEX_ENTRY, MEMORY_OFFSET, ROOT_AT};
use switchover_image::reader::Image;
use switchover_image::sections::{Origin, Sections};
use switchover_image::writer::{ImageWriter, Options};
use switchover_pager::ram::Ram;
use switchover_wire::description::MachineDescription;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};
use tempfile::TempDir;

use crate::input::Input;

const HASH: usize = blake3::OUT_LEN;

/// The name of [`base`] beside the file in question.
const BASE: &str = "base.image";

/// An image of four pages, two of which are zero, in `folder`: what an increment may be based on.
#[must_use]
pub fn base(folder: &Path) -> Base {
    let ram = Ram::new(PageCount(4)).unwrap();
    for (page, byte) in [(0, 0x3C), (3, 0xC3)] {
        ram.file().write_all_at(&[byte; PAGE_SIZE], PageIndex(page).offset()).unwrap();
    }
    let sections = Sections { state: b"before".to_vec(), ..sections() };
    let path = folder.join(BASE);
    let writer = ImageWriter::create(&path, ram.pages(), Options::default()).unwrap();
    writer.write_memory(ram.file(), &Tally::default()).unwrap();
    writer.commit(&sections).unwrap();
    Base::at(&path, sections.moment().unwrap()).unwrap()
}

/// Those of an increment on it.
#[must_use]
pub fn sections() -> Sections {
    Sections {
        machine: MachineDescription::of_memory_alone("seeds", PageCount(4)),
        state: b"state".to_vec(),
        was_running: true,
        first_pages: vec![PageIndex(1)],
        origin: Origin { version: "seeds".to_owned(), saved_at: 1_764_000_000 },
    }
}

/// A folder with the base in it, for all inputs.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let _ = base(folder.path());
        folder
    });
    folder.path()
}

/// A file that may be an image, also one of the differences to [`base`]. The lowest bit of the first byte says whether the root hash is made right before, so that damage
/// comes further than that; the next whether the first chunk's is, as far as there is one.
pub fn image(bytes: &[u8]) {
    let mut input = Input(bytes);
    let how = input.u8();
    let mut file = input.0.to_vec();
    if how & 2 != 0 {
        mend_chunk(&mut file);
    }
    if how & 1 != 0 {
        mend_root(&mut file);
    }
    let place = tempfile::NamedTempFile::new_in(folder()).unwrap();
    fs::write(place.path(), &file).unwrap();
    let image = match Image::open(place.path()) {
        Ok(image) => image,
        Err(error) => return assert!(!error.to_string().contains(char::is_control), "{error:?}"),
    };
    let header = image.header();
    let sections = &file[at(header.sections_at())..at(header.bitmap_at())];
    let again = image.sections().encode().unwrap();
    let (understood, none) = Sections::decode(&again, place.path(), 0, header.pages, false).unwrap();
    assert_eq!((&understood, none), (image.sections(), None), "of {sections:?}");
    assert_eq!(header.is_increment(), image.base().is_some());
    assert!(image.present_pages().0 <= image.pages().0);

    let ram = Ram::new(image.pages()).unwrap();
    let (loaded, verified) = (image.load(ram.file(), &Tally::default()), image.verify(&Tally::default()));
    assert!(loaded.is_ok() || verified.is_err(), "verified, and yet: {loaded:?}");
    if loaded.is_ok() {
        let mut page = [0; PAGE_SIZE];
        for index in (0..image.pages().0.min(64)).map(PageIndex).filter(|index| !image.holds(*index)) {
            assert!(ram.copy_page(index, &mut page) && page == [0; PAGE_SIZE], "{index} is zero by the bitmap");
        }
    }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

fn header_of(file: &[u8]) -> Option<Header> {
    let block = file.first_chunk::<HEADER_LEN>()?;
    Header::decode(block, "an image".as_ref(), file.len() as u64).ok()
}

/// As `docs/image.md` says it.
fn mend_root(file: &mut [u8]) {
    let Some(header) = header_of(file) else { return };
    file[ROOT_AT..ROOT_AT + HASH].fill(0);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&file[..at(MEMORY_OFFSET)]).update(&file[at(header.sections_at())..]);
    let root = hasher.finalize();
    file[ROOT_AT..ROOT_AT + HASH].copy_from_slice(root.as_bytes());
}

/// Of a packed chunk: its bytes as they are stored.
fn mend_chunk(file: &mut [u8]) {
    let Some(header) = header_of(file).filter(Header::is_packed) else { return };
    let entry = at(header.index_at());
    let Some(bytes) = file.get(entry..entry + INDEX_ENTRY) else { return };
    let mut place = Input(bytes);
    let (offset, length) = (place.u64(), place.u32());
    let stored = usize::try_from(offset).ok().and_then(|offset| file.get(offset..)?.get(..length as usize));
    if let Some(hash) = stored.map(blake3::hash) {
        file[entry + INDEX_ENTRY - HASH..entry + INDEX_ENTRY].copy_from_slice(hash.as_bytes());
    }
}
