use switchover_hybrid::missing::MissingPages;
use switchover_wire::bitmap;
use switchover_wire::types::{PageCount, PageIndex};

use crate::input::Input;

/// RAM of 4 GiB at most.
const MOST_PAGES: u32 = 1 << 20;

/// What the source says that it will still send, in stretches. Four bytes are the size of RAM, then each stretch is a byte, its
/// first page where that has its lowest bit set, its length, and its set with a length of two bytes before it.
pub fn missing(bytes: &[u8]) {
    let mut input = Input(bytes);
    let ram = PageCount(u64::from(input.u32() % MOST_PAGES));
    let mut missing = MissingPages::new(ram);
    let mut told = Vec::new();
    let mut next = 0;
    while !input.0.is_empty() {
        let first = if input.u8() & 1 == 0 { next } else { input.u64() };
        let pages = PageCount(u64::from(input.u32()));
        let length = usize::from(input.u16());
        let Ok(whole) = missing.add(PageIndex(first), pages, input.bytes(length)) else { continue };
        assert_eq!(first, next, "a stretch that does not continue the one before");
        told.push(pages);
        next += pages.0;
        assert!(next <= ram.0);
        assert_eq!(whole.is_some(), next == ram.0);
        if let Some(words) = whole {
            assert_eq!(words.len() as u64, ram.0.div_ceil(64));
            told_again(ram, &told, words);
            assert!(missing.add(PageIndex(next), PageCount(1), &bitmap::encode(&[0])).is_err());
        }
    }
}

fn told_again(ram: PageCount, told: &[PageCount], words: Vec<u64>) {
    let mut missing = MissingPages::new(ram);
    let (mut first, mut rest, mut whole) = (0, words.as_slice(), None);
    for pages in told {
        let (own, behind) = rest.split_at(usize::try_from(pages.0.div_ceil(64)).unwrap());
        whole = missing.add(PageIndex(first), *pages, &bitmap::encode(own)).unwrap();
        (first, rest) = (first + pages.0, behind);
    }
    assert_eq!(whole, Some(words));
}
