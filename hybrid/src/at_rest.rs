//! What a save and a restore have in common: a machine, an image, and how far the one has come into the other.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use switchover_image::Tally;
use switchover_pager::collapse::Collapse;
use switchover_pager::cpu::CpuMeter;
use switchover_wire::types::PAGE_SIZE_U64;

use crate::lanes::Lanes;
use crate::machine::Machine;
use crate::progress::Progress;
use crate::recorder::Recorder;
use crate::report::{CpuSeconds, Side, SideReport};
use crate::settings::Observer;

/// The books of a save or a restore, kept by its thread and read by whoever watches.
pub struct Books {
    pub machine: Arc<dyn Machine>,
    pub recorder: Recorder,
    pub tally: Tally,
    pub cpu: CpuMeter,
    /// Maps the guest's memory as huge pages, for as long as somebody has a handle.
    collapse: Mutex<Option<Collapse>>,
}

impl Books {
    /// Of one that begins now.
    pub fn begin(machine: Arc<dyn Machine>, observer: Observer) -> Self {
        let recorder = Recorder::new(observer);
        recorder.begin();
        Self { machine, recorder, tally: Tally::default(), cpu: CpuMeter::default(), collapse: Mutex::default() }
    }

    /// Maps memory as huge pages from now on, where it was mapped page by page.
    pub fn collapse(&self) {
        match Collapse::start(&self.machine.ram()) {
            Ok(collapse) => *self.collapse.lock().unwrap_or_else(PoisonError::into_inner) = Some(collapse),
            Err(error) => tracing::warn!(%error, "the guest runs slower than it could, on small pages"),
        }
    }

    /// How far it has come. Which of its bytes the guest waited for is for the caller to say.
    pub fn progress(&self) -> Progress {
        let record = self.recorder.read();
        let ram_total = self.machine.ram().pages().bytes();
        let (zero, data) = (self.tally.zero.load(Ordering::Relaxed), self.tally.data.load(Ordering::Relaxed));
        Progress {
            status: record.status,
            error: record.error.clone(),
            failure: record.failure,
            ram_total,
            transferred: self.tally.bytes.load(Ordering::Relaxed),
            remaining: ram_total.saturating_sub((zero + data).saturating_mul(PAGE_SIZE_U64)),
            zero_pages: zero,
            normal_pages: data,
            total_time_ns: record.total_time_ns(),
            setup_time_ns: record.setup_time_ns(),
            downtime_ns: record.downtime_ns(),
            phases: record.phases,
            ..Progress::default()
        }
    }

    /// What is known of it. Complete once it is over.
    pub fn report(&self, side: Side) -> SideReport {
        let pages = self.machine.ram().pages();
        let mut report = self.recorder.read().into_report(side, &Lanes::default(), pages);
        report.cpu += CpuSeconds::from(self.cpu.total());
        report
    }
}
