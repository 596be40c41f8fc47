use std::fs::File;
use std::sync::OnceLock;

use switchover_image::Tally;
use switchover_image::reader::Image;
use switchover_image::sections::{Origin, Sections};
use switchover_image::working_set::{HEADER_LEN, WorkingSet};
use switchover_image::writer::{ImageWriter, Options};
use switchover_pager::ram::Ram;
use switchover_wire::description::MachineDescription;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

use crate::input::Input;

const HASH: usize = blake3::OUT_LEN;

/// A file that may be the working set of an image of 300 pages, of which those with odd numbers are not zero. The lowest bit of the
/// first byte says whether the image's root hash is put in before, and the next whether the hash at the end is made right.
pub fn working_set(bytes: &[u8]) {
    let mut input = Input(bytes);
    let how = input.u8();
    let mut file = input.0.to_vec();
    let image = image();
    if how & 1 != 0
        && let Some(root) = file.get_mut(HEADER_LEN - HASH..HEADER_LEN)
    {
        root.copy_from_slice(&image.header().root);
    }
    if how & 2 != 0
        && let Some(end) = file.len().checked_sub(HASH)
    {
        let hash = blake3::hash(&file[..end]);
        file[end..].copy_from_slice(hash.as_bytes());
    }
    let set = match WorkingSet::decode(&file, image) {
        Ok(set) => set,
        Err(error) => return assert!(!error.to_string().contains(char::is_control), "{error:?}"),
    };
    assert_eq!(set.encode(image), file, "what was understood is not what was there");
    let mut pages: Vec<u64> = set.pages().iter().map(|recorded| recorded.page.0).collect();
    assert!(pages.iter().all(|page| page % 2 == 1 && *page < 300), "{pages:?}");
    pages.sort_unstable();
    assert!(pages.is_sorted_by(|one, next| one < next), "a page is there twice");
}

fn image() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let ram = Ram::new(PageCount(300)).unwrap();
        let file: &File = ram.file();
        for page in (1..300).step_by(2).map(PageIndex) {
            std::os::unix::fs::FileExt::write_all_at(file, &[7; PAGE_SIZE], page.offset()).unwrap();
        }
        let sections = Sections {
            machine: MachineDescription::of_memory_alone("fake", ram.pages()),
            state: Vec::new(),
            was_running: true,
            first_pages: Vec::new(),
            origin: Origin { version: "a property".to_owned(), saved_at: 0 },
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let writer = ImageWriter::create(&path, ram.pages(), Options { compress: false }).unwrap();
        writer.write_memory(ram.file(), &Tally::default()).unwrap();
        writer.commit(&sections).unwrap();
        Image::open(&path).unwrap()
    })
}
