//! KVM's dirty rings: what each vCPU wrote, page by page, in a ring of its own.
//!
//! Reading costs what was written, whatever the size of RAM; and it tells vCPUs apart. Entries are harvested into the
//! machine's [`Book`](super::book::Book), and there they are noted.
//!
//! # No write is lost
//! KVM pushes an entry when a page becomes writable, and nothing more for it until the rings are reset. So a page is in one of
//! three states: *protected* (the next write pushes), *pushed* (writable, its entry in a ring), *harvested* (writable, its
//! bit in the book, its entry gone). A page that is harvested must not lose its bit, or later writes would go unnoticed.
//! Therefore harvesting, resetting and the clearing of bits exclude each other under one lock, and the lock is let go only when
//! no page is harvested and not protected: whoever clears a bit finds its page protected or pushed. Where a reset
//! fails, the rings are remembered as *not reset*, and no bit is cleared before one has succeeded.
//!
//! A page pushed *before* a rearm and harvested after it is noted once too often, which costs time only. To harvest at every
//! rearm would avoid it, and would protect the guest's hot pages again for every 64 pages that are sent.
//!
//! # Rings that overrun
//! KVM takes a vCPU out before its ring is full, with room left for what is on the way. A KVM that runs much guest code without
//! looking (seen with one that emulates ring 0) can come too late, and overwrites entries. A ring that is found full to the
//! last entry, or from which KVM resets another number of entries than were harvested, may have lost some: the log then
//! refuses every further answer, for good, and the guest runs on.
//!
//! # What is in no ring
//! On x86, KVM writes guest memory only on behalf of a vCPU, into that one's ring. Where it does so otherwise
//! (KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, as on arm64) this log is not offered.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::dirty::{DirtyLog, DirtyLogError};
use switchover_wire::types::{PageCount, PageIndex};

use super::ioctls;
use super::vcpu_ring::{ENTRY_SIZE, VcpuRing};
use crate::error::VmError;
use crate::lock;
use crate::memory::GuestMemory;

/// Entries of a vCPU's ring where KVM allows as many. A full ring takes its vCPU out of the guest.
const ENTRIES: usize = 16_384;
/// Shorter than this, a rate would say more about the moment than about the vCPU.
pub const LEAST_SPAN: Duration = Duration::from_millis(100);

/// Rings that a VM has been given, before its vCPUs exist.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingBytes(usize);

impl RingBytes {
    /// Gives each vCPU that `vm` will have a ring. `None` where KVM has none, or does not tell everything there.
    ///
    /// # Errors
    /// When KVM has them and refuses.
    pub fn give(kvm: &Kvm, vm: &VmFd) -> Result<Option<Self>, VmError> {
        let most = |capability: u32| usize::try_from(kvm.check_extension_raw(capability.into())).unwrap_or(0);
        if most(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) != 0 {
            return Ok(None);
        }
        // The second is the older name, for processors whose every store is a release.
        let both = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        let Some((cap, most)) = both.map(|cap| (cap, most(cap))).into_iter().find(|(_, most)| *most > 0) else {
            return Ok(None);
        };
        let bytes = most.min(ENTRIES * ENTRY_SIZE);
        let args = [bytes as u64, 0, 0, 0];
        vm.enable_cap(&kvm_enable_cap { cap, args, ..kvm_enable_cap::default() })
            .map_err(VmError::kvm(format!("give each vCPU a dirty ring of {bytes} bytes")))?;
        Ok(Some(Self(bytes)))
    }
}

/// The dirty rings of a machine's vCPUs, and the book of its own writes.
pub struct RingLog {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    started: AtomicBool,
    rings: Mutex<Rings>,
}

struct Rings {
    rings: Vec<VcpuRing>,
    meter: Meter,
    /// Entries that are harvested and not known to be reset. Their pages may not be protected yet.
    not_reset: u64,
    /// Whether entries may have been overwritten.
    overrun: bool,
}

/// Rates of writing, by counts that are some time apart.
struct Meter {
    since: Instant,
    counts: Vec<u64>,
    /// Bytes a second, by the counts before these.
    rates: Vec<u64>,
}

impl Rings {
    fn check(&self) -> Result<(), DirtyLogError> {
        const WHY: &str = "one has overrun, and what the guest wrote is not known any more: this host's KVM takes vCPUs out of \
                           the guest too late; run the machine with --dirty-tracking log";
        if self.overrun { Err(DirtyLogError::new("rely on the dirty rings", WHY)) } else { Ok(()) }
    }
}

impl RingLog {
    /// Over the rings that all of a machine's vCPUs have been given.
    ///
    /// # Errors
    /// When a ring cannot be mapped.
    pub fn new(vm: Arc<VmFd>, memory: GuestMemory, bytes: RingBytes, vcpus: &[VcpuFd]) -> Result<Self, VmError> {
        let rings: Result<_, _> = vcpus.iter().map(|vcpu| VcpuRing::of(vcpu, bytes.0)).collect();
        let rings =
            rings.map_err(|source| VmError::Host { attempted: "map a vCPU's dirty ring".to_owned(), source })?;
        let meter = Meter { since: Instant::now(), counts: Vec::new(), rates: Vec::new() };
        let rings = Mutex::new(Rings { rings, meter, not_reset: 0, overrun: false });
        Ok(Self { vm, memory, started: AtomicBool::new(false), rings })
    }

    /// Makes room in all rings: that of `vcpu` is full.
    ///
    /// # Errors
    /// When KVM does not reset them.
    pub fn make_room(&self, vcpu: usize) -> Result<(), DirtyLogError> {
        let mut rings = lock(&self.rings);
        if rings.overrun {
            if let Some(ring) = rings.rings.get_mut(vcpu) {
                ring.give_up_half();
            }
            return self.reset().map(drop);
        }
        match self.harvest(&mut rings) {
            Err(error) if rings.overrun => {
                tracing::error!(%error, "the dirty log is useless from now on");
                Ok(())
            }
            result => result,
        }
    }

    /// Whether the book is kept.
    #[must_use]
    pub fn has_started(&self) -> bool {
        self.started.load(Ordering::SeqCst)
    }

    /// How many pages each vCPU has newly written since it exists, while the book was kept. One that is rearmed and written
    /// again counts again.
    #[must_use]
    pub fn written(&self) -> Vec<PageCount> {
        lock(&self.rings).rings.iter_mut().map(|ring| PageCount(ring.pushed())).collect()
    }

    /// How many bytes a second each vCPU newly writes, since the call before, if that is [`LEAST_SPAN`] ago.
    #[must_use]
    pub fn rates(&self) -> Vec<u64> {
        let Rings { rings, meter, .. } = &mut *lock(&self.rings);
        let passed = meter.since.elapsed();
        if passed >= LEAST_SPAN || meter.rates.is_empty() {
            let counts: Vec<u64> = rings.iter_mut().map(VcpuRing::pushed).collect();
            let before = meter.counts.iter().copied().chain(std::iter::repeat(0));
            let micros = passed.as_micros().max(1);
            let rate = |(now, before): (&u64, u64)| {
                let bytes = u128::from(PageCount(now.saturating_sub(before)).bytes());
                u64::try_from(bytes * 1_000_000 / micros).unwrap_or(u64::MAX)
            };
            meter.rates = counts.iter().zip(before).map(rate).collect();
            (meter.since, meter.counts) = (Instant::now(), counts);
        }
        meter.rates.clone()
    }

    fn begin_metering(&self) {
        let Rings { rings, meter, .. } = &mut *lock(&self.rings);
        *meter = Meter {
            since: Instant::now(),
            counts: rings.iter_mut().map(VcpuRing::pushed).collect(),
            rates: Vec::new(),
        };
    }

    fn harvest(&self, rings: &mut Rings) -> Result<(), DirtyLogError> {
        rings.check()?;
        let spans: Vec<_> = self.memory.spans().collect();
        for ring in &mut rings.rings {
            let mut taken = 0;
            // Ends: an entry is not used again before it was reset.
            while taken < ring.room()
                && let Some(written) = ring.harvest()
            {
                taken += 1;
                let span = usize::try_from(written.slot).ok().and_then(|slot| spans.get(slot));
                if let Some(span) = span.filter(|span| written.page < span.pages) {
                    self.memory.book().note(PageIndex(span.first + written.page));
                }
            }
            rings.not_reset += taken;
            rings.overrun |= taken == ring.room();
        }
        self.protect(rings)
    }

    /// Has KVM protect the pages of what was harvested.
    fn protect(&self, rings: &mut Rings) -> Result<(), DirtyLogError> {
        if rings.not_reset > 0 {
            rings.overrun |= self.reset()?.is_some_and(|reset| reset != rings.not_reset);
            rings.not_reset = 0;
        }
        rings.check()
    }

    /// How many entries KVM reset, unless a signal came between, which hides some of them.
    fn reset(&self) -> Result<Option<u64>, DirtyLogError> {
        let mut interrupted = false;
        loop {
            match ioctls::reset_dirty_rings(&self.vm) {
                Ok(count) => return Ok((!interrupted).then_some(count)),
                // A vCPU's thread that is wanted out. The signal has been taken by now.
                Err(error) if error.errno() == libc::EINTR => interrupted = true,
                Err(error) => return Err(DirtyLogError::new("reset the dirty rings", error)),
            }
        }
    }

    fn check_started(&self, attempted: &str) -> Result<(), DirtyLogError> {
        if self.has_started() { Ok(()) } else { Err(DirtyLogError::new(attempted, "they have not been started")) }
    }
}

impl DirtyLog for RingLog {
    fn start(&self) -> Result<(), DirtyLogError> {
        lock(&self.rings).check()?;
        self.stop();
        self.memory.book().note_all();
        if let Err(error) = self.memory.log_writes(&self.vm, true) {
            self.stop();
            return Err(DirtyLogError::new("start the dirty rings", error));
        }
        self.begin_metering();
        self.started.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn peek(&self, noted: &mut PageBitmap) -> Result<(), DirtyLogError> {
        self.check_started("read the dirty rings")?;
        // A vCPU that has left the guest has pushed everything that it wrote.
        self.harvest(&mut lock(&self.rings))?;
        noted.unite(&self.memory.book().noted());
        Ok(())
    }

    fn rearm(&self, first: PageIndex, words: &[u64]) -> Result<(), DirtyLogError> {
        self.check_started("rearm pages in the dirty rings")?;
        let rings = &mut *lock(&self.rings);
        self.protect(rings)?;
        self.memory.book().clear(first, words);
        Ok(())
    }

    fn stop(&self) {
        self.started.store(false, Ordering::SeqCst);
        if let Err(error) = self.memory.log_writes(&self.vm, false) {
            tracing::warn!(%error, "the dirty rings stay on, which slows the guest down");
        }
        if let Err(error) = self.harvest(&mut lock(&self.rings)) {
            tracing::warn!(%error, "the dirty rings stay full");
        }
    }
}
