//! The post-copy of a recorded migration: which pages were missing, and each fault on them.
//!
//! A trace that was recorded while nothing was pushed ([`Drain::held`]) shows the guest's first touch of every page, in order,
//! and between them its own pace. One that was recorded beside a push shows only what the push came too late for.

use serde::{Deserialize, Serialize};

use super::{Trace, TraceError};
use crate::report::{FaultRecord, RateSeries, SideReport};

/// Faults that a trace may hold: four times as many as a pager keeps.
const MOST_FAULTS: usize = 1 << 20;
/// vCPUs that a guest may have.
const MOST_VCPUS: u32 = 4096;

/// What happened after the handoff.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Drain {
    /// vCPUs of the guest.
    pub vcpus: u32,
    /// Nothing was pushed while the faults were recorded.
    pub held: bool,
    /// The pages that were to come: a bitmap in base64. Absent: all of RAM.
    #[serde(default)]
    pub missing: Option<String>,
    /// How many of them were zero.
    #[serde(default)]
    pub zero_pages: u64,
    /// When the first vCPU entered the guest, on the clock of the faults.
    #[serde(default)]
    pub entry_ns: Option<u64>,
    /// Every fault, in the order in which they were taken.
    pub faults: Vec<FaultRecord>,
}

impl Drain {
    /// What the two sides told of it.
    ///
    /// # Errors
    /// When no faults were recorded.
    pub fn from_reports(source: &SideReport, destination: &SideReport, vcpus: u32) -> Result<Self, TraceError> {
        if destination.fault_trace.is_empty() {
            return Err(TraceError::NoFaults);
        }
        let mut faults = destination.fault_trace.clone();
        faults.sort_by_key(|fault| fault.taken_ns);
        let held = end_at_push(&mut faults, destination.rates.as_ref());
        Ok(Self {
            vcpus,
            held,
            missing: source.precopy.as_ref().and_then(|precopy| precopy.missing.clone()),
            zero_pages: destination.pages.as_ref().map_or(0, |pages| pages.zero),
            entry_ns: destination.instants.first_entry_ns,
            faults,
        })
    }

    /// The pages that were to come, in words of 64: as much memory as there are pages of RAM, a bit each.
    ///
    /// # Errors
    /// When its text is no bitmap of `trace`'s RAM.
    pub fn missing(&self, trace: &Trace) -> Result<Vec<u64>, TraceError> {
        let Some(text) = &self.missing else {
            let mut words = vec![u64::MAX; trace.words()];
            if let (Some(last), 1..) = (words.last_mut(), trace.ram_pages % 64) {
                *last = (1 << (trace.ram_pages % 64)) - 1;
            }
            return Ok(words);
        };
        trace.decode(text)
    }

    pub(super) fn check(&self, trace: &Trace) -> Result<(), TraceError> {
        let unsound = |reason: &str| Err(TraceError::Unsound(reason.to_owned()));
        if self.vcpus == 0 || self.vcpus > MOST_VCPUS {
            return unsound("its guest has no vCPUs, or more than 4096 of them");
        }
        if self.faults.is_empty() || self.faults.len() > MOST_FAULTS {
            return unsound("it has no faults, or more than a million of them");
        }
        let mut before = 0;
        for fault in &self.faults {
            if fault.page >= trace.ram_pages {
                return unsound("a fault of it is on a page past the end of RAM");
            }
            if fault.taken_ns < before {
                return unsound("its faults are not in the order of time");
            }
            if fault.woken_ns.is_some_and(|woken| woken < fault.taken_ns) {
                return unsound("a fault of it was answered before it was taken");
            }
            before = fault.taken_ns;
        }
        self.missing.as_ref().map_or(Ok(()), |text| trace.decode(text).map(drop))
    }
}

/// Leaves those of `faults`, which are in order, that came before anything was pushed, if those are most of them. Says whether.
///
/// From the first pushed page on faults are those that the push came too late for, and no longer all first touches.
fn end_at_push(faults: &mut Vec<FaultRecord>, rates: Option<&RateSeries>) -> bool {
    let pushed = rates.and_then(|rates| {
        let slice = rates.pushed.iter().position(|pages| *pages > 0)? as u64;
        Some(rates.start_ns.saturating_add(slice.saturating_mul(rates.slice_ns)))
    });
    let before = pushed.map_or(faults.len(), |at| faults.partition_point(|fault| fault.taken_ns < at));
    let held = before > 0 && before >= faults.len() / 2;
    if held {
        faults.truncate(before);
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::FaultAnswer;

    fn fault(page: u64, taken_ns: u64) -> FaultRecord {
        FaultRecord { page, taken_ns, woken_ns: Some(taken_ns + 5), answer: FaultAnswer::Remote }
    }

    fn trace() -> Trace {
        let mut trace = Trace::new("drained", 100);
        let faults = vec![fault(7, 20), fault(99, 30)];
        trace.drain = Some(Drain { vcpus: 1, held: true, missing: None, zero_pages: 9, entry_ns: Some(25), faults });
        trace
    }

    #[test]
    fn a_trace_of_faults_alone_survives_being_written_down() {
        let read = Trace::from_json(&trace().to_json().unwrap()).unwrap();
        assert_eq!(read, trace());
        let drain = read.drain.as_ref().unwrap();
        assert_eq!(drain.missing(&read).unwrap(), [u64::MAX, (1 << 36) - 1]);
    }

    #[test]
    fn a_push_that_was_let_go_ends_what_is_recorded() {
        let faults = || vec![fault(1, 100), fault(3, 120), fault(9, 230)];
        let pages = |pushed| {
            let rates = RateSeries { start_ns: 100, slice_ns: 50, faults: Vec::new(), pushed };
            let mut faults = faults();
            let held = end_at_push(&mut faults, Some(&rates));
            (held, faults.iter().map(|fault| fault.page).collect::<Vec<_>>())
        };
        assert_eq!(pages(vec![0, 0, 5]), (true, vec![1, 3]));
        assert_eq!(pages(vec![]), (true, vec![1, 3, 9]));
        assert_eq!(pages(vec![5, 0, 5]), (false, vec![1, 3, 9]));
    }

    #[test]
    fn what_cannot_be_played_is_refused() {
        type Break = (&'static str, fn(&mut Drain));
        let broken: [Break; 7] = [
            ("no vCPUs", |drain| drain.vcpus = 0),
            ("4096", |drain| drain.vcpus = 5000),
            ("no faults", |drain| drain.faults.clear()),
            ("past the end", |drain| drain.faults[1].page = 100),
            ("order of time", |drain| drain.faults.swap(0, 1)),
            ("before it was taken", |drain| drain.faults[0].woken_ns = Some(1)),
            ("bitmap", |drain| drain.missing = Some("*".to_owned())),
        ];
        for (word, breaks) in broken {
            let mut trace = trace();
            breaks(trace.drain.as_mut().unwrap());
            let error = Trace::from_json(&trace.to_json().unwrap()).unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}
