//! What a migration costs its guest, and the constants of that model: all of them are here.
//!
//! The cost is the one that a migration is judged by: guest-seconds lost plus a tenth of the seconds that it takes. The
//! monitor weighs its ends with this model, and `switchover simulate` plays whole migrations with the same constants.

use super::curve::Curve;

/// Guest-seconds that a second of migration is worth. Not measured: it is the definition of the cost.
pub const TOTAL_WEIGHT: f64 = 0.1;

/// Share of the guest that is lost while rounds are sent: its core, caches and memory bandwidth are shared with the lanes.
/// An assumption of one lane beside one vCPU on two cores, to be replaced by a measured one.
pub const PRECOPY_BROWNOUT: f64 = 0.05;

/// Share of the guest that is lost while the rest follows it, besides what it waits for: pages are placed and mapped beside
/// it. Taken to be that of the rounds until it is measured.
pub const DRAIN_BROWNOUT: f64 = 0.05;

/// The guest's loss, in seconds, at its first write to a page after the page was armed again: an exit, the log's bit, and
/// the mapping made writable. Measured on the shadow paging of our host as what a writer of 256 MiB loses while its pages are
/// rearmed (`benches/dirty_tracking`): 7 µs; a first touch alone is 0.9.
pub const WRITE_FAULT: f64 = 7e-6;

/// The guest's loss, in seconds, at a page that has to be asked for, link and transfer left out: the median of remote faults
/// over loopback, measured at 20 µs.
pub const REMOTE_FAULT: f64 = 20e-6;

/// The guest's loss, in seconds, at a page that post-copy pushed before it was asked for: what is left of the measured loss
/// (0.54 guest-seconds for 65,536 pages of a random writer over loopback) when its drain of 0.2 s is taken away.
pub const LOCAL_FAULT: f64 = 5e-6;

/// Share of the guest that is lost while pages that it needs are missing, at most: it has some of them before the others.
/// An assumption.
pub const STALL: f64 = 0.9;

/// How much longer the guest waits for a page that it needs among others never sent: which of them are hot is not known, so
/// each is asked for behind one that is pushed in vain. An assumption; with 1, the tuning seeds went to post-copy too early.
pub const BLIND: f64 = 2.0;

/// Share of the pages never sent that the guest is taken to need soon, where none of them was seen to be written: what is only
/// read leaves no trace in a dirty log. An assumption.
pub const UNSEEN_NEED: f64 = 0.3;

/// Seconds that a round takes beside its pages: a look at the dirty log and the lanes' start.
pub const ROUND_OVERHEAD: f64 = 0.2e-3;

/// Bytes that a page takes on the wire where nothing better is known.
pub const RAW_PAGE: f64 = 4096.0;

/// Seconds of processors for a page that is sent as a difference: keeping, comparing and encoding it at the source, decoding it at
/// the destination. 8 to 10 µs on the development hosts.
pub const DIFFERENCE: f64 = 9e-6;

/// The same while the guest is paused, and leaves its processor to it: of nine stops of an idle guest at 1 Gbit/s, whose 614 pages went
/// as differences of 100 bytes, eight took 7 to 8.1 µs a page.
pub(super) const PAUSED_DIFFERENCE: f64 = 7.5e-6;

/// Whether differences pay: a page as it is takes longer on the link, which carries so many bytes a second, than packing it does.
///
/// Between two ends of one host only a limit makes a link slow: whatever else holds the lanes up is the processors, which packing
/// would hold up more. Elsewhere they may pay as long as nothing was measured. 0 means not measured, or no limit.
#[must_use]
pub fn differences_pay(bytes_per_second: u64, limit: u64, within_host: bool) -> bool {
    match if within_host { limit } else { bytes_per_second } {
        0 => !within_host,
        carried => RAW_PAGE / carried as f64 > DIFFERENCE,
    }
}

/// Seconds for a page with bytes, and for a zero page, that a paused guest's copy takes where both ends are of one host and
/// nothing but its processors holds them up. Of 15 stops of three guests without a limit, over loopback, 12 come out within
/// 20 % with these two; what the rounds before had measured, beside the running guest, was two to five times as slow.
pub const PAUSED_PAGE: f64 = 1.3e-6;
/// See [`PAUSED_PAGE`].
pub const PAUSED_ZERO: f64 = 0.4e-6;
/// But no more than so many times as fast as the rounds before: 3.8 was the most that was seen.
const PAUSED_GAIN: f64 = 4.0;

/// Share of a limit from which on the limit is what held the lanes up.
const AT_THE_LIMIT: f64 = 0.8;

/// Seconds for a page of `bytes` while the guest is paused, where the lanes carried `rate` bytes a second beside the running
/// guest and are held to `limit`, if that is not 0.
pub(super) fn paused_page(bytes: f64, rate: f64, limit: f64, within_host: bool) -> f64 {
    let measured = bytes / rate;
    let least = if limit > 0.0 { bytes / limit } else { 0.0 };
    if within_host {
        PAUSED_PAGE.max(measured / PAUSED_GAIN).min(measured).max(least)
    } else if rate >= limit * AT_THE_LIMIT && limit > 0.0 {
        least
    } else {
        measured
    }
}

/// Seconds that a handoff waits, the guest running on, for what is under way: what takes no longer is not copied in a blackout.
/// The rounds' own patience with it is as long.
pub(super) const SETTLES: f64 = 0.05;

/// Seconds of a link's time.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Link {
    /// For a page that the guest has written.
    pub data_page: f64,
    /// For a page of this round that was not sent yet: it may be a zero page.
    pub left_page: f64,
    /// For a page that the guest has written, while it is paused.
    pub paused_data_page: f64,
    /// For a page of this round that was not sent yet, while the guest is paused.
    pub paused_left_page: f64,
    /// Of processors, beside the link's, for a written page while the guest is paused: where it goes as a difference.
    pub paused_packing: f64,
    /// For what a handoff takes besides pages.
    pub handoff: f64,
}

/// What a handoff would leave to be copied.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Rest {
    /// Pages written since they were sent, and those in flight.
    pub written: f64,
    /// Pages not sent yet.
    pub left: f64,
    /// Share of those left that the guest writes again soon.
    pub hot_share: f64,
}

impl Rest {
    /// After a round: nothing is left but what was written.
    pub const fn written(pages: f64) -> Self {
        Self { written: pages, left: 0.0, hot_share: 0.0 }
    }

    /// Seconds to copy them to a guest that runs.
    pub fn copy(&self, link: &Link) -> f64 {
        self.written * link.data_page + self.left * link.left_page
    }

    /// Seconds to copy them while the guest is paused.
    pub fn copy_paused(&self, link: &Link) -> f64 {
        let carried = self.written * link.paused_data_page + self.left * link.paused_left_page;
        // Packed while others are carried.
        carried.max(self.written * link.paused_packing)
    }
}

/// Seconds of blackout, if the guest stops and the rest is copied first.
pub(super) fn stop_blackout(rest: &Rest, link: &Link) -> f64 {
    link.handoff + rest.copy_paused(link)
}

/// The cost of stopping and copying.
pub(super) fn stop_and_copy(rest: &Rest, link: &Link) -> f64 {
    stop_blackout(rest, link) * (1.0 + TOTAL_WEIGHT)
}

/// The cost of a handoff now, with `rest` following.
///
/// Hottest pages go first, so the guest is slow until those that it needs are there; a guest that touches few pages waits for
/// those alone.
pub(super) fn postcopy(rest: &Rest, link: &Link, curve: &Curve) -> f64 {
    let drain = rest.copy(link);
    let needed_left = rest.left * rest.hot_share.max(UNSEEN_NEED);
    let among_others = (needed_left * BLIND).min(rest.left);
    let needed = rest.written * curve.comes_back().max(UNSEEN_NEED);
    let until_there = STALL * (needed * link.data_page + among_others * link.left_page);
    let touched = curve.distinct(drain).min(needed) + needed_left;
    let one_by_one = touched * (REMOTE_FAULT + 2.0 * link.data_page);
    let waits = until_there.min(one_by_one);
    let lost =
        link.handoff + waits + DRAIN_BROWNOUT * (drain - waits).max(0.0) + LOCAL_FAULT * (rest.written + needed_left);
    lost + TOTAL_WEIGHT * (link.handoff + drain)
}

/// The cost of `seconds` of rounds in which `written` pages are written.
pub(super) fn precopy(seconds: f64, written: f64) -> f64 {
    seconds * (PRECOPY_BROWNOUT + TOTAL_WEIGHT) + written * WRITE_FAULT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_pay_on_slow_links_only() {
        for (bytes, pay) in [(12_500_000, true), (125_000_000, true), (625_000_000, false), (1_500_000_000, false)] {
            assert_eq!(differences_pay(bytes, 0, false), pay, "{bytes} measured");
            assert_eq!(differences_pay(12_500_000, bytes, true), pay, "{bytes} allowed");
        }
        assert!(differences_pay(0, 0, false), "nothing was measured yet");
        assert!(!differences_pay(12_500_000, 0, true), "it is the processors that are slow");
    }

    #[test]
    fn a_paused_copy_is_held_up_by_what_holds_it_up() {
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < expected / 1e6, "{found} {expected}");
        // A network: what was measured, or the limit that was reached or passed.
        near(paused_page(RAW_PAGE, 125e6, 0.0, false), RAW_PAGE / 125e6);
        near(paused_page(RAW_PAGE, 60e6, 125e6, false), RAW_PAGE / 60e6);
        near(paused_page(RAW_PAGE, 115e6, 125e6, false), RAW_PAGE / 125e6);
        near(paused_page(RAW_PAGE, 150e6, 125e6, false), RAW_PAGE / 125e6);
        // Processors: no slower than they were seen to be, and no faster than can be believed.
        near(paused_page(RAW_PAGE, 1e9, 0.0, true), PAUSED_PAGE);
        near(paused_page(RAW_PAGE, 4e9, 0.0, true), RAW_PAGE / 4e9);
        near(paused_page(RAW_PAGE, 1e8, 0.0, true), RAW_PAGE / 4e8);
        near(paused_page(RAW_PAGE, 5e8, 625e6, true), RAW_PAGE / 625e6);
    }
}
