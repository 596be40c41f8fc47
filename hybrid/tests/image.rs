//! A machine without KVM, saved into an image and restored from it.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use switchover_hybrid::failure::{FailureKind, GuestAfter};
use switchover_hybrid::fake::FakeMachine;
use switchover_hybrid::machine::Machine;
use switchover_hybrid::restoring::Restoring;
use switchover_hybrid::saving::{How, Saving};
use switchover_hybrid::settings::{Notice, no_observer};
use switchover_hybrid::status::MigrationStatus;
use switchover_image::Tally;
use switchover_image::folder::FolderLock;
use switchover_image::merge::prune;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

const PAGES: PageCount = PageCount(4096);
const PATIENCE: Duration = Duration::from_secs(60);

fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < deadline, "never came: {what}");
        thread::yield_now();
    }
}

fn busy() -> Arc<FakeMachine> {
    let machine = FakeMachine::new(PAGES).unwrap();
    machine.resume().unwrap();
    until("the guest has worked", || machine.visits() > 2_000);
    machine
}

fn save(machine: &Arc<FakeMachine>, path: &Path, how: How) -> Saving {
    let saving = Saving::start(Arc::<FakeMachine>::clone(machine), path, how, no_observer()).unwrap();
    assert_eq!(saving.wait(), MigrationStatus::Completed, "{:?}", saving.progress().error);
    saving
}

fn page(machine: &FakeMachine, index: u64) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    assert!(machine.ram().copy_page(PageIndex(index), &mut bytes));
    bytes
}

#[test]
fn a_guest_goes_on_from_its_image_and_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    for how in [How::default(), How { compress: true, live: false }] {
        let (path, here) = (folder.path().join("image"), busy());
        let progress = save(&here, &path, how).progress();
        assert_eq!((progress.remaining, progress.zero_pages + progress.normal_pages), (0, PAGES.0));
        assert!(progress.normal_pages > 0 && progress.transferred > 0);
        assert!(!here.runs(), "a saved guest stands still");
        let visits = here.visits();

        let there = FakeMachine::incoming(PAGES).unwrap();
        there.freeze();
        let restoring = Restoring::start(Arc::<FakeMachine>::clone(&there), &path, no_observer()).unwrap();
        assert_eq!(restoring.wait(), MigrationStatus::Completed, "{:?}", restoring.progress().error);
        assert_eq!((there.visits(), there.runs()), (visits, true));
        assert!((0..PAGES.0).all(|index| page(&here, index) == page(&there, index)), "memory differs");

        here.resume().unwrap();
        until("it goes on", || here.visits() > visits + 100);
        assert_eq!(here.corrupt_visits(), 0);
    }
}

#[test]
fn a_live_save_leaves_the_guest_running_and_holds_one_moment_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let (path, here) = (folder.path().join("image"), busy());
    let saving = save(&here, &path, How { live: true, compress: false });
    assert!(here.runs(), "the guest was paused for a moment only");
    let progress = saving.progress();
    assert!(progress.rounds >= 1 && progress.downtime_ns.is_some(), "{progress:?}");
    let there = FakeMachine::incoming(PAGES).unwrap();
    let restoring = Restoring::start(Arc::<FakeMachine>::clone(&there), &path, no_observer()).unwrap();
    assert_eq!(restoring.wait(), MigrationStatus::Completed, "{:?}", restoring.progress().error);
    // A page that is older or newer than its state shows itself: the sum over all pages is the number of visits.
    there.pause().unwrap();
    let visits = there.visits();
    let counted: u64 =
        (0..PAGES.0).map(|index| u64::from(u32::from_le_bytes(*page(&there, index).first_chunk().unwrap()))).sum();
    assert_eq!(counted, visits);
    there.resume().unwrap();
    until("both go on", || there.visits() > visits + 100);
    assert_eq!((here.corrupt_visits(), there.corrupt_visits()), (0, 0));
}

/// That a page is older or newer than the state of its image shows itself: the sum over all pages is the number of visits.
fn holds_one_moment(path: &Path) -> u64 {
    let there = FakeMachine::incoming(PAGES).unwrap();
    there.freeze();
    let restoring = Restoring::start(Arc::<FakeMachine>::clone(&there), path, no_observer()).unwrap();
    assert_eq!(restoring.wait(), MigrationStatus::Completed, "{:?}", restoring.progress().error);
    there.pause().unwrap();
    let visits = |index| u64::from(u32::from_le_bytes(*page(&there, index).first_chunk().unwrap()));
    let counted: u64 = (0..PAGES.0).map(visits).sum();
    assert_eq!(counted, there.visits(), "{}", path.display());
    counted
}

#[test]
fn each_checkpoint_of_a_series_holds_one_moment_and_no_more_than_was_written_since() {
    let folder = tempfile::tempdir().unwrap();
    let here = busy();
    let path = |number: u32| folder.path().join(format!("{number}.image"));
    let (mut base, mut paths, mut visits) = (None, Vec::new(), Vec::new());
    for number in 0..6 {
        let machine: Arc<FakeMachine> = Arc::clone(&here);
        let saving = Saving::checkpoint(machine, &path(number), base.take(), no_observer()).unwrap();
        assert_eq!(saving.wait(), MigrationStatus::Completed, "{:?}", saving.progress().error);
        assert!(here.runs());
        base = saving.series();
        assert_eq!(base.as_ref().unwrap().name, format!("{number}.image"));
        paths.push(path(number));
        visits.push(holds_one_moment(&path(number)));
        let seen = here.visits();
        until("it writes on", || here.visits() > seen + 20);
    }
    assert!(visits.is_sorted_by(|a, b| a < b), "{visits:?}");
    // All of them still, and when some are gone.
    paths.iter().zip(&visits).for_each(|(path, visits)| assert_eq!(holds_one_moment(path), *visits));
    prune(&FolderLock::exclusive(&paths[0]).unwrap(), &mut paths, 3, &Tally::default()).unwrap();
    paths.iter().zip(&visits[3..]).for_each(|(path, visits)| assert_eq!(holds_one_moment(path), *visits));
    assert_eq!(here.corrupt_visits(), 0);
}

#[test]
fn a_checkpoint_that_fails_ends_its_series() {
    let folder = tempfile::tempdir().unwrap();
    let here = busy();
    let take = |base, name: &str| {
        let saving =
            Saving::checkpoint(Arc::<FakeMachine>::clone(&here), &folder.path().join(name), base, no_observer());
        let saving = saving.unwrap();
        let status = saving.wait();
        (saving, status)
    };
    let (first, status) = take(None, "1");
    assert_eq!(status, MigrationStatus::Completed);
    let base = first.series();
    first.end_series();
    assert_eq!(first.series(), None, "somebody else needed the book");
    let saving =
        Saving::checkpoint(Arc::<FakeMachine>::clone(&here), &folder.path().join("2"), base, no_observer()).unwrap();
    saving.cancel();
    let status = saving.wait();
    assert!(matches!(status, MigrationStatus::Cancelled | MigrationStatus::Completed), "{status}");
    assert_eq!(saving.series().is_some(), status == MigrationStatus::Completed);
}

#[test]
fn one_that_was_paused_by_its_user_is_restored_paused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, here) = (folder.path().join("image"), busy());
    here.pause().unwrap();
    save(&here, &path, How::default());
    let there = FakeMachine::incoming(PAGES).unwrap();
    let restoring = Restoring::start(Arc::<FakeMachine>::clone(&there), &path, no_observer()).unwrap();
    assert_eq!(restoring.wait(), MigrationStatus::Completed);
    assert!(!there.runs());
    there.resume().unwrap();
}

#[test]
fn what_cannot_be_restored_is_refused_before_anything_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let (path, here) = (folder.path().join("image"), busy());
    save(&here, &path, How::default());
    let refusal = |machine: Arc<FakeMachine>| {
        Restoring::start(machine, &path, no_observer()).err().map(|error| error.to_string()).unwrap()
    };
    let smaller = refusal(FakeMachine::incoming(PageCount(PAGES.0 / 2)).unwrap());
    assert!(smaller.contains("the machines differ") && smaller.contains("nothing was touched"), "{smaller}");

    // A damaged chunk is found when it is read: the guest does not start.
    let mut bytes = fs::read(&path).unwrap();
    bytes[2 * PAGE_SIZE] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let there = FakeMachine::incoming(PAGES).unwrap();
    let restoring = Restoring::start(Arc::<FakeMachine>::clone(&there), &path, no_observer()).unwrap();
    assert_eq!(restoring.wait(), MigrationStatus::Failed);
    let progress = restoring.progress();
    let failure = progress.failure.unwrap();
    assert_eq!((failure.kind, failure.guest), (FailureKind::Image, GuestAfter::InImage));
    assert!(progress.error.unwrap().contains("chunk 0 of memory"));
    assert!(!there.runs() && there.resume().is_err(), "it never gets the right to run");

    bytes[2 * PAGE_SIZE] ^= 1;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let altered = refusal(FakeMachine::incoming(PAGES).unwrap());
    assert!(altered.contains("root hash"), "{altered}");
}

#[test]
fn what_fails_or_is_called_off_leaves_a_running_guest_and_the_old_image() {
    let folder = tempfile::tempdir().unwrap();
    let (path, here) = (folder.path().join("image"), busy());
    let start = |path: &Path| Saving::start(Arc::<FakeMachine>::clone(&here), path, How::default(), no_observer());
    let refused = start(&folder.path().join("none/image")).err().unwrap().to_string();
    assert!(refused.contains("does the folder exist?") && here.runs(), "{refused}");

    fs::write(&path, "old").unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&told);
    let observer = Arc::new(move |notice| {
        if let Notice::Status(status) = notice {
            heard.lock().unwrap().push(status);
        }
    });
    let machine: Arc<dyn Machine> = Arc::<FakeMachine>::clone(&here);
    let saving = Saving::start(machine, &path, How::default(), observer).unwrap();
    saving.cancel();
    let ended = saving.wait();
    // It is called off long before the disk has it; on a host that stalls in between it may be done.
    if ended == MigrationStatus::Cancelled {
        assert!(here.runs() && fs::read(&path).unwrap() == b"old");
        use MigrationStatus::{Active, Cancelled, Cancelling, Setup};
        // Whoever waits may hear of the end before the observer does.
        until("the observer is told", || told.lock().unwrap().last() == Some(&Cancelled));
        assert_eq!(*told.lock().unwrap(), [Setup, Active, Cancelling, Cancelled]);
    } else {
        assert_eq!(ended, MigrationStatus::Completed);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "half an image is left behind");
}
