//! The real rounds, over real sockets, against a destination that takes its time, while a guest (a thread here) writes.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod far;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use far::{Dice, Far, Manner};
use switchover_pager::lane::{Notify, PageLane};
use switchover_pager::ram::Ram;
use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::dirty::{DirtyLog, DirtyLogError};
use switchover_precopy::pack::{Compression, PackSettings};
use switchover_precopy::rounds::probe::spread;
use switchover_precopy::rounds::{Rounds, RoundsSettings};
use switchover_wire::socket::Socket;
use switchover_wire::types::{LaneId, LaneRole, PAGE_SIZE, PageCount, PageIndex};

/// Some spans of a lane, and the last of them short.
const PAGES: PageCount = PageCount(3 * 1024 + 100);
const PATIENCE: Duration = Duration::from_secs(60);

/// A book that the guest itself keeps.
struct Book {
    words: Vec<AtomicU64>,
}

impl Book {
    fn note(&self, page: PageIndex) {
        self.words[usize::try_from(page.0 / 64).unwrap()].fetch_or(1 << (page.0 % 64), Ordering::SeqCst);
    }
}

impl DirtyLog for Book {
    fn start(&self) -> Result<(), DirtyLogError> {
        self.words.iter().for_each(|word| word.store(u64::MAX, Ordering::SeqCst));
        Ok(())
    }

    fn peek(&self, noted: &mut PageBitmap) -> Result<(), DirtyLogError> {
        let words: Vec<u64> = self.words.iter().map(|word| word.load(Ordering::SeqCst)).collect();
        noted.unite(&PageBitmap::from_words(&words, noted.pages()));
        Ok(())
    }

    fn rearm(&self, first: PageIndex, words: &[u64]) -> Result<(), DirtyLogError> {
        for (own, cleared) in self.words.iter().skip(usize::try_from(first.0 / 64).unwrap()).zip(words) {
            own.fetch_and(!cleared, Ordering::SeqCst);
        }
        Ok(())
    }

    fn stop(&self) {}
}

/// A source: memory, its book, and a thread that writes it.
struct Source {
    ram: Ram,
    book: Arc<Book>,
    paused: Arc<AtomicBool>,
    guest: Option<JoinHandle<()>>,
}

impl Source {
    /// A guest that writes two thirds of memory: some pages often, some with zeros, some as copies of others.
    fn new(seed: u64, rest: Duration) -> Self {
        let ram = Ram::new(PAGES).unwrap();
        let book = Arc::new(Book { words: (0..PAGES.0.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() });
        book.start().unwrap();
        for page in (0..PAGES.0).filter(|page| page % 3 > 0) {
            write(&ram, PageIndex(page), page % 50);
        }
        let paused = Arc::new(AtomicBool::new(false));
        let (own, noted, stop) = (ram.clone(), Arc::clone(&book), Arc::clone(&paused));
        let mut dice = Dice(seed.wrapping_mul(0x1234_5677) | 1);
        let guest = thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                let hot = dice.below(2) == 0;
                let page = PageIndex(if hot { dice.below(64) * 37 } else { dice.below(PAGES.0) });
                write(&own, page, dice.below(40));
                noted.note(page);
                if !rest.is_zero() && dice.below(16) == 0 {
                    thread::sleep(rest);
                }
            }
        });
        Self { ram, book, paused, guest: Some(guest) }
    }

    fn pause(&mut self) {
        self.paused.store(true, Ordering::SeqCst);
        if let Some(guest) = self.guest.take() {
            guest.join().unwrap();
        }
    }

    fn noted(&self) -> PageBitmap {
        let mut noted = PageBitmap::new(PAGES);
        self.book.peek(&mut noted).unwrap();
        noted
    }
}

/// A page's content is made of one number, 0 for zeros: its beginning, its middle and its end.
fn write(ram: &Ram, page: PageIndex, number: u64) {
    let start = ram.guest_base().wrapping_add(usize::try_from(page.offset()).unwrap()).cast::<u64>();
    for word in [0, 1, 255, 300, 511] {
        // SAFETY: inside the guest mapping; only one thread writes, others read with atomic loads or in the kernel.
        unsafe { start.wrapping_add(word).write_volatile(number * 0x0101_0101_0101) };
    }
}

fn lanes(count: u8) -> (Vec<PageLane>, Vec<PageLane>) {
    let pair = |index| {
        let (one, two) = Socket::pair().unwrap();
        let lane =
            |socket| PageLane { id: LaneId { role: LaneRole::Bulk, index }, socket: Arc::new(socket), checksums: true };
        (lane(one), lane(two))
    };
    (0..count).map(pair).unzip()
}

fn start(source: &Source, lanes: &[PageLane], settings: RoundsSettings) -> (Rounds, Arc<Mutex<Vec<String>>>) {
    let failures = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&failures);
    let notify: Notify = Arc::new(move |event| noted.lock().unwrap().push(format!("{event:?}")));
    let log: Arc<dyn DirtyLog> = Arc::<Book>::clone(&source.book);
    (Rounds::start(&source.ram, log, lanes, settings, &notify).unwrap(), failures)
}

/// A round from its beginning to its end.
fn round(rounds: &Rounds, source: &Source) -> u32 {
    let number = rounds.begin(&source.noted());
    assert!(rounds.wait(PATIENCE), "round {number} does not end");
    number
}

/// What is noted; and where a sample was armed, what no lane has taken.
fn lacking(source: &Source, rounds: &Rounds, probed: bool) -> PageBitmap {
    let mut lacking = source.noted();
    if probed {
        lacking.unite(&rounds.left());
    }
    lacking
}

#[test]
fn a_sample_is_armed_before_the_first_round_only_and_stays_left() {
    let mut source = Source::new(11, Duration::ZERO);
    source.pause();
    let (near, beyond) = lanes(1);
    let far = Far::new(PAGES, beyond, &[Manner::Late], 11);
    let (rounds, _) = start(&source, &near, RoundsSettings::default());
    let sample = spread(PAGES, 512);
    rounds.probe(&source.noted(), &sample).unwrap();
    assert_eq!(source.noted().count().0, PAGES.0 - sample.count().0);
    assert_eq!(rounds.left().count(), PAGES, "nothing was sent yet");
    assert_eq!(round(&rounds, &source), 1);
    assert!(rounds.left().is_empty() && source.noted().is_empty());
    source.book.start().unwrap();
    rounds.probe(&source.noted(), &sample).unwrap();
    assert_eq!(source.noted().count(), PAGES, "a lane may have read these");
    drop(rounds);
    far.end();
}

#[test]
fn at_any_halt_what_the_destination_lacks_is_noted_or_under_way() {
    let mut late = 0;
    for seed in 1..=30 {
        let mut dice = Dice(seed * 0x9e37_79b9);
        let count = 1 + u8::try_from(dice.below(4)).unwrap();
        let compression = [Compression::Off, Compression::Adaptive, Compression::Lz4, Compression::Zstd]
            [usize::try_from(seed % 4).unwrap()];
        let packing = PackSettings { compression, delta_cache_bytes: dice.below(3) << 21, ..PackSettings::default() };
        let bytes_per_second = [0, 0, 60 << 20][usize::try_from(dice.below(3)).unwrap()];
        let settings = RoundsSettings { packing, bytes_per_second };
        let context = format!("seed {seed}: {count} lanes, {settings:?}");

        let mut source = Source::new(seed, Duration::from_micros(dice.below(3) * 50));
        let (near, beyond) = lanes(count);
        let far = Far::new(PAGES, beyond, &vec![Manner::Late; usize::from(count)], seed);
        let (rounds, failures) = start(&source, &near, settings);
        // What was armed as a sample is not noted, and what is left of the first round says so.
        let probed = dice.below(2) == 0;
        if probed {
            rounds.probe(&source.noted(), &spread(PAGES, 512)).unwrap();
        }
        for _ in 0..dice.below(4) * dice.below(3) {
            round(&rounds, &source);
        }
        rounds.begin(&source.noted());
        // A halt may come at any moment.
        let _ = rounds.wait(Duration::from_micros(dice.below(4_000)));
        rounds.halt();
        assert!(rounds.wait_halted(Instant::now() + PATIENCE), "{context}");
        source.pause();

        let mut missing = lacking(&source, &rounds, probed);
        let under_way = rounds.under_way();
        let streams = rounds.in_streams();
        missing.unite(&under_way);
        for index in (0..PAGES.0).map(PageIndex) {
            let mut bytes = [0; PAGE_SIZE];
            assert!(source.ram.copy_page(index, &mut bytes));
            let has = far.has(index, &bytes);
            assert!(has || missing.contains(index), "{context}: {index} is old, and nobody knows");
            if let Some(lane) = far.under_way(index) {
                late += 1;
                let (chunk, bit) = (index.0 / 64, index.0 % 64);
                let known = streams[lane].chunks.iter().any(|(own, mask)| own.0 == chunk && mask >> bit & 1 == 1);
                assert!(known, "{context}: {index} is on lane {lane}, and its stream does not say so");
            }
        }
        for (chunk, mask) in streams.iter().flat_map(|stream| &stream.chunks) {
            for page in (0..64).filter(|bit| mask >> bit & 1 == 1).map(|bit| PageIndex(chunk.0 * 64 + bit)) {
                assert!(page.0 >= PAGES.0 || under_way.contains(page), "{context}: {page} in a stream");
            }
        }
        // All that was sent is acknowledged in the end, and then only what is noted is missing, or was taken and not sent.
        assert!(rounds.wait_taken(Instant::now() + PATIENCE), "{context}");
        assert!(rounds.in_streams().iter().all(|stream| stream.chunks.is_empty()));
        missing = lacking(&source, &rounds, probed);
        missing.unite(&rounds.under_way());
        for index in (0..PAGES.0).map(PageIndex).filter(|index| !missing.contains(*index)) {
            let mut bytes = [0; PAGE_SIZE];
            assert!(source.ram.copy_page(index, &mut bytes));
            assert!(far.has(index, &bytes), "{context}: {index} in the end");
        }
        assert_eq!(rounds.sent().taken_bytes, rounds.sent().wire_bytes, "{context}");
        drop(rounds);
        far.end();
        assert!(failures.lock().unwrap().is_empty(), "{context}: {failures:?}");
    }
    assert!(late > 0, "no page was ever under way at a halt: this tested nothing");
}

/// The guest rests, and everything arrives: rounds pass over what is under way, and come back to it.
#[test]
fn rounds_converge_once_the_guest_rests() {
    for count in [1, 3] {
        let mut source = Source::new(7, Duration::ZERO);
        let (near, beyond) = lanes(count);
        let far = Far::new(PAGES, beyond, &vec![Manner::Late; usize::from(count)], 7);
        let (rounds, _) = start(&source, &near, RoundsSettings::default());
        (1..=5).for_each(|number| assert_eq!(round(&rounds, &source), number));
        source.pause();
        let end = Instant::now() + PATIENCE;
        while !source.noted().is_empty() || !rounds.under_way().is_empty() {
            assert!(Instant::now() < end, "{} lanes: {:?} are left", count, source.noted().count());
            round(&rounds, &source);
        }
        for index in (0..PAGES.0).map(PageIndex) {
            let mut bytes = [0; PAGE_SIZE];
            assert!(source.ram.copy_page(index, &mut bytes));
            assert!(far.has(index, &bytes), "{index}");
        }
        drop(rounds);
        far.end();
    }
}

#[test]
fn a_lane_without_receipts_stops_no_round() {
    let source = Source::new(3, Duration::ZERO);
    let (near, beyond) = lanes(2);
    let far = Far::new(PAGES, beyond, &[Manner::Silent, Manner::Late], 3);
    let (rounds, failures) = start(&source, &near, RoundsSettings::default());
    // The silent lane takes a page once, and never again: in the end all pages that it has taken are its own.
    let mut before = (0, 0);
    for number in 1..=25 {
        assert_eq!(round(&rounds, &source), number);
        let streams = rounds.in_streams();
        let silent: u64 = streams[0].chunks.iter().map(|(_, mask)| u64::from(mask.count_ones())).sum();
        assert!(silent >= before.0, "what was never acknowledged is still under way");
        before = (silent, rounds.sent().taken_bytes);
    }
    assert!(before.0 > 0 && before.0 <= PAGES.0.next_multiple_of(64), "{before:?}");
    assert!(rounds.sent().deferred_pages > 0, "its pages are passed over");
    assert!(far.frames() > 0);
    rounds.halt();
    assert!(rounds.wait_halted(Instant::now() + PATIENCE));
    drop(rounds);
    far.end();
    assert!(failures.lock().unwrap().is_empty());
}

#[test]
fn a_lane_that_nobody_reads_stops_no_round() {
    let source = Source::new(5, Duration::ZERO);
    let (near, beyond) = lanes(2);
    let far = Far::new(PAGES, beyond, &[Manner::Stuck, Manner::Late], 5);
    let (rounds, _) = start(&source, &near, RoundsSettings::default());
    (1..=10).for_each(|number| assert_eq!(round(&rounds, &source), number));
    assert!(rounds.sent().taken_bytes > 0, "the other lane carries pages");
    rounds.halt();
    assert!(!rounds.wait_halted(Instant::now()), "a lane is blocked in its socket");
    near[0].socket.shutdown();
    assert!(rounds.wait_halted(Instant::now() + PATIENCE));
    assert!(!rounds.wait_taken(Instant::now()), "what it has sent was never taken");
    drop(rounds);
    far.end();
}

#[test]
fn a_receipt_for_what_was_never_sent_ends_its_lane() {
    use std::io::IoSlice;
    use std::os::fd::AsFd;
    use switchover_wire::frame::bulk::Taken;
    use switchover_wire::ring::Ring;

    let source = Source::new(9, Duration::ZERO);
    let (near, beyond) = lanes(1);
    let (rounds, failures) = start(&source, &near, RoundsSettings::default());
    let lie = Taken { frames: 1 }.encode();
    Ring::new(2).unwrap().send_all(beyond[0].socket.as_fd(), &[IoSlice::new(&lie)]).unwrap();
    let end = Instant::now() + PATIENCE;
    while failures.lock().unwrap().is_empty() {
        assert!(Instant::now() < end, "nobody objects");
        thread::yield_now();
    }
    assert!(failures.lock().unwrap()[0].contains("were not sent"), "{failures:?}");
    drop(rounds);
}
