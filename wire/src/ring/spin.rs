//! Waiting without sleeping.

use std::hint::spin_loop;
use std::thread;
use std::time::{Duration, Instant};

/// Looks between two looks at the clock, which costs more than they do.
const LOOKS: u32 = 32;

/// A wait of at most so long.
pub struct Spin {
    until: Instant,
}

impl Spin {
    pub fn new(most: Duration) -> Self {
        Self { until: Instant::now() + most }
    }

    /// Pauses for a moment. Says whether there is time for another look.
    pub fn again(&self) -> bool {
        (0..LOOKS).for_each(|_| spin_loop());
        // Whoever is waited for may have no other processor than this one, and a scheduler that preempts at ticks only would leave it
        // waiting for milliseconds: let it in.
        thread::yield_now();
        Instant::now() < self.until
    }
}
