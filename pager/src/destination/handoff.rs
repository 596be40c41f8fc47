//! The moment at which pre-copy's pages become the guest's.
//!
//! Before it, pages come and are replaced by newer versions, and nobody runs on them. At it, the source says which pages it
//! will send once more: those are forgotten, whatever has come of them. Everything else is the guest's from then on, and
//! is written no more.
//!
//! A lane looks at the phase under the lock when it claims a frame's pages, and again when they have landed: a frame of
//! pre-copy that is still landing at the handoff makes nothing present. The fault thread never takes this lock.

use std::num::NonZero;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use switchover_wire::types::{PageCount, PageIndex};

use super::{DestinationPagerError, Shared};
use crate::runs::runs;
use crate::state::PageStates;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// Before or after the handoff.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Phase {
    /// The guest runs on the source.
    #[default]
    Precopy,
    /// What is here belongs to the guest.
    Postcopy,
}

/// What the pager's threads wait for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stage {
    /// Before or after the handoff.
    pub phase: Phase,
    /// The round of pre-copy, counted from 1; 0 before the first.
    pub round: u32,
    /// The guest runs: what is here may be mapped.
    pub map_the_rest: bool,
    /// Nothing is to be mapped ahead any more.
    pub mapping_over: bool,
    /// The pager ends.
    pub stopping: bool,
}

/// The phase, and who waits for the next.
#[derive(Debug, Default)]
pub struct Handoff {
    stage: Mutex<Stage>,
    changed: Condvar,
    /// The handoff has begun: whoever works ahead of it stops at once.
    begun: AtomicBool,
}

impl Handoff {
    /// The phase, held still for as long as the guard lives. Not held across a system call.
    pub fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, or until the pager ends; says how things stand then.
    pub fn wait_until(&self, done: impl Fn(&Stage) -> bool) -> Stage {
        let stage = self.changed.wait_while(self.stage(), |stage| !stage.stopping && !done(stage));
        *stage.unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the handoff has begun.
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Whether the handoff was made.
    pub fn is_over(&self) -> bool {
        self.stage().phase == Phase::Postcopy
    }

    pub fn begin_round(&self, round: u32) {
        self.change(|stage| stage.round = round);
    }

    pub fn map_the_rest(&self) {
        self.change(|stage| stage.map_the_rest = true);
    }

    pub fn end_mapping(&self) {
        self.change(|stage| stage.mapping_over = true);
    }

    pub fn stop(&self) {
        self.change(|stage| stage.stopping = true);
    }

    /// Forgets what must come again, and lets the phase after the handoff begin. `absent` counts the pages that are not here.
    fn cross(
        &self,
        states: &PageStates,
        absent: &AtomicU64,
        missing: &[u64],
    ) -> Result<Crossed, DestinationPagerError> {
        let mut stage = self.stage();
        if stage.phase == Phase::Postcopy {
            return Err(DestinationPagerError::HandedOver);
        }
        let missing_before = absent.load(Ordering::Acquire);
        let to_come = within(missing, states.pages()).map(|(_, mask)| u64::from(mask.count_ones())).sum::<u64>();
        // Where nothing has come there is nothing to forget, and no table to look it up in: the guest stands still.
        let forgotten = if missing_before == states.pages().0 { 0 } else { came_of(missing, states) };
        let needed = missing_before + forgotten;
        if needed != to_come {
            return Err(DestinationPagerError::Forgotten { missing: to_come, absent: needed });
        }
        if forgotten > 0 {
            for (word, (_, mask)) in within(missing, states.pages()).enumerate() {
                states.forget(word, mask);
            }
            absent.fetch_add(forgotten, Ordering::AcqRel);
        }
        stage.phase = Phase::Postcopy;
        drop(stage);
        self.changed.notify_all();
        Ok(Crossed { to_come, nothing_came: missing_before == states.pages().0 })
    }

    fn change(&self, change: impl FnOnce(&mut Stage)) {
        change(&mut self.stage());
        self.changed.notify_all();
    }
}

/// What was found at the handoff.
#[derive(Clone, Copy, Debug)]
struct Crossed {
    /// How many pages are to come.
    to_come: u64,
    /// No page had come before.
    nothing_came: bool,
}

/// How many pages of `missing` are here in an older version.
fn came_of(missing: &[u64], states: &PageStates) -> u64 {
    let words = within(missing, states.pages()).enumerate();
    words.map(|(word, (_, mask))| u64::from((states.came_early(word) & mask).count_ones())).sum()
}

/// See [`super::DestinationPager::hand_over`]. Costs the bitmap's walk, word by word, and something for each page that was
/// mapped too early.
pub fn hand_over(shared: &Shared, missing: &[u64]) -> Result<(), DestinationPagerError> {
    // The guest stands still: the mapper must neither take the lock again, nor a processor.
    shared.handoff.begun.store(true, Ordering::Release);
    // First this one: the mapper must not map what is about to be forgotten.
    let mapped = shared.ahead.hold();
    let Crossed { to_come, nothing_came } = shared.handoff.cross(&shared.states, &shared.missing, missing)?;
    if shared.digest.is_some() {
        digest_kept(shared, missing);
    }
    shared.counts.kept.store(shared.states.pages().0 - to_come, Ordering::Relaxed);
    // What is mapped would be read, old as it is. Nobody runs or loads a state before this returns. A lane that brings a new
    // version meanwhile may see it unmapped again: then a fault finds it here and maps it.
    // With nothing here and nothing mapped there is nothing to note, and the guest stands still.
    if !nothing_came || mapped.any() {
        for (first, mask) in within(missing, shared.states.pages()) {
            shared.ahead.leave_for_later(first / 64, !mask);
            for (bit, count) in runs(mask & mapped.word(first / 64)) {
                shared.watch.unmap(PageIndex(first + u64::from(bit)), PageCount(u64::from(count)))?;
            }
        }
    }
    drop(mapped);
    if to_come == 0 {
        (shared.notify)(crate::lane::PagerEvent::Complete);
    }
    Ok(())
}

/// Digests what is here, with as many threads as there are processors: the guest stands still.
fn digest_kept(shared: &Shared, missing: &[u64]) {
    let words: Vec<_> = within(missing, shared.states.pages()).collect();
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let digest = |(first, missing): (u64, u64)| {
        let pages = 64.min(shared.states.pages().0 - first);
        for page in (0..pages).filter(|bit| missing >> bit & 1 == 0).map(|bit| PageIndex(first + bit)) {
            if shared.stains.has(page) {
                shared.digest(page);
            } else if let Some(digest) = &shared.digest {
                // It came as zero, and nobody has ever written it.
                digest.add_zero(page);
            }
        }
    };
    thread::scope(|scope| {
        let mut parts = words.chunks(words.len().div_ceil(threads).max(1));
        let own = parts.next();
        for part in parts {
            let all = move || part.iter().copied().for_each(digest);
            if thread::Builder::new().spawn_scoped(scope, all).is_err() {
                all();
            }
        }
        own.into_iter().flatten().copied().for_each(digest);
    });
}

/// The words of a set of pages, each with its first page, without bits past the end of RAM.
fn within(words: &[u64], pages: PageCount) -> impl Iterator<Item = (u64, u64)> {
    (0..pages.0).step_by(64).zip(words).map(move |(first, word)| {
        let left = pages.0 - first;
        (first, if left >= 64 { *word } else { *word & ((1 << left) - 1) })
    })
}

#[cfg(test)]
#[cfg(feature = "loom")]
mod models;
