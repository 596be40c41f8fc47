//! A cell of the table: a migration that has come exactly as far as its phase, and stays there until something happens to it.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::link::{Link, Mark, Message, Role, Toward};
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, Way, choose, destination, migrate_as, set, switch};
use switchover_guest_tests::waiting::until;

/// How far a migration has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The destination has taken two of the lanes; the source waits for the second answer.
    Handshake,
    /// A round of pre-copy has begun, and the destination has not heard of it.
    Round(u8),
    /// The guest is paused. Nothing of its handoff has arrived.
    Pausing,
    /// The state is sent, and has not arrived.
    StateSent,
    /// The destination has loaded it, and the source has not heard of it.
    Restored,
    /// The commit is sent, and will not arrive.
    CommitLost,
    /// The commit has arrived, and the source has not heard of it.
    CommitSent,
    /// The guest runs, both sides know it, and its memory follows.
    Running,
    /// As before, and half of it is there.
    HalfDrained,
    /// Everything is there, and the source has not heard of it.
    Drained,
    /// The source knows it, and the destination has not heard of that.
    Acknowledged,
}

/// How the memory is moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plan {
    /// Behind the guest.
    Postcopy,
    /// Before it, in rounds that do not end.
    Rounds,
    /// Before it, all of it.
    StopAndCopy,
}

/// Every phase, in every kind of migration that has it.
pub const CELLS: [(Plan, Phase); 19] = [
    (Plan::Postcopy, Phase::Handshake),
    (Plan::Rounds, Phase::Round(1)),
    (Plan::Rounds, Phase::Round(3)),
    (Plan::Postcopy, Phase::Pausing),
    (Plan::StopAndCopy, Phase::Pausing),
    (Plan::Postcopy, Phase::StateSent),
    (Plan::StopAndCopy, Phase::StateSent),
    (Plan::Postcopy, Phase::Restored),
    (Plan::StopAndCopy, Phase::Restored),
    (Plan::Postcopy, Phase::CommitLost),
    (Plan::StopAndCopy, Phase::CommitLost),
    (Plan::Postcopy, Phase::CommitSent),
    (Plan::StopAndCopy, Phase::CommitSent),
    (Plan::Postcopy, Phase::Running),
    (Plan::Postcopy, Phase::HalfDrained),
    (Plan::Postcopy, Phase::Drained),
    (Plan::StopAndCopy, Phase::Drained),
    (Plan::Postcopy, Phase::Acknowledged),
    (Plan::StopAndCopy, Phase::Acknowledged),
];

/// Where a phase leaves the guest, which is all that the outcome depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// It is the source's, and both sides know it.
    Source,
    /// It is the source's, and only the source knows it.
    SourceAlone,
    /// It is the destination's, and the destination does not know it.
    Nowhere,
    /// It is the destination's, and its memory is not there.
    Split,
    /// It is all at the destination, and the source does not know it.
    Destination,
    /// It is all at the destination, and both sides know it.
    Moved,
}

impl Phase {
    /// What is held so that a migration comes to this phase, and no further.
    const fn mark(self) -> Mark {
        match self {
            Self::Handshake => Mark::Greeting(Role::Fault, Toward::Source),
            Self::Round(number) => Mark::Message(Message::Round(number)),
            Self::Pausing => Mark::Message(Message::Missing),
            Self::StateSent => Mark::Message(Message::State),
            Self::Restored => Mark::Message(Message::Restored),
            Self::CommitLost => Mark::Message(Message::Commit),
            Self::CommitSent => Mark::Message(Message::Running),
            // What the handoff itself pushes is less.
            Self::Running => Mark::Bytes(Role::Bulk, Toward::Destination, 1 << 20),
            Self::HalfDrained => Mark::Bytes(Role::Bulk, Toward::Destination, 8 << 20),
            Self::Drained => Mark::Message(Message::Drained),
            Self::Acknowledged => Mark::Message(Message::DrainedAck),
        }
    }

    /// Whether the guest stands still in it, while it is the source's.
    const fn is_paused(self) -> bool {
        matches!(self, Self::Pausing | Self::StateSent | Self::Restored)
    }
}

/// The guest: 16 MiB, and faults so seldom that they do not bring it before it is pushed.
pub const GUEST: &str = "ws=16M period=50 pace=1000000";

/// How long a guest may stand still at its source from when the failure was seen.
const RESUMED_WITHIN: Duration = Duration::from_secs(1);

/// How long it takes to see that nothing is heard any more, and a look's length.
const SILENCE: Duration = Duration::from_millis(5_500);

/// Two machines and what is between them.
pub struct Cell {
    pub plan: Plan,
    pub phase: Phase,
    pub source: Machine,
    pub there: Machine,
    pub link: Link,
    pub journey: Journey,
    pub spec: Spec,
    /// Its link stalls, and nobody is told.
    pub silent: bool,
    /// What the guest had printed at the source when that was first seen to wait.
    printed: Option<usize>,
}

impl Cell {
    /// A migration that has come as far as `phase`.
    pub fn reach(lab: &Lab, plan: Plan, phase: Phase) -> Self {
        println!("-- {plan:?}, {phase:?}");
        let cell = Self::begin(lab, plan, phase, &lab.guest("random", GUEST));
        cell.come_to_phase()
    }

    /// The machines, and nothing under way.
    pub fn begin(lab: &Lab, plan: Plan, phase: Phase, spec: &Spec) -> Self {
        let source = Machine::start(lab, spec);
        let mut journey = Journey::from(&source);
        journey.works_on(1);
        let (there, to) = destination(lab, spec, Transport::Tcp);
        let link = Link::to(&to);
        Self { plan, phase, source, there, link, journey, spec: spec.clone(), silent: false, printed: None }
    }

    /// Starts it, and waits until it has come to its phase.
    pub fn come_to_phase(mut self) -> Self {
        self.link.hold(self.phase.mark());
        self.start();
        if self.plan == Plan::Postcopy && self.phase != Phase::Handshake {
            self.source.execute("migrate-start-postcopy", json!({}));
        }
        self.link.wait_held();
        if matches!(self.phase, Phase::Running | Phase::HalfDrained) {
            self.source.wait_migration("postcopy-active");
            self.there.wait_migration("postcopy-active");
        }
        self
    }

    /// Starts it.
    pub fn start(&mut self) {
        let source = &mut self.source;
        switch(source, "events", true);
        source.qmp().take_events();
        // So that bytes are pages.
        set(source, json!({ "x-switchover-compression": "off" }));
        match self.plan {
            // A single lane: what is held on it is not sent on another.
            Plan::Postcopy => choose(source, Way::new("postcopy", 1)),
            Plan::Rounds => {
                choose(source, Way::new("precopy", 2));
                set(source, json!({ "downtime-limit": 0, "x-switchover-max-rounds": 1_000_000_000 }));
            }
            Plan::StopAndCopy => {
                choose(source, Way::new("precopy", 2));
                set(source, json!({ "downtime-limit": 10_000 }));
            }
        }
        source.execute("migrate", json!({ "uri": self.link.address() }));
    }

    /// Where the guest is now.
    pub const fn place(&self) -> Place {
        match (self.phase, self.plan) {
            (Phase::Handshake | Phase::Round(_) | Phase::Pausing | Phase::StateSent, _) => Place::Source,
            (Phase::Restored, _) => Place::SourceAlone,
            (Phase::CommitLost, _) => Place::Nowhere,
            (Phase::CommitSent, Plan::Postcopy) | (Phase::Running | Phase::HalfDrained, _) => Place::Split,
            (Phase::CommitSent | Phase::Drained, _) => Place::Destination,
            (Phase::Acknowledged, _) => Place::Moved,
        }
    }

    /// The status and the reason that a side gives, once it has one of these statuses.
    pub fn status(machine: &mut Machine, wanted: &[&str]) -> (String, String) {
        let what = format!("a migration is one of {wanted:?}");
        let look = until(&what, || {
            let look = machine.execute("query-migrate", json!({}));
            wanted.contains(&look["status"].as_str()?).then_some(look)
        });
        let text = |key: &str| look[key].as_str().unwrap_or_default().to_owned();
        println!("   {}: {}", text("status"), text("error-desc"));
        (text("status"), text("error-desc"))
    }

    /// The guest has never left: it runs at the source as before, and can be moved from there.
    pub fn source_goes_on(&mut self, status: &str) {
        let (_, error) = Self::status(&mut self.source, &[status]);
        if status == "failed" {
            assert!(error.contains("unharmed on the source"), "{error}");
        }
        assert_eq!(self.source.run_state(), "running");
        let mut events = Vec::new();
        let paused = usize::from(self.phase.is_paused());
        until("it has been told that the guest runs again", || {
            self.source.run_state();
            events.extend(self.source.qmp().take_events());
            let count = |name: &str| events.iter().filter(|event| event["event"] == name).count();
            assert!(count("STOP") <= paused && count("RESUME") <= paused, "{events:#?}");
            (count("RESUME") == paused).then_some(())
        });
        if let (Some(struck), true) = (self.link.struck(), self.phase.is_paused()) {
            let since = instant(events.iter().find(|event| event["event"] == "RESUME").unwrap()).duration_since(struck);
            let limit = RESUMED_WITHIN + if self.silent { SILENCE } else { Duration::ZERO };
            assert!(since.as_ref().is_ok_and(|since| *since < limit), "it ran again {since:?} after the blow");
        }
        // Nothing of the migration holds the guest back, or watches what it writes: whoever needs that for himself can have it.
        self.source.execute("calc-dirty-rate", json!({ "calc-time": 1, "mode": "dirty-bitmap" }));
        self.journey.works_on(1);
        let rate = self.source.execute("query-dirty-rate", json!({}));
        assert!(matches!(rate["status"].as_str(), Some("measuring" | "measured")), "{rate:#}");
    }

    /// The guest runs at the source, wherever it has been.
    pub fn source_runs(&mut self) {
        Self::status(&mut self.source, &["failed"]);
        assert_eq!(self.source.run_state(), "running");
        self.journey.works_on(1);
    }

    /// The guest that has never left is moved after all, with everything a migration needs of its machine.
    pub fn moves_after_all(mut self, lab: &Lab) {
        let (mut next, to) = destination(lab, &self.spec, Transport::Unix);
        set(&mut self.source, json!({ "downtime-limit": 10_000 }));
        migrate_as(&mut self.source, &mut next, &to, Way::new("precopy", 1));
        self.source.quit();
        self.journey.goes_to(&next);
        self.journey.works_on(1);
        next.quit();
        self.journey.log();
    }

    /// The destination has no guest and will have none of this source: it has ended, or waits for another, where this one had not
    /// opened all of its lanes.
    pub fn there_ends(&mut self) {
        if self.phase == Phase::Handshake {
            Self::status(&mut self.there, &["setup"]);
            assert_eq!(self.there.run_state(), "inmigrate");
            return self.there.quit();
        }
        assert_eq!(self.there.wait_end(), 1);
        let said = self.there.stderr().to_end();
        println!("   {}", said.lines().last().unwrap_or_default());
        assert!(said.contains("the incoming migration failed"), "{said}");
        assert!(self.there.serial().to_end().is_empty(), "a guest ran without a commit");
    }

    /// Whether the destination waits for its source; otherwise it has ended, or waits for another.
    pub fn there_is_paused(&mut self) -> bool {
        self.there_decides() == Some("postcopy-paused".to_owned())
    }

    /// Whether the destination waits without having run the guest; otherwise it has it, or all that it can get of it.
    pub fn there_is_undecided(&mut self) -> bool {
        self.there_is_paused() && self.there.run_state() == "inmigrate"
    }

    /// The destination's last status; `None` where it has ended.
    fn there_decides(&mut self) -> Option<String> {
        until("the destination has ended, or waits", || {
            if self.there.has_ended().is_some() {
                return Some(None);
            }
            // It may end between the two looks.
            let look = self.there.qmp().execute("query-migrate", json!({})).ok()?;
            let status = look["status"].as_str()?;
            matches!(status, "postcopy-paused" | "completed").then(|| Some(status.to_owned()))
        })
    }

    /// The destination waits for its source, and runs no guest: only the source knows whether it may.
    pub fn there_waits_without_a_guest(&mut self) {
        Self::status(&mut self.there, &["postcopy-paused"]);
        assert_ne!(self.there.run_state(), "running");
        let refusal = self.there.refuses("cont", json!({}));
        println!("   cont: {refusal}");
        assert!(self.there.serial().is_empty(), "a guest ran without a commit");
    }

    /// The source waits, and does not run the guest, whatever it is told.
    pub fn source_waits(&mut self) {
        Self::status(&mut self.source, &["postcopy-paused"]);
        assert_eq!(self.source.run_state(), "postmigrate");
        assert!(!self.source.refuses("cont", json!({})).is_empty());
        assert!(self.source.refuses("quit", json!({})).contains("only here yet"));
        assert!(!self.source.refuses("migrate_cancel", json!({})).is_empty());
        let printed = self.source.serial().len_of_all();
        assert_eq!(printed, *self.printed.get_or_insert(printed), "the guest ran at a source that had given it away");
    }

    /// The source joins again, over whatever leads to the destination now, until it has succeeded.
    pub fn join_again(&mut self, to: &str) {
        let what = "the source has joined again";
        let mut last = Value::Null;
        until(what, || {
            last = self.source.execute("query-migrate", json!({}));
            match last["status"].as_str()? {
                "postcopy-active" | "completed" => return Some(()),
                // It may have failed and be tried again, or have been asked for just now.
                "postcopy-paused" => drop(self.source.qmp().execute("migrate", json!({ "uri": to, "resume": true }))),
                "postcopy-recover" => {}
                other => panic!("{other}: {last:#}"),
            }
            None
        });
    }

    /// The guest has moved as a whole, and works.
    pub fn ends_well(mut self) {
        self.source.wait_migration("completed");
        self.there.wait_migration("completed");
        assert_eq!((self.source.run_state().as_str(), self.there.run_state().as_str()), ("postmigrate", "running"));
        self.source.quit();
        let printed = self.source.serial().to_end().len();
        assert_eq!(printed, self.printed.unwrap_or(printed), "the guest ran at both sides");
        // Had it run at both, what it has said would not be one text.
        self.journey.goes_to(&self.there);
        self.journey.works_on(2);
        self.there.quit();
        self.journey.log();
    }
}

/// When an event happened.
fn instant(event: &Value) -> SystemTime {
    let part = |name: &str| event["timestamp"][name].as_u64().unwrap();
    SystemTime::UNIX_EPOCH + Duration::from_secs(part("seconds")) + Duration::from_micros(part("microseconds"))
}
