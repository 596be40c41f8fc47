//! A user thread's fault: from the touch until it goes on.

use std::time::Duration;

use switchover_wire::clock::Nanos;

use super::handler::served;
use super::region::{PAGE, Region};
use super::{FloorError, Samples, Way};

/// Pages touched before they are unmapped again: 2 MiB.
const PAGES: usize = 512;

/// Round trips of touches, one page after the other.
///
/// # Errors
/// When memory or userfaultfd cannot be had.
pub fn measure(way: Way, budget: Duration) -> Result<Samples, FloorError> {
    let region = Region::new(PAGES)?;
    served(&region, way, || {
        let mut samples = Samples::new(budget)?;
        while samples.wants_more() {
            for page in 0..PAGES {
                let at = region.base().wrapping_add(page * PAGE);
                let start = Nanos::now();
                // SAFETY: the page lies in the region's mapping, which outlives this; it is read as a plain byte,
                // volatile because the read itself is what is measured.
                let _ = unsafe { at.read_volatile() };
                samples.record(Nanos::now().since(start));
            }
            region.unmap_pages()?;
        }
        Ok(samples)
    })
}
