//! Pages go in and out of one word while what they stand for changes.

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64 as Data;
use loom::thread;

use super::*;

fn explore(preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(preemptions);
    builder.check(body);
}

const PAGES: PageCount = PageCount(8);
const PAGE: PageIndex = PageIndex(3);
const BIT: u64 = 1 << 3;

/// A writer writes and then notes it; whoever takes the note sees the write, or the note stays.
fn written_is_noted(take: fn(&AtomicPageBitmap) -> u64, noted_before: bool) {
    explore(3, move || {
        let (noted, data) = (Arc::new(AtomicPageBitmap::new(PAGES)), Arc::new(Data::new(0)));
        if noted_before {
            noted.insert(PAGE);
        }
        let writer = {
            let (noted, data) = (Arc::clone(&noted), Arc::clone(&data));
            thread::spawn(move || {
                data.store(1, Ordering::Relaxed);
                noted.insert(PAGE)
            })
        };
        let taken = take(&noted) & BIT != 0;
        let seen = data.load(Ordering::Relaxed);
        let new = writer.join().unwrap();
        let left = noted.contains(PAGE);
        assert!(left || (taken && seen == 1), "a write is neither seen nor noted");
        assert_eq!(u64::from(new) + u64::from(noted_before), u64::from(taken) + u64::from(left));
    });
}

#[test]
fn a_write_is_seen_by_who_takes_its_page_or_stays_noted() {
    written_is_noted(|noted| noted.take(0), false);
    written_is_noted(|noted| noted.take(0), true);
}

#[test]
fn as_by_who_removes_it() {
    written_is_noted(|noted| noted.remove_word(0, BIT), false);
    written_is_noted(|noted| noted.remove_word(0, BIT), true);
}

#[test]
fn a_page_is_taken_by_one() {
    explore(3, || {
        let set = Arc::new(AtomicPageBitmap::from(&PageBitmap::from_words(&[0b1111], PAGES)));
        let threads = [0b0011, 0b0110].map(|bits| {
            let set = Arc::clone(&set);
            thread::spawn(move || set.remove_word(0, bits))
        });
        let adding = {
            let set = Arc::clone(&set);
            thread::spawn(move || set.insert_word(0, 0b1_0001))
        };
        let mine = set.take(0);
        let taken: u32 = threads.into_iter().map(|thread| thread.join().unwrap().count_ones()).sum();
        let added = adding.join().unwrap().count_ones();
        assert_eq!(taken + mine.count_ones() + set.word(0).count_ones(), 4 + added);
    });
}
