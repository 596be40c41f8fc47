//! Micro-benchmarks: what single steps of a migration cost on this machine.
//!
//! `cargo bench -p switchover-benches` runs them all; `cargo bench -p switchover-benches --bench placement` one of
//! them. Each prints a line a case: the median time of one step, the fastest and the slowest of the repetitions, so
//! that a change can be told from noise.
//!
//! ```text
//!   zero_pages      is a page zero; where are the holes of a memfd
//!   bitmaps         sets of pages: on the wire, walked, shared by lanes, and the heat made from them
//!   page_states     claims on the page-state map, alone and against another thread
//!   placement       mapping pages that are in the alias, against copying and moving them: one at a time, and in runs
//!   fault_scaling   remote faults a second by threads that fault and by fault lanes, without a guest
//!   dirty_tracking  what a real guest writes, found out by KVM's bitmaps and by its rings; what that costs the guest
//!   encodings       pages in fewer bytes: each encoding; what a lane's packer costs and gains
//!   image_reads     pages of an image: read, by an io_uring, mapped; from the page cache and from the disk
//!   checksums       noticing damage: CRC-32 of headers, pages and frames; digests of pages
//! ```
//!
//! They measure steps, not migrations: `switchover bench` does that, on real guests.

use std::hint::black_box;
use std::time::Duration;

use switchover_wire::clock::Nanos;

/// Repetitions whose median is shown.
const REPETITIONS: usize = 15;

/// What one case cost.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cost {
    /// Nanoseconds of each repetition, sorted.
    repetitions: Vec<u64>,
    /// Steps in each.
    steps: u64,
}

impl Cost {
    /// Of repetitions that took so many nanoseconds for `steps` steps each.
    #[must_use]
    pub fn new(mut repetitions: Vec<u64>, steps: u64) -> Self {
        repetitions.sort_unstable();
        Self { repetitions, steps: steps.max(1) }
    }

    /// Picoseconds of a step in the median repetition; 0 where there was none.
    #[must_use]
    pub fn median_ps(&self) -> u64 {
        self.ps(self.repetitions.len() / 2)
    }

    /// Of the fastest and the slowest.
    #[must_use]
    pub fn range_ps(&self) -> (u64, u64) {
        (self.ps(0), self.ps(self.repetitions.len().saturating_sub(1)))
    }

    fn ps(&self, index: usize) -> u64 {
        self.repetitions.get(index).map_or(0, |ns| ns.saturating_mul(1000) / self.steps)
    }
}

/// Times `work`, which does `steps` steps, after `prepare`, which is not timed. The first repetition is thrown away.
pub fn time<T>(steps: u64, mut prepare: impl FnMut(), mut work: impl FnMut() -> T) -> Cost {
    let mut repetitions = Vec::with_capacity(REPETITIONS);
    for repetition in 0..=REPETITIONS {
        prepare();
        let start = Nanos::now();
        black_box(work());
        let ns = Nanos::now().since(start);
        if repetition > 0 {
            repetitions.push(ns);
        }
    }
    Cost::new(repetitions, steps)
}

/// Prints the line of one case. `step` names the step: "page", "claim".
pub fn show(case: &str, step: &str, cost: &Cost) {
    let (fastest, slowest) = cost.range_ps();
    println!("{case:<58} {:>12} a {step}   ({} to {})", span(cost.median_ps()), span(fastest), span(slowest));
}

/// Picoseconds with a fitting unit.
fn span(ps: u64) -> String {
    match Duration::from_nanos(ps / 1000) {
        time if time >= Duration::from_micros(100) => format!("{} µs", time.as_micros()),
        time if time >= Duration::from_micros(1) => {
            format!("{}.{:02} µs", time.as_micros(), time.as_nanos() % 1000 / 10)
        }
        _ => format!("{}.{} ns", ps / 1000, ps % 1000 / 100),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_is_that_of_one_step_in_the_median_repetition() {
        let cost = Cost::new(vec![900, 100, 200], 10);
        assert_eq!((cost.median_ps(), cost.range_ps()), (20_000, (10_000, 90_000)));
        assert_eq!(Cost::new(vec![], 0).median_ps(), 0);
    }

    #[test]
    fn preparation_is_not_timed_and_runs_before_each_repetition() {
        let (mut prepared, mut worked) = (0, 0);
        time(1, || prepared += 1, || worked += 1);
        assert_eq!((prepared, worked), (REPETITIONS + 1, REPETITIONS + 1));
    }

    #[test]
    fn spans_have_fitting_units() {
        assert_eq!([560, 56_000, 1_070_000, 123_000_000].map(span), ["0.5 ns", "56.0 ns", "1.07 µs", "123 µs"]);
    }
}
