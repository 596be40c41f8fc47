//! What it costs to give a guest pages whose bytes are here already: mapping those of the alias, as the pager does, by the length
//! of the runs that they are mapped in; and copying or moving them into private memory instead.

use std::cell::{Cell, RefCell};

use switchover_benches::{show, time};
use switchover_pager::ram::Ram;
use switchover_pager::uffd::{Watch, WatchError};
use switchover_wire::types::{PAGE_SIZE_U64, PageCount, PageIndex};

#[path = "placement/uffd.rs"]
mod uffd;

use self::uffd::{HUGE, Pair};

/// 32 MiB: a repetition is long enough to be timed and short enough to be repeated.
const PAGES: u64 = 8192;
/// One page, 64 KiB, 256 KiB, 2 MiB.
const RUNS: [u64; 4] = [1, 16, 64, 512];

fn main() {
    alias();
    private();
}

/// Memory in two mappings, of which the guest's has no page.
fn alias() {
    if let Err(error) = watched() {
        println!("SKIP placement: {error}");
        return;
    }
    for run in RUNS {
        let watch = RefCell::new(None);
        let prepare = || {
            // The old one goes before its successor takes as much memory.
            if let Some(old) = watch.take() {
                let _: Result<(), WatchError> = Watch::unregister(&old);
            }
            watch.replace(watched().ok());
        };
        let cost = time(PAGES, prepare, || map_all(watch.borrow().as_ref(), run));
        show(&format!("map pages of the alias, in runs of {run}"), "page", &cost);
        if let Some(last) = watch.take() {
            let _ = last.unregister();
        }
    }
}

/// Private memory, and a buffer that pages were received in.
fn private() {
    let bytes = |pages: u64| usize::try_from(pages * PAGE_SIZE_U64).unwrap_or(0);
    if let Err(error) = Pair::new(HUGE, false) {
        println!("SKIP copying and moving: {error}");
        return;
    }
    for (what, huge, place) in [
        ("copy pages from a buffer", false, Pair::copy as fn(&Pair, usize, usize) -> bool),
        ("move pages out of a buffer", false, Pair::move_pages),
        ("move pages out of a buffer of huge pages", true, Pair::move_pages),
    ] {
        // A part of a huge page cannot be moved without splitting it, which is not what is asked.
        for run in RUNS.into_iter().filter(|run| !huge || bytes(*run) == HUGE) {
            let pair = RefCell::new(None);
            let failed = Cell::new(0);
            let prepare = || {
                pair.take();
                pair.replace(Pair::new(bytes(PAGES), huge).ok());
            };
            let cost = time(PAGES, prepare, || {
                let pair = pair.borrow();
                let placed =
                    |index: &u64| pair.as_ref().is_some_and(|pair| place(pair, bytes(index * run), bytes(run)));
                failed.set(failed.get() + (0..PAGES / run).filter(|index| !placed(index)).count());
            });
            show(&format!("{what}, in runs of {run}"), "page", &cost);
            if failed.get() > 0 {
                println!("  of which {} failed", failed.get());
            }
        }
    }
    // What was moved away must come again before the next pages can be received.
    for (what, huge) in [("pages", false), ("huge pages", true)] {
        let pair = RefCell::new(None);
        let prepare = || {
            pair.take();
            let moved = Pair::new(bytes(PAGES), huge).inspect(|pair| {
                for index in 0..bytes(PAGES) / HUGE {
                    let _ = pair.move_pages(index * HUGE, HUGE);
                }
            });
            pair.replace(moved.ok());
        };
        let cost = time(PAGES, prepare, || pair.borrow().as_ref().map(Pair::fill_buffer));
        show(&format!("give the buffer {what} again"), "page", &cost);
    }
}

/// RAM whose pages are all there, none of them mapped for the guest.
fn watched() -> Result<Watch, Box<dyn std::error::Error>> {
    let ram = Ram::new(PageCount(PAGES))?;
    ram.populate()?;
    Ok(Watch::register(ram)?)
}

/// Maps all pages; says how many runs could be mapped.
fn map_all(watch: Option<&Watch>, run: u64) -> usize {
    let Some(watch) = watch else { return 0 };
    (0..PAGES / run).filter(|index| watch.map(PageIndex(index * run), PageCount(run), true).is_ok()).count()
}
