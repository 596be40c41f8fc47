//! Mapping what is here before it is touched.
//!
//! A page that pre-copy brought lies in the file, not in the guest mapping: touching it would cost a fault, local but tens
//! of microseconds long. What has not come again for some rounds is mapped while the guest still runs on the source; the rest
//! of what is here, as soon as it runs on this side.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crossbeam::channel::{Receiver, Sender, unbounded};
use switchover_wire::types::{PageCount, PageIndex};

use super::Shared;
use super::handoff::Phase;
use crate::cpu;
use crate::runs::{bits, runs};
use crate::sync::{AtomicU8, AtomicU64, Ordering};
use crate::uffd::WatchError;
use crate::words::bits_for;

/// How many rounds a page must stay as it is to be mapped ahead. Unmapping one that was mapped too early costs the blackout
/// more than mapping a cold one saves, and what outlives two rounds seldom changes in the third.
const COLD_ROUNDS: u32 = 2;

/// Which pages are mapped ahead, and when each came last.
#[derive(Debug)]
pub struct MappedAhead {
    /// A bit a page.
    mapped: Box<[AtomicU64]>,
    /// A bit a page: here at the handoff.
    here: Box<[AtomicU64]>,
    /// The round in which each page came last, up to 255.
    rounds: Box<[AtomicU8]>,
    /// Whether anything was ever mapped.
    mapping: Mutex<bool>,
}

/// Zero pages that came after the handoff and that nobody waits for, until there is time to map them.
#[derive(Debug)]
pub struct UnmappedZeros {
    queue: Sender<(PageIndex, u64)>,
    taken: Receiver<(PageIndex, u64)>,
}

impl Default for UnmappedZeros {
    fn default() -> Self {
        let (queue, taken) = unbounded();
        Self { queue, taken }
    }
}

impl UnmappedZeros {
    /// The pages of `mask`, bit i being page `first + i`.
    pub fn push(&self, first: PageIndex, mask: u64) {
        // This object holds the other end itself.
        let _ = self.queue.send((first, mask));
    }

    /// Nothing more will come.
    pub fn stop(&self) {
        self.push(PageIndex(0), 0);
    }

    /// The next; none when nothing more will come.
    fn next(&self) -> Option<(PageIndex, u64)> {
        self.taken.recv().ok().filter(|(_, mask)| *mask != 0)
    }
}

/// Nobody maps ahead while this lives.
pub struct Held<'a> {
    mapped: &'a [AtomicU64],
    mapping: MutexGuard<'a, bool>,
}

impl MappedAhead {
    /// Nothing mapped.
    pub fn new(pages: PageCount) -> Self {
        Self {
            mapped: bits_for(pages.0),
            here: bits_for(pages.0),
            rounds: (0..pages.0).map(|_| AtomicU8::new(0)).collect(),
            mapping: Mutex::new(false),
        }
    }

    /// `page` has come in `round`.
    pub fn note(&self, page: PageIndex, round: u32) {
        if let Some(slot) = usize::try_from(page.0).ok().and_then(|index| self.rounds.get(index)) {
            slot.store(u8::try_from(round).unwrap_or(u8::MAX), Ordering::Relaxed);
        }
    }

    /// Keeps the mapper from mapping.
    pub fn hold(&self) -> Held<'_> {
        let mapping = self.mapping.lock().unwrap_or_else(PoisonError::into_inner);
        Held { mapped: &self.mapped, mapping }
    }

    /// These of the pages of word `index` are here at the handoff.
    pub fn leave_for_later(&self, index: u64, here: u64) {
        let word = usize::try_from(index).ok().and_then(|index| self.here.get(index));
        if let Some(word) = word.filter(|_| here != 0) {
            word.store(here, Ordering::Relaxed);
        }
    }

    fn round_of(&self, page: u64) -> u32 {
        let slot = usize::try_from(page).ok().and_then(|index| self.rounds.get(index));
        slot.map_or(u32::MAX, |round| u32::from(round.load(Ordering::Relaxed)))
    }
}

impl Held<'_> {
    /// Whether any page is mapped, or was.
    pub fn any(&self) -> bool {
        *self.mapping
    }

    /// Which pages of word `index` are mapped.
    pub fn word(&self, index: u64) -> u64 {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.mapped.get(index))
            .map_or(0, |word| word.load(Ordering::Relaxed))
    }
}

/// The mapper's thread: round by round, then once for the rest.
///
/// # Errors
/// When a page cannot be mapped.
pub fn run(shared: &Shared) -> Result<(), WatchError> {
    // What it does is worth something only where nobody needs the processor more, least of all a vCPU.
    cpu::yield_to_others();
    let mut seen = 0;
    loop {
        let stage = shared.handoff.wait_until(|stage| {
            stage.mapping_over || stage.map_the_rest || (stage.phase == Phase::Precopy && stage.round > seen)
        });
        if stage.mapping_over || stage.stopping {
            return Ok(());
        }
        if stage.map_the_rest {
            map_the_rest(shared)?;
            return map_zeros(shared);
        }
        seen = stage.round;
        map_cold(shared, seen)?;
    }
}

/// Maps what is cold in `round`, chunk by chunk, so that the handoff never waits for more than one.
fn map_cold(shared: &Shared, round: u32) -> Result<(), WatchError> {
    // The mark of a page's last round ends at 255: what came later would be taken for cold.
    if round <= COLD_ROUNDS || round > u32::from(u8::MAX) {
        return Ok(());
    }
    let pages = shared.states.pages().0;
    for (word, first) in shared.ahead.mapped.iter().zip((0..).step_by(64)) {
        if word.load(Ordering::Relaxed) == u64::MAX {
            continue;
        }
        if shared.handoff.has_begun() {
            return Ok(());
        }
        let mut held = shared.ahead.hold();
        {
            let stage = shared.handoff.stage();
            if stage.phase == Phase::Postcopy || stage.mapping_over {
                return Ok(());
            }
        }
        let is_cold = |page: u64| {
            shared.ahead.round_of(page).saturating_add(COLD_ROUNDS) < round && may_be_mapped(shared, PageIndex(page))
        };
        let cold = (first..pages.min(first + 64))
            .filter(|page| is_cold(*page))
            .fold(0, |mask, page| mask | 1 << (page - first));
        let cold = cold & !word.load(Ordering::Relaxed);
        // First: a page that is mapped and not known to be is not unmapped at the handoff, and would be read as it was. One that is
        // not mapped after all is unmapped in vain.
        word.fetch_or(cold, Ordering::Relaxed);
        *held.mapping |= cold != 0;
        for (bit, count) in runs(cold) {
            shared.watch.map(PageIndex(first + u64::from(bit)), PageCount(u64::from(count)), true)?;
        }
    }
    Ok(())
}

/// Maps what was here at the handoff. Faults that come first map their pages themselves.
fn map_the_rest(shared: &Shared) -> Result<(), WatchError> {
    let words = shared.ahead.mapped.iter().zip(&shared.ahead.here).zip((0..).step_by(64));
    for ((mapped, here), first) in words {
        if shared.handoff.stage().mapping_over {
            return Ok(());
        }
        let here = here.load(Ordering::Relaxed) & !mapped.load(Ordering::Relaxed);
        let may_be = |bit: &u32| {
            let page = first + u64::from(*bit);
            page < shared.states.pages().0 && may_be_mapped(shared, PageIndex(page))
        };
        let here = bits(here).filter(may_be).fold(0, |mask, bit| mask | 1 << bit);
        for (bit, count) in runs(here) {
            shared.watch.map(PageIndex(first + u64::from(bit)), PageCount(u64::from(count)), true)?;
        }
    }
    Ok(())
}

/// Maps zero pages as they come, while the processor is nobody else's: until memory is complete a guest that touches one loses a local
/// fault, and afterwards nothing.
fn map_zeros(shared: &Shared) -> Result<(), WatchError> {
    cpu::yield_to_all();
    while let Some((first, mask)) = shared.unmapped_zeros.next() {
        if shared.handoff.stage().mapping_over {
            return Ok(());
        }
        for (bit, count) in runs(mask) {
            shared.watch.map_zero(PageIndex(first.0 + u64::from(bit)), PageCount(u64::from(count)))?;
        }
    }
    Ok(())
}

/// Whether `page` is here, and has memory behind it: where that was not reserved, a zero page has none, and shall not get any
/// before it is touched.
fn may_be_mapped(shared: &Shared, page: PageIndex) -> bool {
    if shared.populated { shared.states.is_resident(page) } else { shared.states.is_present(page) }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;

    #[test]
    fn zeros_come_out_as_they_went_in_until_nothing_more_will_come() {
        let zeros = UnmappedZeros::default();
        zeros.push(PageIndex(64), 0b101);
        zeros.push(PageIndex(0), u64::MAX);
        zeros.stop();
        zeros.push(PageIndex(128), 1);
        assert_eq!(zeros.next(), Some((PageIndex(64), 0b101)));
        assert_eq!(zeros.next(), Some((PageIndex(0), u64::MAX)));
        assert_eq!(zeros.next(), None);
    }
}
