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

/// Seconds of a link's time.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Link {
    /// For a page that the guest has written.
    pub data_page: f64,
    /// For a page of this round that was not sent yet: it may be a zero page.
    pub left_page: f64,
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

    /// Seconds to copy them.
    pub fn copy(&self, link: &Link) -> f64 {
        self.written * link.data_page + self.left * link.left_page
    }
}

/// Seconds of blackout, if the guest stops and the rest is copied first.
pub(super) fn stop_blackout(rest: &Rest, link: &Link) -> f64 {
    link.handoff + rest.copy(link)
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
