//! The simulated world: virtual time, what happens in it, and what must hold after each step.

use std::collections::BTreeMap;

use super::destination_side::DestinationSide;
use super::mishaps::{Failing, Mishap, When};
use super::network::{End, Link};
use super::random::Dice;
use super::source_side::SourceSide;
use crate::session::Outcome;
use crate::session::destination::{DestinationAction, DestinationEvent, DestinationSession};
use crate::session::source::{Ending, SourceEvent};

/// Microseconds since the beginning.
pub type Time = u64;

/// Pages of guest memory. Few, so that everything happens to each.
pub const PAGES: usize = 10;
pub const ALL_PAGES: u32 = (1 << PAGES) - 1;

/// More steps than any migration takes.
const STEPS: usize = 100_000;

/// What happens at some instant.
#[derive(Debug)]
pub enum Happening {
    Arrives {
        link: usize,
        to: End,
        lane: usize,
    },
    /// A session's thread looks for something to do.
    Turn(End),
    /// Nothing was heard for the whole patience.
    Silence {
        link: usize,
        end: End,
        heard: u64,
    },
    Watchdog(Time),
    Prepared,
    Loaded,
    Round,
    Push {
        link: usize,
    },
    /// A source asks for a lane of a new link.
    Hello {
        link: usize,
        lane: usize,
    },
    /// The session had long enough to let go of its old link.
    LettingGoEnds {
        link: usize,
    },
    /// What the destination says to that.
    Answer {
        link: usize,
        lane: usize,
        refusal: Option<&'static str>,
    },
    Joined {
        link: usize,
    },
    Rejoined,
    /// A wish that was found to be allowed some time ago reaches the session.
    Wish(SourceEvent),
    Operator,
    Heal {
        link: usize,
    },
}

/// How a migration is meant to go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scenario {
    pub rounds: bool,
    pub hold: bool,
    /// What the rounds decide.
    pub ending: Ending,
    /// The controller asks for the handoff while the rounds are going on.
    pub impatient: bool,
}

pub struct World {
    pub now: Time,
    order: u64,
    agenda: BTreeMap<(Time, u64), Happening>,
    pub dice: Dice,
    pub scenario: Scenario,
    pub links: Vec<Link>,
    pub source: SourceSide,
    pub destination: DestinationSide,
    /// What the guest has last written.
    pub truth: [u32; PAGES],
    pub last_written: u32,
    pub failing: Failing,
    /// What is still to go wrong, and when.
    pub mishaps: Vec<(When, Mishap)>,
    pub steps: usize,
    pub struck: u32,
    /// The operator has done what can be done, so often.
    pub looks: u32,
    pub settled: bool,
    /// The commit may have been submitted to a socket.
    pub commit_submitted: bool,
    pub violation: Option<String>,
    trace: Option<Vec<String>>,
}

impl World {
    pub fn new(seed: u64, traced: bool) -> Self {
        let mut dice = Dice::new(seed);
        let rounds = dice.one_in(2);
        let scenario = Scenario {
            rounds,
            hold: dice.one_in(4),
            ending: dice.pick(&[Ending::Postcopy, Ending::StopAndCopy]),
            impatient: rounds && dice.one_in(3),
        };
        let mishaps = Mishap::some(&mut dice);
        let mut world = Self {
            now: 0,
            order: 0,
            agenda: BTreeMap::new(),
            scenario,
            links: Vec::new(),
            source: SourceSide::new(scenario),
            destination: DestinationSide::new(),
            truth: [0; PAGES],
            last_written: 0,
            failing: Failing::default(),
            mishaps,
            steps: 0,
            struck: 0,
            looks: 0,
            settled: false,
            commit_submitted: false,
            violation: None,
            trace: traced.then(Vec::new),
            dice,
        };
        world.note(|| format!("{scenario:?}"));
        world.begin();
        world
    }

    /// Lanes are open, and the guest has worked.
    fn begin(&mut self) {
        for page in 0..PAGES {
            if !self.dice.one_in(3) {
                self.last_written += 1;
                self.truth[page] = self.last_written;
            }
        }
        self.source.memory = self.truth;
        let bulk = 1 + self.dice.index(3);
        self.links.push(Link::new(2 + bulk));
        self.source_begins();
        self.destination_begins();
        self.at(1000, Happening::Operator);
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        let (seconds, micros) = (self.now / 1_000_000, self.now % 1_000_000);
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{seconds:>4}.{micros:06}  {}", line()));
        }
    }

    pub fn trace(self) -> Vec<String> {
        self.trace.unwrap_or_default()
    }

    /// An invariant.
    pub fn must(&mut self, holds: bool, otherwise: &str) {
        if !holds && self.violation.is_none() {
            self.note(|| format!("VIOLATION: {otherwise}"));
            self.violation = Some(otherwise.to_owned());
        }
    }

    /// Lets something happen after `delay`.
    pub fn at(&mut self, delay: Time, what: Happening) {
        self.order += 1;
        self.agenda.insert((self.now + delay, self.order), what);
    }

    pub fn wake(&mut self, end: End) {
        let delay = if self.dice.one_in(10) { self.dice.below(5_000) } else { self.dice.below(100) };
        self.at(delay, Happening::Turn(end));
    }

    pub fn is_alive(&self, end: End) -> bool {
        match end {
            End::Source => self.source.alive,
            End::Destination => self.destination.alive,
        }
    }

    /// From beginning to end, or to the first violation.
    pub fn run(&mut self) {
        while self.violation.is_none() && !self.settled {
            self.steps += 1;
            self.must(self.steps < STEPS, "it goes on and on");
            self.comes_to(None);
            self.check();
            let Some(((now, _), what)) = self.agenda.pop_first() else {
                return self.must(false, "nothing happens any more, and it is not over");
            };
            self.now = now;
            self.happens(what);
            if self.dice.one_in(2) {
                self.guest_works();
            }
            self.check();
        }
    }

    fn happens(&mut self, what: Happening) {
        match what {
            Happening::Arrives { link, to, lane } => self.arrives(link, to, lane),
            Happening::Turn(End::Source) => self.source_turn(),
            Happening::Turn(End::Destination) => self.destination_turn(),
            Happening::Silence { link, end, heard } => {
                if self.is_alive(end) && self.is_given_up(end, link, heard) {
                    self.note(|| format!("{end:?} gives up silent link {link}"));
                    match end {
                        End::Source => self.tell_source_of(link, SourceEvent::Lost("silence".into())),
                        End::Destination => self.tell_destination_of(link, DestinationEvent::Lost("silence".into())),
                    }
                    self.shut_down(end, link);
                }
            }
            Happening::Watchdog(deadline) => {
                if self.source.alive && self.source.watchdog.take_if(|armed| *armed <= deadline).is_some() {
                    self.note(|| "the watchdog shuts the lanes down".into());
                    self.shut_down(End::Source, self.source.link);
                }
            }
            Happening::Prepared => self.prepared(),
            Happening::Loaded => self.loaded(),
            Happening::Round => self.round(),
            Happening::Push { link } => self.push(link),
            Happening::Hello { link, lane } => self.hello(link, lane),
            Happening::LettingGoEnds { link } => self.let_go(link, true),
            Happening::Answer { link, lane, refusal } => self.answered(link, lane, refusal),
            Happening::Joined { link } => self.joined(link),
            Happening::Rejoined => self.tell_rejoined(),
            Happening::Wish(event) => {
                if self.source.alive {
                    self.source.inbox.tell(event);
                    self.wake(End::Source);
                }
            }
            Happening::Operator => self.operator(),
            Happening::Heal { link } => self.heal(link),
        }
    }

    /// What must hold at every instant.
    fn check(&mut self) {
        let (source, destination) = (&self.source, &self.destination);
        let source_runs = source.alive && source.machine.runs;
        let destination_runs = destination.alive && destination.machine.runs;
        let both_may = source.alive && source.machine.may_run && destination.alive && destination.machine.may_run;
        let will_run =
            destination.session != DestinationSession::Over || destination.todo.contains(&DestinationAction::Run);
        let never_will = !destination.alive || !(will_run || destination.ever_ran);
        let unfounded = source.machine.may_run && self.commit_submitted && !never_will;
        let unwatched = destination_runs && !destination.pager.watched && destination.pager.missing != 0;
        let ends_early = source.outcome == Some(Outcome::Completed)
            && !(destination.pager.handed_over && destination.pager.missing == 0 && destination.ever_ran);
        let unasked = destination.machine.may_run && !destination.commit_heard;
        self.must(!(source_runs && destination_runs), "two runners");
        self.must(!both_may, "both sides may run the guest");
        self.must(!unfounded, "the source may run after its commit, and the destination may still act on it");
        self.must(!unwatched, "a running guest could read zeros");
        self.must(!ends_early, "the source has completed, and the destination has not all, or does not run");
        self.must(!unasked, "the destination may run without the commit");
    }
}
