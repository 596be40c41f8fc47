//! The state of every page on the destination: the single arbiter of who may write it and what a fault means.
//!
//! ```text
//!             ask                claim(lane)               arrived
//!   Absent ────────▶ Requested ────────────▶ Landing(lane) ────────▶ Present
//!     │ │                 │                      │
//!     │ └─────────────────┼── claim(lane) ──────▶┤ release (the lane died) ──▶ Absent
//!     └── claim_zero ─────┴─▶ Zero
//!   any ── remove ──▶ Removed
//!
//!   before the handoff, while nobody runs on this memory:
//!   Absent, Early ── reclaim(lane) ──▶ Landing(lane) ── version_arrived ──▶ Early
//!   at the handoff, each page that came early is what it came as, Zero or Present, or Absent if it must come again
//! ```
//!
//! The handoff changes no page's byte, for it must not take longer for a larger guest: it notes in a bitmap which pages must
//! come again, and from then on that bitmap says what `Early` means.
//!
//! All changes are compare-and-exchanges on one byte a page, so that the fault thread and the bulk lanes need no
//! lock between them. The rule that keeps the guest's writes safe: *a byte of a page's alias is written only
//! between a won claim and `arrived`*. Once a page is `Present` the guest may have written it, and nothing in the
//! kernel would stop a late copy from overwriting that.

use switchover_wire::types::{PageCount, PageIndex};

use crate::sync::{AtomicU8, AtomicU64, Ordering};
use crate::words::{bits_for, bytes_for};

const ABSENT: u8 = 0;
const REQUESTED: u8 = 1;
const ZERO: u8 = 2;
const PRESENT: u8 = 3;
const REMOVED: u8 = 4;
/// Came before the handoff, with its bytes or as zero.
const EARLY: u8 = 5;
const EARLY_ZERO: u8 = 6;
/// Set in every landing state; the low bits then hold the lane's tag.
const LANDING: u8 = 0x80;
/// Set beside [`LANDING`] when a fault has come for the page meanwhile: somebody sleeps until it is mapped.
const WANTED: u8 = 0x40;
const TAG_MASK: u8 = 0x3f;

/// The name under which a lane claims pages: its number among all lanes that carry pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneTag(u8);

impl LaneTag {
    /// How many lanes can carry pages in one session.
    pub const LIMIT: u8 = TAG_MASK + 1;

    /// The first of them.
    pub const FIRST: Self = Self(0);

    /// The tag of lane `number`, or `None` where there are too many.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if number < Self::LIMIT { Some(Self(number)) } else { None }
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }
}

/// What a fault on a page calls for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultVerdict {
    /// Nobody has it yet: ask the source. The page is `Requested` now, and this caller must ask.
    Ask,
    /// It was asked for already; its arrival wakes this fault too.
    AlreadyAsked,
    /// A lane is receiving it; its placement wakes this fault too.
    Landing,
    /// Its bytes are here: map it.
    Map,
    /// It is zero, and may have no memory behind it yet: map it, or a zero page.
    MapZero,
}

/// Whether a claim was won.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// The claimant, and nobody else, may write the page. `wanted`: a fault waits for it.
    Won {
        /// A fault waits for this page.
        wanted: bool,
    },
    /// The page is here, landing from elsewhere, or removed: its bytes must go elsewhere.
    Lost,
}

/// What became of a page whose last byte has landed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrival {
    /// It is `Present`, and must be mapped now. `wanted`: a fault came for it while it was landing.
    Present {
        /// A fault waits for this page.
        wanted: bool,
    },
    /// It was removed meanwhile: what landed must be wiped out, and it must not be mapped.
    Removed,
}

/// One state a page of RAM.
#[derive(Debug)]
pub struct PageStates {
    states: Box<[AtomicU8]>,
    /// A bit a page: it came before the handoff. Changed only while the handoff is held still.
    early: Box<[AtomicU64]>,
    /// A bit a page: what came before the handoff counts for nothing. Set once, at the handoff.
    outdated: Box<[AtomicU64]>,
}

impl PageStates {
    /// All pages absent.
    ///
    /// # Panics
    /// When RAM has more pages than this machine's address space has bytes, which no mapped RAM has.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        const { assert!(ABSENT == 0) };
        Self { states: bytes_for(pages.0), early: bits_for(pages.0), outdated: bits_for(pages.0) }
    }

    /// The number of pages.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        PageCount(self.states.len() as u64)
    }

    /// A fault has come for `page`.
    pub fn fault(&self, page: PageIndex) -> FaultVerdict {
        let state = self.slot(page);
        let mut current = state.load(Ordering::Acquire);
        loop {
            let (next, verdict) = match self.meaning(page, current) {
                ABSENT => (REQUESTED, FaultVerdict::Ask),
                REQUESTED => return FaultVerdict::AlreadyAsked,
                ZERO | REMOVED => return FaultVerdict::MapZero,
                PRESENT => return FaultVerdict::Map,
                landing if landing & WANTED != 0 => return FaultVerdict::Landing,
                landing => (landing | WANTED, FaultVerdict::Landing),
            };
            match state.compare_exchange_weak(current, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return verdict,
                Err(now) => current = now,
            }
        }
    }

    /// `lane` is about to receive `page`'s bytes.
    pub fn claim(&self, page: PageIndex, lane: LaneTag) -> Claim {
        self.claim_as(page, |wanted| LANDING | lane.0 | if wanted { WANTED } else { 0 })
    }

    /// The source says that `page` is zero.
    pub fn claim_zero(&self, page: PageIndex) -> Claim {
        self.claim_as(page, |_| ZERO)
    }

    /// `lane` is about to receive a version of `page` while the guest still runs on the source: a page that is here gives
    /// way to a newer one. Says whether one was here; `None` where the page is landing, asked for or removed, which before
    /// the handoff only a source brings about that sends two versions at once.
    ///
    /// Only before the handoff: afterwards the guest may have written what is here.
    pub fn reclaim(&self, page: PageIndex, lane: LaneTag) -> Option<bool> {
        let state = self.slot(page);
        let mut current = state.load(Ordering::Acquire);
        loop {
            let resident = match current {
                ABSENT => false,
                EARLY | EARLY_ZERO => true,
                _ => return None,
            };
            match state.compare_exchange_weak(current, LANDING | lane.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    self.early(page).fetch_and(!bit(page), Ordering::Relaxed);
                    return Some(resident);
                }
                Err(now) => current = now,
            }
        }
    }

    /// A version of `page`, which `lane` had [reclaimed](Self::reclaim), is here: its last byte has landed, or it is `zero`
    /// and what had landed before is wiped out. Only before the handoff.
    pub fn version_arrived(&self, page: PageIndex, lane: LaneTag, zero: bool) {
        let arrived = if zero { EARLY_ZERO } else { EARLY };
        let state = self.slot(page);
        let mut current = state.load(Ordering::Acquire);
        while Self::is_landing_from(current, lane) {
            match state.compare_exchange_weak(current, arrived, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    self.early(page).fetch_or(bit(page), Ordering::Relaxed);
                    return;
                }
                Err(now) => current = now,
            }
        }
        debug_assert!(false, "before the handoff only its lane changes a landing page");
    }

    /// Which of the 64 pages from `64 · word` on came before the handoff, a bit each.
    #[must_use]
    pub fn came_early(&self, word: usize) -> u64 {
        self.early.get(word).map_or(0, |early| early.load(Ordering::Relaxed))
    }

    /// The handoff: what is here of the pages of `mask` (bit i: page `64 · word + i`) is an old version, or may be, and they
    /// must come again. Says which of them were here. One that is landing is left to its lane, which
    /// [releases](Self::release) it.
    ///
    /// Nobody [reclaims](Self::reclaim) or lets a version [arrive](Self::version_arrived) meanwhile or afterwards.
    pub fn forget(&self, word: usize, mask: u64) -> u64 {
        let (Some(early), Some(outdated)) = (self.early.get(word), self.outdated.get(word)) else { return 0 };
        let here = early.load(Ordering::Relaxed) & mask;
        // Where nothing was here nothing is outdated, and memory that need not be written is not.
        if here != 0 {
            outdated.store(here, Ordering::Release);
        }
        here
    }

    /// The last byte of `page`, which `lane` had claimed, has landed. Called before it is mapped: a fault that is
    /// read from now on maps it itself, and one read earlier is woken by the mapping.
    pub fn arrived(&self, page: PageIndex, lane: LaneTag) -> Arrival {
        let state = self.slot(page);
        let mut current = state.load(Ordering::Acquire);
        loop {
            if !Self::is_landing_from(current, lane) {
                debug_assert_eq!(current, REMOVED, "only a removal takes a claimed page from its lane");
                return Arrival::Removed;
            }
            match state.compare_exchange_weak(current, PRESENT, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Arrival::Present { wanted: current & WANTED != 0 },
                Err(now) => current = now,
            }
        }
    }

    /// `lane` died while it was receiving `page`, or what it received is too old to count. Says whether a fault waits for the page, which must then be asked
    /// for elsewhere.
    pub fn release(&self, page: PageIndex, lane: LaneTag) -> bool {
        let state = self.slot(page);
        let mut current = state.load(Ordering::Acquire);
        loop {
            if !Self::is_landing_from(current, lane) {
                return false;
            }
            match state.compare_exchange_weak(current, ABSENT, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return current & WANTED != 0,
                Err(now) => current = now,
            }
        }
    }

    /// The guest gave `page` back: it reads as zero ever after, whatever still arrives for it. Says whether it
    /// was resident before.
    pub fn remove(&self, page: PageIndex) -> bool {
        let before = self.slot(page).swap(REMOVED, Ordering::AcqRel);
        matches!(self.meaning(page, before), PRESENT | ZERO | REMOVED)
    }

    /// Whether nobody has sent, asked for or received `page` yet.
    #[must_use]
    pub fn is_absent(&self, page: PageIndex) -> bool {
        self.state(page) == ABSENT
    }

    /// Whether `page` was asked for, and nothing of it has come yet.
    #[must_use]
    pub fn is_requested(&self, page: PageIndex) -> bool {
        self.state(page) == REQUESTED
    }

    /// Whether `page` is here with its bytes.
    #[must_use]
    pub fn is_present(&self, page: PageIndex) -> bool {
        self.state(page) == PRESENT
    }

    /// Whether `page` needs nothing any more.
    #[must_use]
    pub fn is_resident(&self, page: PageIndex) -> bool {
        matches!(self.state(page), PRESENT | ZERO | REMOVED)
    }

    fn claim_as(&self, page: PageIndex, claimed: impl Fn(bool) -> u8) -> Claim {
        let state = self.slot(page);
        let mut current = state.load(Ordering::Acquire);
        loop {
            let wanted = match self.meaning(page, current) {
                ABSENT => false,
                REQUESTED => true,
                _ => return Claim::Lost,
            };
            match state.compare_exchange_weak(current, claimed(wanted), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Claim::Won { wanted },
                Err(now) => current = now,
            }
        }
    }

    const fn is_landing_from(state: u8, lane: LaneTag) -> bool {
        state & LANDING != 0 && state & TAG_MASK == lane.0
    }

    fn state(&self, page: PageIndex) -> u8 {
        self.meaning(page, self.slot(page).load(Ordering::Acquire))
    }

    /// What a page's byte means: one that came early is what it came as, unless the handoff has made it outdated.
    fn meaning(&self, page: PageIndex, state: u8) -> u8 {
        let outdated = || self.outdated[word(page)].load(Ordering::Acquire) & bit(page) != 0;
        match state {
            EARLY | EARLY_ZERO if outdated() => ABSENT,
            EARLY => PRESENT,
            EARLY_ZERO => ZERO,
            state => state,
        }
    }

    fn early(&self, page: PageIndex) -> &AtomicU64 {
        &self.early[word(page)]
    }

    /// Frames and fault addresses are checked against the RAM's size before a page index is made of them, so an
    /// index past the end is a bug of ours; the slice's own bounds check stops it.
    fn slot(&self, page: PageIndex) -> &AtomicU8 {
        &self.states[usize::try_from(page.0).unwrap_or(usize::MAX)]
    }
}

/// Which word of a bitmap holds a page's bit.
fn word(page: PageIndex) -> usize {
    usize::try_from(page.0 / 64).unwrap_or(usize::MAX)
}

/// A page's bit in its word.
const fn bit(page: PageIndex) -> u64 {
    1 << (page.0 % 64)
}

#[cfg(test)]
#[cfg(feature = "loom")]
mod models;

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;

    const LANE: LaneTag = LaneTag::FIRST;

    fn bring(states: &PageStates, page: PageIndex, zero: bool) {
        assert!(states.reclaim(page, LANE).is_some());
        states.version_arrived(page, LANE, zero);
    }

    #[test]
    fn what_came_early_stays_unless_it_must_come_again() {
        let states = PageStates::new(PageCount(70));
        let pages = [PageIndex(0), PageIndex(1), PageIndex(64), PageIndex(65)];
        pages.iter().for_each(|page| bring(&states, *page, page.0 % 2 == 1));
        assert_eq!(states.forget(0, 0b110), 0b10, "page 2 never came");
        assert_eq!(states.forget(1, 0b01), 0b01);
        let resident: Vec<bool> = pages.iter().map(|page| states.is_resident(*page)).collect();
        assert_eq!(resident, [true, false, false, true]);
        assert_eq!(states.fault(pages[0]), FaultVerdict::Map);
        assert_eq!(states.fault(pages[1]), FaultVerdict::Ask);
        assert_eq!(states.fault(pages[3]), FaultVerdict::MapZero);
        assert_eq!(states.claim(pages[0], LANE), Claim::Lost);
        assert_eq!(states.claim(pages[2], LANE), Claim::Won { wanted: false });
        assert_eq!(states.arrived(pages[2], LANE), Arrival::Present { wanted: false });
        assert_eq!(states.fault(pages[2]), FaultVerdict::Map, "what came after the handoff is never outdated");
    }

    #[test]
    fn a_version_that_is_replaced_counts_as_gone_meanwhile() {
        let states = PageStates::new(PageCount(1));
        bring(&states, PageIndex(0), false);
        assert_eq!(states.reclaim(PageIndex(0), LANE), Some(true));
        assert_eq!(states.forget(0, 1), 0);
        assert!(!states.release(PageIndex(0), LANE));
        assert!(states.is_absent(PageIndex(0)));
    }
}
