//! What the tests of whole migrations share.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod relay;

use std::thread;
use std::time::{Duration, Instant};

use switchover_pager::ram::Ram;
use switchover_pager::uffd::Watch;
use switchover_wire::types::PageCount;

const PATIENCE: Duration = Duration::from_secs(20);

/// Whether this process may use userfaultfd; says so where not.
pub fn userfaultfd_or_skip(test: &str) -> bool {
    match Watch::register(Ram::new(PageCount(1)).unwrap()) {
        Ok(watch) => watch.unregister().is_ok(),
        Err(error) => {
            println!("SKIP {test}: {error}");
            false
        }
    }
}

/// Waits until `reached`.
pub fn until(what: &str, reached: impl FnMut() -> bool) {
    until_or(what, reached, || "no more is known".to_owned());
}

/// Waits until `reached`, and says how things stand where that never comes.
pub fn until_or(what: &str, mut reached: impl FnMut() -> bool, stand: impl Fn() -> String) {
    let deadline = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < deadline, "never came: {what}; {}", stand());
        thread::yield_now();
    }
}
