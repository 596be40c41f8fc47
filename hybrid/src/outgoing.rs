//! A source's migration: the threads that carry out what [`SourceSession`] decides.

mod driver;
mod opening;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use crossbeam::channel::unbounded;
use switchover_pager::cpu::CpuMeter;
use switchover_pager::source::{SourcePager, SourceProgress};
use switchover_wire::address::Address;
use switchover_wire::tls::SessionSecret;
use switchover_wire::types::{PageCount, SessionId};

use crate::error::MigrationError;
use crate::lanes::Lanes;
use crate::link::Teller;
use crate::machine::Machine;
use crate::monitor::{Choice, Limits, Mode};
use crate::progress::Progress;
use crate::recorder::Recorder;
use crate::report::{CpuSeconds, Side, SideReport};
use crate::rounds::Precopy;
use crate::security::Security;
use crate::session::source::{Plan, SourceEvent, SourceSession, WishRefused};
use crate::settings::{Observer, Settings, Tunables};
use crate::status::MigrationStatus;
use crate::watchdog::Watchdog;

/// A migration on its source. Clones are handles to the same one; dropping them changes nothing.
#[derive(Clone)]
pub struct Outgoing {
    shared: Arc<Shared>,
}

struct Shared {
    machine: Arc<dyn Machine>,
    settings: Settings,
    /// What the session's first lanes are protected by.
    security: Security,
    /// What lanes prove to belong to this session, over TLS.
    secret: Mutex<Option<SessionSecret>>,
    recorder: Recorder,
    /// Its name, once it has one.
    name: OnceLock<SessionId>,
    session: Mutex<SourceSession>,
    events: Teller<SourceEvent>,
    cancelled: AtomicBool,
    /// What a controller wants of a lost link, until it is done: one wish at a time.
    wish: Mutex<Option<LostWish>>,
    /// What the destination has said over new lanes that it lacks.
    lacking: Mutex<Option<Vec<u64>>>,
    lanes: Arc<Lanes>,
    /// Ends a send that would keep the guest paused.
    watchdog: Watchdog,
    pager: Mutex<Option<SourcePager>>,
    /// What the pagers of lost links had done.
    past: Mutex<Past>,
    precopy: Mutex<Option<Arc<Precopy>>>,
    /// The thread that conducts the rounds.
    conductor: Mutex<Option<JoinHandle<()>>>,
    tunables: Mutex<Tunables>,
    cpu: CpuMeter,
}

/// What the pagers of lost links leave behind.
#[derive(Clone, Copy, Debug, Default)]
struct Past {
    /// Pages sent as zero and with their bytes, and requests answered.
    zero: u64,
    data: u64,
    requests: u64,
    /// What was left to send when the link was lost, until the next pager knows better.
    left: Option<PageCount>,
}

/// What a controller wants of a lost link.
#[derive(Clone, Debug)]
enum LostWish {
    /// Join it again, there and so.
    Rejoin { to: Address, settings: Box<Settings>, security: Security },
    /// Run the guest here again.
    Reclaim,
}

impl Outgoing {
    /// Starts to migrate `machine` to the destination that listens at `to`, and returns at once.
    ///
    /// # Errors
    /// When the settings ask for what is not built, or no thread can be started.
    pub fn start(
        machine: Arc<dyn Machine>,
        to: Address,
        settings: Settings,
        security: Security,
        observer: Observer,
    ) -> Result<Self, MigrationError> {
        settings.check()?;
        let plan = Plan { rounds: settings.limits.mode != Mode::Postcopy, hold: settings.pause_before_switchover };
        let (events, receiver) = unbounded();
        let lanes = Arc::new(Lanes::default());
        let shared = Arc::new(Shared {
            machine,
            settings,
            security,
            secret: Mutex::new(None),
            recorder: Recorder::new(observer),
            name: OnceLock::new(),
            watchdog: Watchdog::start(Arc::clone(&lanes)).map_err(MigrationError::Thread)?,
            session: Mutex::new(SourceSession::new(plan)),
            events: Teller::new(events),
            cancelled: AtomicBool::new(false),
            wish: Mutex::new(None),
            lacking: Mutex::new(None),
            lanes,
            pager: Mutex::new(None),
            past: Mutex::default(),
            precopy: Mutex::new(None),
            conductor: Mutex::new(None),
            tunables: Mutex::new(settings.tunables()),
            cpu: CpuMeter::default(),
        });
        shared.recorder.begin();
        let driver = Arc::clone(&shared);
        thread::Builder::new()
            .name("migration".to_owned())
            .spawn(move || driver.cpu.measure(|| driver.migrate(&to, &receiver)))
            .map_err(MigrationError::Thread)?;
        Ok(Self { shared })
    }

    /// Hands the guest off: now, or as soon as the destination is prepared.
    ///
    /// # Errors
    /// When the migration is over, or post-copy is not allowed.
    pub fn start_postcopy(&self) -> Result<(), MigrationError> {
        let too_late = |why| MigrationError::TooLate { wish: "start post-copy", why };
        if self.shared.recorder.read().status.is_final() {
            return Err(too_late("the migration is over"));
        }
        if !self.shared.settings.postcopy {
            return Err(MigrationError::PostcopyNotAllowed);
        }
        if self.shared.cancelled.load(Ordering::Acquire) && self.shared.session().can_cancel().is_ok() {
            return Err(too_late("the migration is being cancelled"));
        }
        self.shared.tell(SourceEvent::StartPostcopy).ok_or(too_late("the migration is over"))
    }

    /// Goes on with the handoff of a guest that was paused for it ([`Settings::pause_before_switchover`]).
    ///
    /// # Errors
    /// When it does not wait for this.
    pub fn proceed(&self) -> Result<(), MigrationError> {
        let too_late = || MigrationError::TooLate { wish: "go on", why: "the migration does not wait for it" };
        if !self.shared.session().is_held() {
            return Err(too_late());
        }
        self.shared.tell(SourceEvent::Proceed).ok_or_else(too_late)
    }

    /// Changes what may be changed while it runs; the mode stays. Takes effect within some milliseconds.
    pub fn set_tunables(&self, tunables: Tunables) {
        let shared = &self.shared;
        let limits = Limits { mode: shared.settings.limits.mode, ..tunables.limits };
        let tunables = Tunables { limits, ..tunables };
        // Held until both know: what is started meanwhile takes these from here.
        let mut current = shared.tunables();
        *current = tunables;
        if let Some(precopy) = shared.precopy().as_ref() {
            precopy.set_tunables(tunables);
        }
        if let Some(pager) = shared.pager().as_ref() {
            pager.set_max_bandwidth(tunables.bandwidth.postcopy);
        }
    }

    /// Calls the migration off. Whether that still succeeded is seen from the status: `cancelled`, or else.
    ///
    /// # Errors
    /// When the commit has been sent, or the migration is over: nothing is changed then.
    pub fn cancel(&self) -> Result<(), MigrationError> {
        let too_late = |why| MigrationError::TooLate { wish: "cancel", why };
        // Held until it is noted: a commit cannot come in between.
        let session = self.shared.session();
        session.can_cancel().map_err(|refused| {
            too_late(match refused {
                WishRefused::Committed => "the guest has been handed to the destination already",
                WishRefused::Over | WishRefused::NotLost => "the migration is over",
            })
        })?;
        self.shared.cancelled.store(true, Ordering::Release);
        drop(session);
        self.shared.tell(SourceEvent::Cancel).ok_or(too_late("the migration is over"))?;
        if self.shared.pager().is_none() {
            // The lanes are still being opened: whatever that waits for ends now.
            self.shared.lanes.shut_down();
        }
        Ok(())
    }

    /// Cuts the link of a post-copy, or of one that is joining again, as if it had been lost: the guest runs on with what it has,
    /// until [`resume`](Self::resume).
    ///
    /// # Errors
    /// When the guest does not run on the destination, or is all there.
    pub fn pause(&self) -> Result<(), MigrationError> {
        let status = self.shared.recorder.read().status;
        if !matches!(status, MigrationStatus::PostcopyActive | MigrationStatus::PostcopyRecover) {
            return Err(MigrationError::TooLate { wish: "pause the migration", why: "it is not in post-copy" });
        }
        self.shared.events.of_link().tell(SourceEvent::Lost("its controller paused the migration".to_owned()));
        if status == MigrationStatus::PostcopyRecover {
            // Opening lanes may take long: whatever it waits for ends now.
            self.shared.lanes.shut_down();
        }
        Ok(())
    }

    /// Joins a lost link again: over lanes to `to`, where the destination may listen somewhere else by now. Of `settings`, the
    /// lanes and what bounds them count. Returns at once; whether it succeeded is seen from the status: `postcopy-active`, or
    /// `postcopy-paused` again, which can be tried again without end.
    ///
    /// # Errors
    /// When the link is not lost, another such wish is being carried out, or the settings ask for what cannot be.
    pub fn resume(&self, to: Address, settings: Settings, security: Security) -> Result<(), MigrationError> {
        settings.check()?;
        self.shared.wish_for_lost("resume", LostWish::Rejoin { to, settings: Box::new(settings), security })?;
        // At once: whoever looks after this has returned must not take the last loss for the outcome.
        self.shared.recorder.set_status(MigrationStatus::PostcopyRecover);
        self.shared.tell(SourceEvent::Rejoin).ok_or(MigrationError::NotLost { wish: "resume" })
    }

    /// Runs a guest again that was handed off, because the caller vouches that the destination does not run it and never will: its
    /// host is fenced, or its process is known to be gone. Were that not so, the guest would run twice. What the guest did on the
    /// destination is lost.
    ///
    /// # Errors
    /// When the link is not lost, or is being joined again.
    pub fn reclaim(&self) -> Result<(), MigrationError> {
        self.shared.wish_for_lost("reclaim", LostWish::Reclaim)?;
        self.shared.tell(SourceEvent::Reclaim).ok_or(MigrationError::NotLost { wish: "reclaim" })
    }

    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let shared = &self.shared;
        let record = shared.recorder.read();
        let ram_total = shared.machine.ram().pages().bytes();
        let pager = shared.pager_progress();
        let precopy = shared.precopy().as_ref().map(|precopy| precopy.progress());
        let pages = |of: fn(&SourceProgress) -> u64| pager.as_ref().map_or(0, of);
        let handed_over = record.instants.last_exit_ns.is_some();
        let rounds = precopy.unwrap_or_default();
        let past = *shared.past();
        let remaining = match (past.left, precopy, pager) {
            (Some(left), ..) => left.bytes(),
            (None, Some(precopy), _) if !handed_over => precopy.remaining,
            (None, _, Some(pager)) => pager.remaining.bytes(),
            _ => ram_total,
        };
        let transferred = shared.lanes.transferred();
        let [precopy_bytes, downtime_bytes, postcopy_bytes] = record.split(transferred);
        let encodings = shared.precopy().as_ref().filter(|_| handed_over).map(|precopy| precopy.encodings());
        Progress {
            status: record.status,
            downtime_ns: record.downtime_ns(),
            setup_time_ns: record.setup_time_ns(),
            total_time_ns: record.total_time_ns(),
            ram_total,
            transferred,
            bulk_bytes: shared.lanes.bulk_bytes(),
            remaining,
            zero_pages: pages(|pager| pager.zero) + past.zero + rounds.sent.zero_pages,
            normal_pages: pages(|pager| pager.data) + past.data + rounds.sent.data_pages,
            postcopy_requests: pages(|pager| pager.requests) + past.requests,
            precopy_bytes,
            downtime_bytes,
            postcopy_bytes,
            encodings,
            rounds: rounds.rounds,
            dirty_pages_per_second: rounds.dirty_pages_per_second,
            expected_downtime_ns: rounds.expected_downtime_ns.filter(|_| !handed_over),
            throttle_percent: if handed_over { 0 } else { rounds.throttle_percent },
            waits: None,
            error: record.error,
            failure: record.failure,
            phases: record.phases,
            interruptions: record.interruptions,
        }
    }

    /// What this side knows of it. Complete once it is over.
    #[must_use]
    pub fn report(&self) -> SideReport {
        let shared = &self.shared;
        let record = shared.recorder.read();
        // Only between two readings of one clock is it a blackout.
        let blackout_ns =
            record.downtime_ns().filter(|_| record.same_clock && record.instants.first_entry_ns.is_some());
        let mut report = record.into_report(Side::Source, &shared.lanes, shared.machine.ram().pages());
        report.cpu += CpuSeconds::from(shared.cpu.total());
        if let Some(pager) = shared.pager().as_ref() {
            report.cpu += CpuSeconds::from(pager.cpu());
        }
        if let Some(precopy) = shared.precopy().as_ref() {
            report.cpu += CpuSeconds::from(precopy.cpu());
            let mut rounds = precopy.report();
            if let Some(last) = rounds.decisions.last_mut()
                && matches!(last.verdict.choice, Choice::StopAndCopy | Choice::Postcopy)
            {
                last.actual_blackout_ns = blackout_ns;
            }
            report.precopy = Some(rounds);
        }
        report
    }

    /// Waits until it is over. One whose link is lost after the commit is not: see [`wait_for`](Self::wait_for).
    #[must_use]
    pub fn wait(&self) -> MigrationStatus {
        self.shared.recorder.wait()
    }

    /// Waits until its status is one of those that are `wanted`, which it must come to.
    #[must_use]
    pub fn wait_for(&self, wanted: impl Fn(MigrationStatus) -> bool) -> MigrationStatus {
        self.shared.recorder.wait_for(wanted)
    }
}

impl Shared {
    fn session(&self) -> MutexGuard<'_, SourceSession> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pager(&self) -> MutexGuard<'_, Option<SourcePager>> {
        self.pager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn precopy(&self) -> MutexGuard<'_, Option<Arc<Precopy>>> {
        self.precopy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tunables(&self) -> MutexGuard<'_, Tunables> {
        self.tunables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pager_progress(&self) -> Option<SourceProgress> {
        self.pager().as_ref().map(SourcePager::progress)
    }

    /// Tells the session; `None` when it is over.
    fn tell(&self, event: SourceEvent) -> Option<()> {
        self.events.tell(event).then_some(())
    }

    /// Notes what is wanted of a lost link, for the one caller that comes first.
    fn wish_for_lost(&self, name: &'static str, wanted: LostWish) -> Result<(), MigrationError> {
        // The session cannot leave its phase while this looks, and only a noted wish makes it leave.
        let session = self.session();
        session.is_lost().map_err(|_| MigrationError::NotLost { wish: name })?;
        let mut wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        if wish.is_some() {
            let why = "another controller has it resumed or reclaimed already";
            return Err(MigrationError::TooLate { wish: name, why });
        }
        *wish = Some(wanted);
        Ok(())
    }
}
