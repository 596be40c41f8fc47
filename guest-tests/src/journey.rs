//! One guest's words across all machines that it runs on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::capture::Capture;
use crate::guest_log::GuestLog;
use crate::machine::Machine;
use crate::waiting::PATIENCE;

/// A built-in guest, read as it moves. What the next machine prints is read once the one before has ended: only then
/// is it certain that all of its words are here.
#[derive(Debug, Default)]
pub struct Journey {
    log: GuestLog,
    parts: VecDeque<Arc<Capture>>,
    read: usize,
}

impl Journey {
    /// A guest that begins on `machine`.
    #[must_use]
    pub fn from(machine: &Machine) -> Self {
        let mut journey = Self::default();
        journey.goes_to(machine);
        journey
    }

    /// A guest that is heard wherever it runs.
    #[must_use]
    pub fn hearing(everything: Arc<Capture>) -> Self {
        Self { parts: VecDeque::from([everything]), ..Self::default() }
    }

    /// It moves to `machine`.
    pub fn goes_to(&mut self, machine: &Machine) {
        self.parts.push_back(machine.serial());
    }

    /// It has moved from `source`, which is ended, to `there`, where it works on for so many periods before that is ended too.
    ///
    /// # Panics
    /// When it does not, when anything that it has said is wrong, or when a machine does not end as it should.
    pub fn ends_at(&mut self, source: &mut Machine, there: &mut Machine, periods: usize) {
        source.quit();
        self.goes_to(there);
        self.works_on(periods);
        there.quit();
        self.log();
    }

    /// What it has said so far.
    ///
    /// # Panics
    /// When any of it is wrong.
    pub fn log(&mut self) -> &GuestLog {
        while let Some(part) = self.parts.front() {
            let (new, ended) = part.after(self.read);
            self.read += new.len();
            self.log.feed(&new);
            if !ended || self.parts.len() == 1 {
                break;
            }
            self.parts.pop_front();
            self.read = 0;
        }
        assert!(self.log.problems.is_empty(), "the guest is not sound: {:#?}", self.log.problems);
        &self.log
    }

    /// Waits until what it has said is as `there` wants it.
    ///
    /// # Panics
    /// When that does not come, or anything it says is wrong.
    pub fn wait(&mut self, what: &str, mut there: impl FnMut(&GuestLog) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !there(self.log()) {
            assert!(
                Instant::now() < end,
                "waited {PATIENCE:?} in vain until {what}; {} periods so far",
                self.log.periods.len()
            );
            if let Some(part) = self.parts.front() {
                part.wait_for_more(self.read, end);
            }
        }
    }

    /// Waits until it is ready and has worked for `periods` more periods, the last of them with every vCPU.
    /// It is sound up to there. Returns the number of its periods.
    ///
    /// # Panics
    /// When it does not, or anything it says is wrong.
    pub fn works_on(&mut self, periods: usize) -> usize {
        // The first may be one that was under way, and the last has its vCPUs only when the next begins.
        let start = self.log().periods.len() + 1;
        let wanted = start + periods + 1;
        self.wait(&format!("the guest has worked to period {wanted} with every vCPU"), |log| {
            log.periods.len() >= wanted && log.all_alive_since(start)
        });
        self.log().periods.len()
    }
}
