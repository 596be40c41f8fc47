use switchover_wire::bitmap::{decode, encode};

use crate::input::Input;

/// Words that a set may have here.
const MOST_WORDS: u16 = 8192;

/// Sets of pages. Two bytes say how many words are expected.
pub fn bitmap(bytes: &[u8]) {
    let mut input = Input(bytes);
    let count = usize::from(input.u16() % MOST_WORDS);
    if let Ok(words) = decode(input.0, count) {
        assert_eq!(words.len(), count);
        let written = encode(&words);
        assert!(written.len() <= input.0.len(), "a decoder takes what no encoder would write so long");
        assert_eq!(decode(&written, count).unwrap(), words);
    }
    let words: Vec<_> = input.0.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let written = encode(&words);
    assert!(written.len() <= words.len() * 8 + 10);
    assert_eq!(decode(&written, words.len()).unwrap(), words);
    assert!(decode(&written, words.len() + 1).is_err());
}
