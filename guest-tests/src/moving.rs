//! Moving a guest by QMP, as a client written for QEMU does.

use serde_json::{Value, json};

use crate::lab::Lab;
use crate::link::{Ended, Link};
use crate::machine::{Machine, Spec};
use crate::waiting::until;

/// What lanes run over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// TCP on the loopback.
    Tcp,
    /// Unix sockets.
    Unix,
}

/// How a guest is moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way {
    /// `x-switchover-mode`.
    pub mode: &'static str,
    /// Bulk lanes.
    pub channels: u8,
}

impl Way {
    /// A mode, over this many bulk lanes.
    #[must_use]
    pub const fn new(mode: &'static str, channels: u8) -> Self {
        Self { mode, channels }
    }
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

/// Hands off over `link`, and cuts that once the guest runs at the destination: both sides wait for it to be joined again.
pub fn lose_link(source: &mut Machine, destination: &mut Machine, link: &Link) {
    source.execute("migrate-start-postcopy", json!({}));
    destination.wait_migration("postcopy-active");
    link.cut(Ended::Reset);
    for machine in [source, destination] {
        machine.wait_migration("postcopy-paused");
    }
}

/// Joins a lost link again at `to`, and waits until all has arrived, as fast as it may.
pub fn join_and_finish(source: &mut Machine, destination: &mut Machine, to: &str) {
    set(source, json!({ "max-postcopy-bandwidth": 0 }));
    source.execute("migrate", json!({ "uri": to, "resume": true }));
    source.wait_migration("completed");
    destination.wait_migration("completed");
}

/// Moves the guest of `source`, from beginning to end.
pub fn migrate(source: &mut Machine, destination: &mut Machine, to: &str) {
    begin(source, to);
    finish(source, destination);
}

/// Sets parameters of migrations.
pub fn set(machine: &mut Machine, parameters: Value) {
    machine.execute("migrate-set-parameters", parameters);
}

/// Switches a capability on or off.
pub fn switch(machine: &mut Machine, capability: &str, state: bool) {
    let capabilities = json!([{ "capability": capability, "state": state }]);
    machine.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }));
}

/// Has the next migration of `source` go this way. A hybrid, and it alone, may end in post-copy.
pub fn choose(source: &mut Machine, way: Way) {
    set(source, json!({ "x-switchover-mode": way.mode, "multifd-channels": way.channels }));
    switch(source, "multifd", way.channels > 1);
    switch(source, "postcopy-ram", way.mode != "precopy");
}

/// Begins to move the guest of `source`, and waits until it has begun round `round`.
///
/// # Panics
/// When that does not come.
pub fn begin_rounds(source: &mut Machine, to: &str, round: u64) {
    source.execute("migrate", json!({ "uri": to }));
    until(&format!("round {round} has begun"), || {
        let look = source.execute("query-migrate", json!({}));
        let status = look["status"].as_str().unwrap_or_default();
        assert!(matches!(status, "setup" | "active"), "it has ended before round {round}: {look:#}");
        (look["ram"]["dirty-sync-count"].as_u64() >= Some(round)).then_some(())
    });
}

/// Moves the guest of `source` from beginning to end, as [chosen](choose); where that is post-copy, hands off at once.
pub fn migrate_as(source: &mut Machine, destination: &mut Machine, to: &str, way: Way) {
    choose(source, way);
    if way.mode == "postcopy" {
        source.execute("migrate", json!({ "uri": to }));
        source.wait_migration("active");
        return finish(source, destination);
    }
    source.execute("migrate", json!({ "uri": to }));
    source.wait_migration("completed");
    destination.wait_migration("completed");
}
