//! Post-copy of a guest that is played: what it loses until the last page is there.

use switchover_hybrid::monitor::costs::{DRAIN_BROWNOUT, LOCAL_FAULT, REMOTE_FAULT};

use super::bits::{count, lowest, whole};
use super::guest::{Guest, Position, Stretch};
use super::replay::Link;

/// Turns that a drain is played in: what the guest asks for, then what is pushed meanwhile.
const TURNS: f64 = 64.0;
/// The guest's time after the drain in which it is taken to come to the pages that were pushed unasked.
const AFTERWARDS_NS: u64 = 100_000_000;

/// What a drain took.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Drained {
    /// Its seconds.
    pub seconds: f64,
    /// Guest-seconds lost in it and right after it.
    pub lost: f64,
}

/// Drains `missing`, `hot` pages first, from where the guest stands.
#[must_use]
pub fn drain(guest: &Guest, link: Link, missing: Vec<u64>, hot: &[u64], position: Position) -> Drained {
    let page = link.page_seconds(guest);
    let turn = (count(&missing) as f64 * page / TURNS).max(1e-6);
    let mut drain = Drain {
        guest,
        left: count(&missing),
        pushed: vec![0; missing.len()],
        missing,
        position,
        fault: REMOTE_FAULT + link.round_trip() + 2.0 * page,
        debt: 0.0,
        ran: 0.0,
        asked: 0,
        cursor: 0,
    };
    let (mut seconds, mut budget) = (0.0, 0.0);
    while drain.left > 0 {
        drain.run(turn);
        budget += turn / page - std::mem::take(&mut drain.asked) as f64;
        let pushed = drain.push(hot, budget);
        budget -= pushed as f64;
        seconds += turn;
    }
    // The last turn may have been longer than what was left to push.
    let spare = (budget.max(0.0) * page).min(turn);
    let lost =
        (seconds - drain.ran - spare * (1.0 - DRAIN_BROWNOUT)).max(0.0) + drain.debt.max(0.0) + drain.afterwards();
    Drained { seconds: (seconds - spare).max(0.0), lost }
}

struct Drain<'a> {
    guest: &'a Guest,
    missing: Vec<u64>,
    left: u64,
    /// Pages that came unasked and that the guest has not touched yet.
    pushed: Vec<u64>,
    position: Position,
    fault: f64,
    /// Seconds that the guest still waits for what it has asked for.
    debt: f64,
    /// Seconds of its own that the guest has run.
    ran: f64,
    asked: u64,
    cursor: usize,
}

impl Drain<'_> {
    /// Lets the guest go on for `seconds` of the wall's clock.
    fn run(&mut self, seconds: f64) {
        // The wall's seconds for one of the guest's.
        let slow = 1.0 / (1.0 - DRAIN_BROWNOUT);
        let mut wall = seconds - self.debt;
        while wall > 1e-9 {
            let (stretch, mut length) = self.guest.stretch(self.position, whole(wall / slow * 1e9).max(1));
            let (remote, local) = self.faults(&stretch);
            let mut waits = self.waits(remote, local);
            let needs = length as f64 / 1e9 * slow + waits;
            if needs > wall {
                // It does not get that far: a part of the stretch, and the faults of that part.
                let part = whole(length as f64 * wall / needs).max(1);
                let (stretch, shorter) = self.guest.stretch(self.position, part);
                length = shorter;
                let (remote, local) = self.faults(&stretch);
                waits = self.waits(remote, local);
                self.take(&stretch, remote);
            } else {
                self.take(&stretch, remote);
            }
            self.position = self.guest.after(self.position, length);
            self.ran += length as f64 / 1e9;
            wall -= length as f64 / 1e9 * slow + waits;
        }
        self.debt = -wall;
    }

    fn waits(&self, remote: u64, local: u64) -> f64 {
        remote as f64 * self.fault + local as f64 * LOCAL_FAULT
    }

    /// Pages that the guest finds missing, and such that came unasked.
    fn faults(&self, stretch: &Stretch<'_>) -> (u64, u64) {
        let (mut remote, mut local) = (0, 0);
        for (word, (missing, pushed)) in self.missing.iter().zip(&self.pushed).enumerate() {
            if missing | pushed != 0 {
                let touched = stretch.touched(word);
                remote += u64::from((missing & touched).count_ones());
                local += u64::from((pushed & touched).count_ones());
            }
        }
        (remote, local)
    }

    fn take(&mut self, stretch: &Stretch<'_>, remote: u64) {
        for (word, (missing, pushed)) in self.missing.iter_mut().zip(&mut self.pushed).enumerate() {
            if *missing | *pushed != 0 {
                let touched = stretch.touched(word);
                *missing &= !touched;
                *pushed &= !touched;
            }
        }
        self.left -= remote;
        self.asked += remote;
    }

    /// Pushes up to `most` pages: first hot ones, then all others. Says how many.
    fn push(&mut self, hot: &[u64], most: f64) -> u64 {
        let most = whole(most.max(0.0));
        let words = self.missing.len();
        let mut done = 0;
        while done < most && self.left > 0 && self.cursor < 2 * words {
            let word = self.cursor % words;
            let wanted = if self.cursor < words { hot[word] } else { u64::MAX };
            let pages = lowest(self.missing[word] & wanted, most - done);
            self.missing[word] &= !pages;
            self.pushed[word] |= pages;
            let count = u64::from(pages.count_ones());
            done += count;
            self.left -= count;
            if done < most {
                self.cursor += 1;
            }
        }
        done
    }

    /// Seconds lost at pushed pages after the drain.
    fn afterwards(&mut self) -> f64 {
        let (mut ns, mut lost) = (AFTERWARDS_NS, 0.0);
        while ns > 0 {
            let (stretch, length) = self.guest.stretch(self.position, ns);
            let (_, local) = self.faults(&stretch);
            self.take(&stretch, 0);
            lost += local as f64 * LOCAL_FAULT;
            self.position = self.guest.after(self.position, length);
            ns -= length;
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::super::guest::Epoch;
    use super::*;

    fn link() -> Link {
        Link { bytes_per_second: 409_600_000, delay_ns: 0 }
    }

    fn guest(written: u64) -> Guest {
        Guest::new("g".into(), 6400, 0, vec![Epoch::new(5_000_000, vec![written; 100], &[])])
    }

    #[test]
    fn a_guest_that_needs_nothing_is_slowed_down_only() {
        let guest = guest(0);
        let Drained { seconds, lost } = drain(&guest, link(), guest.all(), &[0; 100], Position::default());
        assert!((seconds - 0.064).abs() < 0.001, "{seconds}: 6,400 pages at 100,000 a second");
        assert!((lost - 0.064 * DRAIN_BROWNOUT).abs() < 1e-4, "{lost}");
    }

    #[test]
    fn a_guest_that_needs_all_loses_the_drain_and_its_mapping() {
        let guest = guest(u64::MAX);
        let Drained { seconds, lost } = drain(&guest, link(), guest.all(), &[0; 100], Position::default());
        assert!((seconds - 0.064).abs() < 0.002, "{seconds}");
        assert!((0.06..0.1).contains(&lost), "{lost}");
    }

    #[test]
    fn hot_pages_go_first() {
        let mut guest = guest(0);
        guest.epochs[0].touched[99] = u64::MAX;
        let mut hot = vec![0; 100];
        let blind = drain(&guest, link(), guest.all(), &hot, Position::default());
        hot[99] = u64::MAX;
        let informed = drain(&guest, link(), guest.all(), &hot, Position::default());
        assert!(informed.lost < blind.lost * 0.8, "{} {}", informed.lost, blind.lost);
    }

    #[test]
    fn nothing_to_drain_takes_no_time() {
        let guest = guest(u64::MAX);
        let Drained { seconds, lost } = drain(&guest, link(), vec![0; 100], &[0; 100], Position::default());
        assert_eq!((seconds, lost), (0.0, 0.0));
    }
}
