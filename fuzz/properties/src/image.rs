use std::fs;

use switchover_image::Tally;
use switchover_image::layout::{HEADER_LEN, Header, INDEX_ENTRY, MEMORY_OFFSET, ROOT_AT};
use switchover_image::reader::Image;
use switchover_image::sections::Sections;
use switchover_pager::ram::Ram;
use switchover_wire::types::{PAGE_SIZE, PageIndex};

use crate::input::Input;

const HASH: usize = blake3::OUT_LEN;

/// A file that may be an image. The lowest bit of the first byte says whether the root hash is made right before, so that damage
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
    let place = tempfile::NamedTempFile::new().unwrap();
    fs::write(place.path(), &file).unwrap();
    let image = match Image::open(place.path()) {
        Ok(image) => image,
        Err(error) => return assert!(!error.to_string().contains(char::is_control), "{error:?}"),
    };
    let header = image.header();
    let sections = &file[at(header.sections_at())..at(header.bitmap_at())];
    let again = image.sections().encode().unwrap();
    let understood = Sections::decode(&again, place.path(), 0, header.pages).unwrap();
    assert_eq!(&understood, image.sections(), "of {sections:?}");
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
