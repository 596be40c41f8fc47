//! This VMM beside a peer: who is better at what, by how much, how sure that is, and whether it is as much as was asked.

use serde::{Deserialize, Serialize};

use super::bandwidth::Bandwidth;
use super::figures::FIGURES;
use super::modes::Family;
use super::schema::{ModeReport, PeerInfo};
use super::statistics::{median, median_interval, ratio_interval};

/// What is asked of each post-copy mode of this VMM. The peer's best is taken over its own post-copy modes, figure by figure.
const ASKED: &[(&str, &str, Bound)] = &[
    ("gap_ns", "Blackout that the guest saw", Bound::AtMost(2e6)),
    ("gap_ns", "Blackout that the guest saw", Bound::RatioAtMost(0.1)),
    ("drain_gbit_s", "Drain rate", Bound::RatioAtLeast(3.0)),
    (LOST, "Progress lost within 10 s", Bound::RatioAtMost(0.25)),
    (RECOVERED, "Back at 95 % of its rate after", Bound::AtMost(2.0)),
    ("cpu_s_per_gib", "CPU for a GiB, both processes", Bound::RatioAtMost(1.0)),
];

/// The figures in which the best of both are held against each other, and whether more of them is better.
const COMPARED: &[(&str, bool)] = &[
    ("gap_ns", false),
    (LOST, false),
    ("lost_s", false),
    (RECOVERED, false),
    ("drain_gbit_s", true),
    ("total_ns", false),
    ("cpu_s_per_gib", false),
    ("wire_bytes", false),
];

const LOST: &str = "lost_around_s";
/// A run without it took infinitely long.
const RECOVERED: &str = "recovered_s";

/// Both VMMs in every cell.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// The peer's name for people.
    pub title: String,
    /// Its version.
    pub version: String,
    /// In the order in which they were measured.
    pub cells: Vec<ComparedCell>,
}

/// One guest at one bandwidth.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ComparedCell {
    /// The guest's name.
    pub guest: String,
    /// What the link could carry, in bit/s; absent where nothing bounded it.
    pub bandwidth_bit_s: Option<u64>,
    /// The best of both, family by family.
    pub families: Vec<ComparedFamily>,
    /// Whether it is as much as was asked.
    pub demands: Vec<Demand>,
}

/// The modes of one family.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ComparedFamily {
    /// Which.
    pub family: Family,
    /// Figure by figure.
    pub figures: Vec<ComparedFigure>,
}

/// The better mode of each VMM by one figure.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ComparedFigure {
    /// Its name in `runs[].figures`.
    pub figure: String,
    /// This VMM's best mode by it; absent where no mode has a finite median.
    pub ours: Option<Best>,
    /// The peer's, likewise.
    pub theirs: Option<Best>,
    /// Ours over theirs; absent where either is, or theirs is not above 0.
    pub ratio: Option<f64>,
    /// The lower end of the ratio's confidence interval of 95 %, by the percentile bootstrap of both.
    pub ratio_low: Option<f64>,
    /// Its upper end.
    pub ratio_high: Option<f64>,
}

/// A mode that is best by a figure.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Best {
    /// The mode.
    pub mode: String,
    /// The figure's median over the runs that moved the guest.
    pub median: f64,
    /// The lower end of the median's confidence interval; absent with one run.
    pub ci_low: Option<f64>,
    /// Its upper end.
    pub ci_high: Option<f64>,
}

/// What is asked of a figure.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// Its median, in its own unit.
    AtMost(f64),
    /// Its median over the peer's best.
    RatioAtMost(f64),
    /// The same.
    RatioAtLeast(f64),
}

/// Whether one of this VMM's modes is as good as was asked.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Demand {
    /// The figure's name in `runs[].figures`.
    pub figure: String,
    /// For people.
    pub label: String,
    /// This VMM's mode.
    pub mode: String,
    /// The figure's median; absent where it is infinite.
    pub ours: Option<f64>,
    /// What it is held against; absent where that is a number.
    pub theirs: Option<Best>,
    /// Ours over theirs; absent where either is, or theirs is not above 0.
    pub ratio: Option<f64>,
    /// What was asked.
    pub bound: Bound,
    /// It is.
    pub met: bool,
}

impl Comparison {
    /// Of `modes`, some of which are this VMM's and some `peer`'s; `None` where one of them made no runs.
    #[must_use]
    pub fn of(modes: &[ModeReport], peer: &PeerInfo) -> Option<Self> {
        let mut cells: Vec<Vec<&ModeReport>> = Vec::new();
        for mode in modes {
            let same = |cell: &&mut Vec<&ModeReport>| {
                cell.first()
                    .is_some_and(|first| first.guest == mode.guest && first.bandwidth_bit_s == mode.bandwidth_bit_s)
            };
            match cells.iter_mut().find(same) {
                Some(cell) => cell.push(mode),
                None => cells.push(vec![mode]),
            }
        }
        let cells: Vec<_> = cells.iter().filter_map(|modes| ComparedCell::of(modes, &peer.name)).collect();
        let (title, version) = (peer.title.clone(), peer.version.clone());
        (!cells.is_empty()).then_some(Self { title, version, cells })
    }
}

impl ComparedCell {
    /// `random, 1G`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}, {}", self.guest, Bandwidth::from(self.bandwidth_bit_s))
    }

    /// How many demands are met, and how many there are.
    #[must_use]
    pub fn met(&self) -> (usize, usize) {
        (self.demands.iter().filter(|demand| demand.met).count(), self.demands.len())
    }

    fn of(modes: &[&ModeReport], peer: &str) -> Option<Self> {
        let first = modes.first()?;
        let (ours, theirs): (Vec<&ModeReport>, Vec<&ModeReport>) = (
            modes.iter().copied().filter(|mode| mode.is_ours()).collect(),
            modes.iter().copied().filter(|mode| mode.vmm == peer).collect(),
        );
        if ours.is_empty() || theirs.is_empty() {
            return None;
        }
        let families = [Family::PostCopy, Family::PreCopy].into_iter();
        Some(Self {
            guest: first.guest.clone(),
            bandwidth_bit_s: first.bandwidth_bit_s,
            families: families.filter_map(|family| ComparedFamily::of(family, &ours, &theirs)).collect(),
            demands: demands(&ours, &theirs),
        })
    }
}

impl ComparedFamily {
    fn of(family: Family, ours: &[&ModeReport], theirs: &[&ModeReport]) -> Option<Self> {
        let figures = COMPARED.iter().filter_map(|(key, more)| {
            let (ours, theirs) = (Sample::best(ours, family, key, *more), Sample::best(theirs, family, key, *more));
            (ours.is_some() || theirs.is_some()).then(|| ComparedFigure::of(key, ours, theirs))
        });
        let figures: Vec<_> = figures.collect();
        (!figures.is_empty()).then_some(Self { family, figures })
    }
}

impl ComparedFigure {
    fn of(key: &str, ours: Option<Sample>, theirs: Option<Sample>) -> Self {
        let both = ours.as_ref().zip(theirs.as_ref());
        let interval = both.and_then(|(ours, theirs)| ratio_interval(&ours.values, &theirs.values));
        let ratio = both.and_then(|(ours, theirs)| ratio(ours.median, theirs.median));
        Self {
            figure: key.to_owned(),
            ratio,
            ratio_low: interval.filter(|_| ratio.is_some()).map(|interval| interval.low),
            ratio_high: interval.filter(|_| ratio.is_some()).map(|interval| interval.high),
            ours: ours.and_then(Sample::named),
            theirs: theirs.and_then(Sample::named),
        }
    }
}

/// The median time after which a mode's guests were back at their rate: infinite where the median run's never was.
#[must_use]
pub fn recovered(mode: &ModeReport) -> Option<f64> {
    Sample::of(mode, RECOVERED).map(|sample| sample.median)
}

/// A figure in the runs of a mode that moved the guest.
struct Sample {
    mode: String,
    values: Vec<f64>,
    /// Infinite where the median run never came there.
    median: f64,
}

impl Sample {
    /// `None` where no such run has the figure.
    fn of(mode: &ModeReport, key: &str) -> Option<Self> {
        let descriptor = FIGURES.iter().find(|figure| figure.key == key)?;
        let moved = mode.carried_out().filter(|run| run.not_converged.is_none());
        let never = (key == RECOVERED).then_some(f64::INFINITY);
        let values: Vec<f64> = moved.filter_map(|run| (descriptor.get)(&run.figures).or(never)).collect();
        Some(Self { mode: mode.mode.clone(), median: median(values.clone())?, values })
    }

    /// Of the modes of a family, the one with the best median.
    fn best(modes: &[&ModeReport], family: Family, key: &str, more: bool) -> Option<Self> {
        let samples = modes.iter().filter(|mode| mode.family == Some(family)).filter_map(|mode| Self::of(mode, key));
        samples.min_by(|one, other| {
            let order = one.median.total_cmp(&other.median);
            if more { order.reverse() } else { order }
        })
    }

    /// `None` where its median is infinite.
    fn named(self) -> Option<Best> {
        let interval = median_interval(&self.values);
        self.median.is_finite().then(|| Best {
            mode: self.mode,
            median: self.median,
            ci_low: interval.map(|interval| interval.low),
            ci_high: interval.map(|interval| interval.high),
        })
    }
}

/// What is asked, of each of our post-copy modes that has the figure.
fn demands(ours: &[&ModeReport], theirs: &[&ModeReport]) -> Vec<Demand> {
    let family = Family::PostCopy;
    let modes = || ours.iter().filter(|mode| mode.family == Some(family));
    let demand = |(key, label, bound): &(&str, &str, Bound), mode: &ModeReport| {
        let sample = Sample::of(mode, key)?;
        let more = matches!(bound, Bound::RatioAtLeast(_));
        let against = match bound {
            Bound::AtMost(_) => None,
            Bound::RatioAtMost(_) | Bound::RatioAtLeast(_) => Some(Sample::best(theirs, family, key, more)?),
        };
        let ratio = against.as_ref().and_then(|against| ratio(sample.median, against.median));
        let met = match (bound, &against) {
            (Bound::AtMost(most), _) => sample.median <= *most,
            (Bound::RatioAtMost(most), Some(theirs)) => {
                // A guest that lost nothing, or gained, has no ratio.
                ratio.map_or(sample.median <= theirs.median, |ratio| ratio <= *most) && sample.median.is_finite()
            }
            (Bound::RatioAtLeast(least), _) => ratio.is_some_and(|ratio| ratio >= *least),
            (Bound::RatioAtMost(_), None) => false,
        };
        Some(Demand {
            figure: (*key).to_owned(),
            label: (*label).to_owned(),
            mode: sample.mode,
            ours: Some(sample.median).filter(|median| median.is_finite()),
            theirs: against.and_then(Sample::named),
            ratio,
            bound: *bound,
            met,
        })
    };
    ASKED.iter().flat_map(|asked| modes().filter_map(move |mode| demand(asked, mode))).collect()
}

fn ratio(ours: f64, theirs: f64) -> Option<f64> {
    (ours.is_finite() && theirs.is_finite() && theirs > 0.0).then(|| ours / theirs)
}

#[cfg(test)]
mod tests {
    use super::super::synthetic;
    use super::*;

    fn both() -> Vec<ModeReport> {
        synthetic::beside_a_peer(4).0.modes
    }

    fn compared(modes: &[ModeReport]) -> ComparedCell {
        Comparison::of(modes, &synthetic::peer()).unwrap().cells.remove(0)
    }

    /// Gives every run of a mode the same figures.
    fn set(modes: &mut [ModeReport], name: &str, change: impl Fn(&mut super::super::figures::Figures)) {
        let mode = modes.iter_mut().find(|mode| mode.name() == name).unwrap();
        mode.runs.iter_mut().for_each(|run| change(&mut run.figures));
    }

    fn demand<'a>(cell: &'a ComparedCell, figure: &str, mode: &str, ratio: bool) -> &'a Demand {
        let wanted = |demand: &&Demand| {
            demand.figure == figure && demand.mode == mode && matches!(demand.bound, Bound::AtMost(_)) != ratio
        };
        cell.demands.iter().find(wanted).unwrap()
    }

    #[test]
    fn the_peers_best_post_copy_is_what_ours_are_held_against() {
        let mut modes = both();
        set(&mut modes, "postcopy", |figures| figures.progress.gap_ns = Some(1_900_000));
        set(&mut modes, "hybrid", |figures| figures.progress.gap_ns = Some(2_100_000));
        set(&mut modes, "qemu precopy", |figures| figures.progress.gap_ns = Some(1_000_000));
        set(&mut modes, "qemu postcopy", |figures| figures.progress.gap_ns = Some(30_000_000));
        set(&mut modes, "qemu postcopy-preempt", |figures| figures.progress.gap_ns = Some(20_000_000));
        let cell = compared(&modes);
        let found = demand(&cell, "gap_ns", "postcopy", true);
        assert_eq!(found.theirs.as_ref().unwrap().mode, "postcopy-preempt");
        assert!(found.met && (found.ratio.unwrap() - 0.095).abs() < 1e-9, "{found:?}");
        let found = demand(&cell, "gap_ns", "hybrid", true);
        assert!(!found.met && (found.ratio.unwrap() - 0.105).abs() < 1e-9, "{found:?}");
        assert!(demand(&cell, "gap_ns", "postcopy", false).met && !demand(&cell, "gap_ns", "hybrid", false).met);
        let post = cell.families.iter().find(|found| found.family == Family::PostCopy).unwrap();
        let gap = post.figures.iter().find(|found| found.figure == "gap_ns").unwrap();
        assert_eq!((gap.ours.as_ref().unwrap().mode.as_str(), gap.ratio), ("postcopy", Some(0.095)));
        assert_eq!((gap.ratio_low, gap.ratio_high), (Some(0.095), Some(0.095)));
    }

    #[test]
    fn of_a_drain_more_is_better() {
        let mut modes = both();
        set(&mut modes, "postcopy", |figures| figures.drain_gbit_s = Some(16.0));
        set(&mut modes, "qemu postcopy", |figures| figures.drain_gbit_s = Some(8.0));
        set(&mut modes, "qemu postcopy-preempt", |figures| figures.drain_gbit_s = Some(5.0));
        let cell = compared(&modes);
        let found = demand(&cell, "drain_gbit_s", "postcopy", true);
        assert_eq!(
            (found.theirs.as_ref().unwrap().mode.as_str(), found.ratio, found.met),
            ("postcopy", Some(2.0), false)
        );
        set(&mut modes, "postcopy", |figures| figures.drain_gbit_s = Some(24.0));
        assert!(demand(&compared(&modes), "drain_gbit_s", "postcopy", true).met);
    }

    #[test]
    fn a_guest_that_never_comes_back_took_infinitely_long() {
        let mut modes = both();
        let seconds = [Some(0.2), None, None, Some(0.1)];
        let mode = modes.iter_mut().find(|mode| mode.name() == "postcopy").unwrap();
        for (run, seconds) in mode.runs.iter_mut().zip(seconds) {
            run.figures.progress.recovered_s = seconds;
        }
        let cell = compared(&modes);
        let found = demand(&cell, RECOVERED, "postcopy", false);
        assert_eq!((found.ours, found.met), (None, false));
        assert_eq!(recovered(modes.iter().find(|mode| mode.name() == "postcopy").unwrap()), Some(f64::INFINITY));
        set(&mut modes, "postcopy", |figures| figures.progress.recovered_s = Some(1.9));
        assert!(demand(&compared(&modes), RECOVERED, "postcopy", false).met);
    }

    #[test]
    fn who_lost_nothing_has_no_ratio_and_is_good() {
        let mut modes = both();
        let lost =
            |lost| move |figures: &mut super::super::figures::Figures| figures.progress.lost_around_s = Some(lost);
        set(&mut modes, "postcopy", lost(-0.01));
        assert!(demand(&compared(&modes), LOST, "postcopy", true).met);
        for name in ["qemu postcopy", "qemu postcopy-preempt"] {
            set(&mut modes, name, lost(0.0));
        }
        let found = compared(&modes);
        assert_eq!(demand(&found, LOST, "postcopy", true).ratio, None);
        set(&mut modes, "postcopy", lost(0.01));
        assert!(!demand(&compared(&modes), LOST, "postcopy", true).met);
    }

    #[test]
    fn what_no_run_has_is_not_asked_and_one_vmm_alone_is_no_comparison() {
        let mut modes = both();
        set(&mut modes, "hybrid", |figures| figures.drain_gbit_s = None);
        let cell = compared(&modes);
        assert!(!cell.demands.iter().any(|demand| demand.figure == "drain_gbit_s" && demand.mode == "hybrid"));
        modes.retain(ModeReport::is_ours);
        assert!(Comparison::of(&modes, &synthetic::peer()).is_none());
    }

    #[test]
    fn a_comparison_reads_back_as_it_was_written() {
        let comparison = Comparison::of(&both(), &synthetic::peer()).unwrap();
        let json = serde_json::to_string(&comparison).unwrap();
        assert!(json.contains("\"ratio-at-most\":0.1"), "{json}");
        assert_eq!(serde_json::from_str::<Comparison>(&json).unwrap(), comparison);
    }
}
