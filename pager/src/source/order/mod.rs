//! In which order pages are pushed: a pure policy, from what was sent and which faults came to what goes next.
//!
//! Nothing in here knows a clock, a socket or a thread. The live queue (`queue.rs`) asks it, and `switchover simulate
//! --faults` plays recorded faults through the very same code; docs/prefetch.md has the table that the default was chosen by.
//!
//! ```text
//!   hints (first pages, then heat) ─┐
//!   faults ─▶ streams (trend) ──────┼─▶ next step: up to 64 pages of one chunk
//!          ─▶ neighbours ───────────┘
//!          ─▶ where the sweep goes on ─▶ next span, when no step is left
//! ```
//!
//! In post-copy every page is pushed once in any case, so that no prefetch is ever wasted: a policy only says what is pushed
//! sooner. All memory is taken at the start; a fault costs a bounded amount of work and no allocation.

mod around;
mod bubbles;
mod policy;
mod spans;
mod trend;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::Range;

use switchover_wire::frame::bulk::CHUNK_PAGES;
use switchover_wire::types::{PageCount, PageIndex};

use self::around::Around;
use self::bubbles::Bubbles;
pub use self::policy::{Hints, Near, Policy, PolicyError};
pub use self::spans::SPAN_CHUNKS;
use self::spans::Spans;
use self::trend::Trend;
use crate::sent::{ChunkIndex, SentPages};

/// Chunks that one call looks at before it leaves the rest to the next: it is made under a lock.
const MOST_LOOKS: u32 = 128;

/// What nobody has sent yet.
pub trait Left {
    /// The pages of `chunk` that nobody has sent, a bit each; 0 past the end of RAM.
    fn left(&self, chunk: ChunkIndex) -> u64;
}

impl Left for SentPages {
    fn left(&self, chunk: ChunkIndex) -> u64 {
        SentPages::left(self, chunk)
    }
}

/// A fault that was answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Its page.
    pub page: PageIndex,
    /// Who had it: the number of the fault lane that it came on, or of the vCPU where that is known. Trends are looked for in
    /// the faults of each apart.
    pub lane: u8,
}

/// Pages of one chunk to be sent next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Its pages, a bit each. At least one of them was left when the step was made.
    pub pages: u64,
}

/// The order of one push.
#[derive(Debug)]
pub struct Order {
    policy: Policy,
    hints: VecDeque<Step>,
    /// The last step was a hint: where they alternate, it is the faults' turn.
    hinted: bool,
    trend: Trend,
    around: Around,
    bubbles: Bubbles,
    spans: Spans,
}

impl Order {
    /// Nothing wanted yet; the sweep at the start of RAM.
    #[must_use]
    pub fn new(policy: Policy, pages: PageCount) -> Self {
        let chunks = pages.0.div_ceil(CHUNK_PAGES);
        Self {
            policy,
            hints: VecDeque::new(),
            hinted: false,
            trend: Trend::new(pages),
            around: Around::new(policy.near == Near::Latest),
            bubbles: Bubbles::new(pages),
            spans: Spans::new(chunks),
        }
    }

    /// Adds pages known to be wanted, in this order.
    pub fn hint(&mut self, steps: impl IntoIterator<Item = Step>) {
        self.hints.extend(steps);
    }

    /// A fault was answered.
    pub fn note_fault(&mut self, fault: Fault) {
        let followed = self.policy.trend && self.trend.note(fault);
        // What lies on a stream needs no neighbours: the stream brings what comes next.
        if !followed {
            match self.policy.near {
                Near::None => {}
                Near::Around | Near::Latest => self.around.note(fault.page),
                Near::Bubbles => self.bubbles.note(fault.page),
            }
        }
        if self.policy.aim {
            self.spans.aim(ChunkIndex::of(fault.page));
        }
    }

    /// What is more urgent than the sweep; `None` when nothing is.
    pub fn step(&mut self, left: &impl Left) -> Option<Step> {
        let mut looks = Looks { left, spent: 0 };
        let hints_first = match self.policy.hints {
            Hints::First => true,
            Hints::InTurn => !self.hinted,
        };
        let step = if hints_first {
            self.hinted(&mut looks).or_else(|| self.after_faults(&mut looks))
        } else {
            self.after_faults(&mut looks).or_else(|| self.hinted(&mut looks))
        };
        debug_assert!(step.is_none_or(|step| step.pages & left.left(step.chunk) != 0 || looks.spent > 0));
        step
    }

    /// Whether there are hints that nobody has looked at yet.
    #[must_use]
    pub fn has_hints(&self) -> bool {
        !self.hints.is_empty()
    }

    /// The next stretch of chunks of the sweep, or `None` when all were given.
    pub fn span(&mut self) -> Option<Range<u64>> {
        self.spans.next()
    }

    fn hinted(&mut self, looks: &mut Looks<'_, impl Left>) -> Option<Step> {
        while looks.more() {
            let step = looks.wanted(self.hints.pop_front()?);
            if step.is_some() {
                self.hinted = true;
                return step;
            }
        }
        None
    }

    fn after_faults(&mut self, looks: &mut Looks<'_, impl Left>) -> Option<Step> {
        self.hinted = false;
        let stream = if self.policy.trend { self.trend.step(looks) } else { None };
        stream.or_else(|| match self.policy.near {
            Near::None => None,
            Near::Around | Near::Latest => self.around.step(looks),
            Near::Bubbles => self.bubbles.step(looks),
        })
    }
}

/// What is left, looked at a bounded number of times.
struct Looks<'a, L: Left> {
    left: &'a L,
    spent: u32,
}

impl<L: Left> Looks<'_, L> {
    fn more(&self) -> bool {
        self.spent < MOST_LOOKS
    }

    /// Those of a step's pages that are left; `None` when there are none.
    fn wanted(&mut self, step: Step) -> Option<Step> {
        self.spent += 1;
        let pages = step.pages & self.left.left(step.chunk);
        (pages != 0).then_some(Step { pages, ..step })
    }
}

/// The bits of the pages `from..to` of the chunk that `from` lies in; nothing past that chunk.
fn part(from: u64, to: u64) -> Step {
    let chunk = ChunkIndex(from / CHUNK_PAGES);
    let (low, count) = (from % CHUNK_PAGES, to.saturating_sub(from).min(CHUNK_PAGES - from % CHUNK_PAGES));
    let pages = if count == 0 { 0 } else { (u64::MAX >> (CHUNK_PAGES - count)) << low };
    Step { chunk, pages }
}
