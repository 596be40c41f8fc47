//! The best that can be done by one who knows what the guest is going to touch, and what nobody can beat.
//!
//! *The best feasible schedule* pushes the missing pages in the order in which the guest first touches them, the others after
//! them, over the same link and to the same pager, which takes as long to notice a fault and to wake a vCPU. It is feasible:
//! nothing in it is faster than what is measured, and only knowledge is added. It is near the best: the page that is wanted
//! k-th cannot be reached before k pages have crossed the link, and in this order it arrives just then. What it can lose is one
//! wake-up at a time, where a page comes just after its touch. Letting several pages arrive together trades some of these
//! wake-ups for later pages, so it is tried with several sizes of batch, and the one with the least stall is taken.
//!
//! *The bound* is the same order with a pager that costs nothing: no schedule, feasible or not, has less stall over this link
//! with one vCPU, by the argument above. With several the order in which they come to their pages depends on the stalls, and it
//! is a guide, no proof.

use super::guest::{Toucher, index};
use super::model::Model;
use super::play::{Outcome, Push, play};

/// Pages that arrive together.
const BATCHES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// How the touches of several vCPUs are put in one order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Merge {
    /// By the time at which each would come in a run without stalls: right where there are few.
    ByTime,
    /// Every vCPU's first, every vCPU's second, and so on: right where all wait for the link most of the time.
    InTurn,
}

/// The missing pages in the order of their first touch, then all others.
#[must_use]
pub fn order(guest: &Toucher, merge: Merge) -> Vec<u64> {
    let mut touches = Vec::new();
    for (vcpu, of_it) in guest.vcpus.iter().enumerate() {
        let mut at = 0_u64;
        for (rank, touch) in of_it.iter().enumerate() {
            at = at.saturating_add(touch.think_ns);
            let place = match merge {
                Merge::ByTime => at,
                Merge::InTurn => rank as u64,
            };
            touches.push((place, vcpu, touch.page));
        }
    }
    touches.sort_by_key(|(place, ..)| *place);
    let mut left = guest.missing.clone();
    let mut take = |page: u64| {
        let (word, bit) = (index(page), 1 << (page % 64));
        let is = left.get(word).is_some_and(|word| word & bit != 0);
        if is {
            left[word] &= !bit;
        }
        is
    };
    let touched: Vec<u64> = touches.into_iter().map(|(.., page)| page).collect();
    touched.into_iter().chain(0..guest.pages).filter(|page| take(*page)).collect()
}

/// The best feasible schedule.
#[must_use]
pub fn best(guest: &Toucher, model: &Model) -> Outcome {
    least(guest, model, &BATCHES)
}

/// What no schedule can beat.
#[must_use]
pub fn bound(guest: &Toucher, model: &Model) -> Outcome {
    least(guest, &model.free_of_charge(), &BATCHES[..1])
}

fn least(guest: &Toucher, model: &Model, batches: &[usize]) -> Outcome {
    let merges = if guest.vcpus.len() > 1 { &[Merge::ByTime, Merge::InTurn][..] } else { &[Merge::ByTime] };
    let orders: Vec<_> = merges.iter().map(|merge| order(guest, *merge)).collect();
    let tries = orders
        .iter()
        .flat_map(|pages| batches.iter().map(move |batch| play(guest, model, &Push::Known { pages, batch: *batch })));
    tries.min_by(|one, other| one.stall.total_cmp(&other.stall)).unwrap_or_default()
}
