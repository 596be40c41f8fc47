//! What a claim on the page-state map costs: every page that arrives pays for one.

use std::thread;

use switchover_benches::{show, time};
use switchover_pager::state::{Claim, FaultVerdict, LaneTag, PageStates};
use switchover_wire::types::{PageCount, PageIndex};

/// 512 MiB of guest.
const PAGES: u64 = 131_072;

fn main() {
    let Some((bulk, fault)) = LaneTag::new(0).zip(LaneTag::new(1)) else { return };
    let fresh = || PageStates::new(PageCount(PAGES));
    let mut states = fresh();

    let alone = |states: &PageStates| (0..PAGES).filter(|page| land(states, PageIndex(*page), bulk)).count();
    // Preparation and work take turns, never at once; a cell tells the compiler so.
    let cell = std::cell::RefCell::new(&mut states);
    let cost = time(PAGES, || **cell.borrow_mut() = fresh(), || alone(&cell.borrow()));
    show("claim and arrive, one lane", "page", &cost);

    let cost = time(PAGES, || (), || alone(&cell.borrow()));
    show("claim lost: the page is there", "page", &cost);

    let both = |states: &PageStates| {
        thread::scope(|scope| {
            scope.spawn(|| (0..PAGES).filter(|page| land(states, PageIndex(*page), fault)).count());
            alone(states)
        })
    };
    let cost = time(PAGES, || **cell.borrow_mut() = fresh(), || both(&cell.borrow()));
    show("claim and arrive, two lanes after the same pages", "page", &cost);

    let cost = time(
        PAGES,
        || **cell.borrow_mut() = fresh(),
        || {
            let states = cell.borrow();
            (0..PAGES).filter(|page| states.fault(PageIndex(*page)) == FaultVerdict::Ask).count()
        },
    );
    show("fault on an absent page", "fault", &cost);
}

/// Does what a lane does with a page; says whether it won it.
fn land(states: &PageStates, page: PageIndex, lane: LaneTag) -> bool {
    let won = matches!(states.claim(page, lane), Claim::Won { .. });
    if won {
        states.arrived(page, lane);
    }
    won
}
