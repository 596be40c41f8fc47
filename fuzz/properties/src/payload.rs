use std::cell::RefCell;

use switchover_wire::encoding::{Encoding, Entry, Page, PageDecoder, PageEncoder, Payload, PayloadWriter};
use switchover_wire::frame::bulk::{CHUNK_PAGES, PACKED_LIMIT};
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

use crate::input::Input;

const RAM: PageCount = PageCount(1000);
const FIRST: PageIndex = PageIndex(128);

/// What a lane keeps from page to page. To make it anew for each would take longer than all else.
struct Coder {
    encoder: PageEncoder,
    decoder: PageDecoder,
    writer: PayloadWriter,
}

thread_local! {
    static CODER: RefCell<Coder> = RefCell::new(Coder {
        encoder: PageEncoder::new(1),
        decoder: PageDecoder::new(),
        writer: PayloadWriter::default(),
    });
}

/// Payloads of packed chunks, as they come. Sixteen bytes are the frame's masks.
pub fn payload(bytes: &[u8]) {
    CODER.with_borrow_mut(|coder| coder.payload(bytes));
}

/// A page that the bytes describe goes through every encoding and comes back.
pub fn pages(bytes: &[u8]) {
    let page = described(bytes);
    CODER.with_borrow_mut(|coder| coder.encoded_again(FIRST, &page));
}

impl Coder {
    /// See [`payload`].
    fn payload(&mut self, bytes: &[u8]) {
        let mut input = Input(bytes);
        let data = input.u64();
        let zero = input.u64() & !data;
        let bytes = input.bytes(PACKED_LIMIT);
        let Ok(parsed) = Payload::parse(FIRST, data, zero, bytes, RAM) else { return };
        let entries: Vec<_> = parsed.entries().collect();
        assert_eq!(entries.len(), data.count_ones() as usize);
        for entry in &entries {
            let bit = entry.page().0.checked_sub(FIRST.0).filter(|bit| *bit < CHUNK_PAGES).unwrap();
            assert_eq!(data >> bit & 1, 1, "a page that the frame does not name");
            let (mut page, mut again) = (old(), old());
            if self.decoder.decode(entry, &mut page, &mut held).is_ok() {
                self.decoder.decode(entry, &mut again, &mut held).unwrap();
                assert_eq!(page, again, "a decoder that remembers");
                self.encoded_again(entry.page(), &page);
            }
        }
        self.writer.begin(0, entries.len());
        for entry in entries {
            self.writer.body().extend_from_slice(entry.body());
            self.writer.finish_page(entry.encoding());
        }
        assert_eq!(self.writer.bytes(), bytes, "a payload has one form only");
    }

    /// In every encoding.
    fn encoded_again(&mut self, number: PageIndex, page: &Page) {
        let Self { encoder, decoder, writer } = self;
        for encoding in Encoding::ALL {
            writer.begin(0, 1);
            let body = writer.body();
            let fits = match encoding {
                Encoding::Raw => {
                    body.extend_from_slice(page);
                    true
                }
                Encoding::Lz4 => encoder.lz4(page, PAGE_SIZE, body),
                Encoding::Zstd => encoder.zstd(page, PAGE_SIZE, body),
                Encoding::Delta => encoder.delta(&old(), page, PAGE_SIZE, body),
                Encoding::Same => {
                    PageEncoder::same(PageIndex(7), &blake3::hash(page), body);
                    true
                }
            };
            if !fits {
                continue;
            }
            writer.finish_page(encoding);
            let parsed = Payload::parse(FIRST, 1 << (number.0 - FIRST.0), 0, writer.bytes(), RAM).unwrap();
            let entry: Entry<'_> = parsed.entries().next().unwrap();
            assert_eq!((entry.page(), entry.encoding()), (number, encoding));
            let mut decoded = old();
            let mut held = |_, bytes: &mut Page| {
                *bytes = *page;
                true
            };
            decoder.decode(&entry, &mut decoded, &mut held).unwrap();
            assert_eq!(&decoded, page, "{encoding}");
        }
    }
}

/// The page that the bytes describe.
fn described(bytes: &[u8]) -> Page {
    let mut page = old();
    let mut input = Input(bytes);
    // A few changes of the old version, or all of it anew.
    if input.u8() & 1 == 0 {
        while !input.0.is_empty() {
            let at = usize::from(input.u16()) % PAGE_SIZE;
            let length = usize::from(input.u8()).min(PAGE_SIZE - at);
            let changed = input.bytes(length);
            page[at..at + changed.len()].copy_from_slice(changed);
        }
    } else if !input.0.is_empty() {
        for (place, byte) in page.iter_mut().zip(input.0.iter().cycle()) {
            *place = *byte;
        }
    }
    page
}

/// The version that the destination holds.
fn old() -> Page {
    let mut page = [0; PAGE_SIZE];
    for (place, number) in page.iter_mut().zip((0..=u8::MAX).cycle()) {
        *place = number & 0xF0;
    }
    page
}

/// Another page that it holds, if the number is even.
fn held(page: PageIndex, bytes: &mut Page) -> bool {
    assert!(page.0 < RAM.0, "a page past the end of RAM is asked for");
    *bytes = old();
    page.0.is_multiple_of(2)
}
