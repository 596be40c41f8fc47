//! Faults that are answered, by whoever can cause them here.

use std::time::Duration;

use super::guest_fault::{self, Guest};
use super::handler::{nothing, served};
use super::region::Region;
use super::request::{answered, tcp_pair};
use super::{FloorError, Samples, Way, user_fault};

/// Who touches pages, or keeps a processor busy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vcpu {
    /// A KVM guest.
    Guest,
    /// A thread, where there is no KVM.
    User,
}

/// How pages are touched.
#[derive(Clone, Copy, Debug)]
pub struct Touches {
    /// Who does it.
    pub by: Vcpu,
    /// Pages touched before all are unmapped again.
    pub pages: usize,
    /// How long it works before each touch.
    pub work_ns: u64,
}

impl Vcpu {
    /// A guest, where there can be one.
    #[must_use]
    pub fn available() -> Self {
        let guest = Region::new(1).and_then(|region| Guest::new(&region, 0).map(drop));
        guest.map_or(Self::User, |()| Self::Guest)
    }

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::User => "user",
        }
    }
}

/// Round trips of faults that are answered at once.
///
/// # Errors
/// When KVM, memory or userfaultfd cannot be had, or the guest does not do what it should.
pub fn no_op(touches: Touches, way: Way, budget: Duration) -> Result<Samples, FloorError> {
    with(touches, way, budget, nothing)
}

/// Round trips of faults whose page is asked for over TCP, from another thread, before they are answered.
///
/// # Errors
/// As for [`no_op`], and when sockets fail.
pub fn remote(touches: Touches, way: Way, budget: Duration) -> Result<Samples, FloorError> {
    let (near, far) = tcp_pair(way)?;
    answered(near, far, |near| with(touches, way, budget, || near.ask()))
}

fn with(
    Touches { by, pages, work_ns }: Touches,
    way: Way,
    budget: Duration,
    fetch: impl FnMut() -> Result<(), FloorError> + Send,
) -> Result<Samples, FloorError> {
    let region = Region::new(pages)?;
    match by {
        Vcpu::Guest => {
            let mut guest = Guest::new(&region, work_ns)?;
            served(&region, way, fetch, || guest_fault::measure(&mut guest, Samples::new(budget)?))
        }
        Vcpu::User => served(&region, way, fetch, || user_fault::measure(&region, work_ns, Samples::new(budget)?)),
    }
}
