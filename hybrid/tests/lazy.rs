//! A machine without KVM whose guest runs before its memory is there: real userfaultfd, a made-up guest.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use switchover_hybrid::failure::{FailureKind, GuestAfter};
use switchover_hybrid::fake::FakeMachine;
use switchover_hybrid::lazy::Lazily;
use switchover_hybrid::machine::Machine;
use switchover_hybrid::restoring::Restoring;
use switchover_hybrid::saving::{How, Saving};
use switchover_hybrid::settings::no_observer;
use switchover_hybrid::status::MigrationStatus;
use switchover_image::reader::Image;
use switchover_image::working_set::WorkingSet;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};
use tempfile::TempDir;

use common::{until, userfaultfd_or_skip};

const PAGES: PageCount = PageCount(4096);
const ALONE: Lazily = Lazily { working_set: false };

/// An image of a guest that has been everywhere that it goes, and the guest.
fn saved(compress: bool) -> (TempDir, PathBuf, Arc<FakeMachine>) {
    let folder = tempfile::tempdir().unwrap();
    let (path, here) = (folder.path().join("image"), FakeMachine::new(PAGES).unwrap());
    here.resume().unwrap();
    until("the guest has worked", || here.visits() > 4_000);
    let machine: Arc<dyn Machine> = Arc::<FakeMachine>::clone(&here);
    let saving = Saving::start(machine, &path, How { compress, live: false }, no_observer()).unwrap();
    assert_eq!(saving.wait(), MigrationStatus::Completed, "{:?}", saving.progress().error);
    (folder, path, here)
}

fn lazily(machine: &Arc<FakeMachine>, path: &Path, how: Lazily) -> Restoring {
    Restoring::start_lazily(Arc::<FakeMachine>::clone(machine), path, how, no_observer()).unwrap()
}

fn page(machine: &FakeMachine, index: u64) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    assert!(machine.ram().copy_page(PageIndex(index), &mut bytes));
    bytes
}

/// Visits by the pages themselves: each counts its own.
fn counted(machine: &FakeMachine) -> u64 {
    (0..PAGES.0).map(|index| u64::from(u32::from_le_bytes(*page(machine, index).first_chunk().unwrap()))).sum()
}

fn recorded(path: &Path) -> Option<WorkingSet> {
    WorkingSet::beside(&Image::open(path).unwrap())
}

#[test]
fn memory_comes_as_it_was_saved() {
    if !userfaultfd_or_skip("memory_comes_as_it_was_saved") {
        return;
    }
    for compress in [false, true] {
        let (_folder, path, here) = saved(compress);
        let there = FakeMachine::incoming(PAGES).unwrap();
        there.freeze();
        let restoring = lazily(&there, &path, ALONE);
        assert_eq!(restoring.wait(), MigrationStatus::Completed, "{:?}", restoring.progress().error);
        let progress = restoring.progress();
        assert_eq!((progress.remaining, progress.zero_pages + progress.normal_pages), (0, PAGES.0), "{progress:?}");
        assert_eq!((there.visits(), there.runs()), (here.visits(), true));
        assert!((0..PAGES.0).all(|index| page(&here, index) == page(&there, index)), "memory differs");
        assert_eq!(recorded(&path), None, "it was told to keep none");
    }
}

#[test]
fn what_is_touched_first_is_recorded_and_brought_first() {
    if !userfaultfd_or_skip("what_is_touched_first_is_recorded_and_brought_first") {
        return;
    }
    for compress in [false, true] {
        let (_folder, path, here) = saved(compress);
        let mut faults = Vec::new();
        for restore in 0..3 {
            let there = FakeMachine::incoming(PAGES).unwrap();
            let restoring = lazily(&there, &path, Lazily::default());
            until("the guest works while its memory comes", || there.visits() > here.visits() + 1_000);
            assert_eq!(restoring.wait(), MigrationStatus::Completed, "{:?}", restoring.progress().error);
            there.pause().unwrap();
            // Nothing is older or newer than the state: all that was visited, before and since, is in the pages.
            assert_eq!((there.corrupt_visits(), counted(&there)), (0, there.visits()), "restore {restore}");
            let set = recorded(&path).unwrap();
            assert!(set.pages().len() > 200, "{}", set.pages().len());
            let report = restoring.report();
            let pages = report.pages.unwrap();
            assert_eq!(pages.zero + pages.pushed + pages.requested, PAGES.0);
            let (commit, entry) = (report.instants.commit_ns.unwrap(), report.instants.first_entry_ns.unwrap());
            assert!(commit <= entry);
            if restore == 0 {
                assert!(commit <= report.instants.last_page_ns.unwrap(), "it was to run before all was here");
            }
            let seen = report.faults.unwrap();
            faults.push(seen.remote + seen.raced + seen.joined + seen.local);
        }
        assert!(faults[1] * 4 < faults[0], "faults of restores one after the other: {faults:?}");
    }
}

#[test]
fn two_guests_come_of_one_image_at_once() {
    if !userfaultfd_or_skip("two_guests_come_of_one_image_at_once") {
        return;
    }
    let (_folder, path, here) = saved(false);
    let both = [(); 2].map(|()| FakeMachine::incoming(PAGES).unwrap());
    let restoring = both.each_ref().map(|machine| lazily(machine, &path, Lazily::default()));
    for (there, restoring) in both.iter().zip(&restoring) {
        assert_eq!(restoring.wait(), MigrationStatus::Completed, "{:?}", restoring.progress().error);
        until("it works", || there.visits() > here.visits() + 1_000);
        there.pause().unwrap();
        assert_eq!((there.corrupt_visits(), counted(there)), (0, there.visits()));
    }
    assert!(recorded(&path).is_some());
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 2, "image and working set, and nothing else");
}

#[test]
fn a_damaged_chunk_stops_the_guest_with_a_reason() {
    if !userfaultfd_or_skip("a_damaged_chunk_stops_the_guest_with_a_reason") {
        return;
    }
    let (_folder, path, _here) = saved(false);
    // With a working set that tells the page's own hash, and without.
    let first = FakeMachine::incoming(PAGES).unwrap();
    assert_eq!(lazily(&first, &path, Lazily::default()).wait(), MigrationStatus::Completed);
    let hurt = recorded(&path).unwrap().pages()[0].page;
    damage(&path, hurt);
    for how in [ALONE, Lazily::default()] {
        let there = FakeMachine::incoming(PAGES).unwrap();
        let restoring = lazily(&there, &path, how);
        assert_eq!(restoring.wait(), MigrationStatus::Failed, "{how:?}");
        let progress = restoring.progress();
        let failure = progress.failure.unwrap();
        assert_eq!((failure.kind, failure.guest), (FailureKind::Image, GuestAfter::Lost));
        let chunk = format!("chunk {} of memory", hurt.0 / 256);
        let reason = progress.error.unwrap();
        assert!(reason.contains(&chunk) && reason.contains("in its image"), "{reason}");
        assert!(there.stopped().unwrap().contains(&chunk) && !there.runs());
        assert_eq!(there.corrupt_visits(), 0, "it was given a wrong page");
        assert!(page(&there, hurt.0) == [0; PAGE_SIZE], "the damaged page came into its memory");
    }
}

/// Alters a byte of `page`, which is not zero.
fn damage(path: &Path, page: PageIndex) {
    let mut bytes = fs::read(path).unwrap();
    bytes[usize::try_from(page.0).unwrap() * PAGE_SIZE + PAGE_SIZE + 8] ^= 1;
    fs::write(path, &bytes).unwrap();
}

#[test]
fn a_damaged_chunk_that_the_state_needs_fails_before_the_guest_runs() {
    if !userfaultfd_or_skip("a_damaged_chunk_that_the_state_needs_fails_before_the_guest_runs") {
        return;
    }
    let (_folder, path, here) = saved(false);
    let hurt = PageIndex((0..PAGES.0).find(|index| page(&here, *index) != [0; PAGE_SIZE]).unwrap());
    damage(&path, hurt);
    let there = FakeMachine::incoming(PAGES).unwrap();
    there.touch_on_load(hurt);
    let restoring = lazily(&there, &path, ALONE);
    until("it has failed", || restoring.progress().failure.is_some());
    assert_eq!(restoring.wait(), MigrationStatus::Failed);
    let failure = restoring.progress().failure.unwrap();
    assert_eq!((failure.kind, failure.guest), (FailureKind::Image, GuestAfter::InImage));
    assert!(restoring.progress().error.unwrap().contains("chunk"));
    assert_eq!((there.first_entry(), there.stopped()), (None, None));
}

#[test]
fn a_working_set_that_is_none_changes_nothing() {
    if !userfaultfd_or_skip("a_working_set_that_is_none_changes_nothing") {
        return;
    }
    let (_folder, path, here) = saved(false);
    fs::write(WorkingSet::path_beside(&path), "no working set").unwrap();
    let there = FakeMachine::incoming(PAGES).unwrap();
    there.freeze();
    assert_eq!(lazily(&there, &path, ALONE).wait(), MigrationStatus::Completed);
    assert!((0..PAGES.0).all(|index| page(&here, index) == page(&there, index)), "memory differs");
    let again = FakeMachine::incoming(PAGES).unwrap();
    assert_eq!(lazily(&again, &path, Lazily::default()).wait(), MigrationStatus::Completed);
    assert!(recorded(&path).is_some(), "a whole one takes its place");
}

#[test]
fn one_that_was_paused_by_its_user_stays_paused() {
    if !userfaultfd_or_skip("one_that_was_paused_by_its_user_stays_paused") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (path, here) = (folder.path().join("image"), FakeMachine::new(PAGES).unwrap());
    let saving = Saving::start(Arc::<FakeMachine>::clone(&here), &path, How::default(), no_observer()).unwrap();
    assert_eq!(saving.wait(), MigrationStatus::Completed);
    let there = FakeMachine::incoming(PAGES).unwrap();
    assert_eq!(lazily(&there, &path, ALONE).wait(), MigrationStatus::Completed);
    assert!(!there.runs());
    there.resume().unwrap();
}
