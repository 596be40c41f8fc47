//! Who connects to a destination, and what for.

use std::io;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use switchover_pager::lane::{FAULT_LANES_LIMIT, PageLane};
use switchover_wire::clock::{HostClock, Nanos};
use switchover_wire::description::describe_mismatches;
use switchover_wire::handshake::{Hello, LaneCounts, Welcome, accept, read_hello, refuse};
use switchover_wire::message::ControlMessage;
use switchover_wire::socket::{Listener, Socket};
use switchover_wire::tls::SessionSecret;
use switchover_wire::types::{LaneId, LaneRole};

use super::Shared;
use super::driver::NO_THREAD;
use super::gate::{Displaced, Place};
use crate::capability;
use crate::comparison::Comparison;
use crate::control::Control;
use crate::happening::Happening;
use crate::lanes::BULK_LANES_LIMIT;
use crate::reception;
use crate::recorder::Record;
use crate::session::destination::DestinationEvent;
use crate::status::MigrationStatus;

/// How long the session may take to let go of a link that its source has lost: less than that waits for an answer to its handshake.
const LETTING_GO_PATIENCE: Duration = Duration::from_secs(3);

/// A lane that was taken.
#[derive(Debug)]
pub(super) struct Admitted {
    pub socket: Arc<Socket>,
    /// The source has said that what it sends on it carries checksums.
    pub checksums: bool,
    /// And that guest memory is to be compared.
    compare: bool,
}

impl Admitted {
    /// As a lane that carries pages.
    pub fn into_page_lane(self, id: LaneId) -> PageLane {
        PageLane { id, socket: self.socket, checksums: self.checksums }
    }
}

impl Shared {
    /// Starts a listener's thread.
    pub(super) fn accept_at(self: &Arc<Self>, listener: &Arc<Listener>) -> io::Result<()> {
        let (shared, listener) = (Arc::clone(self), Arc::clone(listener));
        thread::Builder::new().name("listener".to_owned()).spawn(move || shared.accept_all(&listener)).map(drop)
    }

    /// The listener's thread. It goes on while a session is under way, so that others are refused with a reason.
    fn accept_all(self: &Arc<Self>, listener: &Listener) {
        loop {
            match listener.accept() {
                Ok(Some(socket)) => self.receive(socket),
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "the destination can no longer be connected to");
                    return;
                }
            }
        }
    }

    /// Starts a connection's handshake on a thread of its own: a slow peer must not keep others waiting. Waits for a place.
    fn receive(self: &Arc<Self>, socket: Socket) {
        let socket = Arc::new(socket);
        let place = self.gate.enter(&socket, |Displaced(gone)| {
            self.not_taken(gone.peer(), "too many others are in their handshake, and it has been there for longest");
        });
        let (shared, shaking) = (Arc::clone(self), Arc::clone(&socket));
        let spawned = thread::Builder::new().name("handshake".to_owned()).spawn(move || {
            if let Err(reason) = shared.shake_hands(&shaking, &place) {
                shared.not_taken(shaking.peer(), &reason);
            }
        });
        if let Err(error) = spawned {
            self.not_taken(socket.peer(), &format!("no thread could be started for its handshake: {error}"));
        }
    }

    /// A connection was not taken: says so, unless there are many.
    fn not_taken(&self, peer: &str, reason: &str) {
        let telling = self.not_taken.lock().unwrap_or_else(PoisonError::into_inner).one_more(Instant::now());
        if telling.passed_over > 0 {
            let count = telling.passed_over;
            tracing::warn!(count, "connections were not taken, beside those that are told of one by one");
            self.recorder.tell(Happening::MoreNotTaken { count });
        }
        if telling.this {
            tracing::warn!(peer, reason, "a connection was not taken");
            self.recorder.tell(Happening::NotTaken { peer: peer.to_owned(), reason: reason.to_owned() });
        }
    }

    fn shake_hands(self: &Arc<Self>, socket: &Arc<Socket>, place: &Place) -> Result<(), String> {
        self.security.secure_destination(socket).map_err(|error| error.to_string())?;
        let introduction = read_hello(socket).map_err(|error| error.to_string())?;
        let hello = introduction.proven(socket).map_err(|error| error.to_string())?;
        // It speaks, and is no recording: it can no longer be dropped for its silence.
        place.is_known();
        if let Err(reason) = self.admit(&hello, socket) {
            let _ = refuse(socket, &reason);
            return Err(format!("refused: {reason}"));
        }
        let clock = HostClock::here();
        let same_clock = clock.same_host(&hello.clock);
        let welcome = Welcome { version: hello.common_version().unwrap_or_default(), clock };
        let welcomed = socket.tune(hello.lane.role).map_err(|error| error.to_string());
        let welcomed = welcomed.and_then(|()| accept(socket, &welcome).map_err(|error| error.to_string()));
        if let Err(reason) = welcomed {
            self.reception().forget(hello.session);
            return Err(reason);
        }
        self.recorder.tell(Happening::opened(hello.lane, hello.session, socket.peer()));
        let complete = self.reception().complete();
        if let Some(lanes) = complete {
            self.recorder.write(|record| record.same_clock = same_clock);
            if lanes.again { self.join(lanes) } else { self.begin(lanes) }
        }
        Ok(())
    }

    /// Whether this lane may be taken; it has its place then.
    fn admit(&self, hello: &Hello, socket: &Arc<Socket>) -> Result<(), String> {
        let (session, lane) = (hello.session, hello.lane);
        let checksums = hello.capabilities & capability::CHECKSUMS != 0;
        let compare = hello.capabilities & capability::COMPARE != 0;
        let admitted = Admitted { socket: Arc::clone(socket), checksums, compare };
        if lane.role != LaneRole::Control {
            let mut reception = self.reception();
            if let Some(secret) = &*self.secret() {
                check_proof(secret, hello, socket)?;
            }
            return reception.page_lane(session, lane, admitted);
        }
        let again = hello.capabilities & capability::REJOIN != 0;
        if again {
            let reception = self.reception();
            reception.knows(session)?;
            // Before anything is done for it: whoever knows the session's name alone must not be able to cut its link.
            if let Some(secret) = &*self.secret() {
                check_proof(secret, hello, socket)?;
            }
        }
        let unknown = hello.capabilities & !capability::KNOWN;
        if unknown != 0 {
            return Err(format!("the source asks for capabilities {unknown:#x}, which this destination does not have"));
        }
        let LaneCounts { fault, bulk } = hello.lanes;
        if !(1..=FAULT_LANES_LIMIT).contains(&fault) || !(1..=BULK_LANES_LIMIT).contains(&bulk) {
            return Err(format!(
                "the source wants {fault} fault and {bulk} bulk lanes; this destination takes 1 to {FAULT_LANES_LIMIT} and 1 to \
                 {BULK_LANES_LIMIT}"
            ));
        }
        let source = hello.description.as_ref().ok_or("the source did not describe its machine")?;
        let mismatches = self.machine.describe().mismatches(source);
        if !mismatches.is_empty() {
            return Err(describe_mismatches(&mismatches));
        }
        if again {
            self.lose_old_link()?;
        }
        let mut reception = self.reception();
        let mut secret = self.secret();
        let now = Instant::now();
        if again {
            reception.control_again(session, hello.lanes, admitted, now)?;
        } else {
            reception.control(session, hello.lanes, admitted, now, |control| control.socket.is_open())?;
        }
        *secret = socket.tls().map(|tls| match &*secret {
            Some(before) if again => tls.session_secret_again(before),
            _ => tls.session_secret(),
        });
        Ok(())
    }

    /// A source joins again because it has lost its link, which may seem whole from here. Waits until the session has let go of
    /// it.
    fn lose_old_link(&self) -> Result<(), String> {
        if self.may_be_joined() && self.recorder.read().status != MigrationStatus::PostcopyRecover {
            return Ok(());
        }
        self.events.of_link().tell(DestinationEvent::Lost("the source has lost the link, and joins again".to_owned()));
        // The session may be sending over it.
        self.lanes.shut_down();
        let waits = |record: &Record| record.status.is_final() || record.status == MigrationStatus::PostcopyPaused;
        self.recorder.wait_until(Instant::now() + LETTING_GO_PATIENCE, waits);
        if self.may_be_joined() {
            Ok(())
        } else {
            let status = self.recorder.read().status;
            Err(format!("this destination is in state `{status}`, in which nobody can join it again"))
        }
    }

    /// A source has joined again over new lanes.
    fn join(self: &Arc<Self>, lanes: reception::Lanes<Admitted>) {
        if self.recorder.read().unacknowledged.is_some() {
            self.answer_at_last(&lanes);
            return;
        }
        *self.joined.lock().unwrap_or_else(PoisonError::into_inner) = Some(lanes);
        // Where the session has ended meanwhile, nobody else takes them.
        if !self.events.tell(DestinationEvent::Rejoined)
            && let Some(lanes) = self.take_joined()
        {
            self.answer_at_last(&lanes);
        }
    }

    /// The lanes of a source that has joined again, for whoever is first.
    pub(super) fn take_joined(&self) -> Option<reception::Lanes<Admitted>> {
        self.joined.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The guest is complete and the session over; only its source does not know.
    pub(super) fn answer_at_last(&self, lanes: &reception::Lanes<Admitted>) {
        self.lanes.add(LaneId { role: LaneRole::Control, index: 0 }, Arc::clone(&lanes.control.socket));
        match self.tell_complete(&lanes.control.socket) {
            Ok(()) => {
                self.recorder.write(|record| {
                    record.instants.drained_ns = Some(Nanos::now().0);
                    record.unacknowledged = None;
                });
                self.close_listeners();
            }
            Err(reason) => tracing::warn!(reason, "the source still does not know that its guest is complete here"),
        }
        self.lanes.retire();
        lanes.pages.iter().for_each(|(_, lane)| lane.socket.shutdown());
    }

    /// Tells a source over its control lane that all is here, and waits until it knows. One that says nothing is given up.
    fn tell_complete(&self, lane: &Arc<Socket>) -> Result<(), String> {
        let (mut control, mut listener) = Control::open(lane, &self.lanes, *self.silence(), || {})?;
        let standing = ControlMessage::Standing { committed: true, complete: true };
        let digests = self.digests().into_iter();
        let mut said = digests.chain([standing]);
        let mut told = said.try_for_each(|message| control.send(&message)).map_err(|error| error.to_string());
        while told.is_ok() {
            match listener.next() {
                Ok(ControlMessage::DrainedAck) => break,
                Ok(ControlMessage::Compared { differing }) => self.recorder.compared(Comparison::of(&differing)),
                Ok(_) => {}
                Err(reason) => told = Err(reason),
            }
        }
        lane.shutdown();
        control.end();
        told
    }

    /// All lanes are open: the session's thread takes over.
    fn begin(self: &Arc<Self>, lanes: reception::Lanes<Admitted>) {
        self.lanes.add(LaneId { role: LaneRole::Control, index: 0 }, Arc::clone(&lanes.control.socket));
        *self.compared.lock().unwrap_or_else(PoisonError::into_inner) = lanes.control.compare.then_some(lanes.session);
        let session = lanes.session.to_string();
        self.recorder.begin_again(session);
        let pages: Vec<PageLane> = lanes.pages.into_iter().map(|(id, lane)| lane.into_page_lane(id)).collect();
        for lane in &pages {
            self.lanes.add(lane.id, Arc::clone(&lane.socket));
        }
        let driver = Arc::clone(self);
        let control = lanes.control.socket;
        let spawned = thread::Builder::new()
            .name("migration".to_owned())
            .spawn(move || driver.cpu.measure(|| driver.migrate(&control, pages)));
        if let Err(error) = spawned {
            self.lanes.shut_down();
            self.close_listeners();
            self.recorder.fail(NO_THREAD, format!("cannot start the migration's thread: {error}"));
        }
    }
}

/// Over TLS: whether a lane belongs to the session that it names.
fn check_proof(secret: &SessionSecret, hello: &Hello, socket: &Socket) -> Result<(), String> {
    match (socket.tls(), hello.proof) {
        (Some(tls), Some(proof)) => tls.verify(secret, proof, hello.session, hello.lane),
        _ => Err(format!("the {} does not prove that it belongs to session {}", hello.lane, hello.session.hint())),
    }
}
