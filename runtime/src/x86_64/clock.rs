//! The guest's clocks across a move. The policy: time goes on.
//!
//! The TSC and KVM's paravirtual clock are advanced by the blackout, so that the guest can see how long it stood still; they
//! are never set back or held to hide it. On one host the blackout is measured by CLOCK_MONOTONIC, between two by
//! CLOCK_REALTIME, which both hosts are expected to keep. The local APIC's timer goes on with what it had left in its counting
//! modes; a TSC deadline is a point in time and fires late if it has passed. The PIT's channels begin their counts anew, because
//! KVM_SET_PIT2 has no other way: a guest that is moved while it measures its TSC against the PIT measures wrong.
//!
//! Where KVM can set a vCPU's TSC offset, all vCPUs' offsets are moved by the same number, so that they stay as synchronous
//! as they were. Where it cannot, the TSC is written, as near as that comes. KVM without control of the TSC (software
//! virtualisation) ignores the write, and the guest reads the host's counter.
//!
//! The method for offsets is that of Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use switchover_wire::clock::{HostClock, Nanos};

/// The clocks at one instant.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SavedClock {
    /// KVM's paravirtual clock, in nanoseconds.
    kvm_clock_ns: u64,
    /// The host's TSC at the same instant, where KVM tells.
    host_tsc: Option<u64>,
    /// CLOCK_MONOTONIC, in nanoseconds.
    monotonic_ns: u64,
    /// CLOCK_REALTIME, in nanoseconds.
    realtime_ns: u64,
    /// Whose CLOCK_MONOTONIC it is.
    host: HostClock,
    /// The guest TSC's frequency.
    tsc_khz: u32,
}

impl SavedClock {
    /// The clocks now.
    ///
    /// # Errors
    /// When KVM does not tell.
    pub fn now(vm: &VmFd, host: &HostClock, tsc_khz: u32) -> Result<Self, kvm_ioctls::Error> {
        let clock = vm.get_clock()?;
        Ok(Self {
            kvm_clock_ns: clock.clock,
            host_tsc: (clock.flags & KVM_CLOCK_HOST_TSC != 0).then_some(clock.host_tsc),
            monotonic_ns: Nanos::now().0,
            realtime_ns: realtime_ns(),
            host: host.clone(),
            tsc_khz,
        })
    }

    /// Sets the paravirtual clock to what it would show now had it never stopped. Answers what the TSCs need for the same.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore(&self, vm: &VmFd, host: &HostClock) -> Result<TscAdvance, kvm_ioctls::Error> {
        let elapsed_ns = self.elapsed_ns(host, Nanos::now().0, realtime_ns());
        let clock = kvm_clock_data { clock: self.kvm_clock_ns.wrapping_add(elapsed_ns), ..Default::default() };
        vm.set_clock(&clock)?;
        let there = Self::now(vm, host, self.tsc_khz)?;
        Ok(TscAdvance { elapsed_ns, offset: self.offset_change(&there, elapsed_ns) })
    }

    /// How long ago the state was saved.
    fn elapsed_ns(&self, host: &HostClock, monotonic_ns: u64, realtime_ns: u64) -> u64 {
        if self.host.same_host(host) {
            monotonic_ns.saturating_sub(self.monotonic_ns)
        } else {
            realtime_ns.saturating_sub(self.realtime_ns)
        }
    }

    /// By how much each vCPU's TSC offset changes: the ticks that have passed, less the difference of the two hosts' counters.
    fn offset_change(&self, there: &Self, elapsed_ns: u64) -> Option<u64> {
        let (here, there) = (self.host_tsc?, there.host_tsc?);
        Some(here.wrapping_add(ticks(elapsed_ns, self.tsc_khz)).wrapping_sub(there))
    }
}

/// What a vCPU's TSC needs so that the blackout is not hidden.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TscAdvance {
    elapsed_ns: u64,
    offset: Option<u64>,
}

impl TscAdvance {
    /// The TSC to set, for one that was `saved`.
    #[must_use]
    pub fn tsc(&self, saved: u64, tsc_khz: u32) -> u64 {
        saved.wrapping_add(ticks(self.elapsed_ns, tsc_khz))
    }

    /// The offset to set, for one that was `saved`, where both hosts' KVM told enough to know it.
    #[must_use]
    pub fn offset(&self, saved: u64) -> Option<u64> {
        self.offset.map(|change| saved.wrapping_add(change))
    }
}

/// A counter of `khz` counts that much in `ns`.
fn ticks(ns: u64, khz: u32) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(khz) / 1_000_000).unwrap_or(u64::MAX)
}

fn realtime_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(host: &str, host_tsc: u64) -> SavedClock {
        SavedClock {
            kvm_clock_ns: 5_000,
            host_tsc: Some(host_tsc),
            monotonic_ns: 1_000,
            realtime_ns: 1_000_000,
            host: HostClock { boot_id: host.to_owned() },
            tsc_khz: 2_000_000,
        }
    }

    #[test]
    fn the_blackout_is_measured_by_the_clock_that_both_sides_share() {
        let (here, elsewhere) = (clock("a", 0).host, clock("b", 0).host);
        assert_eq!(clock("a", 0).elapsed_ns(&here, 1_700, 9_000_000), 700);
        assert_eq!(clock("a", 0).elapsed_ns(&elsewhere, 1_700, 1_000_300), 300);
        assert_eq!(clock("a", 0).elapsed_ns(&elsewhere, 0, 0), 0, "never backwards");
    }

    #[test]
    fn the_guest_sees_the_blackout_in_its_tsc() {
        // The other host's counter stands elsewhere. 1 µs at 2 GHz is 2000 ticks.
        let (saved, there) = (clock("a", 10_000), clock("b", 700));
        let advance = TscAdvance { elapsed_ns: 1_000, offset: saved.offset_change(&there, 1_000) };
        let offset = 50_u64;
        let guest_before = saved.host_tsc.unwrap() + offset;
        let guest_after = there.host_tsc.unwrap().wrapping_add(advance.offset(offset).unwrap());
        assert_eq!(guest_after - guest_before, 2_000);
        assert_eq!(advance.tsc(guest_before, 2_000_000), guest_after);
    }
}
