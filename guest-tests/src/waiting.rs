//! Waiting for states.

use std::thread;
use std::time::{Duration, Instant};

/// How long a state may take that will come. Generous: hosts may be busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How often a state is looked at that nobody announces.
const LOOK: Duration = Duration::from_millis(2);

/// Looks again and again until `look` finds something.
///
/// # Panics
/// When it finds nothing within [`PATIENCE`].
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited {PATIENCE:?} in vain until {what}");
        thread::sleep(LOOK);
    }
}
