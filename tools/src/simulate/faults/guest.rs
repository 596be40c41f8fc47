//! A guest as its faults show it: which pages each vCPU touches for the first time, and how long it works in between.

use switchover_hybrid::report::FaultAnswer;
use switchover_hybrid::trace::drain::Drain;
use switchover_hybrid::trace::{Trace, TraceError};
use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::heat::Heat;
use switchover_wire::types::{PageCount, PageIndex};
use thiserror::Error;

/// The hottest pages that are pushed before all else, as a source does.
const HOTTEST: usize = 1 << 18;
/// Touches over which the scatter of what a fault costs outside the pager is taken to cancel out.
const WINDOW: usize = 64;

/// The first touch of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Touch {
    /// The guest's own work since the touch before.
    pub think_ns: u64,
    /// The page.
    pub page: u64,
}

/// What is drained, and who needs it.
#[derive(Clone, PartialEq, Debug)]
pub struct Toucher {
    /// For tables.
    pub name: String,
    /// Pages of RAM.
    pub pages: u64,
    /// Those that are to come, a bit each.
    pub missing: Vec<u64>,
    /// Those of them that are zero: they cost a bit each.
    pub zero: Vec<u64>,
    /// Those known to be wanted, the most urgent first.
    pub hints: Vec<PageIndex>,
    /// Each vCPU's touches, in order.
    pub vcpus: Vec<Vec<Touch>>,
}

/// A trace whose faults cannot be played.
#[derive(Debug, Error)]
pub enum GuestError {
    /// It has none.
    #[error("it holds no faults; `switchover bench --modes postcopy --trace FILE` records them")]
    NoFaults,
    /// What the guest touched is not known.
    #[error(
        "its faults were recorded beside a push: they are what that push came too late for, and not all that was touched"
    )]
    Pushed,
    /// Its bitmaps are none.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

impl Toucher {
    /// The guest of a trace. `outside_ns` is what each recorded fault cost the vCPU besides the pager's part: no work of its own.
    ///
    /// # Errors
    /// When no faults were recorded, or beside a push.
    pub fn from_trace(trace: &Trace, outside_ns: u64) -> Result<Self, GuestError> {
        let drain = trace.drain.as_ref().ok_or(GuestError::NoFaults)?;
        if !drain.held {
            return Err(GuestError::Pushed);
        }
        let missing = drain.missing(trace)?;
        let vcpus = touches(drain, &missing, outside_ns);
        let zero = zeros(&missing, &vcpus, drain.zero_pages);
        Ok(Self {
            name: trace.name.clone(),
            pages: trace.ram_pages,
            hints: if drain.missing.is_some() { hottest(trace, &missing)? } else { Vec::new() },
            missing,
            zero,
            vcpus,
        })
    }
}

/// The hottest of `missing`, from the trace's rounds, as the source finds them.
fn hottest(trace: &Trace, missing: &[u64]) -> Result<Vec<PageIndex>, TraceError> {
    let pages = PageCount(trace.ram_pages);
    let mut heat = Heat::new(pages);
    for epoch in &trace.epochs {
        heat.note_round(&PageBitmap::from_words(&trace.written(epoch)?, pages));
    }
    Ok(heat.hottest(&PageBitmap::from_words(missing, pages), HOTTEST))
}

/// Deals the faults out to vCPUs: each to the one that has run for longest of those that were running. With one vCPU that is
/// exact; with several it is a guess, for a fault does not say whose it is.
fn touches(drain: &Drain, missing: &[u64], outside_ns: u64) -> Vec<Vec<Touch>> {
    let count = usize::try_from(drain.vcpus).unwrap_or(1).max(1);
    // Each touched page with the time between the wake-up before it and its fault, less what is nobody's work.
    let mut vcpus: Vec<Vec<(i64, u64)>> = vec![Vec::new(); count];
    let mut carried = vec![0; count];
    let first = drain.faults.first().map_or(0, |fault| fault.taken_ns);
    let mut runs_from = vec![drain.entry_ns.unwrap_or(first).min(first); count];
    let mut seen = vec![0_u64; missing.len()];
    for fault in &drain.faults {
        let running = (0..count).filter(|vcpu| runs_from[*vcpu] <= fault.taken_ns);
        // Where all seem to wait, the times of the two sides of the pager overlap a little.
        let vcpu =
            running.min_by_key(|vcpu| runs_from[*vcpu]).or_else(|| (0..count).min_by_key(|vcpu| runs_from[*vcpu]));
        let vcpu = vcpu.unwrap_or(0);
        let gap = fault.taken_ns.saturating_sub(runs_from[vcpu]);
        let own = carried[vcpu] + i64::try_from(gap).unwrap_or(i64::MAX / 4) - i64::try_from(outside_ns).unwrap_or(0);
        runs_from[vcpu] = fault.woken_ns.unwrap_or(fault.taken_ns);
        let (word, bit) = (index(fault.page), 1 << (fault.page % 64));
        if fault.answer != FaultAnswer::Local && missing[word] & bit != 0 && seen[word] & bit == 0 {
            vcpus[vcpu].push((own, fault.page));
            carried[vcpu] = 0;
        } else {
            // What was here already is work like any other.
            carried[vcpu] = own;
        }
        seen[word] |= bit;
    }
    vcpus.iter().map(|touches| touches.chunks(WINDOW).flat_map(without_noise).collect()).collect()
}

/// The guest's own work before each touch of a window. What leaving and entering the guest takes scatters by far more than a
/// busy guest works between two touches: cut off at zero, the scatter would add up to work that was never done. So what lies
/// above zero is scaled such that the window's sum comes out right.
fn without_noise(window: &[(i64, u64)]) -> Vec<Touch> {
    let sum: i64 = window.iter().map(|(own, _)| *own).sum();
    let above: i64 = window.iter().map(|(own, _)| (*own).max(0)).sum();
    let share = if above > 0 { (sum.max(0) as f64 / above as f64).min(1.0) } else { 0.0 };
    window
        .iter()
        .map(|(own, page)| Touch { think_ns: super::super::bits::whole(*own as f64 * share), page: *page })
        .collect()
}

/// `wanted` of the missing pages that nobody touches.
fn zeros(missing: &[u64], vcpus: &[Vec<Touch>], wanted: u64) -> Vec<u64> {
    let mut zero = missing.to_vec();
    for touch in vcpus.iter().flatten() {
        zero[index(touch.page)] &= !(1 << (touch.page % 64));
    }
    let mut left = wanted;
    for word in zero.iter_mut().rev() {
        // From the end: a guest uses the start of its RAM first.
        let pages = super::super::bits::lowest(*word, left);
        left -= u64::from(pages.count_ones());
        *word = pages;
    }
    zero
}

/// The word of a page.
#[must_use]
pub fn index(page: u64) -> usize {
    usize::try_from(page / 64).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use switchover_hybrid::report::FaultRecord;

    use super::*;

    fn fault(page: u64, taken_ns: u64, woken_ns: u64) -> FaultRecord {
        FaultRecord { page, taken_ns, woken_ns: Some(woken_ns), answer: FaultAnswer::Remote }
    }

    fn trace(vcpus: u32, faults: Vec<FaultRecord>) -> Trace {
        let mut trace = Trace::new("t", 200);
        trace.drain = Some(Drain { vcpus, held: true, missing: None, zero_pages: 100, entry_ns: Some(90), faults });
        trace
    }

    #[test]
    fn what_lies_between_faults_is_the_guests_own_pace() {
        let faults = vec![fault(5, 100, 150), fault(6, 180, 230), fault(5, 300, 310), fault(150, 340, 400)];
        let guest = Toucher::from_trace(&trace(1, faults), 10).unwrap();
        let touch = |think_ns, page| Touch { think_ns, page };
        assert_eq!(guest.vcpus, [vec![touch(0, 5), touch(20, 6), touch(80, 150)]]);
        assert_eq!(guest.zero.iter().map(|word| word.count_ones()).sum::<u32>(), 100);
        assert_eq!((guest.zero[0] & 0b0110_0000, guest.zero[2] >> 22 & 1), (0, 0), "touched pages are not zero");
    }

    #[test]
    fn scatter_adds_up_to_no_work() {
        let window: Vec<_> = (0..64).map(|page| (if page % 2 == 0 { 1000 } else { -990 }, page)).collect();
        let work: u64 = without_noise(&window).iter().map(|touch| touch.think_ns).sum();
        assert_eq!(work, 32 * 10);
        assert_eq!(without_noise(&[(-5, 1), (3, 2)])[1].think_ns, 0);
    }

    #[test]
    fn two_vcpus_fault_at_once() {
        let faults = vec![fault(1, 100, 200), fault(2, 110, 180), fault(3, 190, 250), fault(4, 230, 300)];
        let guest = Toucher::from_trace(&trace(2, faults), 0).unwrap();
        let pages = |vcpu: usize| guest.vcpus[vcpu].iter().map(|touch| touch.page).collect::<Vec<_>>();
        assert_eq!((pages(0), pages(1)), (vec![1, 4], vec![2, 3]));
        assert_eq!(guest.vcpus[1][1].think_ns, 10);
    }

    #[test]
    fn what_was_recorded_beside_a_push_is_refused() {
        let mut trace = trace(1, vec![fault(5, 100, 150)]);
        trace.drain.as_mut().unwrap().held = false;
        assert!(matches!(Toucher::from_trace(&trace, 0), Err(GuestError::Pushed)));
        trace.drain = None;
        assert!(matches!(Toucher::from_trace(&trace, 0), Err(GuestError::NoFaults)));
    }

    #[test]
    fn the_rounds_say_which_pages_are_hot() {
        use switchover_hybrid::trace::Epoch;
        let mut trace = trace(1, vec![fault(5, 100, 150)]);
        trace.epochs = vec![Epoch::new(1, &[0b1110, 0, 0, 0], &[], None), Epoch::new(1, &[0b1000, 1, 0, 0], &[], None)];
        trace.drain.as_mut().unwrap().missing = Some(Epoch::new(1, &[0b1_1010, 1, 0, 0], &[], None).written);
        let guest = Toucher::from_trace(&trace, 0).unwrap();
        assert_eq!(guest.hints, [3, 64, 1].map(PageIndex), "page 2 is not missing, page 4 is cold");
        assert!(guest.vcpus[0].is_empty(), "page 5 was here");
    }
}
