//! The record that a migration keeps of itself: status, spans of time, instants, and why it failed.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use switchover_wire::clock::{HostClock, Nanos};
use switchover_wire::types::PageCount;

use crate::comparison::Comparison;
use crate::failure::FailureView;
use crate::happening::Happening;
use crate::lanes::Lanes;
use crate::report::{CpuSeconds, Instants, Interruption, PhaseSpan, Side, SideReport};
use crate::settings::{Notice, Observer};
use crate::status::MigrationStatus;

/// Spans and interruptions kept: a link may be lost and joined for ever. What came first is kept.
const SPANS_KEPT: usize = 4096;

/// One side's record, written by its session thread and read by whoever watches.
pub struct Recorder {
    record: Mutex<Record>,
    changed: Condvar,
    observer: Observer,
}

/// What has been recorded so far.
#[derive(Clone, Debug)]
pub struct Record {
    /// Where the migration stands.
    pub status: MigrationStatus,
    /// Why it failed, or why its link is lost.
    pub error: Option<String>,
    /// The same, as a caller acts on it.
    pub failure: Option<FailureView>,
    /// The session's name, once there is one.
    pub session: Option<String>,
    /// When it began.
    pub started: Nanos,
    /// When it was over.
    pub ended: Option<Nanos>,
    /// Statuses and steps, in order of their start.
    pub phases: Vec<PhaseSpan>,
    /// The instants that figures are taken between.
    pub instants: Instants,
    /// Source: when it was told that the guest runs on the destination.
    pub running_heard: Option<Nanos>,
    /// Whether the guest was running when it was paused for the handoff.
    pub was_running: bool,
    /// Both sides read one clock.
    pub same_clock: bool,
    /// Bytes of vCPU and device state.
    pub state_bytes: u64,
    /// What had crossed the lanes when the guest was paused for the handoff, or, on a destination, when that was heard.
    pub bytes_at_pause: Option<u64>,
    /// And when the guest ran on the destination, or, on a source, when that was heard.
    pub bytes_at_running: Option<u64>,
    /// How often the link was lost after the commit.
    pub interruptions: Vec<Interruption>,
    /// Destination: the guest is complete, but the link was lost, for this reason, before its source could say that it knows.
    pub unacknowledged: Option<String>,
    /// What came of comparing guest memory, where that was asked for.
    pub comparison: Option<Comparison>,
    /// The open span of the current status.
    status_span: Option<usize>,
}

impl Recorder {
    /// A record of a migration that has not begun.
    #[must_use]
    pub fn new(observer: Observer) -> Self {
        let record = Record {
            status: MigrationStatus::None,
            error: None,
            failure: None,
            session: None,
            started: Nanos::now(),
            ended: None,
            phases: Vec::new(),
            instants: Instants::default(),
            running_heard: None,
            was_running: true,
            same_clock: false,
            state_bytes: 0,
            bytes_at_pause: None,
            bytes_at_running: None,
            interruptions: Vec::new(),
            unacknowledged: None,
            comparison: None,
            status_span: None,
        };
        Self { record: Mutex::new(record), changed: Condvar::new(), observer }
    }

    /// What has been recorded so far.
    #[must_use]
    pub fn read(&self) -> Record {
        self.lock().clone()
    }

    /// Changes the record.
    pub fn write(&self, change: impl FnOnce(&mut Record)) {
        change(&mut self.lock());
    }

    /// The migration begins now: time counts from here.
    pub fn begin(&self) {
        self.write(|record| record.started = Nanos::now());
        self.set_status(MigrationStatus::Setup);
    }

    /// A destination's source has come: time counts from here, not from when it began to listen.
    pub fn begin_again(&self, session: String) {
        let now = Nanos::now();
        self.write(|record| {
            record.session = Some(session);
            record.started = now;
            if let Some(phase) = record.status_span.and_then(|span| record.phases.get_mut(span)) {
                phase.start_ns = now.0;
            }
        });
    }

    /// Moves to `status`, ending the span of the last.
    pub fn set_status(&self, status: MigrationStatus) {
        let now = Nanos::now();
        {
            let mut record = self.lock();
            if record.status == status {
                return;
            }
            record.status = status;
            if matches!(status, MigrationStatus::PostcopyActive | MigrationStatus::Completed) {
                (record.error, record.failure) = (None, None);
                if status == MigrationStatus::Completed {
                    record.error = record.comparison.as_ref().and_then(Comparison::sentence);
                }
                if let Some(last) = record.interruptions.last_mut().filter(|last| last.joined_ns.is_none()) {
                    last.joined_ns = Some(now.0);
                }
            }
            if let Some(span) = record.status_span.take()
                && let Some(phase) = record.phases.get_mut(span)
            {
                phase.end_ns = Some(now.0);
            }
            if status.is_final() {
                record.ended = Some(now);
            } else if record.phases.len() < SPANS_KEPT {
                record.status_span = Some(record.phases.len());
                record.phases.push(PhaseSpan { name: status.name().to_owned(), start_ns: now.0, end_ns: None });
            }
        }
        self.changed.notify_all();
        (self.observer)(Notice::Status(status));
    }

    /// A round of pre-copy begins.
    pub fn tell_round(&self, round: u32) {
        (self.observer)(Notice::Round(round));
    }

    /// Something has happened that is worth keeping.
    pub fn tell(&self, happening: Happening) {
        (self.observer)(Notice::Happening(happening));
    }

    /// Does `work` and records how long it took.
    pub fn timed<T>(&self, name: &str, work: impl FnOnce() -> T) -> T {
        let start_ns = Nanos::now().0;
        let result = work();
        let end_ns = Some(Nanos::now().0);
        self.write(|record| record.phases.push(PhaseSpan { name: name.to_owned(), start_ns, end_ns }));
        result
    }

    /// The link is lost after the commit.
    pub fn interrupt(&self, failure: FailureView, reason: &str) {
        let sentence = format!("{reason}; {}", failure.guest.sentence());
        self.write(|record| {
            let lost_ns = Nanos::now().0;
            // A rejoin that fails is no interruption of its own.
            if let Some(last) = record.interruptions.last_mut().filter(|last| last.joined_ns.is_none()) {
                last.attempts += 1;
            } else if record.interruptions.len() < SPANS_KEPT {
                let reason = reason.to_owned();
                record.interruptions.push(Interruption { lost_ns, joined_ns: None, attempts: 0, reason });
            }
            record.error = Some(sentence.clone());
            record.failure = Some(failure);
        });
        self.tell(Happening::Trouble { reason: sentence });
        self.set_status(MigrationStatus::PostcopyPaused);
    }

    /// Guest memory was compared.
    pub fn compared(&self, comparison: Comparison) {
        if let Some(sentence) = comparison.sentence() {
            tracing::error!("{sentence}");
        }
        self.write(|record| {
            if record.status == MigrationStatus::Completed {
                record.error = comparison.sentence();
            }
            record.comparison = Some(comparison);
        });
    }

    /// Ends with a failure.
    pub fn fail(&self, failure: FailureView, reason: String) {
        self.write(|record| (record.error, record.failure) = (Some(reason.clone()), Some(failure)));
        self.tell(Happening::Trouble { reason });
        self.set_status(MigrationStatus::Failed);
    }

    /// Waits until the migration is over.
    #[must_use]
    pub fn wait(&self) -> MigrationStatus {
        self.wait_for(MigrationStatus::is_final)
    }

    /// Waits until the status is one of those that are `wanted`.
    #[must_use]
    pub fn wait_for(&self, wanted: impl Fn(MigrationStatus) -> bool) -> MigrationStatus {
        let mut record = self.lock();
        while !wanted(record.status) {
            record = self.changed.wait(record).unwrap_or_else(PoisonError::into_inner);
        }
        record.status
    }

    /// Waits until `done`, but not past `deadline`.
    pub fn wait_until(&self, deadline: Instant, done: impl Fn(&Record) -> bool) {
        let mut record = self.lock();
        while !done(&record) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
            record = self.changed.wait_timeout(record, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Record {
    /// The record as a report, with what only one side knows left empty: pages, faults, rates and CPU time.
    #[must_use]
    pub fn into_report(self, side: Side, lanes: &Lanes, ram: PageCount) -> SideReport {
        SideReport {
            side,
            session: self.session.unwrap_or_default(),
            status: self.status,
            error: self.error,
            failure: self.failure,
            clock: HostClock::here(),
            phases: self.phases,
            instants: self.instants,
            lanes: lanes.bytes(),
            state_bytes: self.state_bytes,
            ram_pages: ram.0,
            pages: None,
            faults: None,
            fault_trace: Vec::new(),
            rates: None,
            cpu: CpuSeconds::default(),
            precopy: None,
            interruptions: self.interruptions,
            unacknowledged: self.unacknowledged,
            comparison: self.comparison,
        }
    }

    /// The blackout as far as this record knows it.
    #[must_use]
    pub fn downtime_ns(&self) -> Option<u64> {
        // A guest that its user had paused stood still anyway.
        let last_exit = self.instants.last_exit_ns.filter(|_| self.was_running)?;
        match self.instants.first_entry_ns {
            Some(first_entry) if self.same_clock => Some(first_entry.saturating_sub(last_exit)),
            _ => Some(self.running_heard?.0.saturating_sub(last_exit)),
        }
    }

    /// Of `transferred` bytes, those that crossed before the pause, while no vCPU ran, and since then.
    #[must_use]
    pub const fn split(&self, transferred: u64) -> [u64; 3] {
        let Some(pause) = self.bytes_at_pause else { return [transferred, 0, 0] };
        let running = match self.bytes_at_running {
            Some(running) => running,
            None => transferred,
        };
        [pause, running.saturating_sub(pause), transferred.saturating_sub(running)]
    }

    /// From the start to the end of `setup`.
    #[must_use]
    pub fn setup_time_ns(&self) -> Option<u64> {
        let setup = self.phases.iter().find(|phase| phase.name == "setup")?;
        Some(setup.end_ns?.saturating_sub(setup.start_ns))
    }

    /// From the start until now, or until the end.
    #[must_use]
    pub fn total_time_ns(&self) -> u64 {
        self.ended.unwrap_or_else(Nanos::now).since(self.started)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::failure::{FailureKind, GuestAfter};

    #[test]
    fn spans_follow_each_other_without_gaps() {
        let recorder = Recorder::new(crate::settings::no_observer());
        recorder.begin();
        recorder.set_status(MigrationStatus::Active);
        recorder.timed("pause", || {});
        recorder.set_status(MigrationStatus::Completed);
        let record = recorder.read();
        let names: Vec<_> = record.phases.iter().map(|phase| phase.name.as_str()).collect();
        assert_eq!(names, ["setup", "active", "pause"]);
        assert_eq!(record.phases[0].end_ns, Some(record.phases[1].start_ns));
        assert!(record.phases.iter().all(|phase| phase.end_ns.is_some()));
        assert!(record.ended.is_some() && record.setup_time_ns().is_some());
    }

    #[test]
    fn each_status_is_told_once() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&told);
        let recorder = Recorder::new(Arc::new(move |notice| {
            if let Notice::Status(status) = notice {
                heard.lock().unwrap().push(status);
            }
        }));
        recorder.begin();
        recorder.set_status(MigrationStatus::Setup);
        let failure = FailureView { kind: FailureKind::Refused, guest: GuestAfter::OnSource };
        recorder.fail(failure, "no".into());
        assert_eq!(recorder.read().failure, Some(failure));
        assert_eq!(*told.lock().unwrap(), [MigrationStatus::Setup, MigrationStatus::Failed]);
        assert_eq!(recorder.wait(), MigrationStatus::Failed);
    }

    #[test]
    fn bytes_are_split_where_the_guest_was_paused_and_where_it_ran_again() {
        let mut record = Recorder::new(crate::settings::no_observer()).read();
        assert_eq!(record.split(9), [9, 0, 0]);
        record.bytes_at_pause = Some(4);
        assert_eq!(record.split(9), [4, 5, 0]);
        record.bytes_at_running = Some(7);
        assert_eq!(record.split(9), [4, 3, 2]);
    }

    #[test]
    fn the_blackout_is_taken_from_one_clock_or_from_what_was_heard() {
        let recorder = Recorder::new(crate::settings::no_observer());
        recorder.write(|record| {
            record.instants.last_exit_ns = Some(1_000);
            record.instants.first_entry_ns = Some(3_000);
            record.running_heard = Some(Nanos(9_000));
        });
        assert_eq!(recorder.read().downtime_ns(), Some(8_000));
        recorder.write(|record| record.same_clock = true);
        assert_eq!(recorder.read().downtime_ns(), Some(2_000));
    }
}
