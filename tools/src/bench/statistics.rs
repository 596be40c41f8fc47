//! What the report needs of statistics: orders that nobody chose, medians, and how far a median can be trusted.
//!
//! All of it is a pure function of its arguments: the same runs make the same report.

use crate::rng::Rng;

/// How many times the runs are drawn again for an interval. Its ends move by less than their last shown digit with more.
const RESAMPLES: usize = 2_000;
/// Of the medians of those draws, as many per mille lie below an interval's lower end, and above its upper.
const TAIL_PER_MILLE: usize = 25;
/// Any number would do; one that is always the same makes the same interval of the same runs.
const SEED: u64 = 0x5eed;

/// Puts `items` into an order of which each is as likely as any other.
pub fn shuffle<T>(items: &mut [T], generator: &mut Rng) {
    for last in (1..items.len()).rev() {
        items.swap(last, generator.below(last + 1));
    }
}

/// The middle one of `values`, or the mean of the two middle ones; infinite where the upper of them is. `None` where there
/// are none.
#[must_use]
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get((values.len() - 1) / 2)?;
    // Of two infinities and of one, the mean is infinite.
    Some(if upper.is_infinite() { upper } else { lower.midpoint(upper) })
}

/// Where a median lies with a probability of 95 %.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// The interval of the median of `values`, by the percentile bootstrap; `None` below two values.
#[must_use]
pub fn median_interval(values: &[f64]) -> Option<Interval> {
    let mut generator = Rng::new(SEED);
    interval(|| median(drawn(values, &mut generator)?))
}

/// The interval of the ratio of two medians, likewise. `None` where either has fewer than two values, or a draw has no
/// ratio: one that divides by what is not above 0, or an infinite one.
#[must_use]
pub fn ratio_interval(ours: &[f64], theirs: &[f64]) -> Option<Interval> {
    let mut generator = Rng::new(SEED);
    interval(|| {
        let (over, under) = (median(drawn(ours, &mut generator)?)?, median(drawn(theirs, &mut generator)?)?);
        (under > 0.0).then(|| over / under)
    })
}

/// As many of `values` as there are, each drawn from all of them.
fn drawn(values: &[f64], generator: &mut Rng) -> Option<Vec<f64>> {
    if values.len() < 2 {
        return None;
    }
    (0..values.len()).map(|_| values.get(generator.below(values.len())).copied()).collect()
}

fn interval(mut draw: impl FnMut() -> Option<f64>) -> Option<Interval> {
    let mut draws = (0..RESAMPLES).map(|_| draw().filter(|value| value.is_finite())).collect::<Option<Vec<_>>>()?;
    draws.sort_by(f64::total_cmp);
    let tail = RESAMPLES * TAIL_PER_MILLE / 1_000;
    Some(Interval { low: *draws.get(tail)?, high: *draws.get(RESAMPLES - 1 - tail)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_comes_as_often_as_any_other() {
        let mut generator = Rng::new(7);
        let mut found = std::collections::BTreeMap::new();
        for _ in 0..6_000 {
            let mut items = [1, 2, 3];
            shuffle(&mut items, &mut generator);
            *found.entry(items).or_insert(0) += 1;
        }
        assert_eq!(found.len(), 6);
        assert!(found.values().all(|count| (850..1_150).contains(count)), "{found:?}");
    }

    #[test]
    fn a_median_is_the_middle_and_may_be_infinite() {
        assert_eq!(median(vec![5.0, 1.0, 3.0]), Some(3.0));
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(vec![1.0, f64::INFINITY]), Some(f64::INFINITY));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn an_interval_holds_the_median_within_the_range_and_is_the_same_every_time() {
        let values = [5.0, 7.0, 6.0, 30.0, 5.5, 6.2, 6.1, 5.9, 6.4, 6.3];
        let found = median_interval(&values).unwrap();
        let middle = median(values.to_vec()).unwrap();
        assert!(5.0 < found.low && found.low < middle && middle < found.high && found.high < 7.5, "{found:?}");
        assert_eq!(median_interval(&values), Some(found));
        assert_eq!(median_interval(&[3.0]), None);
        assert_eq!(median_interval(&[3.0, 3.0]), Some(Interval { low: 3.0, high: 3.0 }));
    }

    /// What the interval promises: of many samples, about 95 of 100 have the true median in theirs.
    #[test]
    fn intervals_of_most_samples_hold_the_true_median() {
        let mut generator = Rng::new(99);
        let held = (0..200).filter(|_| {
            let sample: Vec<f64> = (0..10).map(|_| generator.below(1_000) as f64).collect();
            median_interval(&sample).is_some_and(|found| (found.low..=found.high).contains(&499.5))
        });
        let held = held.count();
        assert!((180..=200).contains(&held), "{held} of 200");
    }

    #[test]
    fn a_ratio_is_as_uncertain_as_both_of_its_parts() {
        let (ours, theirs) = ([1.0, 1.1, 0.9, 1.0], [10.0, 12.0, 8.0, 10.0]);
        let found = ratio_interval(&ours, &theirs).unwrap();
        assert!(found.low < 0.1 && 0.1 < found.high, "{found:?}");
        assert!(found.low >= 0.9 / 12.0 && found.high <= 1.1 / 8.0, "{found:?}");
        assert_eq!(ratio_interval(&ours, &[0.0, 0.0]), None);
        assert_eq!(ratio_interval(&ours, &[1.0]), None);
    }
}
