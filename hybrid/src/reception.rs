//! Who may connect to a destination: one source, with exactly the lanes that it announced. Pure: the sockets are
//! whatever the caller stores.

use std::time::{Duration, Instant};

use switchover_wire::handshake::LaneCounts;
use switchover_wire::types::{LaneId, LaneRole, SessionId};

/// How long a source may take to open its other lanes after the control lane. One that died in between must not keep
/// others out for ever.
const GATHERING_PATIENCE: Duration = Duration::from_secs(10);

/// The lanes of one source, as they come in.
#[derive(Debug)]
pub enum Reception<S> {
    /// Nobody has come.
    Waiting,
    /// A source has opened its control lane; others are missing.
    Gathering(Gathering<S>),
    /// A source has opened all of its lanes: this destination is taken.
    Taken {
        /// Its session.
        session: SessionId,
        /// How many fault lanes it has, or had: memory is divided among as many.
        fault_lanes: usize,
    },
}

/// The lanes that have come in so far.
#[derive(Debug)]
pub struct Gathering<S> {
    session: SessionId,
    since: Instant,
    /// The session was here before, and has lost its lanes.
    again: bool,
    control: S,
    fault: Vec<Option<S>>,
    bulk: Vec<Option<S>>,
}

/// All lanes of a source.
#[derive(Debug)]
pub struct Lanes<S> {
    /// The session that they belong to.
    pub session: SessionId,
    /// They take the place of lanes that were lost.
    pub again: bool,
    /// The control lane.
    pub control: S,
    /// The lanes that carry pages.
    pub pages: Vec<(LaneId, S)>,
}

impl<S> Reception<S> {
    /// A source's control lane. It has been checked for everything else. A source that was connecting gives way when
    /// it takes too long, or when its control lane is not open any more.
    ///
    /// # Errors
    /// Why it cannot be taken, for the source to read.
    pub fn control(
        &mut self,
        session: SessionId,
        lanes: LaneCounts,
        lane: S,
        now: Instant,
        is_open: impl Fn(&S) -> bool,
    ) -> Result<(), String> {
        match self {
            Self::Taken { session: other, .. } | Self::Gathering(Gathering { again: true, session: other, .. }) => {
                return Err(format!("this destination already receives another guest (session {})", other.hint()));
            }
            Self::Gathering(other)
                if now.duration_since(other.since) < GATHERING_PATIENCE && is_open(&other.control) =>
            {
                let hint = other.session.hint();
                return Err(format!("another source is connecting to this destination right now (session {hint})"));
            }
            Self::Gathering(_) | Self::Waiting => {}
        }
        *self = Self::Gathering(Gathering::new(session, lanes, lane, now, false));
        Ok(())
    }

    /// The control lane of a source that joins again. An earlier attempt gives way: the source itself has given it up.
    ///
    /// # Errors
    /// When the session is not the one that has this destination, which says nothing of what became of the guest; or when it
    /// comes with another number of fault lanes.
    pub fn control_again(
        &mut self,
        session: SessionId,
        lanes: LaneCounts,
        lane: S,
        now: Instant,
    ) -> Result<(), String> {
        self.knows(session)?;
        let before = match self {
            Self::Taken { fault_lanes, .. } => *fault_lanes,
            Self::Gathering(last) => last.fault.len(),
            Self::Waiting => usize::from(lanes.fault),
        };
        if usize::from(lanes.fault) != before {
            return Err(format!("{} fault lanes cannot take the place of {before}", lanes.fault));
        }
        *self = Self::Gathering(Gathering::new(session, lanes, lane, now, true));
        Ok(())
    }

    /// Whether this destination was taken by `session`.
    ///
    /// # Errors
    /// Where it was not.
    pub fn knows(&self, session: SessionId) -> Result<(), String> {
        match self {
            Self::Taken { session: own, .. } | Self::Gathering(Gathering { again: true, session: own, .. })
                if *own == session =>
            {
                Ok(())
            }
            _ => Err(format!("session {session} is unknown here, which says nothing of where its guest runs")),
        }
    }

    /// A lane that carries pages.
    ///
    /// # Errors
    /// Why it cannot be taken, for the source to read.
    pub fn page_lane(&mut self, session: SessionId, id: LaneId, lane: S) -> Result<(), String> {
        let Self::Gathering(gathering) = self else {
            return Err(format!("no session {session} is being opened here"));
        };
        if gathering.session != session {
            return Err(format!("the session that is being opened here is not {session}"));
        }
        let slots = match id.role {
            LaneRole::Fault => &mut gathering.fault,
            LaneRole::Bulk => &mut gathering.bulk,
            LaneRole::Control => return Err("the session has its control lane already".to_owned()),
        };
        match slots.get_mut(usize::from(id.index)) {
            None => Err(format!("the {id} was not announced")),
            Some(Some(_)) => Err(format!("the {id} is open already")),
            Some(slot) => {
                *slot = Some(lane);
                Ok(())
            }
        }
    }

    /// Gives a session up whose source could not be answered.
    pub fn forget(&mut self, session: SessionId) {
        match self {
            Self::Gathering(gathering) if gathering.session == session => {
                *self = if gathering.again {
                    Self::Taken { session, fault_lanes: gathering.fault.len() }
                } else {
                    Self::Waiting
                };
            }
            _ => {}
        }
    }

    /// All lanes, once they are complete; this destination is taken then.
    pub fn complete(&mut self) -> Option<Lanes<S>> {
        let Self::Gathering(gathering) = self else { return None };
        if gathering.fault.iter().chain(&gathering.bulk).any(Option::is_none) {
            return None;
        }
        let (session, fault_lanes) = (gathering.session, gathering.fault.len());
        let taken = Self::Taken { session, fault_lanes };
        let Self::Gathering(gathering) = std::mem::replace(self, taken) else { return None };
        let numbered = |role, lanes: Vec<Option<S>>| {
            (0_u8..).zip(lanes.into_iter().flatten()).map(move |(index, lane)| (LaneId { role, index }, lane))
        };
        let pages =
            numbered(LaneRole::Fault, gathering.fault).chain(numbered(LaneRole::Bulk, gathering.bulk)).collect();
        Some(Lanes { session, again: gathering.again, control: gathering.control, pages })
    }
}

impl<S> Gathering<S> {
    fn new(session: SessionId, lanes: LaneCounts, control: S, since: Instant, again: bool) -> Self {
        let room = |count: u8| (0..count).map(|_| None).collect();
        Self { session, since, again, control, fault: room(lanes.fault), bulk: room(lanes.bulk) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: SessionId = SessionId([1; 16]);
    const TWO: SessionId = SessionId([2; 16]);
    const LANES: LaneCounts = LaneCounts { fault: 1, bulk: 2 };

    fn id(role: LaneRole, index: u8) -> LaneId {
        LaneId { role, index }
    }

    #[test]
    fn a_source_takes_the_destination_when_all_its_lanes_are_open() {
        let mut reception = Reception::Waiting;
        reception.control(ONE, LANES, "control", Instant::now(), |_| true).unwrap();
        for (lane, name) in [(id(LaneRole::Bulk, 1), "b1"), (id(LaneRole::Fault, 0), "f0")] {
            reception.page_lane(ONE, lane, name).unwrap();
            assert!(reception.complete().is_none());
        }
        reception.page_lane(ONE, id(LaneRole::Bulk, 0), "b0").unwrap();
        let lanes = reception.complete().unwrap();
        assert_eq!(lanes.control, "control");
        let names: Vec<_> = lanes.pages.iter().map(|(id, name)| (id.role, id.index, *name)).collect();
        assert_eq!(names, [(LaneRole::Fault, 0, "f0"), (LaneRole::Bulk, 0, "b0"), (LaneRole::Bulk, 1, "b1")]);
        let refusal = reception.control(TWO, LANES, "late", Instant::now(), |_| true).unwrap_err();
        assert!(refusal.contains("already receives"), "{refusal}");
        assert!(!refusal.contains(&ONE.to_string()), "whoever knows a session's name may join it: {refusal}");
        assert!(reception.page_lane(ONE, id(LaneRole::Bulk, 0), "again").is_err());
    }

    #[test]
    fn nobody_joins_a_session_that_is_not_theirs() {
        let mut reception = Reception::Waiting;
        assert!(reception.page_lane(ONE, id(LaneRole::Fault, 0), "f").is_err());
        reception.control(ONE, LANES, "c", Instant::now(), |_| true).unwrap();
        assert!(reception.page_lane(TWO, id(LaneRole::Fault, 0), "f").is_err());
        assert!(reception.page_lane(ONE, id(LaneRole::Bulk, 2), "b").unwrap_err().contains("not announced"));
        reception.page_lane(ONE, id(LaneRole::Fault, 0), "f").unwrap();
        assert!(reception.page_lane(ONE, id(LaneRole::Fault, 0), "f").unwrap_err().contains("open already"));
    }

    #[test]
    fn only_the_session_that_was_here_joins_again() {
        let mut reception = Reception::Waiting;
        let lanes = LaneCounts { fault: 1, bulk: 1 };
        let now = Instant::now();
        assert!(reception.control_again(ONE, lanes, "c", now).unwrap_err().contains("unknown"));
        reception.control(ONE, lanes, "c", now, |_| true).unwrap();
        assert!(reception.control_again(ONE, lanes, "c", now).is_err(), "it has not been here yet");
        let open = |reception: &mut Reception<&'static str>| {
            reception.page_lane(ONE, id(LaneRole::Fault, 0), "f").unwrap();
            reception.page_lane(ONE, id(LaneRole::Bulk, 0), "b").unwrap();
            reception.complete().unwrap()
        };
        assert!(!open(&mut reception).again);
        assert!(reception.control_again(TWO, lanes, "c", now).is_err());
        // One attempt after another, each of which may end at any lane.
        reception.control_again(ONE, lanes, "c", now).unwrap();
        reception.page_lane(ONE, id(LaneRole::Fault, 0), "f").unwrap();
        reception.control_again(ONE, lanes, "c", now).unwrap();
        reception.forget(ONE);
        assert!(reception.control(TWO, lanes, "late", now, |_| false).is_err());
        reception.control_again(ONE, lanes, "c", now).unwrap();
        assert!(reception.control(TWO, lanes, "late", now + GATHERING_PATIENCE, |_| false).is_err());
        assert!(open(&mut reception).again);
        assert!(reception.knows(ONE).is_ok() && reception.knows(TWO).is_err());
    }

    #[test]
    fn a_source_joins_again_with_as_many_fault_lanes() {
        let mut reception = Reception::Waiting;
        let now = Instant::now();
        let lanes = |fault| LaneCounts { fault, bulk: 1 };
        reception.control(ONE, lanes(2), "c", now, |_| true).unwrap();
        for lane in [id(LaneRole::Fault, 1), id(LaneRole::Bulk, 0), id(LaneRole::Fault, 0)] {
            assert!(reception.complete().is_none());
            reception.page_lane(ONE, lane, "lane").unwrap();
        }
        assert_eq!(reception.complete().unwrap().pages.len(), 3);
        assert!(reception.control_again(ONE, lanes(1), "c", now).unwrap_err().contains("place of 2"));
        reception.control_again(ONE, lanes(2), "c", now).unwrap();
        assert!(reception.control_again(ONE, lanes(3), "c", now).unwrap_err().contains("place of 2"));
        reception.forget(ONE);
        assert!(reception.control_again(ONE, lanes(1), "c", now).unwrap_err().contains("place of 2"));
    }

    #[test]
    fn a_source_that_went_away_does_not_keep_others_out() {
        let mut reception = Reception::Waiting;
        let then = Instant::now();
        reception.control(ONE, LANES, "one", then, |_| true).unwrap();
        assert!(reception.control(TWO, LANES, "two", then, |_| true).is_err());
        reception.control(TWO, LANES, "two", then + GATHERING_PATIENCE, |_| true).unwrap();
        assert!(reception.page_lane(ONE, id(LaneRole::Fault, 0), "f").is_err());
        reception.control(ONE, LANES, "one", then, |_| false).unwrap();
        reception.forget(ONE);
        reception.forget(TWO);
        reception.control(ONE, LANES, "one", then, |_| true).unwrap();
    }
}
