//! What a migration can be told.

use std::sync::Arc;

use crate::status::MigrationStatus;

/// How a migration is to be carried out. Both sides have settings of their own; what the source asks for suffices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Post-copy is allowed. A source without it is refused for now: nothing else is built.
    pub postcopy: bool,
    /// How many `bulk` lanes the source opens.
    pub bulk_lanes: u8,
    /// Bound on pushed bytes a second after the handoff, all bulk lanes together; 0 means none.
    pub max_postcopy_bandwidth: u64,
    /// Destination: do not reserve memory before the handoff. The guest is lost if memory runs out after it.
    pub lazy_memory: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { postcopy: true, bulk_lanes: 1, max_postcopy_bandwidth: 0, lazy_memory: false }
    }
}

/// What an observer is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notice {
    /// The status has changed to this.
    Status(MigrationStatus),
}

/// Whoever wants to know of a migration's steps. Called on the migration's own thread: must return at once.
pub type Observer = Arc<dyn Fn(Notice) + Send + Sync>;

/// An observer for those who do not want to know.
#[must_use]
pub fn no_observer() -> Observer {
    Arc::new(|_| {})
}
