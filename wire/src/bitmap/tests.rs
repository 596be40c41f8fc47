use proptest::prelude::*;

use super::*;

/// Words of all sorts: long runs, short ones, and words of few bits, of many, and of any.
fn words() -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![
        4 => Just(0),
        4 => Just(u64::MAX),
        2 => (0..64_u32).prop_map(|bit| 1 << bit),
        2 => (0..64_u32).prop_map(|bit| !(1 << bit)),
        2 => any::<u64>(),
    ];
    let run = (word, prop_oneof![1..4_usize, 1..200_usize]).prop_map(|(word, length)| vec![word; length]);
    prop::collection::vec(run, 0..40).prop_map(|runs| runs.concat())
}

/// Bytes that look like runs more often than arbitrary ones would.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => 0..16_u8, 1 => any::<u8>()];
    prop_oneof![prop::collection::vec(byte, 0..60), prop::collection::vec(any::<u8>(), 0..60)]
}

proptest! {
    #[test]
    fn words_come_back_as_they_were(words in words()) {
        let bytes = encode(&words);
        prop_assert!(bytes.len() <= words.len() * 8 + VARINT_MAX);
        let back = decode(&bytes, words.len()).unwrap();
        prop_assert_eq!(back.capacity(), words.len());
        prop_assert_eq!(back, words);
    }

    #[test]
    fn no_other_count_is_accepted(words in words(), count in 0..400_usize) {
        prop_assume!(count != words.len());
        prop_assert!(decode(&encode(&words), count).is_err());
    }

    #[test]
    fn arbitrary_bytes_give_exactly_the_words_asked_for_or_nothing(bytes in bytes(), count in 0..200_usize) {
        if let Ok(words) = decode(&bytes, count) {
            prop_assert_eq!(words.len(), count);
            prop_assert_eq!(words.capacity(), count);
        }
    }

    #[test]
    fn bytes_that_are_cut_short_are_refused(words in words(), cut in any::<prop::sample::Index>()) {
        prop_assume!(!words.is_empty());
        let bytes = encode(&words);
        prop_assert!(decode(&bytes[..cut.index(bytes.len())], words.len()).is_err());
    }
}

#[test]
fn long_runs_cost_a_few_bytes() {
    // 1 TiB of guest.
    let words = vec![0; 1 << 22];
    assert_eq!(encode(&words), [0x80, 0x80, 0x80, 0x08]);
    assert_eq!(encode(&[u64::MAX; 3]), [3 << 2 | 1]);
    assert_eq!(encode(&[0, 0x0102]), [1 << 2, 1 << 2 | 2, 2, 1, 0, 0, 0, 0, 0, 0]);
    assert!(encode(&[]).is_empty());
}

#[test]
fn each_way_to_be_malformed_has_its_error() {
    let zeros = |length: u8| length << 2;
    assert_eq!(decode(&[], 1), Err(BitmapError::Incomplete { words: 0, count: 1 }));
    assert_eq!(decode(&[zeros(2)], 3), Err(BitmapError::Incomplete { words: 2, count: 3 }));
    assert_eq!(decode(&[zeros(2), zeros(2)], 3), Err(BitmapError::PastTheEnd { at: 1, count: 3 }));
    assert_eq!(decode(&[zeros(3), zeros(0)], 3), Err(BitmapError::EmptyRun { at: 1 }));
    assert_eq!(decode(&[zeros(3) | 3], 3), Err(BitmapError::UnknownKind { at: 0, kind: 3 }));
    assert_eq!(decode(&[zeros(1) | 2, 0, 0, 0, 0, 0, 0, 0], 1), Err(BitmapError::CutShort { at: 0 }));
    assert_eq!(decode(&[zeros(1), 0x80], 1), Err(BitmapError::CutShort { at: 1 }));
}

#[test]
fn lengths_have_one_spelling() {
    let bad = Err(BitmapError::BadLength { at: 0 });
    // 1 << 2, in two bytes.
    assert_eq!(decode(&[0x84, 0x00], 1), bad);
    assert_eq!(decode(&[0x80; 10], 1), bad);
    assert_eq!(decode(&[0x80; 11], 1), bad);
    // Bit 64.
    assert_eq!(decode(&[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x02], 1), bad);
    // The longest length that can be written asks for no memory.
    let most = [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    assert_eq!(decode(&most, 64), Err(BitmapError::PastTheEnd { at: 0, count: 64 }));
    let literal = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    assert_eq!(decode(&literal, 64), Err(BitmapError::CutShort { at: 0 }));
}
