//! How much of a guest's time to take from it so that pre-copy converges.
//!
//! Rounds shrink where a round dirties fewer pages than it sends. Where it dirties more than half of what it sends, they
//! shrink slowly or not at all, and the guest is given less time; where it would dirty no more than half even with all
//! its time, it is given all of it back.
//!
//! Only guests that nothing but pre-copy can move need this: post-copy converges whatever the guest does.

use switchover_wire::types::PageCount;

/// A round that dirties more than one page for so many sent does not shrink as it should: the next must be at most
/// half as long.
const SHRINK: u64 = 2;

/// Slow rounds in a row before the guest is first throttled. One alone says little: the first round sends all of memory,
/// and a burst of writes may be over.
const PATIENCE: u32 = 2;

/// A vCPU that never runs would not converge but stop: it always keeps one percent.
const ALWAYS_LEFT: u8 = 1;

/// Decides after each round what share of the vCPUs' time to take from them, in percent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AutoConverge {
    initial: u8,
    increment: u8,
    most: u8,
    throttle: u8,
    slow_rounds: u32,
}

impl AutoConverge {
    /// A guest that is not throttled yet. It will first be throttled to `initial` percent, then by `increment` more each
    /// round, never to more than `most`, nor to more than 99.
    #[must_use]
    pub fn new(initial: u8, increment: u8, most: u8) -> Self {
        Self { initial, increment, most: most.min(100 - ALWAYS_LEFT), throttle: 0, slow_rounds: 0 }
    }

    /// The percent of their time that vCPUs are kept from running now; 0 where they run freely.
    #[must_use]
    pub fn throttle(&self) -> u8 {
        self.throttle
    }

    /// A round has sent `sent` pages, while the guest dirtied `dirtied` distinct ones, throttled as it was. Returns the
    /// throttle for the next round, in percent.
    pub fn after_round(&mut self, sent: PageCount, dirtied: PageCount) -> u8 {
        let shrinks = |dirtied: u128| dirtied * u128::from(SHRINK) <= u128::from(sent.0);
        let dirtied = u128::from(dirtied.0);
        // What it would have dirtied with all its time. No less than that: pages written twice count once.
        let freely = dirtied * 100 / u128::from(100 - self.throttle);
        if shrinks(freely) {
            (self.throttle, self.slow_rounds) = (0, 0);
        } else if shrinks(dirtied) {
            // It converges because it is throttled.
            self.slow_rounds = 0;
        } else {
            self.slow_rounds = self.slow_rounds.saturating_add(1);
            if self.throttle > 0 {
                self.throttle = self.throttle.saturating_add(self.increment).min(self.most);
            } else if self.slow_rounds >= PATIENCE {
                self.throttle = self.initial.min(self.most);
            }
        }
        self.throttle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(policy: &mut AutoConverge, sent: u64, dirtied: u64) -> u8 {
        policy.after_round(PageCount(sent), PageCount(dirtied))
    }

    #[test]
    fn a_guest_that_converges_runs_freely() {
        let mut policy = AutoConverge::new(20, 10, 99);
        for sent in [100_000, 50_000, 10_000, 10, 0] {
            assert_eq!(round(&mut policy, sent, sent / 2), 0);
        }
    }

    #[test]
    fn one_slow_round_is_forgiven_and_more_are_not() {
        let mut policy = AutoConverge::new(20, 10, 99);
        assert_eq!(round(&mut policy, 1000, 501), 0);
        assert_eq!(round(&mut policy, 1000, 500), 0);
        assert_eq!(round(&mut policy, 1000, 501), 0);
        assert_eq!(round(&mut policy, 1000, 501), 20);
        assert_eq!(round(&mut policy, 1000, 501), 30);
    }

    #[test]
    fn it_never_takes_more_than_the_ceiling() {
        let mut policy = AutoConverge::new(20, 30, 75);
        let throttles: Vec<_> = (0..6).map(|_| round(&mut policy, 1000, 1000)).collect();
        assert_eq!(throttles, [0, 20, 50, 75, 75, 75]);
        let mut greedy = AutoConverge::new(255, 255, 255);
        let throttles: Vec<_> = (0..4).map(|_| round(&mut greedy, 1, u64::MAX)).collect();
        assert_eq!(throttles, [0, 99, 99, 99]);
        // Initially no more than the ceiling either.
        let mut careful = AutoConverge::new(50, 10, 30);
        assert_eq!([0, 0].map(|_: u8| round(&mut careful, 1, 9)), [0, 30]);
    }

    #[test]
    fn it_holds_what_makes_the_guest_converge_and_lets_go_when_nothing_is_needed() {
        let mut policy = AutoConverge::new(50, 10, 99);
        assert_eq!([0, 0].map(|_: u8| round(&mut policy, 1000, 900)), [0, 50]);
        // Half the time, half the pages: with all its time it would be too many again.
        assert_eq!(round(&mut policy, 1000, 450), 50);
        assert_eq!(round(&mut policy, 1000, 251), 50);
        assert_eq!(round(&mut policy, 1000, 250), 0);
        assert_eq!(policy.throttle(), 0);
        // Should it begin anew, patience does too.
        assert_eq!([0, 0].map(|_: u8| round(&mut policy, 1000, 900)), [0, 50]);
    }

    #[test]
    fn a_round_of_nothing_changes_nothing_but_lets_go() {
        let mut policy = AutoConverge::new(50, 10, 99);
        assert_eq!([0, 0].map(|_: u8| round(&mut policy, 10, 10)), [0, 50]);
        assert_eq!(round(&mut policy, 0, 0), 0);
    }
}
