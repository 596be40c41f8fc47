//! What it costs to map pages whose bytes are in the alias already, by the length of the runs that they are mapped in.

use std::cell::RefCell;

use switchover_benches::{show, time};
use switchover_pager::ram::Ram;
use switchover_pager::uffd::{Watch, WatchError};
use switchover_wire::types::{PageCount, PageIndex};

/// 32 MiB: a repetition is long enough to be timed and short enough to be repeated.
const PAGES: u64 = 8192;
/// One page, 64 KiB, 256 KiB, 2 MiB.
const RUNS: [u64; 4] = [1, 16, 64, 512];

fn main() {
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
