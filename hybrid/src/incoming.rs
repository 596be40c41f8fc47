//! A destination's migration: listening for a source, and what is known of it.

mod connecting;
mod driver;
mod gate;
mod tally;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, unbounded};
use switchover_pager::collapse::Collapse;
use switchover_pager::cpu::CpuMeter;
use switchover_pager::destination::{DestinationPager, DestinationProgress};
use switchover_wire::address::Address;
use switchover_wire::clock::Nanos;
use switchover_wire::socket::Listener;
use switchover_wire::tls::SessionSecret;
use switchover_wire::types::SessionId;

use self::connecting::Admitted;
use self::gate::Gate;
use self::tally::Tally;
use crate::error::MigrationError;
use crate::lanes::Lanes;
use crate::link::{Teller, Told};
use crate::machine::Machine;
use crate::progress::Progress;
use crate::reception::{self, Reception};
use crate::recorder::Recorder;
use crate::report::{CpuSeconds, PageClasses, Side, SideReport, fault_report, rate_series};
use crate::security::Security;
use crate::session::destination::DestinationEvent;
use crate::settings::{Observer, Settings};
use crate::status::MigrationStatus;

/// A migration on its destination. Clones are handles to the same one; dropping them changes nothing, but that with the last one
/// a complete guest's memory is mapped as huge pages no further.
#[derive(Clone)]
pub struct Incoming {
    shared: Arc<Shared>,
}

struct Shared {
    machine: Arc<dyn Machine>,
    settings: Settings,
    /// What every lane must be protected by.
    security: Security,
    /// What lanes must prove to belong to the session, over TLS. Changed and looked at with the reception held.
    secret: Mutex<Option<SessionSecret>>,
    /// How long the source may be silent; a link has what there was when it began.
    silence: Mutex<Duration>,
    recorder: Recorder,
    listener: Arc<Listener>,
    /// Where a source that lost its link may come to, beside where it came to first.
    recovery: Mutex<Option<Arc<Listener>>>,
    reception: Mutex<Reception<Admitted>>,
    /// Connections whose peer is not known yet.
    gate: Arc<Gate>,
    not_taken: Mutex<Tally>,
    lanes: Arc<Lanes>,
    events: Teller<DestinationEvent>,
    /// The lanes of a source that has joined again, until the session takes them up.
    joined: Mutex<Option<reception::Lanes<Admitted>>>,
    pager: Mutex<Option<DestinationPager>>,
    /// Maps the complete guest's memory as huge pages, for as long as somebody has a handle.
    collapse: Mutex<Option<Collapse>>,
    /// The session whose guest's memory is to be compared.
    compared: Mutex<Option<SessionId>>,
    /// The session's events, until its thread takes them.
    heard: Mutex<Option<Receiver<Told<DestinationEvent>>>>,
    cpu: CpuMeter,
}

impl Incoming {
    /// Listens at `at` for one source that wants to give its guest to `machine`. Bound when it returns.
    ///
    /// # Errors
    /// When the address cannot be bound, or no thread can be started.
    pub fn listen(
        machine: Arc<dyn Machine>,
        at: &Address,
        settings: Settings,
        security: Security,
        observer: Observer,
    ) -> Result<Self, MigrationError> {
        let (events, receiver) = unbounded();
        let listener = Arc::new(listen_at(at, &security)?);
        let shared = Arc::new(Shared {
            machine,
            settings,
            security,
            secret: Mutex::new(None),
            silence: Mutex::new(settings.silence),
            recorder: Recorder::new(observer),
            listener,
            recovery: Mutex::new(None),
            reception: Mutex::new(Reception::Waiting),
            gate: Arc::default(),
            not_taken: Mutex::default(),
            lanes: Arc::default(),
            events: Teller::new(events),
            joined: Mutex::new(None),
            compared: Mutex::new(None),
            heard: Mutex::new(Some(receiver)),
            pager: Mutex::new(None),
            collapse: Mutex::new(None),
            cpu: CpuMeter::default(),
        });
        shared.recorder.begin();
        shared.accept_at(&shared.listener).map_err(MigrationError::Thread)?;
        Ok(Self { shared })
    }

    /// Where it listens, with the port that the kernel chose where 0 was asked for.
    #[must_use]
    pub fn address(&self) -> Address {
        self.shared.listener.address()
    }

    /// Where it listens for a source that lost its link, after [`recover`](Self::recover).
    #[must_use]
    pub fn recovery_address(&self) -> Option<Address> {
        self.shared.recovery().as_ref().map(|listener| listener.address())
    }

    /// Listens at `at` too, for the source of this migration to join a lost link again: its old way here may be the one that is
    /// cut. In place of where an earlier call let it listen. Returns where that is, bound.
    ///
    /// # Errors
    /// When the link is not lost, or the address cannot be bound.
    pub fn recover(&self, at: &Address) -> Result<Address, MigrationError> {
        let shared = &self.shared;
        if !shared.may_be_joined() {
            return Err(MigrationError::NotLost { wish: "recover" });
        }
        let mut recovery = shared.recovery();
        // Let go first: it may be the same address.
        if let Some(last) = recovery.take() {
            last.close();
        }
        let listener = Arc::new(listen_at(at, &shared.security)?);
        shared.accept_at(&listener).map_err(MigrationError::Thread)?;
        let address = listener.address();
        *recovery = Some(listener);
        drop(recovery);
        // It may have come to its end meanwhile, which closed the listeners that there were.
        if !shared.may_be_joined() {
            shared.close_listeners();
            return Err(MigrationError::NotLost { wish: "recover" });
        }
        Ok(address)
    }

    /// Cuts the link of a post-copy, or of one that is joining again, as if it had been lost: the guest runs on with what it has,
    /// until its source joins again.
    ///
    /// # Errors
    /// When the guest does not run here, or is all here.
    pub fn pause(&self) -> Result<(), MigrationError> {
        let missing = self.shared.pager().as_ref().map_or(0, |pager| pager.progress().missing);
        let status = self.shared.recorder.read().status;
        if !matches!(status, MigrationStatus::PostcopyActive | MigrationStatus::PostcopyRecover) || missing == 0 {
            return Err(MigrationError::TooLate { wish: "pause the migration", why: "it is not in post-copy" });
        }
        self.shared.events.of_link().tell(DestinationEvent::Lost("its controller paused the migration".to_owned()));
        Ok(())
    }

    /// Changes how long the source may be silent ([`Settings::silence`]), from its next link on.
    pub fn set_silence(&self, silence: Duration) {
        *self.shared.silence() = silence;
    }

    /// Listens no longer, and ends a migration that has not had its commit. One that has goes on.
    pub fn close(&self) {
        self.shared.close_listeners();
        if self.shared.recorder.read().instants.commit_ns.is_none() {
            self.shared.lanes.shut_down();
        }
        // One that waits for its source, which may never come, has no lanes any more.
        let _ = self.shared.events.tell(DestinationEvent::Closed);
    }

    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let shared = &self.shared;
        let record = shared.recorder.read();
        let ram_total = shared.machine.ram().pages();
        let (seen, waits) = shared.pager().as_ref().map_or_else(
            || (DestinationProgress { missing: ram_total.0, ..DestinationProgress::default() }, None),
            |pager| (pager.progress(), Some(pager.waits())),
        );
        let transferred = shared.lanes.transferred();
        let [precopy_bytes, downtime_bytes, postcopy_bytes] = record.split(transferred);
        Progress {
            status: record.status,
            downtime_ns: record.downtime_ns(),
            setup_time_ns: record.setup_time_ns(),
            total_time_ns: record.total_time_ns(),
            ram_total: ram_total.bytes(),
            transferred,
            precopy_bytes,
            downtime_bytes,
            postcopy_bytes,
            bulk_bytes: shared.lanes.bulk_bytes(),
            remaining: switchover_wire::types::PageCount(seen.missing).bytes(),
            zero_pages: seen.zero + seen.precopied_zero,
            normal_pages: seen.pushed + seen.requested + seen.precopied,
            postcopy_requests: seen.requests,
            waits: waits.filter(|_| record.instants.commit_ns.is_some()),
            error: record.error,
            failure: record.failure,
            phases: record.phases,
            interruptions: record.interruptions,
            comparison: record.comparison,
            ..Progress::default()
        }
    }

    /// What this side knows of it. Complete once it is over.
    #[must_use]
    pub fn report(&self) -> SideReport {
        let shared = &self.shared;
        let record = shared.recorder.read();
        let mut report = record.into_report(Side::Destination, &shared.lanes, shared.machine.ram().pages());
        report.cpu += CpuSeconds::from(shared.cpu.total());
        report.instants.first_entry_ns =
            report.instants.commit_ns.and_then(|_| shared.machine.first_entry()).map(|at| at.0);
        if let Some(pager) = shared.pager().as_ref() {
            report.cpu += CpuSeconds::from(pager.cpu());
            let seen = pager.progress();
            report.pages = Some(PageClasses {
                precopied: seen.kept,
                zero: seen.zero,
                pushed: seen.pushed,
                requested: seen.requested,
                discarded: seen.discarded,
            });
            let stats = pager.fault_stats();
            report.instants.last_page_ns = pager.last_placed().map(|at| at.0);
            // What came between the handoff and the commit belongs to it.
            let handed_over = report.phases.iter().find(|phase| phase.name == "hand-over").map(|phase| phase.start_ns);
            let start =
                report.instants.commit_ns.map(|commit| handed_over.map_or(commit, |handoff| handoff.min(commit)));
            report.rates = start.map(|start| rate_series(&stats, pager, Nanos(start)));
            report.faults = fault_report(&stats).ok();
            report.fault_trace = pager.traced_faults().into_iter().map(Into::into).collect();
        }
        report
    }

    /// Waits until it is over. One whose link is lost after the commit is not: see [`wait_for`](Self::wait_for).
    #[must_use]
    pub fn wait(&self) -> MigrationStatus {
        self.shared.recorder.wait()
    }

    /// Waits until nothing more comes over the link that there is, but not past `deadline`: all has come, or the link is lost.
    pub fn wait_for_the_rest(&self, deadline: Instant) {
        use MigrationStatus as Is;
        let goes_on = |status| matches!(status, Is::Active | Is::Device | Is::PostcopyActive | Is::PostcopyRecover);
        self.shared.recorder.wait_until(deadline, |record| !goes_on(record.status));
    }

    /// Waits until its status is one of those that are `wanted`, which it must come to.
    #[must_use]
    pub fn wait_for(&self, wanted: impl Fn(MigrationStatus) -> bool) -> MigrationStatus {
        self.shared.recorder.wait_for(wanted)
    }
}

/// Listens, where it may.
fn listen_at(at: &Address, security: &Security) -> Result<Listener, MigrationError> {
    let listener = Listener::bind(at)?;
    if security.takes_others() || listener.is_within_host() {
        Ok(listener)
    } else {
        Err(MigrationError::Plain { at: at.clone() })
    }
}

impl Shared {
    fn pager(&self) -> MutexGuard<'_, Option<DestinationPager>> {
        self.pager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reception(&self) -> MutexGuard<'_, Reception<Admitted>> {
        self.reception.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn secret(&self) -> MutexGuard<'_, Option<SessionSecret>> {
        self.secret.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn silence(&self) -> MutexGuard<'_, Duration> {
        self.silence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recovery(&self) -> MutexGuard<'_, Option<Arc<Listener>>> {
        self.recovery.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a source that was here has reason to come again.
    fn may_be_joined(&self) -> bool {
        let record = self.recorder.read();
        matches!(record.status, MigrationStatus::PostcopyPaused | MigrationStatus::PostcopyRecover)
            || record.unacknowledged.is_some()
    }

    fn close_listeners(&self) {
        self.listener.close();
        if let Some(recovery) = self.recovery().take() {
            recovery.close();
        }
    }
}
