//! Playing one guest through one push: link, pager and vCPUs event by event.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ops::Range;

use serde::Serialize;
use switchover_pager::sent::ChunkIndex;
use switchover_pager::source::order::{Fault, Left, Order, Policy, Step};
use switchover_wire::types::{PageCount, PageIndex};

use super::guest::{Toucher, index};
use super::model::Model;

/// What one drain came to.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Outcome {
    /// Faults whose page was asked for. The raced ones are among them.
    pub asked: u64,
    /// Those of them whose pushed copy won.
    pub raced: u64,
    /// Faults on a page that was just arriving: not asked for.
    pub landing: u64,
    /// Seconds that vCPUs stood still, all together.
    pub stall: f64,
    /// The part of that which a pager sees: from the fault to the wake-up.
    pub waits: f64,
    /// Seconds until the last page was here.
    pub drain: f64,
    /// Seconds until every vCPU had made its last recorded touch.
    pub finish: f64,
}

/// What is pushed.
pub enum Push<'a> {
    /// What this policy says.
    Policy(Policy),
    /// These pages one after the other, `batch` of them arriving together, by one who knows what is going to be asked for: no
    /// request changes anything, or costs the link anything.
    Known {
        /// In the order in which they go.
        pages: &'a [u64],
        /// How many go at once.
        batch: usize,
    },
}

/// Plays `guest`.
#[must_use]
pub fn play(guest: &Toucher, model: &Model, push: &Push<'_>) -> Outcome {
    let mut play = Play::new(guest, model, push);
    play.run();
    play.outcome
}

const NOT_SENT: u32 = u32::MAX;
/// In place of a frame: it went as an answer.
const ANSWERED: u32 = u32::MAX - 1;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Event {
    /// A frame, all of it, at the destination.
    Arrived(u32),
    /// An answer at the destination, for this page.
    Answered(u64),
    /// A request at the source, from this vCPU.
    Request(u64, usize),
    /// A vCPU comes to its next touch.
    Touch(usize),
}

struct Frame {
    pages: Content,
    /// On the link.
    start: u64,
    finish: u64,
}

enum Content {
    Chunk(Step),
    Listed(Range<usize>),
}

struct Sent(Vec<u64>);

impl Left for Sent {
    fn left(&self, chunk: ChunkIndex) -> u64 {
        usize::try_from(chunk.0).ok().and_then(|index| self.0.get(index)).copied().unwrap_or(0)
    }
}

enum Source<'a> {
    Order { order: Box<Order>, span: Range<u64> },
    List { pages: &'a [u64], at: usize, batch: usize },
}

struct Play<'a> {
    guest: &'a Toucher,
    model: &'a Model,
    source: Source<'a>,
    left: Sent,
    here: Vec<u64>,
    /// The frame that each page went in.
    frame_of: Vec<u32>,
    frames: Vec<Frame>,
    /// Frames handed to the lane and not yet over the link, in order.
    link: VecDeque<u32>,
    /// When the link has carried all answers so far.
    answers_until: u64,
    heap: BinaryHeap<Reverse<(u64, u64, Event)>>,
    sequence: u64,
    waiting: Vec<Waiting>,
    next_touch: Vec<usize>,
    now: u64,
    outcome: Outcome,
}

struct Waiting {
    vcpu: usize,
    page: u64,
    since: u64,
    asked: bool,
}

impl<'a> Play<'a> {
    fn new(guest: &'a Toucher, model: &'a Model, push: &Push<'a>) -> Self {
        let source = match *push {
            Push::Policy(policy) => {
                let mut order = Box::new(Order::new(policy, PageCount(guest.pages)));
                let parts = guest.hints.chunk_by(|one, next| ChunkIndex::of(*one) == ChunkIndex::of(*next));
                order.hint(parts.map(|part| Step {
                    chunk: ChunkIndex::of(part[0]),
                    pages: part.iter().fold(0, |mask, page| mask | 1 << (page.0 % 64)),
                }));
                Source::Order { order, span: 0..0 }
            }
            Push::Known { pages, batch } => Source::List { pages, at: 0, batch },
        };
        let here = guest.missing.iter().map(|word| !word).collect();
        let mut play = Self {
            guest,
            model,
            source,
            left: Sent(guest.missing.clone()),
            here,
            frame_of: vec![NOT_SENT; usize::try_from(guest.pages).unwrap_or(0)],
            frames: Vec::new(),
            link: VecDeque::new(),
            answers_until: 0,
            heap: BinaryHeap::new(),
            sequence: 0,
            waiting: Vec::new(),
            next_touch: vec![0; guest.vcpus.len()],
            now: 0,
            outcome: Outcome::default(),
        };
        (0..guest.vcpus.len()).for_each(|vcpu| play.think(vcpu, 0));
        play
    }

    fn run(&mut self) {
        loop {
            self.fill_link();
            let event = self.heap.peek().map(|Reverse((at, ..))| *at);
            let frame = self.link.front().map(|id| self.frames[*id as usize].finish);
            match (frame, event) {
                (Some(finish), event) if event.is_none_or(|at| finish <= at) => {
                    self.now = finish;
                    if let Some(id) = self.link.pop_front() {
                        self.at(finish + self.model.delay_ns, Event::Arrived(id));
                    }
                }
                (_, Some(_)) => {
                    if let Some(Reverse((at, _, event))) = self.heap.pop() {
                        self.now = at;
                        self.on(event);
                    }
                }
                _ => return,
            }
        }
    }

    fn at(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        self.heap.push(Reverse((at, self.sequence, event)));
    }

    /// A vCPU goes on: to its next touch, if it has one.
    fn think(&mut self, vcpu: usize, from: u64) {
        match self.guest.vcpus[vcpu].get(self.next_touch[vcpu]) {
            Some(touch) => self.at(from + touch.think_ns, Event::Touch(vcpu)),
            None => self.outcome.finish = self.outcome.finish.max(from as f64 / 1e9),
        }
    }

    /// Hands frames to the lane while it takes some.
    fn fill_link(&mut self) {
        while self.link.len() < self.model.ahead.max(1) {
            let Some((pages, cost)) = self.next_frame() else { return };
            let free = self.link.back().map_or(0, |id| self.frames[*id as usize].finish);
            let start = self.now.max(free).max(self.answers_until);
            let id = u32::try_from(self.frames.len()).unwrap_or(ANSWERED - 1);
            for page in listed(&self.source, &pages) {
                self.left.0[index(page)] &= !(1 << (page % 64));
                if let Some(slot) = usize::try_from(page).ok().and_then(|page| self.frame_of.get_mut(page)) {
                    *slot = id;
                }
            }
            self.frames.push(Frame { pages, start, finish: start + cost });
            self.link.push_back(id);
        }
    }

    fn next_frame(&mut self) -> Option<(Content, u64)> {
        match &mut self.source {
            Source::Order { order, span } => loop {
                let step =
                    order.step(&self.left).map(|step| Step { pages: step.pages & self.left.left(step.chunk), ..step });
                let step = match step {
                    Some(step) => step,
                    None if span.is_empty() => {
                        *span = order.span()?;
                        continue;
                    }
                    None => {
                        let chunk = ChunkIndex(span.start);
                        span.start += 1;
                        Step { chunk, pages: self.left.left(chunk) }
                    }
                };
                if step.pages == 0 {
                    continue;
                }
                let zero = usize::try_from(step.chunk.0).ok().and_then(|index| self.guest.zero.get(index)).copied();
                let data = u64::from((step.pages & !zero.unwrap_or(0)).count_ones());
                // Chunks of zeros beside one another go in one frame.
                let cost = if data == 0 { self.model.frame_ns / 16 } else { self.model.frame_of_ns(data) };
                return Some((Content::Chunk(step), cost));
            },
            Source::List { pages, at, batch } => {
                let (from, end) = (*at, (*at + *batch).min(pages.len()));
                *at = end;
                let zero = |page: &&u64| self.guest.zero[index(**page)] >> (**page % 64) & 1 == 1;
                let data = pages[from..end].iter().filter(|page| !zero(page)).count() as u64;
                (from < end).then(|| (Content::Listed(from..end), data * self.model.page_ns()))
            }
        }
    }

    fn on(&mut self, event: Event) {
        match event {
            Event::Touch(vcpu) => self.touch(vcpu),
            Event::Request(page, vcpu) => self.answer(page, vcpu),
            Event::Arrived(id) => {
                let pages: Vec<u64> = listed(&self.source, &self.frames[id as usize].pages).collect();
                self.outcome.drain = self.outcome.drain.max(self.now as f64 / 1e9);
                pages.into_iter().for_each(|page| self.arrived(page, true));
            }
            Event::Answered(page) => {
                self.outcome.drain = self.outcome.drain.max(self.now as f64 / 1e9);
                self.arrived(page, false);
            }
        }
    }

    fn touch(&mut self, vcpu: usize) {
        let page = self.guest.vcpus[vcpu][self.next_touch[vcpu]].page;
        if self.here[index(page)] >> (page % 64) & 1 == 1 {
            self.next_touch[vcpu] += 1;
            return self.think(vcpu, self.now);
        }
        let joined = self.waiting.iter().any(|waiting| waiting.page == page);
        let landing = !joined && self.is_landing(page);
        let asked = !joined && !landing;
        self.waiting.push(Waiting { vcpu, page, since: self.now, asked });
        if landing {
            self.outcome.landing += 1;
        } else if asked {
            self.outcome.asked += 1;
            let at = self.now + self.model.step_ns(self.model.ask_ns, self.is_pushing()) + self.model.delay_ns;
            self.at(at, Event::Request(page, vcpu));
        }
    }

    /// Its frame has begun to arrive.
    fn is_landing(&self, page: u64) -> bool {
        let frame = usize::try_from(page).ok().and_then(|page| self.frame_of.get(page));
        let frame = frame.and_then(|id| self.frames.get(*id as usize));
        frame.is_some_and(|frame| frame.start + self.model.delay_ns <= self.now)
    }

    fn is_pushing(&self) -> bool {
        !self.link.is_empty()
    }

    /// The source has a request: sends the page, whether or not it was pushed, and ahead of everything that is.
    fn answer(&mut self, page: u64, vcpu: usize) {
        let (word, bit) = (index(page), 1 << (page % 64));
        // Who knows what is asked for has it on its way.
        let Source::Order { order, .. } = &mut self.source else { return };
        let lane = vcpu % usize::from(self.model.fault_lanes.max(1));
        order.note_fault(Fault { page: PageIndex(page), lane: u8::try_from(lane).unwrap_or(0) });
        self.left.0[word] &= !bit;
        let slot = usize::try_from(page).ok().and_then(|page| self.frame_of.get_mut(page));
        if let Some(slot) = slot.filter(|slot| **slot == NOT_SENT) {
            *slot = ANSWERED;
        }
        let cost = if self.guest.zero[word] & bit == 0 { self.model.page_ns() } else { 0 };
        self.answers_until = self.now.max(self.answers_until) + cost;
        for id in &self.link {
            let frame = &mut self.frames[*id as usize];
            frame.finish += cost;
            if frame.start > self.now {
                frame.start += cost;
            }
        }
        self.at(self.answers_until + self.model.delay_ns, Event::Answered(page));
    }

    /// A page is here: whoever waits for it goes on.
    fn arrived(&mut self, page: u64, pushed: bool) {
        let (word, bit) = (index(page), 1 << (page % 64));
        if self.here[word] & bit != 0 {
            return;
        }
        self.here[word] |= bit;
        let woken = self.now + self.model.step_ns(self.model.wake_ns, self.is_pushing());
        let resumed = woken + self.model.outside_ns;
        let mut at = 0;
        while at < self.waiting.len() {
            if self.waiting[at].page != page {
                at += 1;
                continue;
            }
            let waiting = self.waiting.swap_remove(at);
            self.outcome.raced += u64::from(pushed && waiting.asked);
            self.outcome.waits += (woken - waiting.since) as f64 / 1e9;
            self.outcome.stall += (resumed - waiting.since) as f64 / 1e9;
            self.next_touch[waiting.vcpu] += 1;
            self.think(waiting.vcpu, resumed);
        }
    }
}

fn listed<'a>(source: &Source<'a>, content: &Content) -> Box<dyn Iterator<Item = u64> + 'a> {
    match (content, source) {
        (Content::Chunk(step), _) => {
            let (first, pages) = (step.chunk.first().0, step.pages);
            Box::new((0..64).filter(move |bit| pages >> bit & 1 == 1).map(move |bit| first + bit))
        }
        (Content::Listed(range), Source::List { pages, .. }) => Box::new(pages[range.clone()].iter().copied()),
        (Content::Listed(_), Source::Order { .. }) => Box::new(std::iter::empty()),
    }
}
