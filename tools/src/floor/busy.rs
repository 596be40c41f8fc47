//! A vCPU that always has something to do.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::FloorError;
use super::fault::Vcpu;
use super::guest_fault::Guest;
use super::region::Region;

/// It leaves the guest every few milliseconds, to see whether it is still wanted.
const PAGES: usize = 32;
const WORK_NS: u64 = 100_000;

/// Runs `work` while another thread is a busy vCPU: a guest that stays in ring 3 but for an exit every 3 ms, or a thread that
/// spins.
///
/// # Errors
/// When there is no guest where there should be one, it does not do what it should, or `work` fails.
pub fn beside<T>(vcpu: Vcpu, work: impl FnOnce() -> Result<T, FloorError>) -> Result<T, FloorError> {
    let stop = AtomicBool::new(false);
    let busy = || match vcpu {
        Vcpu::Guest => {
            let region = Region::new(PAGES)?;
            // Nobody answers its faults: the kernel does.
            region.release();
            let mut guest = Guest::new(&region, WORK_NS)?;
            while !stop.load(Ordering::Acquire) {
                guest.run_batch()?;
            }
            Ok(())
        }
        Vcpu::User => {
            while !stop.load(Ordering::Acquire) {
                let until = Instant::now() + Duration::from_nanos(WORK_NS);
                while Instant::now() < until {
                    spin_loop();
                }
            }
            Ok(())
        }
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("floor vCPU".to_owned())
            .spawn_scoped(scope, busy)
            .map_err(FloorError::on("start a thread"))?;
        let done = work();
        stop.store(true, Ordering::Release);
        thread.join().unwrap_or(Ok(())).and(done)
    })
}
