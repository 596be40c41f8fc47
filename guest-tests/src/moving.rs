//! Moving a guest by QMP, as a client written for QEMU does.

use serde_json::json;

use crate::lab::Lab;
use crate::machine::{Machine, Spec};

/// What lanes run over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// TCP on the loopback.
    Tcp,
    /// Unix sockets.
    Unix,
}

/// A machine like `spec` that waits for a guest, and the address that a source is told.
#[must_use]
pub fn destination(lab: &Lab, spec: &Spec, transport: Transport) -> (Machine, String) {
    let address = match transport {
        Transport::Tcp => "tcp:127.0.0.1:0".to_owned(),
        Transport::Unix => {
            static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
            let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            format!("unix:{}", lab.path(&format!("lane{number}")).display())
        }
    };
    let mut machine = Machine::start(lab, &spec.incoming(&address));
    let address = machine.address();
    (machine, address)
}

/// Switches post-copy on, without rounds of pre-copy before it.
pub fn allow_postcopy(machine: &mut Machine) {
    machine.execute("migrate-set-parameters", json!({ "x-switchover-mode": "postcopy" }));
    machine.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] }),
    );
}

/// Bounds what a source pushes, in bytes a second, so that post-copy lasts.
pub fn slow_down(source: &mut Machine, bytes_a_second: u64) {
    source.execute("migrate-set-parameters", json!({ "max-postcopy-bandwidth": bytes_a_second }));
}

/// Begins to move the guest of `source`, up to `active`.
pub fn begin(source: &mut Machine, to: &str) {
    allow_postcopy(source);
    source.execute("migrate", json!({ "uri": to }));
    source.wait_migration("active");
}

/// Hands off and waits until all has arrived.
pub fn finish(source: &mut Machine, destination: &mut Machine) {
    source.execute("migrate-start-postcopy", json!({}));
    source.wait_migration("completed");
    destination.wait_migration("completed");
}

/// Moves the guest of `source`, from beginning to end.
pub fn migrate(source: &mut Machine, destination: &mut Machine, to: &str) {
    begin(source, to);
    finish(source, destination);
}
