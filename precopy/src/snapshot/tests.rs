use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const PAGES: PageCount = PageCount(192);

/// A snapshot of new RAM, or `None` (said visibly) where the host has no userfaultfd for it.
fn begin(test: &str, ram: &Ram) -> Option<Snapshot> {
    match Snapshot::begin(ram, None) {
        Ok(snapshot) => Some(snapshot),
        Err(error) => {
            println!("SKIP {test}: {error}");
            None
        }
    }
}

/// Writes `value` to each word of a page, one after the other.
fn fill(ram: &Ram, page: u64, value: u64) {
    let start = ram.guest_base().wrapping_add(usize::try_from(page).unwrap() * PAGE_SIZE).cast::<u64>();
    for word in 0..PAGE_SIZE / 8 {
        // SAFETY: inside the live guest mapping; each page has one writer at a time, and its readers are the kernel's.
        unsafe { start.wrapping_add(word).write_volatile(value) };
    }
}

fn contents(ram: &Ram) -> Vec<u8> {
    let mut bytes = vec![0; ram.len_bytes()];
    ram.file().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// All of the moment, by two threads, some pages at a time.
fn read_all(snapshot: &Snapshot) -> Vec<u8> {
    const PIECE: usize = 12;
    let mut bytes = vec![0; usize::try_from(PAGES.bytes()).unwrap()];
    let (front, back) = bytes.split_at_mut(PIECE * 8 * PAGE_SIZE);
    let read = |from: u64, bytes: &mut [u8]| {
        for (piece, bytes) in (0..).zip(bytes.chunks_mut(PIECE * PAGE_SIZE)) {
            snapshot.read(PageIndex(from + piece * PIECE as u64), bytes).unwrap();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| read(0, front));
        read(PIECE as u64 * 8, back);
    });
    bytes
}

/// Sets its flag when it goes, also by a panic: whoever looks at it must not be waited for in vain.
struct SetAtTheEnd<'a>(&'a AtomicBool);

impl Drop for SetAtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn what_is_written_after_the_moment_is_not_in_it() {
    const ROUNDS: u32 = 40;
    let ram = Ram::new(PAGES).unwrap();
    let (running, ended) = (RwLock::new(()), AtomicBool::new(false));
    let (mut overwritten, mut rounds) = (0, 0);
    thread::scope(|scope| {
        let _ending = SetAtTheEnd(&ended);
        for writer in 0..3_u64 {
            let (ram, running, ended) = (&ram, &running, &ended);
            scope.spawn(move || {
                // Each has every third page; all are written in turn, in an order that is not the readers'.
                for step in 1.. {
                    if ended.load(Ordering::Acquire) {
                        return;
                    }
                    let Ok(_in_guest) = running.read() else { return };
                    fill(ram, step * 35 % (PAGES.0 / 3) * 3 + writer, step);
                }
            });
        }
        for _ in 0..ROUNDS {
            let Some(snapshot) = begin("what_is_written_after_the_moment_is_not_in_it", &ram) else { break };
            // Not all of them: the rest is protected at the moment.
            let mut early = PageBitmap::new(PAGES);
            (0..PAGES.0).filter(|page| page % 32 < 16).for_each(|page| assert!(early.insert(PageIndex(page))));
            assert_eq!(snapshot.protect(&early).unwrap(), early.count());
            let moment = {
                let _paused = running.write().unwrap();
                assert!(snapshot.take(&PageBitmap::full(PAGES)).unwrap() >= PageCount(PAGES.0 / 2));
                contents(&ram)
            };
            let read = read_all(&snapshot);
            let differs = (0..PAGES.0).find(|page| {
                let at = usize::try_from(*page).unwrap() * PAGE_SIZE;
                read[at..at + PAGE_SIZE] != moment[at..at + PAGE_SIZE]
            });
            assert_eq!(differs, None);
            overwritten += snapshot.put_aside().0;
            rounds += 1;
            snapshot.end().unwrap();
        }
    });
    println!("{rounds} moments, {overwritten} pages were overwritten before they were read");
    assert!(rounds == 0 || overwritten > 0, "nothing was ever put aside");
}

#[test]
fn who_waits_goes_on_when_the_page_is_read_and_when_there_is_no_snapshot_any_more() {
    let ram = Ram::new(PAGES).unwrap();
    let name = "who_waits_goes_on_when_the_page_is_read_and_when_there_is_no_snapshot_any_more";
    let Some(snapshot) = begin(name, &ram) else { return };
    let all = PageBitmap::full(PAGES);
    snapshot.protect(&all).unwrap();
    assert_eq!(snapshot.protect(&all).unwrap(), PageCount(0), "they are");
    fill(&ram, 3, 1);
    assert_eq!(snapshot.take(&all).unwrap(), PageCount(1), "the one that was written");
    fill(&ram, 3, 2);
    assert_eq!(snapshot.put_aside(), PageCount(1));
    let mut bytes = [0; 2 * PAGE_SIZE];
    snapshot.read(PageIndex(2), &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[PAGE_SIZE]), (0, 1));
    // Read, and so free.
    fill(&ram, 2, 9);
    assert_eq!(snapshot.put_aside(), PageCount(1));
    drop(snapshot);
    (0..PAGES.0).for_each(|page| fill(&ram, page, 5));
}

#[test]
fn a_snapshot_that_is_lost_says_so_and_holds_nobody_up() {
    let ram = Ram::new(PAGES).unwrap();
    let Some(snapshot) = begin("a_snapshot_that_is_lost_says_so_and_holds_nobody_up", &ram) else { return };
    snapshot.take(&PageBitmap::full(PAGES)).unwrap();
    // As the thread says when it cannot go on.
    snapshot.shared.lock().lost = Some("a test".to_owned());
    snapshot.shared.watch.unregister().unwrap();
    fill(&ram, 0, 1);
    let error = snapshot.read(PageIndex(0), &mut [0; PAGE_SIZE]).unwrap_err();
    assert!(matches!(&error, SnapshotError::Lost(why) if why == "a test"), "{error}");
    assert!(snapshot.take(&PageBitmap::full(PAGES)).is_err());
}

#[test]
fn what_lies_close_together_is_protected_by_one_call_and_no_call_takes_long() {
    let mut which = PageBitmap::new(PageCount(4096));
    for page in [0, 1, 9, 19, 100].into_iter().chain(200..1300) {
        which.insert(PageIndex(page));
    }
    let found: Vec<_> = stretches(&which).into_iter().map(|(first, count)| (first.0, count.0)).collect();
    assert_eq!(found, [(0, 10), (19, 1), (100, 1), (200, 512), (712, 512), (1224, 76)]);
    assert!(stretches(&PageBitmap::new(PageCount(64))).is_empty());
}

/// A book in which only rearming happens.
#[derive(Default)]
struct Rearmed(Mutex<Vec<(u64, Vec<u64>)>>);

impl DirtyLog for Rearmed {
    fn start(&self) -> Result<(), DirtyLogError> {
        Ok(())
    }

    fn peek(&self, _: &mut PageBitmap) -> Result<(), DirtyLogError> {
        Ok(())
    }

    fn rearm(&self, first: PageIndex, words: &[u64]) -> Result<(), DirtyLogError> {
        self.0.lock().unwrap().push((first.0, words.iter().copied().take_while(|word| *word != 0).collect()));
        Ok(())
    }

    fn stop(&self) {}
}

#[test]
fn each_page_of_the_moment_is_rearmed_once_and_before_it_can_be_written() {
    let ram = Ram::new(PAGES).unwrap();
    let log = Arc::new(Rearmed::default());
    let snapshot = match Snapshot::begin(&ram, Some(Arc::clone(&log) as _)) {
        Ok(snapshot) => snapshot,
        Err(error) => {
            return println!("SKIP each_page_of_the_moment_is_rearmed_once_and_before_it_can_be_written: {error}");
        }
    };
    let mut which = PageBitmap::new(PAGES);
    (70..73).for_each(|page| assert!(which.insert(PageIndex(page))));
    snapshot.protect(&which).unwrap();
    fill(&ram, 70, 1);
    assert!(log.0.lock().unwrap().is_empty(), "before the moment its note is what tells of it");
    snapshot.take(&which).unwrap();
    fill(&ram, 71, 1);
    assert_eq!(*log.0.lock().unwrap(), [(64, vec![1 << 7])]);
    let mut bytes = [0; 4 * PAGE_SIZE];
    snapshot.read(PageIndex(69), &mut bytes).unwrap();
    assert_eq!(log.0.lock().unwrap()[1..], [(64, vec![1 << 6 | 1 << 8])], "what was written since stays noted");
    snapshot.read(PageIndex(69), &mut bytes).unwrap();
    fill(&ram, 72, 1);
    assert_eq!(log.0.lock().unwrap().len(), 2);
    snapshot.end().unwrap();
}
