//! What the model must hold to whatever its numbers are.

use switchover_pager::source::order::Policy;
use switchover_wire::types::PageIndex;

use super::guest::{Touch, Toucher};
use super::patterns::{Pattern, TUNING_SEEDS};
use super::*;

/// 16 MiB: an unoptimised build plays all patterns in seconds.
const PAGES: u64 = 4096;

fn model(bits_per_second: u64) -> Model {
    Model { bytes_per_second: bits_per_second / 8, ..Model::HERE }
}

fn guest(touches: &[(u64, u64)], pages: u64) -> Toucher {
    let words = usize::try_from(pages / 64).unwrap();
    let touches = touches.iter().map(|(think_ns, page)| Touch { think_ns: *think_ns, page: *page }).collect();
    let (missing, zero) = (vec![u64::MAX; words], vec![0; words]);
    Toucher { name: "g".to_owned(), pages, missing, zero, hints: Vec::new(), vcpus: vec![touches] }
}

#[test]
fn nobody_beats_one_who_knows_the_trace() {
    for pattern in Pattern::ALL {
        for seed in TUNING_SEEDS.take(2) {
            for (bits, pace_ns) in [(1_000_000_000, 500), (10_000_000_000, 500), (5_000_000_000, 20_000)] {
                let guest = patterns::guest(pattern, seed, PAGES, pace_ns);
                let judged = judge(&guest, &model(bits), &Policy::COMPARED);
                assert!(judged.bound.stall <= judged.best.stall, "{}: {judged:?}", guest.name);
                for Played { order, outcome } in &judged.played {
                    assert!(outcome.stall >= judged.best.stall, "{} {bits} {pace_ns}: {order}\n{judged:?}", guest.name);
                    assert!(outcome.stall >= outcome.waits && outcome.raced <= outcome.asked, "{order}");
                }
            }
        }
    }
}

#[test]
fn a_drain_takes_what_its_bytes_take() {
    let model = Model { frame_ns: 0, ..model(8_192_000_000) };
    for policy in Policy::COMPARED {
        let outcome = play(&guest(&[], 6400), &model, &Push::Policy(policy));
        // 4 µs a page, and a header a chunk.
        assert!((outcome.drain - 0.0256).abs() < 0.0001, "{policy}: {outcome:?}");
        assert_eq!((outcome.asked, outcome.stall), (0, 0.0));
    }
}

#[test]
fn a_fault_costs_its_steps_and_its_page_and_waits_behind_no_push() {
    let model = Model {
        bytes_per_second: 40_960_000,
        delay_ns: 1_000_000,
        ask_ns: 20_000,
        wake_ns: 10_000,
        loaded: 1.0,
        outside_ns: 5_000,
        ..Model::HERE
    };
    let sweep = Push::Policy(Policy::SWEEP);
    let outcome = play(&guest(&[(50_000, 6399)], 6400), &model, &sweep);
    let waits = 2.0 * 1e-3 + 20e-6 + 100e-6 + 10e-6;
    assert!((outcome.waits - waits).abs() < 1e-9, "{outcome:?}");
    assert!((outcome.stall - waits - 5e-6).abs() < 1e-9, "{outcome:?}");
    assert_eq!((outcome.asked, outcome.raced), (1, 0));
}

#[test]
fn a_pushed_copy_under_way_wins_the_race_or_loses_it() {
    let model = Model { loaded: 1.0, ..model(1_000_000_000) };
    let page_ns = model.page_ns();
    // The second frame: on its way from the start, and there before an answer where asking takes long.
    let slow = Model { ask_ns: 200 * page_ns, ..model };
    let sweep = Push::Policy(Policy::SWEEP);
    let raced = play(&guest(&[(0, 70)], 6400), &slow, &sweep);
    assert_eq!((raced.asked, raced.raced), (1, 1));
    let lost = play(&guest(&[(0, 70)], 6400), &model, &sweep);
    assert_eq!((lost.asked, lost.raced), (1, 0));
    let landing = play(&guest(&[(page_ns, 5)], 6400), &model, &sweep);
    assert_eq!((landing.asked, landing.landing), (0, 1), "the first frame has begun to arrive");
}

#[test]
fn a_page_that_came_in_time_costs_nothing() {
    let outcome = play(&guest(&[(1_000_000_000, 70)], 6400), &model(10_000_000_000), &Push::Policy(Policy::SWEEP));
    assert_eq!((outcome.asked, outcome.stall, outcome.finish), (0, 0.0, 1.0));
}

#[test]
fn zero_pages_cost_the_link_next_to_nothing() {
    let mut guest = guest(&[], 6400);
    guest.zero = vec![u64::MAX; 100];
    let outcome = play(&guest, &model(1_000_000_000), &Push::Policy(Policy::SWEEP));
    assert!(outcome.drain < 1e-3, "{outcome:?}");
}

#[test]
fn hints_are_pushed_first() {
    let mut guest = guest(&[(1_000_000, 6000)], 6400);
    let sweep = Push::Policy(Policy::SWEEP);
    assert_eq!(play(&guest, &model(1_000_000_000), &sweep).asked, 1);
    guest.hints = vec![PageIndex(6000)];
    assert_eq!(play(&guest, &model(1_000_000_000), &sweep).asked, 0);
}

#[test]
fn a_link_that_carries_next_to_nothing_is_played_to_the_end() {
    let mut guest = guest(&[(0, 3), (10, 100)], 128);
    guest.missing = vec![1 << 3, 1 << 36];
    let slow = Model { bytes_per_second: 1, ..Model::HERE };
    let judged = judge(&guest, &slow, &Policy::COMPARED);
    for Played { order, outcome } in &judged.played {
        assert!(outcome.drain >= 2.0 * 4096.0 && outcome.stall >= judged.best.stall, "{order}: {outcome:?}");
    }
}

/// What the choice rests on, in little: docs/prefetch.md has all of it.
#[test]
fn the_chosen_order_is_among_the_best_of_those_compared() {
    let mut stall = [0.0; Policy::COMPARED.len()];
    for pattern in Pattern::ALL {
        let guest = patterns::guest(pattern, patterns::JUDGING_SEEDS.start, 4 * PAGES, 20_000);
        for bits in [1_000_000_000, 10_000_000_000] {
            let judged = judge(&guest, &model(bits), &Policy::COMPARED);
            stall.iter_mut().zip(&judged.played).for_each(|(sum, played)| *sum += played.outcome.stall);
        }
    }
    let chosen = Policy::COMPARED.iter().position(|policy| *policy == Policy::CHOSEN).unwrap();
    let best = stall.iter().copied().fold(f64::INFINITY, f64::min);
    // Which of those that aim is the best differs by some percent from guest to guest; those that do not are a fifth behind.
    assert!(stall[chosen] <= best * 1.10, "{stall:?}");
}
