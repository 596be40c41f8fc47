//! The modes side by side: what each costs in each cell, and whether the hybrid is as good as the better of the others.

use serde::{Deserialize, Serialize};
use switchover_hybrid::monitor::Choice;

use super::bandwidth::Bandwidth;
use super::figures::Figures;
use super::schema::ModeReport;
use super::statistics::median;

/// The hybrid's cost may be this many times the better pure mode's.
pub const MOST_COST_RATIO: f64 = 1.15;
/// The longest gap that the hybrid's guest sees may be this many times post-copy's.
pub const MOST_GAP_RATIO: f64 = 1.5;

/// A prediction of a blackout that is no further off is good, however short the blackout.
const CLOSE_NS: u64 = 2_000_000;

const PURE: [&str; 2] = ["precopy", "postcopy"];
const HYBRID: &str = "hybrid";
const POSTCOPY: &str = "postcopy";

/// Every cell's modes side by side.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Matrix {
    /// [`MOST_COST_RATIO`].
    pub most_cost_ratio: f64,
    /// [`MOST_GAP_RATIO`].
    pub most_gap_ratio: f64,
    /// In the order in which they were measured.
    pub cells: Vec<MatrixCell>,
    /// How well stop and copy was predicted, over the runs of all cells; absent where none ended so.
    pub predicted: Option<Predicted>,
}

/// How well blackouts were predicted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Predicted {
    /// Runs whose predicted blackout was within 2 ms or 20 % of the measured one, whichever is more.
    pub within: u32,
    /// Runs that ended by stop and copy and have both.
    pub runs: u32,
}

/// One guest at one bandwidth.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MatrixCell {
    /// The guest's name.
    pub guest: String,
    /// What the link could carry, in bit/s; absent where nothing bounded it.
    pub bandwidth_bit_s: Option<u64>,
    /// The modes, in the order in which they were asked for.
    pub modes: Vec<MatrixEntry>,
    /// The hybrid's cost against the better pure mode's; absent where there is nothing to compare.
    pub cost: Option<Judgement>,
    /// The gap that the hybrid's guest saw against post-copy's, likewise.
    pub gap: Option<Judgement>,
}

/// One mode in one cell.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MatrixEntry {
    /// The mode's name.
    pub mode: String,
    /// Runs that were carried out to an end.
    pub runs: u32,
    /// Those of them that did not converge: each costs infinitely much.
    pub not_converged: u32,
    /// The median of `cost_s` over the runs; absent where it is infinite, or no run has one.
    pub cost_s: Option<f64>,
    /// The median of `gap_ns` over the runs that moved the guest; absent where the cost is.
    pub gap_ns: Option<f64>,
}

/// Whether the hybrid is good enough.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Judgement {
    /// The mode that it is compared with.
    pub against: String,
    /// The hybrid's figure over that mode's; absent where the hybrid's is infinite or the other's is not above 0.
    pub ratio: Option<f64>,
    /// It is.
    pub met: bool,
}

impl Matrix {
    /// Of this VMM's `modes`; `None` where no cell has more than one.
    #[must_use]
    pub fn of(modes: &[ModeReport]) -> Option<Self> {
        let mut cells: Vec<(&ModeReport, Vec<&ModeReport>)> = Vec::new();
        for mode in modes.iter().filter(|mode| mode.is_ours()) {
            let same = |(first, _): &&mut (&ModeReport, Vec<&ModeReport>)| {
                first.guest == mode.guest && first.bandwidth_bit_s == mode.bandwidth_bit_s
            };
            match cells.iter_mut().find(same) {
                Some((_, cell)) => cell.push(mode),
                None => cells.push((mode, vec![mode])),
            }
        }
        if cells.iter().all(|(_, cell)| cell.len() < 2) {
            return None;
        }
        let cells = cells.into_iter().map(|(first, modes)| MatrixCell::of(first, &modes)).collect();
        Some(Self {
            most_cost_ratio: MOST_COST_RATIO,
            most_gap_ratio: MOST_GAP_RATIO,
            cells,
            predicted: Predicted::of(modes),
        })
    }

    /// The judgements that `which` finds: how many are met, and how many there are.
    #[must_use]
    pub fn met(&self, which: fn(&MatrixCell) -> Option<&Judgement>) -> (usize, usize) {
        let judged = || self.cells.iter().filter_map(which);
        (judged().filter(|judgement| judgement.met).count(), judged().count())
    }
}

impl Predicted {
    fn of(modes: &[ModeReport]) -> Option<Self> {
        let mut found = Self { within: 0, runs: 0 };
        for figures in modes.iter().flat_map(|mode| &mode.runs).map(|run| &run.figures) {
            let both = figures.predicted_blackout_ns.zip(figures.blackout_ns);
            let Some((predicted, measured)) = both.filter(|_| figures.ended_by == Some(Choice::StopAndCopy)) else {
                continue;
            };
            found.runs += 1;
            if predicted.abs_diff(measured) <= (measured / 5).max(CLOSE_NS) {
                found.within += 1;
            }
        }
        (found.runs > 0).then_some(found)
    }
}

impl MatrixCell {
    /// `guest, 1G`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}, {}", self.guest, self.link())
    }

    /// The bandwidth as people write it.
    #[must_use]
    pub fn link(&self) -> Bandwidth {
        Bandwidth::from(self.bandwidth_bit_s)
    }

    fn of(first: &ModeReport, modes: &[&ModeReport]) -> Self {
        let costs = |name: &str| modes.iter().find(|mode| mode.mode == name).and_then(|mode| cost(mode));
        let gaps = |name: &str| modes.iter().find(|mode| mode.mode == name).and_then(|mode| gap(mode));
        let better = PURE.iter().filter_map(|name| Some((*name, costs(name)?))).min_by(|(_, a), (_, b)| a.total_cmp(b));
        Self {
            guest: first.guest.clone(),
            bandwidth_bit_s: first.bandwidth_bit_s,
            modes: modes.iter().map(|mode| MatrixEntry::of(mode)).collect(),
            cost: costs(HYBRID).zip(better).and_then(|(ours, (name, other))| judge(ours, name, other, MOST_COST_RATIO)),
            gap: gaps(HYBRID)
                .zip(gaps(POSTCOPY))
                .and_then(|(ours, other)| judge(ours, POSTCOPY, other, MOST_GAP_RATIO)),
        }
    }
}

impl MatrixEntry {
    fn of(mode: &ModeReport) -> Self {
        let cost_s = cost(mode).filter(|cost| cost.is_finite());
        Self {
            mode: mode.mode.clone(),
            runs: u32::try_from(mode.carried_out().count()).unwrap_or(u32::MAX),
            not_converged: u32::try_from(mode.not_converged()).unwrap_or(u32::MAX),
            cost_s,
            gap_ns: gap(mode).filter(|_| cost_s.is_some()),
        }
    }
}

/// The median cost, infinite where the median run did not converge.
fn cost(mode: &ModeReport) -> Option<f64> {
    let of = |run: &super::schema::RunReport| match run.not_converged {
        Some(_) => Some(f64::INFINITY),
        None => run.figures.cost_s,
    };
    median(mode.carried_out().filter_map(of).collect())
}

/// The median gap over the runs that moved the guest.
fn gap(mode: &ModeReport) -> Option<f64> {
    let gap = |figures: &Figures| {
        #[expect(clippy::cast_precision_loss, reason = "shown to four digits")]
        figures.progress.gap_ns.map(|ns| ns as f64)
    };
    let moved = mode.carried_out().filter(|run| run.not_converged.is_none());
    median(moved.filter_map(|run| gap(&run.figures)).collect())
}

fn judge(ours: f64, against: &str, other: f64, most: f64) -> Option<Judgement> {
    // Nothing is worse than what never ends.
    if other.is_infinite() {
        return None;
    }
    let ratio = (ours.is_finite() && other > 0.0).then(|| ours / other);
    let met = ratio.map_or(ours <= other, |ratio| ratio <= most);
    Some(Judgement { against: against.to_owned(), ratio, met })
}

#[cfg(test)]
mod tests {
    use super::super::aggregate::Aggregate;
    use super::super::schema::RunReport;
    use super::super::synthetic;
    use super::*;

    fn mode(name: &str, costs: &[Option<f64>], gap_ms: u64) -> ModeReport {
        let runs = costs.iter().map(|cost| {
            let mut run: RunReport = synthetic::runs(1).remove(0);
            run.figures.cost_s = *cost;
            run.figures.progress.gap_ns = Some(gap_ms * 1_000_000);
            run.not_converged = cost.is_none().then(|| "the budget is spent".to_owned());
            run
        });
        let aggregate = Aggregate::of(name, "switchover", runs.collect()).unwrap();
        aggregate.in_cell("random".to_owned(), Bandwidth::UNLIMITED).report
    }

    fn cell(modes: &[ModeReport]) -> MatrixCell {
        Matrix::of(modes).unwrap().cells.remove(0)
    }

    #[test]
    fn the_hybrid_is_held_against_the_better_of_the_others() {
        let all = [Some(1.0), Some(1.2), Some(9.0)];
        let found =
            cell(&[mode("precopy", &all, 5), mode("postcopy", &[Some(2.0)], 10), mode("hybrid", &[Some(1.5)], 14)]);
        let cost = found.cost.unwrap();
        assert_eq!((cost.against.as_str(), cost.met), ("precopy", false));
        assert!((cost.ratio.unwrap() - 1.25).abs() < 1e-12);
        let gap = found.gap.unwrap();
        assert_eq!((gap.against.as_str(), gap.met), ("postcopy", true));
        assert!((gap.ratio.unwrap() - 1.4).abs() < 1e-12);
        assert_eq!(found.modes[0].cost_s, Some(1.2));
    }

    #[test]
    fn what_mostly_does_not_converge_costs_infinitely_much() {
        let postcopy = mode("postcopy", &[Some(2.0)], 10);
        let hybrid = mode("hybrid", &[Some(2.2)], 16);
        let found = cell(&[mode("precopy", &[None, Some(0.1), None], 5), postcopy.clone(), hybrid.clone()]);
        let cost = found.cost.unwrap();
        assert_eq!((cost.against.as_str(), cost.met), ("postcopy", true));
        assert_eq!((found.modes[0].cost_s, found.modes[0].gap_ns, found.modes[0].not_converged), (None, None, 2));
        assert!(!found.gap.unwrap().met);

        let half = cell(&[mode("precopy", &[None, Some(0.1)], 5), postcopy.clone(), hybrid]);
        assert_eq!(half.modes[0].cost_s, None);
        let never = cell(&[postcopy, mode("hybrid", &[None], 5)]);
        let cost = never.cost.unwrap();
        assert_eq!((cost.ratio, cost.met), (None, false));
    }

    #[test]
    fn a_run_that_failed_is_no_run_that_did_not_converge() {
        let mut postcopy = mode("postcopy", &[Some(2.0)], 10);
        postcopy.runs.push(RunReport { run: 2, doubts: vec!["it failed".to_owned()], ..RunReport::default() });
        let found = cell(&[postcopy, mode("hybrid", &[Some(2.0)], 10)]);
        assert_eq!((found.modes[0].runs, found.modes[0].cost_s), (1, Some(2.0)));
    }

    #[test]
    fn a_prediction_is_good_within_2_ms_or_20_percent() {
        let mut hybrid = mode("hybrid", &[Some(1.0); 4], 10);
        for (run, (predicted, measured)) in hybrid.runs.iter_mut().zip([(3, 5), (2, 5), (81, 100), (70, 100)]) {
            run.figures.predicted_blackout_ns = Some(predicted * 1_000_000);
            run.figures.blackout_ns = Some(measured * 1_000_000);
            run.figures.ended_by = Some(Choice::StopAndCopy);
        }
        let mut modes = [mode("postcopy", &[Some(2.0)], 10), hybrid];
        assert_eq!(Matrix::of(&modes).unwrap().predicted, Some(Predicted { within: 2, runs: 4 }));
        for run in &mut modes[1].runs {
            run.figures.ended_by = Some(Choice::Postcopy);
        }
        assert_eq!(Matrix::of(&modes).unwrap().predicted, None);
    }

    #[test]
    fn cells_are_told_apart_and_one_mode_alone_makes_no_matrix() {
        let mut slow = mode("postcopy", &[Some(2.0)], 10);
        slow.bandwidth_bit_s = Some(1_000_000_000);
        let modes = [mode("postcopy", &[Some(1.0)], 10), slow, mode("hybrid", &[Some(1.0)], 10)];
        let matrix = Matrix::of(&modes).unwrap();
        assert_eq!(matrix.cells.iter().map(|cell| cell.modes.len()).collect::<Vec<_>>(), [2, 1]);
        assert_eq!(matrix.cells[1].name(), "random, 1G");
        assert_eq!(matrix.met(|cell| cell.cost.as_ref()), (1, 1));
        assert!(Matrix::of(&modes[..2]).is_none());
    }
}
