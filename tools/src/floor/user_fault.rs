//! A user thread's fault: from the touch until it goes on.

use std::hint::spin_loop;

use switchover_wire::clock::Nanos;

use super::region::{PAGE, Region};
use super::{FloorError, Samples};

/// Touches the region's pages one after the other, working so long before each, until `samples` wants no more.
///
/// # Errors
/// When the pages cannot be unmapped again.
pub fn measure(region: &Region, work_ns: u64, mut samples: Samples) -> Result<Samples, FloorError> {
    while samples.wants_more() {
        for page in 0..region.len() / PAGE {
            let at = region.base().wrapping_add(page * PAGE);
            let mut start = Nanos::now();
            let until = start.0.saturating_add(work_ns);
            while start.0 < until {
                spin_loop();
                start = Nanos::now();
            }
            // SAFETY: the page lies in the region's mapping, which outlives this; it is read as a plain byte, volatile
            // because the read itself is what is measured.
            let _ = unsafe { at.read_volatile() };
            samples.record(Nanos::now().since(start));
        }
        region.unmap_pages()?;
    }
    Ok(samples)
}
