//! Saying that connections were not taken, without letting strangers fill a log: so many a second are told of one by one, and
//! the others are counted.

use std::time::{Duration, Instant};

/// How many are told of in each span.
const EACH: u32 = 10;
const SPAN: Duration = Duration::from_secs(1);

/// What has been told lately.
#[derive(Debug, Default)]
pub struct Tally {
    since: Option<Instant>,
    told: u32,
    untold: u64,
}

/// What to say of one more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Telling {
    /// So many before it were not told of.
    pub passed_over: u64,
    /// Whether to tell of this one.
    pub this: bool,
}

impl Tally {
    /// One more, at `now`.
    pub fn one_more(&mut self, now: Instant) -> Telling {
        let mut passed_over = 0;
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= SPAN) {
            (self.since, self.told) = (Some(now), 0);
            passed_over = std::mem::take(&mut self.untold);
        }
        let this = self.told < EACH;
        if this {
            self.told += 1;
        } else {
            self.untold += 1;
        }
        Telling { passed_over, this }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_is_counted() {
        let (mut tally, start) = (Tally::default(), Instant::now());
        let told = (0..1000).filter(|_| tally.one_more(start).this).count();
        assert_eq!(told, 10);
        assert_eq!(tally.one_more(start + SPAN), Telling { passed_over: 990, this: true });
        assert_eq!(tally.one_more(start + SPAN), Telling { passed_over: 0, this: true });
    }
}
