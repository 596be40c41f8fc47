//! Replays the inputs that were kept for each fuzz target.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking; its helpers are tests too")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use switchover_properties::TARGETS;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

fn replay(name: &str) {
    let (_, property) = TARGETS.iter().find(|(target, _)| *target == name).unwrap();
    let mut inputs = 0;
    for entry in fs::read_dir(fuzz().join("corpus").join(name)).unwrap() {
        let path = entry.unwrap().path();
        // Shown only when the test fails: the last one named is the one that does it.
        println!("{}", path.display());
        let input = fs::read(path).unwrap();
        property(&input);
        for change in changes(&input) {
            println!("  with {change:?}");
            property(&change.of(&input));
        }
        inputs += 1;
    }
    assert!(inputs > 0, "there are no inputs for {name}");
    property(&[]);
}

/// Changes of each input that are tried too: far fewer than a fuzzer tries, and always the same.
const CHANGES: u64 = 500;

#[derive(Debug)]
enum Change {
    Flip { at: usize, bits: u8 },
    Insert { at: usize, byte: u8 },
    Remove { at: usize },
    CutOff { at: usize },
}

impl Change {
    fn of(&self, input: &[u8]) -> Vec<u8> {
        let mut bytes = input.to_vec();
        match *self {
            Self::Flip { at, bits } => bytes[at] ^= bits,
            Self::Insert { at, byte } => bytes.insert(at, byte),
            Self::Remove { at } => {
                bytes.remove(at);
            }
            Self::CutOff { at } => bytes.truncate(at),
        }
        bytes
    }
}

fn changes(input: &[u8]) -> impl Iterator<Item = Change> {
    let length = input.len() as u64;
    let mut state = 0x9E37_79B9_7F4A_7C15 ^ length;
    // Marsaglia's xorshift64.
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..if length == 0 { 0 } else { CHANGES }).map(move |_| {
        let at = usize::try_from(random() % length).unwrap();
        let [byte, kind, ..] = random().to_le_bytes();
        match kind % 8 {
            0 => Change::Insert { at, byte },
            1 => Change::Remove { at },
            2 => Change::CutOff { at },
            3 | 4 => Change::Flip { at, bits: byte | 1 },
            _ => Change::Flip { at, bits: 1 << (byte % 8) },
        }
    })
}

macro_rules! replayed {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            replay(stringify!($name));
        })*

        const REPLAYED: &[&str] = &[$(stringify!($name)),*];
    };
}

replayed!(arguments bitmap control frames framing handshake image kernel missing pages payload state tls trace working_set);

#[test]
fn each_property_has_a_target_a_corpus_and_a_test() {
    let all: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&fuzz().join("fuzz_targets")), all);
    assert_eq!(names(&fuzz().join("corpus")), all);
    assert_eq!(REPLAYED.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>(), all);
}
