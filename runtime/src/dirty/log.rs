//! KVM's dirty bitmap: a bit for each page of a slot, read and cleared by separate calls.
//!
//! Clearing by a call of its own (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) is what makes `peek` change nothing, and
//! `rearm` cost what the few pages cost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VmFd};
use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::dirty::{DirtyLog, DirtyLogError};
use switchover_wire::types::{PAGE_SIZE, PageIndex};

use super::ioctls;
use crate::memory::GuestMemory;

/// The dirty bitmaps of a machine's slots, and the book of its own writes.
pub struct BitmapLog {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    started: AtomicBool,
}

impl BitmapLog {
    /// For a VM whose slots are registered already or not. `None` where KVM has no log that is cleared by a call of its
    /// own (Linux before 5.2).
    #[must_use]
    pub fn new(kvm: &Kvm, vm: Arc<VmFd>, memory: GuestMemory) -> Option<Self> {
        let there = kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let there = u32::try_from(there).unwrap_or(0);
        // With the second, logging begins with all bits set and no page protected: nothing has to be done for all pages at
        // once, and a page costs the guest a fault only after it was sent.
        let wanted = there & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        if wanted & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
            return None;
        }
        let capability = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [wanted.into(), 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        vm.enable_cap(&capability).ok()?;
        Some(Self { vm, memory, started: AtomicBool::new(false) })
    }

    fn check_started(&self, attempted: &str) -> Result<(), DirtyLogError> {
        if self.started.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(DirtyLogError::new(attempted, "it has not been started"))
    }
}

impl DirtyLog for BitmapLog {
    fn start(&self) -> Result<(), DirtyLogError> {
        self.stop();
        // KVM may begin with an empty log and all pages protected, or a full one: the own book is full in any case.
        self.memory.book().note_all();
        if let Err(error) = self.memory.log_writes(&self.vm, true) {
            self.stop();
            return Err(DirtyLogError::new("start the dirty log", error));
        }
        self.started.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn peek(&self, noted: &mut PageBitmap) -> Result<(), DirtyLogError> {
        self.check_started("read the dirty log")?;
        let pages = self.memory.ram().pages();
        let mut words = self.memory.book().noted().words().to_vec();
        for span in self.memory.spans() {
            let failed = |error| DirtyLogError::new(format!("read the dirty log of slot {}", span.slot), error);
            let bytes = usize::try_from(span.pages).unwrap_or(usize::MAX).saturating_mul(PAGE_SIZE);
            let slot = self.vm.get_dirty_log(span.slot, bytes).map_err(failed)?;
            span.add_to(&mut words, &slot);
        }
        noted.unite(&PageBitmap::from_words(&words, pages));
        Ok(())
    }

    fn rearm(&self, first: PageIndex, words: &[u64]) -> Result<(), DirtyLogError> {
        self.check_started("rearm pages in the dirty log")?;
        for span in self.memory.spans() {
            if let Some(part) = span.part(first, words) {
                ioctls::clear_dirty_log(&self.vm, span.slot, &part).map_err(|error| {
                    let range =
                        format!("{} pages from {} on in the dirty log of slot {}", part.pages, part.first, span.slot);
                    DirtyLogError::new(format!("rearm {range}"), error)
                })?;
            }
        }
        // Last: a page that could not be rearmed stays noted.
        self.memory.book().clear(first, words);
        Ok(())
    }

    fn stop(&self) {
        self.started.store(false, Ordering::SeqCst);
        if let Err(error) = self.memory.log_writes(&self.vm, false) {
            tracing::warn!(%error, "the dirty log stays on, which slows the guest down");
        }
    }
}
