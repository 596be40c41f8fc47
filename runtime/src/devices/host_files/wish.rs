//! A guest's wish to be saved, between the instruction that tells of it and the next one.
//!
//! The vCPU that asked stays inside its instruction until it is told to leave the guest, which is the pause that the save begins with
//! (where it was another one, it waits again before it runs on); or until there will be no save. The result is 0 from the beginning, so that the guest that is restored finds that; one that goes on
//! because it was not saved finds an error instead, put there before any vCPU of it runs.

use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use nix::errno::Errno;

use super::request::Request;
use crate::memory::GuestMemory;

/// How often a vCPU that is held looks whether it is to leave: nobody can wake it who does not know that it is here.
const LOOK: Duration = Duration::from_millis(1);

/// What was asked, and by which vCPU.
struct Asked {
    request: Request,
    vcpu: ThreadId,
}

/// At most one wish at a time.
#[derive(Default)]
pub struct Wish {
    /// Who is told of it.
    heard: OnceLock<Box<dyn Fn() + Send + Sync>>,
    asked: Mutex<Option<Asked>>,
    answered: Condvar,
}

impl Wish {
    /// From now on somebody hears of it. The first one only.
    pub fn tell(&self, heard: impl Fn() + Send + Sync + 'static) {
        let _ = self.heard.set(Box::new(heard));
    }

    /// The guest asks, by this request of the vCPU whose thread this is. Where it may, `told` is called before anybody hears of it.
    ///
    /// # Errors
    /// When nobody would hear, or it has asked already.
    pub fn ask(&self, request: &Request, memory: &GuestMemory, told: impl FnOnce()) -> Result<(), Errno> {
        let heard = self.heard.get().ok_or(Errno::ENOTSUP)?;
        let mut asked = self.lock();
        if asked.is_some() {
            return Err(Errno::EBUSY);
        }
        request.answer(memory, 0);
        *asked = Some(Asked { request: *request, vcpu: thread::current().id() });
        drop(asked);
        told();
        heard();
        Ok(())
    }

    /// Holds the vCPU that asked, if this is its thread, until it is `leaving` the guest or has an answer.
    pub fn hold(&self, leaving: &dyn Fn() -> bool) {
        let mut asked = self.lock();
        let own = thread::current().id();
        while asked.as_ref().is_some_and(|asked| asked.vcpu == own) && !leaving() {
            asked = self.answered.wait_timeout(asked, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The guest goes on without having been saved. Where it had wished to be, `told` is called before it does.
    pub fn refuse(&self, errno: Errno, memory: &GuestMemory, told: impl FnOnce()) {
        let mut asked = self.lock();
        if let Some(Asked { request, .. }) = asked.take() {
            request.answer(memory, -i64::from(errno as i32));
            told();
            self.answered.notify_all();
        }
    }

    /// The guest was saved as it wished.
    pub fn fulfil(&self) {
        *self.lock() = None;
        self.answered.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Option<Asked>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
