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
        property(&fs::read(path).unwrap());
        inputs += 1;
    }
    assert!(inputs > 0, "there are no inputs for {name}");
    property(&[]);
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

replayed!(arguments bitmap control frames framing handshake kernel missing pages payload state trace);

#[test]
fn each_property_has_a_target_a_corpus_and_a_test() {
    let all: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&fuzz().join("fuzz_targets")), all);
    assert_eq!(names(&fuzz().join("corpus")), all);
    assert_eq!(REPLAYED.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>(), all);
}
