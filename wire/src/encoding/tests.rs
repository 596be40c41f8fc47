use proptest::prelude::*;

use super::*;
use crate::types::PageCount;

const RAM: PageCount = PageCount(1000);

/// A stream of numbers that look random.
fn numbers(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

fn below(number: u64, limit: usize) -> usize {
    usize::try_from(number >> 20).unwrap() % limit
}

fn noise(seed: u64) -> Page {
    let mut next = numbers(seed);
    std::array::from_fn(|_| next().to_le_bytes()[5])
}

fn text(seed: u64) -> Page {
    const WORDS: [&str; 8] = ["page ", "fault ", "dirty ", "round ", "the ", "of ", "guest\n", "0x7fff "];
    let mut next = numbers(seed);
    let mut page = [b' '; PAGE_SIZE];
    let mut at = 0;
    while at + 8 < PAGE_SIZE {
        let word = WORDS[below(next(), WORDS.len())].as_bytes();
        page[at..at + word.len()].copy_from_slice(word);
        at += word.len();
    }
    page
}

/// `page` with `changes` words of eight bytes changed, some of them in only one byte.
fn changed(mut page: Page, seed: u64, changes: usize) -> Page {
    let mut next = numbers(seed);
    for _ in 0..changes {
        let at = below(next(), PAGE_SIZE - 8);
        if next() >> 63 == 0 {
            page[at..at + 8].copy_from_slice(&next().to_le_bytes());
        } else {
            page[at] ^= 0x5A;
        }
    }
    page
}

/// The kinds of page that a guest has.
fn page() -> impl Strategy<Value = Page> {
    prop_oneof![
        any::<u64>().prop_map(noise),
        any::<u64>().prop_map(text),
        (any::<u64>(), 0..40_usize).prop_map(|(seed, changes)| changed([0; PAGE_SIZE], seed, changes)),
        any::<u8>().prop_map(|byte| [byte; PAGE_SIZE]),
        (any::<u64>(), 0..PAGE_SIZE).prop_map(|(seed, noisy)| {
            let mut page = text(seed);
            page[..noisy].copy_from_slice(&noise(seed)[..noisy]);
            page
        }),
        prop::collection::vec(any::<u8>(), PAGE_SIZE).prop_map(|bytes| bytes.try_into().unwrap()),
    ]
}

/// An old version and a new one, from equal to all different, with every pattern of changes in between.
fn versions() -> impl Strategy<Value = (Page, Page)> {
    let period = (page(), 1..40_usize, 1..40_usize).prop_map(|(old, changed, unchanged)| {
        let mut new = old;
        for stretch in new.chunks_mut(changed + unchanged) {
            stretch.iter_mut().take(changed).for_each(|byte| *byte = !*byte);
        }
        (old, new)
    });
    let edge = (page(), prop::collection::vec(prop_oneof![Just(0), Just(PAGE_SIZE - 1), 0..PAGE_SIZE], 0..20))
        .prop_map(|(old, at)| {
            let mut new = old;
            at.into_iter().for_each(|at| new[at] = !new[at]);
            (old, new)
        });
    prop_oneof![
        (page(), any::<u64>(), 0..60_usize).prop_map(|(old, seed, changes)| (old, changed(old, seed, changes))),
        (page(), page()),
        period,
        edge,
    ]
}

/// A payload with one page, number 64.
fn alone(encoding: Encoding, body: &[u8]) -> Vec<u8> {
    let [low, high, ..] = body.len().to_le_bytes();
    [&[encoding.number(), 0, low, high], body].concat()
}

fn parse(bytes: &[u8]) -> Result<Payload<'_>, EncodingError> {
    Payload::parse(PageIndex(64), 1, 2, bytes, RAM)
}

/// Decodes a body over `page` through the whole path; where page 3 is the same as `third`.
fn decode(encoding: Encoding, body: &[u8], page: &mut Page, third: &Page) -> Result<(), EncodingError> {
    let bytes = alone(encoding, body);
    let entry = parse(&bytes)?.entries().next().unwrap();
    PageDecoder::new().decode(&entry, page, &mut |other, page| {
        *page = *third;
        other == PageIndex(3)
    })
}

fn encode(encoding: Encoding, old: &Page, new: &Page) -> Option<Vec<u8>> {
    let mut encoder = PageEncoder::new(1);
    let mut out = b"before".to_vec();
    let smaller = match encoding {
        Encoding::Raw => {
            out.extend_from_slice(new);
            true
        }
        Encoding::Lz4 => encoder.lz4(new, PAGE_SIZE, &mut out),
        Encoding::Zstd => encoder.zstd(new, PAGE_SIZE, &mut out),
        Encoding::Delta => encoder.delta(old, new, PAGE_SIZE, &mut out),
        Encoding::Same => {
            PageEncoder::same(PageIndex(3), &blake3::hash(new), &mut out);
            true
        }
    };
    assert!(out.starts_with(b"before") && (smaller || out.len() == 6));
    smaller.then(|| out.split_off(6))
}

fn any_encoding() -> impl Strategy<Value = Encoding> {
    prop::sample::select(&Encoding::ALL[..])
}

proptest! {
    #[test]
    fn every_encoding_gives_every_page_back((old, new) in versions()) {
        for encoding in Encoding::ALL {
            if let Some(body) = encode(encoding, &old, &new) {
                let mut page = old;
                decode(encoding, &body, &mut page, &new).unwrap();
                prop_assert!(page == new, "{}", encoding);
            }
        }
    }

    #[test]
    fn one_encoder_and_one_decoder_do_for_many_pages(pages in prop::collection::vec(page(), 1..20)) {
        let (mut encoder, mut decoder) = (PageEncoder::new(3), PageDecoder::new());
        let mut writer = PayloadWriter::default();
        writer.begin(32, pages.len());
        for (index, page) in pages.iter().enumerate() {
            let encoding = match index % 4 {
                0 if encoder.lz4(page, PAGE_SIZE, writer.body()) => Encoding::Lz4,
                1 if encoder.zstd(page, PAGE_SIZE, writer.body()) => Encoding::Zstd,
                2 if encoder.delta(&[0; PAGE_SIZE], page, PAGE_SIZE, writer.body()) => Encoding::Delta,
                _ => {
                    writer.body().extend_from_slice(page);
                    Encoding::Raw
                }
            };
            writer.finish_page(encoding);
        }
        // Every third page of the chunk.
        let data = (0..pages.len()).fold(0_u64, |mask, page| mask | 1 << (page * 3));
        let payload = Payload::parse(PageIndex(128), data, 0, &writer.bytes()[32..], RAM).unwrap();
        prop_assert_eq!(payload.entries().count(), pages.len());
        for (index, entry) in payload.entries().enumerate() {
            let mut page = [0; PAGE_SIZE];
            decoder.decode(&entry, &mut page, &mut |_, _| false).unwrap();
            prop_assert!(page == pages[index]);
            prop_assert_eq!(entry.page(), PageIndex(128 + index as u64 * 3));
        }
    }

    #[test]
    fn a_delta_twice_is_a_delta_once((old, new) in versions()) {
        if let Some(body) = encode(Encoding::Delta, &old, &new) {
            let mut page = new;
            delta::decode(&body, &mut page).unwrap();
            prop_assert!(page == new);
        }
    }

    #[test]
    fn a_limit_is_kept((old, new) in versions(), limit in 0..5000_usize) {
        let mut encoder = PageEncoder::new(1);
        for encoding in [Encoding::Lz4, Encoding::Zstd, Encoding::Delta] {
            let mut out = Vec::new();
            let smaller = match encoding {
                Encoding::Lz4 => encoder.lz4(&new, limit, &mut out),
                Encoding::Zstd => encoder.zstd(&new, limit, &mut out),
                _ => encoder.delta(&old, &new, limit, &mut out),
            };
            let free = encode(encoding, &old, &new);
            prop_assert_eq!(smaller, free.is_some_and(|body| body.len() < limit));
            prop_assert!((smaller && out.len() < limit) || (!smaller && out.is_empty()));
        }
    }

    #[test]
    fn arbitrary_bodies_are_survived(
        encoding in any_encoding(),
        body in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..PAGE_SIZE),
            prop::collection::vec(any::<u8>(), 0..60),
            prop::collection::vec(0..4_u8, 0..PAGE_SIZE),
        ],
        headed: bool,
        old in page(),
    ) {
        // Behind a frame's header and a block's, whatever follows reaches zstd itself.
        let mut bytes = body;
        if headed && encoding == Encoding::Zstd {
            let size = u32::try_from(bytes.len()).unwrap() << 3 | 5;
            bytes.splice(..0, [0x28, 0xB5, 0x2F, 0xFD, 0x60, 0, 15].into_iter().chain(size.to_le_bytes().into_iter().take(3)));
        }
        let mut page = old;
        let result = decode(encoding, &bytes, &mut page, &old);
        if encoding == Encoding::Delta && result.is_err() {
            prop_assert!(page == old, "a refused delta must change nothing");
        }
    }

    #[test]
    fn mutations_of_bodies_are_survived(
        (old, new) in versions(),
        encoding in any_encoding(),
        mutations in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        if let Some(mut body) = encode(encoding, &old, &new).filter(|body| !body.is_empty()) {
            for (at, byte) in mutations {
                let at = at.index(body.len());
                body[at] = byte;
            }
            if let Some(cut) = cut {
                body.truncate(cut.index(body.len()));
            }
            let mut page = old;
            let _ = decode(encoding, &body, &mut page, &new);
        }
    }

    #[test]
    fn arbitrary_payloads_are_survived(
        first in prop_oneof![0..15_u64, any::<u64>()],
        data: u64,
        zero: u64,
        ram in prop_oneof![0..2000_u64, any::<u64>()],
        bytes in prop::collection::vec(prop_oneof![Just(0_u8), 0..8_u8, any::<u8>()], 0..2000),
    ) {
        if let Ok(payload) = Payload::parse(PageIndex(first), data, zero, &bytes, PageCount(ram)) {
            decode_all(&payload);
        }
    }

    #[test]
    fn payloads_with_a_fitting_table_are_checked_on(
        bodies in prop::collection::vec((any_encoding(), any::<u16>(), any::<u8>()), 1..6),
        other: u64,
        mutation in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
    ) {
        let (mut table, mut rest) = (Vec::new(), Vec::new());
        for (encoding, length, byte) in &bodies {
            let lengths = encoding.lengths();
            let length = usize::from(*length).clamp(*lengths.start(), *lengths.end());
            table.extend_from_slice(&alone(*encoding, &vec![0; length])[..4]);
            let mut body = vec![*byte; length];
            if *encoding == Encoding::Same {
                body[..8].copy_from_slice(&(other % 1100).to_le_bytes());
            }
            rest.extend_from_slice(&body);
        }
        table.append(&mut rest);
        let data = (1 << bodies.len()) - 1;
        if let Some((at, byte)) = mutation {
            let at = at.index(table.len());
            table[at] = byte;
        } else {
            let parsed = Payload::parse(PageIndex(64), data, 1 << 63, &table, RAM);
            let others = bodies.iter().any(|(encoding, ..)| *encoding == Encoding::Same);
            let own = (64..64 + bodies.len() as u64).contains(&(other % 1100)) || other % 1100 == 127;
            prop_assert_eq!(parsed.is_ok(), !others || (other % 1100 < 1000 && !own));
        }
        if let Ok(payload) = Payload::parse(PageIndex(64), data, 1 << 63, &table, RAM) {
            prop_assert_eq!(payload.entries().count(), bodies.len());
            prop_assert_eq!(payload.entries().map(|entry| entry.body().len() + ENTRY_LEN).sum::<usize>(), table.len());
            decode_all(&payload);
        }
    }
}

fn decode_all(payload: &Payload<'_>) {
    let mut decoder = PageDecoder::new();
    for entry in payload.entries() {
        let mut page = [7; PAGE_SIZE];
        let _ = decoder.decode(&entry, &mut page, &mut |_, _| true);
    }
}

#[test]
fn what_compresses_gets_smaller_and_noise_does_not() {
    let (text, noise) = (text(5), noise(5));
    let few = changed(noise, 9, 4);
    for encoding in [Encoding::Lz4, Encoding::Zstd] {
        assert!(encode(encoding, &noise, &noise).is_none(), "{encoding}");
        let length = encode(encoding, &noise, &text).unwrap().len();
        assert!(length < PAGE_SIZE / 2, "{encoding}: {length}");
    }
    assert!(encode(Encoding::Delta, &noise, &text).is_none());
    assert_eq!(encode(Encoding::Delta, &noise, &noise).unwrap(), []);
    let length = encode(Encoding::Delta, &noise, &few).unwrap().len();
    assert!(length <= 4 * (8 + 3), "{length}");
}

#[test]
fn a_delta_is_runs_of_what_changed() {
    let old = noise(1);
    let mut new = old;
    for at in [0, 300, 301, 303, 4095] {
        new[at] ^= 1;
    }
    let runs = [&[0, 1, new[0]][..], &[0xAB, 2, 4], &new[300..304], &[0xCF, 0x1D, 1, new[4095]]].concat();
    assert_eq!(encode(Encoding::Delta, &old, &new).unwrap(), runs);
}

#[test]
fn zstd_frames_are_the_ones_that_the_decoder_takes() {
    for level in [-5, 1, 3, 9, 19, 22] {
        let mut encoder = PageEncoder::new(level);
        for page in [text(1), [0; PAGE_SIZE], [9; PAGE_SIZE], changed([0; PAGE_SIZE], 3, 20)] {
            assert!(encoder.zstd(&page, PAGE_SIZE, &mut Vec::new()), "level {level}");
        }
    }
}

/// Frames that zstd itself would decode, and that could take more than a page is worth.
#[test]
fn other_zstd_frames_are_refused() {
    let page = text(1);
    let body = encode(Encoding::Zstd, &page, &page).unwrap();
    let reason = |body: &[u8]| match decode(Encoding::Zstd, body, &mut [0; PAGE_SIZE], &page) {
        Err(EncodingError::Body { encoding: Encoding::Zstd, reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    let two = [&body[..], &[0x50, 0x2A, 0x4D, 0x18, 0, 0, 0, 0]].concat();
    assert!(reason(&two).contains("not as long"));
    let mut unfinished = body.clone();
    unfinished[7] &= !1;
    assert!(reason(&[&unfinished[..], &[1, 0, 0]].concat()).contains("more than one block"));
    let mut larger = body.clone();
    larger[6] = 0x10;
    assert!(reason(&larger).contains("header"));
    let stream = zstd::encode_all(&page[..], 1).unwrap();
    assert!(reason(&stream).contains("header"));
}

#[test]
fn bodies_that_hold_less_than_a_page_are_refused() {
    let short = lz4_flex::block::compress(&[0; 100]);
    let long = lz4_flex::block::compress(&[0; PAGE_SIZE + 1]);
    for body in [short, long] {
        let error = decode(Encoding::Lz4, &body, &mut [0; PAGE_SIZE], &[0; PAGE_SIZE]).unwrap_err();
        assert!(matches!(&error, EncodingError::Body { encoding: Encoding::Lz4, .. }), "{error}");
    }
}

#[test]
fn a_delta_that_cannot_be_is_refused_and_says_why() {
    for (body, why) in [
        (&[1][..], "second number"),
        (&[0x80], "first number"),
        (&[0x80, 0x80, 1], "first number"),
        (&[0, 0], "changes nothing"),
        (&[0, 2, 9], "left of the body"),
        (&[0xFF, 0x1F, 2, 9, 9], "beyond the page"),
        (&[0xFF, 0x1F, 1, 9, 0, 1, 9], "beyond the page"),
    ] {
        let mut page = [3; PAGE_SIZE];
        let error = decode(Encoding::Delta, body, &mut page, &[0; PAGE_SIZE]).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("delta") && error.contains("page 0x40"), "{error}");
        assert_eq!(page, [3; PAGE_SIZE], "{error}");
    }
}

#[test]
fn another_page_is_believed_only_if_it_is_the_same() {
    let page = noise(1);
    let mut body = encode(Encoding::Same, &page, &page).unwrap();
    assert!(decode(Encoding::Same, &body, &mut [0; PAGE_SIZE], &page).is_ok());
    let mut other = page;
    other[4000] ^= 1;
    let error = decode(Encoding::Same, &body, &mut [0; PAGE_SIZE], &other).unwrap_err().to_string();
    assert!(error.contains("page 0x3 has another content"), "{error}");
    body[0] = 4;
    let error = decode(Encoding::Same, &body, &mut [0; PAGE_SIZE], &page).unwrap_err().to_string();
    assert!(error.contains("page 0x4 is not here"), "{error}");
}

#[test]
fn each_rule_of_the_table_has_its_refusal() {
    let same = |page: u64| {
        let mut body = encode(Encoding::Same, &[0; PAGE_SIZE], &[0; PAGE_SIZE]).unwrap();
        body[..8].copy_from_slice(&page.to_le_bytes());
        alone(Encoding::Same, &body)
    };
    let raw = alone(Encoding::Raw, &[1; PAGE_SIZE]);
    for (bytes, field) in [
        (raw[..3].to_vec(), "payload length"),
        ([&[0], &raw[1..]].concat(), "an encoding"),
        ([&[6], &raw[1..]].concat(), "an encoding"),
        ([&[1, 1], &raw[2..]].concat(), "a reserved byte"),
        (alone(Encoding::Raw, &[1; PAGE_SIZE - 1]), "a body's length"),
        (alone(Encoding::Lz4, &[1; PAGE_SIZE]), "a body's length"),
        (alone(Encoding::Lz4, &[]), "a body's length"),
        (alone(Encoding::Zstd, &[1; 10]), "a body's length"),
        (alone(Encoding::Same, &[1; SAME_LEN - 1]), "a body's length"),
        (raw[..raw.len() - 1].to_vec(), "the bodies' length"),
        ([&raw[..], &[0]].concat(), "the bodies' length"),
        (same(1000), "a page of the same content"),
        (same(u64::MAX), "a page of the same content"),
        (same(64), "a page of the same content"),
        (same(65), "a page of the same content"),
    ] {
        match parse(&bytes) {
            Err(EncodingError::Table { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }
    assert!(parse(&same(66)).is_ok() && parse(&same(999)).is_ok() && parse(&raw).is_ok());
}
