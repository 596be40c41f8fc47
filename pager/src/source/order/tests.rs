//! What holds of every policy.

use proptest::prelude::*;

use super::*;

/// What is left, for policies that are tested alone.
pub struct Pages {
    left: Vec<u64>,
    count: u64,
}

impl Pages {
    pub fn new(count: u64) -> Self {
        let word = |first: u64| if count - first >= 64 { u64::MAX } else { (1 << (count - first)) - 1 };
        Self { left: (0..count).step_by(64).map(word).collect(), count }
    }

    pub fn is_left(&self, page: u64) -> bool {
        self.left[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1
    }

    /// It was sent in answer to a request.
    pub fn mark(&mut self, page: u64) {
        self.left[usize::try_from(page / 64).unwrap()] &= !(1 << (page % 64));
    }

    /// Sends what is left of a step's pages: which they were.
    pub fn send(&mut self, step: Step) -> Vec<u64> {
        let first = step.chunk.first().0;
        let sent: Vec<_> = (0..64).filter(|bit| step.pages >> bit & 1 == 1).map(|bit| first + bit).collect();
        assert!(sent.iter().all(|page| *page < self.count), "{step:?} is past the end of RAM");
        let sent: Vec<_> = sent.into_iter().filter(|page| self.is_left(*page)).collect();
        sent.iter().for_each(|page| self.mark(*page));
        sent
    }
}

impl Left for Pages {
    fn left(&self, chunk: ChunkIndex) -> u64 {
        usize::try_from(chunk.0).ok().and_then(|index| self.left.get(index)).copied().unwrap_or(0)
    }
}

fn fault(page: u64) -> Fault {
    Fault { page: PageIndex(page), lane: u8::try_from(page % 3).unwrap() }
}

fn step(chunk: u64, pages: u64) -> Step {
    Step { chunk: ChunkIndex(chunk), pages }
}

#[derive(Clone, Debug)]
enum Event {
    Fault(u64),
    Hint(u64, u64),
    Push,
}

fn events(pages: u64) -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        (0..pages).prop_map(Event::Fault),
        // Faults beside one another, so that streams and bubbles come about.
        (0..pages / 4).prop_map(move |page| Event::Fault(page * 4 % pages)),
        (0..pages / 64, 1..u64::MAX).prop_map(|(chunk, mask)| Event::Hint(chunk, mask)),
        Just(Event::Push),
    ];
    proptest::collection::vec(event, 0..200)
}

proptest! {
    #[test]
    fn every_page_is_pushed_exactly_once(
        policy in proptest::sample::select(&Policy::COMPARED[..]),
        events in events(3000),
        run in 0..2000_u64,
    ) {
        let mut order = Order::new(policy, PageCount(3000));
        let mut pages = Pages::new(3000);
        let (mut pushed, mut asked) = (Vec::new(), Vec::new());
        let mut answer = |page: u64, pages: &mut Pages, order: &mut Order| {
            if pages.is_left(page) {
                asked.push(page);
                pages.mark(page);
            }
            order.note_fault(fault(page));
        };
        for (index, event) in events.iter().enumerate() {
            // A sequential guest beside what is drawn.
            answer(run + index as u64, &mut pages, &mut order);
            match *event {
                Event::Fault(page) => answer(page, &mut pages, &mut order),
                Event::Hint(chunk, mask) => order.hint([step(chunk, mask)]),
                Event::Push => {
                    if let Some(step) = order.step(&pages) {
                        let sent = pages.send(step);
                        prop_assert!(!sent.is_empty(), "{step:?} sends nothing");
                        pushed.extend(sent);
                    }
                }
            }
        }
        while let Some(step) = order.step(&pages) {
            pushed.extend(pages.send(step));
        }
        while let Some(span) = order.span() {
            span.for_each(|chunk| pushed.extend(pages.send(step(chunk, pages.left(ChunkIndex(chunk))))));
        }
        pushed.extend(asked);
        pushed.sort_unstable();
        prop_assert_eq!(pushed, (0..3000).collect::<Vec<_>>());
    }
}

#[test]
fn hints_go_first_in_their_order_whatever_faults() {
    for policy in Policy::COMPARED.into_iter().filter(|policy| policy.hints == Hints::First) {
        let mut order = Order::new(policy, PageCount(6400));
        let mut pages = Pages::new(6400);
        (0..40).for_each(|page| order.note_fault(fault(3000 + page)));
        order.hint([step(9, 0b1100), step(2, 1), step(9, 0b0011)]);
        let mut next = || order.step(&pages).inspect(|step| drop(pages.send(*step)));
        assert_eq!([next(), next(), next()], [step(9, 0b1100), step(2, 1), step(9, 0b0011)].map(Some), "{policy}");
    }
}

#[test]
fn hints_in_turn_leave_every_other_step_to_the_faults() {
    let policy = Policy { near: Near::Around, hints: Hints::InTurn, ..Policy::SWEEP };
    let mut order = Order::new(policy, PageCount(6400));
    let mut pages = Pages::new(6400);
    [3000, 4000].into_iter().for_each(|page| order.note_fault(fault(page)));
    order.hint([step(9, 1), step(2, 1), step(3, 1)]);
    let mut next = || order.step(&pages).inspect(|step| drop(pages.send(*step))).map(|step| step.chunk.0);
    let order: Vec<_> = std::iter::from_fn(&mut next).collect();
    assert_eq!(order, [9, 46, 2, 62, 3]);
}

#[test]
fn one_call_does_a_bounded_amount_of_work() {
    let mut order = Order::new(Policy::SWEEP, PageCount(64 * 1000));
    let mut pages = Pages::new(64 * 1000);
    (0..999 * 64).for_each(|page| pages.mark(page));
    order.hint((0..1000).map(|chunk| step(chunk, u64::MAX)));
    let calls = (1..).find(|_| order.step(&pages).is_some()).unwrap();
    assert_eq!(calls, 1000_u32.div_ceil(MOST_LOOKS));
}
