//! Opening a source's lanes, for the first time and in place of lost ones, and listening to them.

use std::error::Error;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use switchover_pager::cpu;
use switchover_pager::lane::{Notify, PageLane, PagerEvent};
use switchover_pager::source::SourcePager;
use switchover_precopy::rounds::{Rounds, RoundsSettings};
use switchover_wire::address::Address;
use switchover_wire::clock::{HostClock, Nanos};
use switchover_wire::handshake::{HandshakeError, Hello, LaneCounts, VERSION_MAX, VERSION_MIN, greet};
use switchover_wire::message::ControlMessage;
use switchover_wire::socket::Socket;
use switchover_wire::tls::SessionSecret;
use switchover_wire::types::{LaneId, LaneRole, SessionId};

use super::{LostWish, Shared};
use crate::capability;
use crate::control::{Control, Listener};
use crate::failure::FailureKind;
use crate::happening::Happening;
use crate::link::LinkTeller;
use crate::missing::MissingPages;
use crate::monitor::Mode;
use crate::rounds::Precopy;
use crate::security::Security;
use crate::session::source::SourceEvent;
use crate::settings::Settings;

/// How long the destination's host may take to accept a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Why a link could not be opened.
pub(super) struct Unopened {
    pub kind: FailureKind,
    pub reason: String,
}

impl From<String> for Unopened {
    /// Something that this side lacks.
    fn from(reason: String) -> Self {
        Self { kind: FailureKind::Machine, reason }
    }
}

impl Unopened {
    fn unreachable(error: &dyn Error) -> Self {
        Self { kind: FailureKind::Unreachable, reason: error.to_string() }
    }

    fn handshake(lane: LaneId, error: &HandshakeError) -> Self {
        let kind = match error {
            HandshakeError::Refused { .. } | HandshakeError::Tls { .. } | HandshakeError::Plain { .. } => {
                FailureKind::Refused
            }
            _ => FailureKind::Unreachable,
        };
        Self { kind, reason: format!("cannot open the {lane}: {error}") }
    }
}

/// Where to, and how protected.
struct Way<'a> {
    to: &'a Address,
    security: &'a Security,
}

/// Open lanes.
struct Opened {
    control: Arc<Socket>,
    pages: Vec<PageLane>,
    /// The shortest that was seen.
    round_trip: Duration,
}

impl Shared {
    /// Opens all lanes and starts what serves them.
    pub(super) fn open(self: &Arc<Self>, to: &Address) -> Result<Control, Unopened> {
        let session = SessionId::random().map_err(|error| format!("cannot name the session: {error}"))?;
        let session = *self.name.get_or_init(|| session);
        self.recorder.write(|record| record.session = Some(session.to_string()));
        let Opened { control, pages, round_trip } =
            self.open_lanes(to, session, &self.settings, &self.security, capability::POSTCOPY)?;
        let events = self.events.of_link();
        let notify = notify(events.clone());
        let tunables = self.tunables();
        if self.settings.limits.mode != Mode::Postcopy {
            let bulk: Vec<_> = pages.iter().filter(|lane| lane.id.role == LaneRole::Bulk).cloned().collect();
            let rounds =
                RoundsSettings { packing: self.settings.packing, bytes_per_second: tunables.bandwidth.precopy };
            let log = self.machine.dirty_log();
            let rounds = Rounds::start(&self.machine.ram(), log, &bulk, rounds, &notify);
            let rounds = rounds.map_err(|error| error.to_string())?;
            let precopy = Precopy::new(rounds, &*self.machine, *tunables, round_trip);
            *self.precopy() = Some(Arc::new(precopy));
        }
        self.start_pager(pages, tunables.bandwidth.postcopy, &notify)?;
        drop(tunables);
        self.begin_link(&control, self.settings.silence, events)
    }

    /// Opens new lanes in place of those that were lost, to a destination that is to say first where it stands.
    pub(super) fn open_again(self: &Arc<Self>) -> Result<Control, Unopened> {
        let wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(LostWish::Rejoin { to, settings, security }) = wish else {
            return Err("nobody has said where the destination is now".to_owned().into());
        };
        let session = *self.name.get().ok_or_else(|| "the session was never begun".to_owned())?;
        let capabilities = capability::POSTCOPY | capability::REJOIN;
        // Memory is divided for the lanes that there were.
        let settings = Settings { fault_lanes: self.settings.fault_lanes, ..*settings };
        let Opened { control, pages, .. } = self.open_lanes(&to, session, &settings, &security, capabilities)?;
        let events = self.events.of_link();
        let mut tunables = self.tunables();
        tunables.bandwidth = settings.bandwidth;
        self.start_pager(pages, tunables.bandwidth.postcopy, &notify(events.clone()))?;
        drop(tunables);
        self.begin_link(&control, settings.silence, events)
    }

    /// In place of the last link's pager, whose threads have ended.
    fn start_pager(&self, lanes: Vec<PageLane>, max_bandwidth: u64, notify: &Notify) -> Result<(), String> {
        let next = SourcePager::start(self.machine.ram(), lanes, max_bandwidth, notify);
        let next = next.map_err(|error| error.to_string())?;
        if let Some(last) = self.pager().replace(next) {
            let done = last.progress();
            let mut past = self.past();
            // The new one knows nothing before it serves.
            past.left.get_or_insert(done.remaining);
            past.zero += done.zero;
            past.data += done.data;
            past.requests += done.requests;
            self.cpu.add(last.cpu());
        }
        Ok(())
    }

    fn open_lanes(
        &self,
        to: &Address,
        session: SessionId,
        settings: &Settings,
        security: &Security,
        capabilities: u64,
    ) -> Result<Opened, Unopened> {
        let lanes = LaneCounts { fault: settings.fault_lanes, bulk: settings.bulk_lanes };
        // A TLS record notices whatever happened to it on the way.
        let checksums = settings.checksums && security.tls.is_none();
        let compare = self.settings.verify_memory;
        let capabilities = capabilities
            | if checksums { capability::CHECKSUMS } else { 0 }
            | if compare { capability::COMPARE } else { 0 };
        let hello = |role, index| Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            session,
            lane: LaneId { role, index },
            lanes,
            description: (role == LaneRole::Control).then(|| self.machine.describe()),
            clock: HostClock::here(),
            capabilities,
            proof: None,
        };
        let way = Way { to, security };
        // What a link that is joined again is proved with is that of the first.
        let again = capabilities & capability::REJOIN != 0;
        let first = self.secret().clone().filter(|_| again);
        let (control, _) = self.open_lane(&way, hello(LaneRole::Control, 0), first.as_ref())?;
        let secret = control.tls().map(|tls| match &first {
            Some(first) => tls.session_secret_again(first),
            None => tls.session_secret(),
        });
        if !again {
            (*self.secret()).clone_from(&secret);
        }
        let mut pages = Vec::new();
        let fault = (0..lanes.fault).map(|index| (LaneRole::Fault, index));
        let bulk = (0..lanes.bulk).map(|index| (LaneRole::Bulk, index));
        let mut round_trip = Duration::MAX;
        for (role, index) in fault.chain(bulk) {
            let (socket, took) = self.open_lane(&way, hello(role, index), secret.as_ref())?;
            round_trip = round_trip.min(took);
            pages.push(PageLane { id: LaneId { role, index }, socket, checksums });
        }
        Ok(Opened { control, pages, round_trip })
    }

    /// Listens to the control lane, and for signs of life.
    fn begin_link(
        self: &Arc<Self>,
        socket: &Arc<Socket>,
        silence: Duration,
        events: LinkTeller<SourceEvent>,
    ) -> Result<Control, Unopened> {
        let told = events.clone();
        let silent = move || {
            let _ = told.tell(SourceEvent::Lost(format!("nothing was heard of the destination for {silence:?}")));
        };
        let (control, listener) = Control::open(socket, &self.lanes, silence, silent)?;
        let shared = Arc::clone(self);
        thread::Builder::new()
            .name("control lane".to_owned())
            .spawn(move || shared.cpu.measure(|| shared.listen(listener, &events)))
            .map_err(|error| format!("cannot start a thread for the control lane: {error}"))?;
        Ok(control)
    }

    fn secret(&self) -> MutexGuard<'_, Option<SessionSecret>> {
        self.secret.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a lane, which proves that it knows `secret`. Says how long a round trip took.
    fn open_lane(
        &self,
        &Way { to, security }: &Way<'_>,
        mut hello: Hello,
        secret: Option<&SessionSecret>,
    ) -> Result<(Arc<Socket>, Duration), Unopened> {
        if self.cancelled.load(Ordering::Acquire) && hello.capabilities & capability::REJOIN == 0 {
            return Err("cancelled".to_owned().into());
        }
        let began = Instant::now();
        let socket = Arc::new(Socket::connect(to, CONNECT_PATIENCE).map_err(|error| Unopened::unreachable(&error))?);
        self.lanes.add(hello.lane, Arc::clone(&socket));
        socket.tune(hello.lane.role).map_err(|error| error.to_string())?;
        let failed = |error| Unopened::handshake(hello.lane, &error);
        security.secure_source(&socket, to).map_err(failed)?;
        let secured = Instant::now();
        if let (Some(tls), Some(secret)) = (socket.tls(), secret) {
            hello.proof = Some(tls.prove(secret, hello.session, hello.lane));
        }
        let welcome = greet(&socket, &hello).map_err(failed)?;
        // Connecting, the challenge and the answer are a round trip each; the handshake of TLS, which has no challenge behind it,
        // has much to compute.
        let round_trip = if socket.tls().is_some() { secured.elapsed() } else { began.elapsed() / 3 };
        let same_clock = welcome.clock.same_host(&hello.clock);
        self.recorder.write(|record| record.same_clock = same_clock);
        self.recorder.tell(Happening::opened(hello.lane, hello.session, socket.peer()));
        Ok((socket, round_trip))
    }

    /// The control lane's thread: turns what the destination says into events.
    fn listen(&self, mut listener: Listener, events: &LinkTeller<SourceEvent>) {
        cpu::be_prompt();
        let mut standing = None;
        loop {
            let event = match listener.next() {
                Ok(ControlMessage::Standing { committed, complete: true }) => {
                    SourceEvent::Standing { committed, complete: true }
                }
                Ok(ControlMessage::Standing { committed, complete: false }) => {
                    standing = Some((committed, MissingPages::new(self.machine.ram().pages())));
                    continue;
                }
                Ok(ControlMessage::Missing { first, pages, set, .. })
                    if let Some((committed, missing)) = &mut standing =>
                {
                    match missing.add(first, pages, &set) {
                        Ok(None) => continue,
                        Ok(Some(words)) => {
                            *self.lacking.lock().unwrap_or_else(PoisonError::into_inner) = Some(words);
                            SourceEvent::Standing { committed: *committed, complete: false }
                        }
                        Err(reason) => SourceEvent::Lost(reason),
                    }
                }
                Ok(ControlMessage::Digests { first, digests }) if self.settings.verify_memory => {
                    match self.comparer.hear(first, &digests, self.machine.ram().pages()) {
                        Ok(()) => continue,
                        Err(reason) => SourceEvent::Lost(reason),
                    }
                }
                Ok(ControlMessage::Prepared { .. }) => SourceEvent::Prepared,
                Ok(ControlMessage::Restored) => SourceEvent::Restored,
                Ok(ControlMessage::Refused { reason }) => SourceEvent::Refused(reason),
                Ok(ControlMessage::Running { first_entry_ns }) => {
                    let now = Nanos::now();
                    // After a rejoin it is told again: the blackout ended with the first time.
                    self.recorder.write(|record| {
                        record.running_heard.get_or_insert(now);
                        record.instants.first_entry_ns = record.instants.first_entry_ns.or(first_entry_ns);
                        record.bytes_at_running.get_or_insert_with(|| self.lanes.transferred());
                    });
                    self.recorder.tell(Happening::Running);
                    SourceEvent::Running
                }
                Ok(ControlMessage::Drained { first_entry_ns, last_page_ns }) => {
                    self.recorder.write(|record| {
                        record.instants.first_entry_ns = first_entry_ns.or(record.instants.first_entry_ns);
                        record.instants.last_page_ns = Some(last_page_ns);
                    });
                    SourceEvent::Drained
                }
                Ok(other) => {
                    SourceEvent::Lost(format!("the destination sent {}, which only a source says", other.name()))
                }
                Err(reason) => SourceEvent::Lost(reason),
            };
            let over = matches!(event, SourceEvent::Lost(_) | SourceEvent::Drained | SourceEvent::Refused(_));
            if !events.tell(event) || over {
                return;
            }
        }
    }
}

/// What a pager's threads tell, as events of its link.
fn notify(events: LinkTeller<SourceEvent>) -> Notify {
    Arc::new(move |event| {
        let event = match event {
            PagerEvent::AllPushed | PagerEvent::Complete => return,
            PagerEvent::LaneFailed { lane, reason } => {
                // Where the guest turns out to be complete, nobody else says it.
                tracing::warn!(%lane, reason, "a lane has failed");
                SourceEvent::LaneLost(format!("the {lane} failed: {reason}"))
            }
            PagerEvent::Broken { reason } => SourceEvent::Lost(reason),
        };
        let _ = events.tell(event);
    })
}
