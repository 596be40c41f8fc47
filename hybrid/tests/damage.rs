//! One bit of a migration is flipped on its way, wherever: it is noticed, nobody sees a wrong page, and the guest goes on.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use common::relay::{Flip, Relay, Stream};
use common::{until, until_or, userfaultfd_or_skip};
use switchover_hybrid::comparison::Comparison;
use switchover_hybrid::error::MigrationError;
use switchover_hybrid::fake::FakeMachine;
use switchover_hybrid::incoming::Incoming;
use switchover_hybrid::machine::Machine;
use switchover_hybrid::monitor::{Limits, Mode};
use switchover_hybrid::outgoing::Outgoing;
use switchover_hybrid::security::Security;
use switchover_hybrid::settings::{Bandwidth, Settings, no_observer};
use switchover_hybrid::status::MigrationStatus;
use switchover_pager::ram::Ram;
use switchover_precopy::pack::{Compression, PackSettings};
use switchover_wire::types::{LaneRole, PAGE_SIZE, PageCount, PageIndex};

const PAGES: PageCount = PageCount(512);

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// What became of a migration.
#[derive(Clone, PartialEq, Eq, Debug)]
enum End {
    /// The guest is the source's, as before.
    Stayed,
    /// It is the destination's.
    Moved,
}

struct Story {
    end: End,
    /// The first page that the guest was not given as it left it.
    wrong: Option<PageIndex>,
    /// What the two sides found by comparing.
    compared: [Option<Comparison>; 2],
    flipped: bool,
    /// What either side said was wrong, in between or in the end.
    said: Vec<String>,
    /// Warnings that were logged.
    logged: String,
    /// Bytes that crossed each stream.
    crossed: Vec<(Stream, u64)>,
}

/// What this process has logged.
#[derive(Clone)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn get() -> Self {
        static LOG: OnceLock<Log> = OnceLock::new();
        LOG.get_or_init(|| {
            let log = Self(Arc::default());
            let writer = log.clone();
            tracing_subscriber::fmt()
                .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
                .with_ansi(false)
                .with_writer(move || writer.clone())
                .init();
            log
        })
        .clone()
    }

    fn length(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn since(&self, before: usize) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()[before..]).into_owned()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Fills half of memory with what nothing makes smaller, but for the words that the guest keeps its books in.
fn fill(ram: &Ram) {
    let mut dice = Dice(1);
    for page in (0..PAGES.0 / 2).map(PageIndex) {
        let start = ram.guest_base().wrapping_add(usize::try_from(page.offset()).unwrap()).cast::<u64>();
        for word in 1..PAGE_SIZE / 8 {
            // SAFETY: inside the guest mapping; nobody else is there yet.
            unsafe { start.wrapping_add(word).write_volatile(dice.next()) };
        }
    }
}

/// Reads every page of the guest mapping, as a guest would, until it is told to end.
fn read_all(ram: &Ram, ended: &AtomicBool) {
    for step in 0..PAGES.0 {
        if ended.load(Ordering::Acquire) {
            return;
        }
        // In an order that no sweep has.
        let page = PageIndex(step.wrapping_mul(0x9E37_79B1) % PAGES.0);
        let start = ram.guest_base().wrapping_add(usize::try_from(page.offset()).unwrap()).cast::<u64>();
        // SAFETY: inside the guest mapping; volatile, as another mapping fills it.
        unsafe { start.read_volatile() };
    }
}

fn first_different(one: &Ram, other: &Ram) -> Option<PageIndex> {
    let (mut a, mut b) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    (0..PAGES.0).map(PageIndex).find(|page| {
        assert!(one.copy_page(*page, &mut a) && other.copy_page(*page, &mut b));
        a != b
    })
}

fn settings(mode: Mode, compression: Compression) -> Settings {
    Settings {
        silence: Duration::from_secs(1),
        limits: Limits { mode, ..Limits::default() },
        packing: PackSettings { compression, ..PackSettings::default() },
        // So that some pages are asked for.
        bandwidth: Bandwidth { precopy: 0, postcopy: 64 << 20 },
        ..Settings::default()
    }
}

fn migrate(settings: Settings, flip: Option<Flip>) -> Story {
    let mode = settings.limits.mode;
    let log = Log::get();
    let before = log.length();
    let from = FakeMachine::new(PAGES).unwrap();
    let to = FakeMachine::incoming(PAGES).unwrap();
    fill(&from.ram());
    from.throttle(50);
    from.resume().unwrap();
    until("the guest has worked", || from.visits() > 300);
    // Its memory stays as it arrives; this test touches it in its place.
    to.freeze();
    let machine: Arc<dyn Machine> = Arc::clone(&to) as _;
    let listening = Settings { silence: settings.silence, ..Settings::default() };
    let incoming =
        Incoming::listen(machine, &"tcp:127.0.0.1:0".parse().unwrap(), listening, Security::default(), no_observer())
            .unwrap();
    let relay = Relay::to(&incoming.address(), flip);
    let machine: Arc<dyn Machine> = Arc::clone(&from) as _;
    let outgoing = Outgoing::start(machine, relay.address(), settings, Security::default(), no_observer()).unwrap();
    if mode == Mode::Postcopy {
        // Damage in the first words may have ended it already.
        match outgoing.start_postcopy() {
            Err(MigrationError::TooLate { .. }) if flip.is_some() => {}
            started => started.unwrap(),
        }
    }

    let ended = Arc::new(AtomicBool::new(false));
    let mut reader = None;
    let mut said = Vec::new();
    let mut mended = false;
    let mut end = None;
    let context = format!("{mode:?}, {flip:?}");
    until_or(
        &format!("an end of {context}"),
        || {
            let (source, destination) = (outgoing.progress(), incoming.progress());
            for error in [&source.error, &destination.error].into_iter().flatten() {
                if !said.contains(error) {
                    said.push(error.clone());
                }
            }
            use MigrationStatus as Is;
            let (at_source, at_destination) = (source.status, destination.status);
            if at_destination == Is::PostcopyActive && reader.is_none() {
                let (ram, ended) = (to.ram(), Arc::clone(&ended));
                reader = Some(thread::spawn(move || read_all(&ram, &ended)));
            }
            match (at_source, at_destination) {
                (Is::PostcopyPaused, Is::PostcopyPaused | Is::Completed) => {
                    if !std::mem::replace(&mut mended, true) {
                        relay.mend();
                    }
                    let _ = outgoing.resume(relay.address(), settings, Security::default());
                }
                (Is::Failed, _) => end = Some(End::Stayed),
                (Is::Completed, Is::Completed) => end = Some(End::Moved),
                _ => {}
            }
            end.is_some()
        },
        || format!("{:?} {:?}, flipped: {}", outgoing.progress(), incoming.progress(), relay.flipped()),
    );
    ended.store(true, Ordering::Release);
    let end = end.unwrap();
    match end {
        End::Stayed => {
            assert!(from.runs() && !to.runs(), "{context}: {said:?}");
            let seen = from.visits();
            until("the guest goes on where it was", || from.visits() > seen + 100);
        }
        End::Moved => {
            assert!(to.runs() && !from.runs(), "{context}");
            if let Some(reader) = reader {
                reader.join().unwrap();
            }
        }
    }
    assert_eq!((from.corrupt_visits(), to.corrupt_visits()), (0, 0), "{context}");
    let moved = end == End::Moved;
    let story = Story {
        end,
        wrong: if moved { first_different(&from.ram(), &to.ram()) } else { None },
        compared: [outgoing.progress().comparison, incoming.progress().comparison],
        flipped: relay.flipped(),
        said,
        logged: log.since(before),
        crossed: Stream::all().map(|stream| (stream, relay.crossed(stream))).collect(),
    };
    drop(relay);
    story
}

/// Flips bits all over the streams of such migrations.
fn damage_all_over(mode: Mode, compression: Compression, seed: u64) {
    let mut dice = Dice(seed);
    let settings = settings(mode, compression);
    let whole = migrate(settings, None);
    assert_eq!((whole.end, whole.wrong, whole.said), (End::Moved, None, vec![]));
    for (stream, bytes) in whole.crossed {
        // The handshake, what follows it, and anywhere.
        let mut within = |end: u64| (0..12).map(|_| dice.next() % end.max(1)).collect::<Vec<_>>();
        for byte in [within(bytes.min(400)), within(bytes)].concat() {
            let flip = Flip { stream, at: byte * 8 + dice.next() % 8 };
            let Story { end, wrong, flipped, said, logged, .. } = migrate(settings, Some(flip));
            println!("{flip:?}: flipped {flipped}, {end:?}, {said:?} {logged}");
            assert_eq!(wrong, None, "{flip:?}: {said:?}");
            // What the destination says of pre-copy's frames when the rounds have ended is heard by nobody, and counts for nothing.
            let unheard = stream.role == LaneRole::Bulk && !stream.to_destination && end == End::Moved;
            assert!(!flipped || unheard || !said.is_empty() || !logged.is_empty(), "{flip:?} of {bytes} bytes");
        }
    }
}

#[test]
fn a_bit_flipped_anywhere_in_postcopy_is_noticed() {
    if !userfaultfd_or_skip("a_bit_flipped_anywhere_in_postcopy_is_noticed") {
        return;
    }
    damage_all_over(Mode::Postcopy, Compression::Off, 1);
}

#[test]
fn a_bit_flipped_anywhere_in_precopy_is_noticed() {
    if !userfaultfd_or_skip("a_bit_flipped_anywhere_in_precopy_is_noticed") {
        return;
    }
    damage_all_over(Mode::Precopy, Compression::Adaptive, 2);
}

#[test]
fn a_bit_flipped_anywhere_in_a_hybrid_is_noticed() {
    if !userfaultfd_or_skip("a_bit_flipped_anywhere_in_a_hybrid_is_noticed") {
        return;
    }
    damage_all_over(Mode::Hybrid, Compression::Off, 3);
}

/// A bit of a page that is pushed.
const IN_A_PAGE: Flip = Flip { stream: Stream { role: LaneRole::Bulk, to_destination: true }, at: 20_000 * 8 };

/// That it is the checksums that notice: without them the very same damage goes through.
#[test]
fn without_checksums_a_damaged_page_goes_unnoticed() {
    if !userfaultfd_or_skip("without_checksums_a_damaged_page_goes_unnoticed") {
        return;
    }
    let settings = settings(Mode::Postcopy, Compression::Off);
    let story = migrate(settings, Some(IN_A_PAGE));
    assert!(story.flipped && story.logged.contains("CRC-32"), "{:?} {}", story.said, story.logged);
    assert_eq!(story.wrong, None);
    // The guest may have asked for that very page, which then comes twice, and once undamaged.
    let damaged = (0..10).map(|_| migrate(Settings { checksums: false, ..settings }, Some(IN_A_PAGE)));
    let story = damaged.inspect(|story| assert!(story.flipped)).find(|story| story.wrong.is_some());
    let story = story.expect("no damaged page got through");
    assert!(story.said.is_empty(), "{:?}", story.said);
    assert_eq!(story.compared, [None, None]);
}

#[test]
fn memory_that_is_compared_matches() {
    if !userfaultfd_or_skip("memory_that_is_compared_matches") {
        return;
    }
    for mode in [Mode::Postcopy, Mode::Precopy, Mode::Hybrid] {
        let settings = Settings { verify_memory: true, ..settings(mode, Compression::Adaptive) };
        // With a link that is lost and joined again too.
        for flip in [None, Some(IN_A_PAGE)] {
            let story = migrate(settings, flip);
            if story.end == End::Moved {
                let matched = story.compared.iter().all(|found| found.as_ref().is_some_and(Comparison::matches));
                assert!(matched && story.wrong.is_none(), "{mode:?} {flip:?}: {:?} {:?}", story.compared, story.said);
            }
        }
    }
}

#[test]
fn a_page_that_was_damaged_is_found_by_comparing_and_named() {
    if !userfaultfd_or_skip("a_page_that_was_damaged_is_found_by_comparing_and_named") {
        return;
    }
    for mode in [Mode::Postcopy, Mode::Hybrid] {
        let mut found_one = false;
        // Pages are sent once more where the guest has written them since: until one is not.
        for at in (20_000..1_000_000).step_by(20_000) {
            let settings = Settings { checksums: false, verify_memory: true, ..settings(mode, Compression::Off) };
            let story = migrate(settings, Some(Flip { at: at * 8, ..IN_A_PAGE }));
            assert_eq!(story.end, End::Moved, "{:?}", story.said);
            let Some(wrong) = story.wrong else { continue };
            for found in story.compared {
                let found = found.unwrap();
                let [stretch] = found.differing[..] else { panic!("{found:?}") };
                assert!(
                    (stretch.first_page..stretch.first_page + stretch.pages).contains(&wrong.0) && stretch.pages <= 64
                );
            }
            assert!(story.said.iter().all(|said| said.contains("did not arrive as it was left")), "{:?}", story.said);
            assert!(story.logged.contains("did not arrive as it was left"), "{}", story.logged);
            found_one = true;
            break;
        }
        assert!(found_one, "{mode:?}: no damage was left to be found");
    }
}
