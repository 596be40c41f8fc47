//! Links of several lanes: in order within a lane, in any order across lanes; stalled, cut, closed.

use std::collections::VecDeque;

use super::world::{Happening, Time, World};

/// How long a silent link is put up with.
pub const SILENCE: Time = 5_000_000;

pub const CONTROL: usize = 0;
pub const FAULT: usize = 1;
pub const FIRST_BULK: usize = 2;

/// Who is at an end of a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    Source,
    Destination,
}

impl End {
    pub const BOTH: [Self; 2] = [Self::Source, Self::Destination];

    pub const fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// What crosses a lane. Sets of pages are a bit a page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    Prepared,
    Missing {
        set: u32,
        complete_first: bool,
    },
    State,
    Restored,
    Refused,
    Commit,
    Running,
    Drained,
    DrainedAck,
    Abort,
    Standing {
        committed: bool,
        complete: bool,
        set: u32,
    },
    Request {
        page: usize,
    },
    /// A page, as it was when it was sent.
    Page {
        page: usize,
        bytes: u32,
    },
    /// The same, of pre-copy.
    Version {
        page: usize,
        bytes: u32,
    },
    Taken {
        page: usize,
    },
    /// The lane is over.
    Closed,
}

/// What is under way to one end on one lane.
#[derive(Clone, Default)]
struct Flow {
    queue: VecDeque<Message>,
    /// So many of them have come, and nobody has read them.
    owed: usize,
    reading: bool,
    /// The end that reads has closed it: nothing reaches it any more.
    closed: bool,
}

/// Lanes that were opened together.
pub struct Link {
    /// To the source and to the destination.
    flows: [Vec<Flow>; 2],
    /// Nothing comes to this end, and nothing tells it so.
    stalled: [bool; 2],
    /// No stall ends by itself.
    dead: bool,
    /// This end listens for signs of life, and gives them.
    pulse: [bool; 2],
    /// Counts the ends of silences.
    heard: [u64; 2],
}

impl Link {
    pub fn new(lanes: usize) -> Self {
        let flows = vec![Flow::default(); lanes];
        Self { flows: [flows.clone(), flows], stalled: [false; 2], dead: false, pulse: [false; 2], heard: [0; 2] }
    }

    pub fn lanes(&self) -> usize {
        self.flows[0].len()
    }

    pub fn is_closed(&self, end: End, lane: usize) -> bool {
        self.flows[end as usize][lane].closed
    }

    pub fn is_stalled(&self) -> bool {
        self.stalled[0] || self.stalled[1]
    }

    /// It is stalled, and will not be for ever.
    pub fn is_passing_stall(&self) -> bool {
        self.is_stalled() && !self.dead
    }

    fn is_silent(&self, end: End) -> bool {
        self.stalled[end as usize] || !self.pulse[end.other() as usize]
    }
}

impl World {
    /// Hands a message to the socket; says whether that went well, which does not say that it arrives.
    pub fn send(&mut self, from: End, link: usize, lane: usize, message: Message) -> bool {
        let (here, there) = (from as usize, from.other() as usize);
        if self.links[link].flows[here][lane].closed {
            return false;
        }
        if self.links[link].flows[there][lane].closed {
            return self.dice.one_in(2);
        }
        self.note(|| format!("{from:?} sends {message:?} on lane {lane} of link {link}"));
        let breaks = lane == CONTROL && std::mem::take(&mut self.failing.send[here]);
        if !(breaks && self.dice.one_in(2)) {
            self.post(link, from.other(), lane, message);
        }
        if breaks {
            // What was submitted may arrive, and may not.
            self.note(|| format!("{from:?}: that failed"));
            self.close_lane(from, link, lane, false);
        }
        !breaks
    }

    fn post(&mut self, link: usize, to: End, lane: usize, message: Message) {
        self.links[link].flows[to as usize][lane].queue.push_back(message);
        let delay = if self.dice.one_in(8) { self.dice.below(40_000) } else { self.dice.below(600) };
        self.at(delay, Happening::Arrives { link, to, lane });
    }

    /// The next message of a lane has come.
    pub fn arrives(&mut self, link: usize, to: End, lane: usize) {
        let handed_over = self.destination.pager.handed_over;
        let there = &mut self.links[link];
        let flow = &mut there.flows[to as usize][lane];
        // A page waits for the handoff, which is told on another lane, and whoever comes behind it waits too.
        let early = !handed_over && matches!(flow.queue.front(), Some(Message::Page { .. }));
        if there.stalled[to as usize] || !flow.reading || early {
            flow.owed += 1;
            return;
        }
        let Some(message) = flow.queue.pop_front() else { return };
        if message == Message::Closed {
            flow.reading = false;
        }
        if !self.is_alive(to) {
            return;
        }
        self.note(|| format!("{to:?} receives {message:?} on lane {lane} of link {link}"));
        match to {
            End::Source => self.source_hears(link, lane, message),
            End::Destination => self.destination_hears(link, lane, message),
        }
    }

    /// What has come and was not read may be readable now.
    pub fn flush(&mut self, link: usize) {
        for to in End::BOTH {
            for lane in 0..self.links[link].lanes() {
                for _ in 0..std::mem::take(&mut self.links[link].flows[to as usize][lane].owed) {
                    self.at(0, Happening::Arrives { link, to, lane });
                }
            }
        }
    }

    /// From now on `end` reads these lanes.
    pub fn read(&mut self, end: End, link: usize, lanes: std::ops::Range<usize>) {
        for flow in &mut self.links[link].flows[end as usize][lanes] {
            flow.reading = true;
        }
        self.flush(link);
    }

    /// The control lane's thread has ended.
    pub fn stop_reading(&mut self, end: End, link: usize) {
        self.links[link].flows[end as usize][CONTROL].reading = false;
    }

    /// Listens on this link's control lane, and for signs of life.
    pub fn begin_pulse(&mut self, end: End, link: usize) {
        self.read(end, link, CONTROL..FAULT);
        self.links[link].pulse[end as usize] = true;
        if !self.links[link].stalled[end.other() as usize] {
            self.links[link].heard[end.other() as usize] += 1;
        }
        self.expect_life(end, link);
    }

    pub fn end_pulse(&mut self, end: End, link: usize) {
        self.links[link].pulse[end as usize] = false;
        self.expect_life(end.other(), link);
    }

    fn expect_life(&mut self, end: End, link: usize) {
        if self.links[link].pulse[end as usize] && self.links[link].is_silent(end) {
            let heard = self.links[link].heard[end as usize];
            let patience = SILENCE + self.dice.below(SILENCE / 8);
            self.at(patience, Happening::Silence { link, end, heard });
        }
    }

    /// Whether `end` has heard nothing since then, and still listens.
    pub fn is_given_up(&self, end: End, link: usize, heard: u64) -> bool {
        let there = &self.links[link];
        there.pulse[end as usize] && there.is_silent(end) && there.heard[end as usize] == heard
    }

    /// `end` shuts all lanes down: the other sees it, but for a stall; its own readers do too.
    pub fn shut_down(&mut self, end: End, link: usize) {
        for lane in 0..self.links[link].lanes() {
            // What was sent before a shutdown is not lost by it, unless the network is in trouble.
            let abruptly = self.struck > 0 && self.dice.one_in(3);
            self.close_lane(end, link, lane, abruptly);
        }
    }

    /// `abruptly`: what is under way from `end` is lost.
    pub fn close_lane(&mut self, end: End, link: usize, lane: usize, abruptly: bool) {
        let forgets = self.dice.one_in(2);
        let flows = &mut self.links[link].flows;
        if std::mem::replace(&mut flows[end as usize][lane].closed, true) {
            return;
        }
        if abruptly {
            flows[end.other() as usize][lane].queue.clear();
        }
        if forgets {
            flows[end as usize][lane].queue.clear();
        }
        self.post(link, end.other(), lane, Message::Closed);
        self.post(link, end, lane, Message::Closed);
    }

    /// The network cuts a link, and tells both ends.
    pub fn cut(&mut self, link: usize) {
        for end in End::BOTH {
            for lane in 0..self.links[link].lanes() {
                self.close_lane(end, link, lane, true);
            }
        }
    }

    /// Nothing passes any more in one direction or both, and nobody is told.
    pub fn stall(&mut self, link: usize, ends: &[End], for_good: bool) {
        self.links[link].dead |= for_good;
        for end in ends {
            self.links[link].stalled[*end as usize] = true;
            self.expect_life(*end, link);
        }
    }

    pub fn heal(&mut self, link: usize) {
        if self.links[link].dead {
            return;
        }
        self.links[link].stalled = [false; 2];
        for heard in &mut self.links[link].heard {
            *heard += 1;
        }
        for end in End::BOTH {
            self.expect_life(end, link);
        }
        self.flush(link);
    }
}
