//! `switchover simulate --faults`: plays recorded or made-up first touches through push orders, and says what each leaves the
//! guest to wait for, beside one who knows them all beforehand.

pub mod best;
pub mod guest;
pub mod model;
pub mod patterns;
pub mod play;
pub mod table;

#[cfg(test)]
mod tests;

use serde::Serialize;
use switchover_pager::source::order::Policy;

use self::guest::Toucher;
use self::model::Model;
use self::play::{Outcome, Push, play};

/// One guest over one link.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Judged {
    /// The guest's name.
    pub name: String,
    /// Bits a second.
    pub bandwidth: u64,
    /// Pages that it touched, each vCPU's.
    pub touches: u64,
    /// Seconds of its own work between them, the busiest vCPU's.
    pub work: f64,
    /// What link and pager cost.
    pub model: Model,
    /// What each order came to.
    pub played: Vec<Played>,
    /// What one who knows the trace comes to.
    pub best: Outcome,
    /// What no schedule can beat.
    pub bound: Outcome,
}

/// One order.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Played {
    /// Its name.
    pub order: String,
    /// What it came to.
    pub outcome: Outcome,
}

/// Plays `guest` through each of `orders`.
#[must_use]
pub fn judge(guest: &Toucher, model: &Model, orders: &[Policy]) -> Judged {
    let outcome =
        |policy: &Policy| Played { order: policy.to_string(), outcome: play(guest, model, &Push::Policy(*policy)) };
    let work = |touches: &Vec<guest::Touch>| touches.iter().map(|touch| touch.think_ns).sum::<u64>();
    Judged {
        name: guest.name.clone(),
        bandwidth: model.bytes_per_second.saturating_mul(8),
        touches: guest.vcpus.iter().map(|touches| touches.len() as u64).sum(),
        work: guest.vcpus.iter().map(work).max().unwrap_or(0) as f64 / 1e9,
        model: *model,
        played: orders.iter().map(outcome).collect(),
        best: best::best(guest, model),
        bound: best::bound(guest, model),
    }
}
