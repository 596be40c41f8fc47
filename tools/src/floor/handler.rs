//! The thread that answers faults: by mapping the page and doing nothing else, or by asking for it first.

use std::ffi::c_void;
use std::hint::spin_loop;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use userfaultfd::{Event, EventBuffer};

use super::region::{PAGE, Region};
use super::{FloorError, Way};

/// Faults taken at a time: there is one thread to cause them.
const FAULTS: usize = 4;

/// Maps the page of a fault at once.
///
/// # Errors
/// Never.
pub fn nothing() -> Result<(), FloorError> {
    Ok(())
}

/// Runs `touch` while another thread answers the faults that it causes in `region`, waiting for them in the given way and
/// doing `fetch` before it maps a page.
///
/// # Errors
/// When a fault cannot be answered, or `touch` fails.
pub fn served<T>(
    region: &Region,
    way: Way,
    fetch: impl FnMut() -> Result<(), FloorError> + Send,
    touch: impl FnOnce() -> Result<T, FloorError>,
) -> Result<T, FloorError> {
    let stop = AtomicBool::new(false);
    let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(FloorError::on("make an eventfd"))?;
    thread::scope(|scope| {
        let (stop, wake) = (&stop, &wake);
        let serve = move || {
            let served = match way {
                Way::Sleeping => serve_sleeping(region, stop, wake, fetch),
                Way::Spinning => serve_spinning(region, stop, fetch),
            };
            // Whoever faults now must not wait for ever.
            if served.is_err() {
                region.release();
            }
            served
        };
        let handler = thread::Builder::new()
            .name("floor handler".to_owned())
            .spawn_scoped(scope, serve)
            .map_err(FloorError::on("start a thread"))?;
        let touched = touch();
        stop.store(true, Ordering::Release);
        let _ = wake.write(1);
        let served = handler.join().unwrap_or(Ok(()));
        served.and(touched)
    })
}

fn serve_sleeping(
    region: &Region,
    stop: &AtomicBool,
    wake: &EventFd,
    mut fetch: impl FnMut() -> Result<(), FloorError>,
) -> Result<(), FloorError> {
    let mut buffer = EventBuffer::new(FAULTS);
    while !stop.load(Ordering::Acquire) {
        let mut waiting =
            [PollFd::new(region.uffd().as_fd(), PollFlags::POLLIN), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => answer(region, &mut buffer, &mut fetch)?,
            Err(errno) => return Err(FloorError::on("wait for faults")(errno)),
        }
    }
    Ok(())
}

fn serve_spinning(
    region: &Region,
    stop: &AtomicBool,
    mut fetch: impl FnMut() -> Result<(), FloorError>,
) -> Result<(), FloorError> {
    let mut buffer = EventBuffer::new(FAULTS);
    while !stop.load(Ordering::Acquire) {
        answer(region, &mut buffer, &mut fetch)?;
        spin_loop();
    }
    Ok(())
}

/// Maps the pages whose faults are there; there may be none.
fn answer(
    region: &Region,
    buffer: &mut EventBuffer,
    fetch: &mut impl FnMut() -> Result<(), FloorError>,
) -> Result<(), FloorError> {
    for event in region.uffd().read_events(buffer).map_err(FloorError::on("read faults"))? {
        if let Event::Pagefault { addr, .. } = event.map_err(FloorError::on("read faults"))? {
            fetch()?;
            let page = addr.cast::<u8>().map_addr(|address| address & !(PAGE - 1));
            region.uffd().r#continue(page.cast::<c_void>(), PAGE, true).map_err(FloorError::on("map a page"))?;
        }
    }
    Ok(())
}
