//! What is noted of migrations and commands, and how.

use serde_json::{Value, json};
use switchover_hybrid::happening::Happening;
use switchover_hybrid::settings::Notice;

use super::{Audit, brief};

impl Audit {
    /// Notes what a migration tells its observer. `way` is `in` or `out`.
    pub(crate) fn note_migration(&self, way: &'static str, notice: &Notice) {
        if !self.is_on() {
            return;
        }
        match notice {
            Notice::Status(status) => self.note("status", json!({ "way": way, "status": status.name() })),
            // Rounds change nothing, and there may be many.
            Notice::Round(_) => {}
            Notice::Happening(happening) => self.note_happening(way, happening),
        }
    }

    fn note_happening(&self, way: &'static str, happening: &Happening) {
        let (event, data) = match happening {
            Happening::LaneOpened { lane, session, peer } => {
                let lane = lane.to_string();
                ("lane-opened", json!({ "way": way, "lane": lane, "session": session, "peer": peer }))
            }
            Happening::NotTaken { peer, reason } => {
                ("connection-refused", json!({ "way": way, "peer": peer, "reason": brief(reason) }))
            }
            Happening::MoreNotTaken { count } => ("connections-refused", json!({ "way": way, "count": count })),
            Happening::HandoffBegun => ("handoff", json!({ "way": way })),
            Happening::CommitSent => ("commit-sent", json!({ "way": way })),
            Happening::CommitTaken => ("commit-taken", json!({ "way": way })),
            Happening::Running => ("running", json!({ "way": way })),
            Happening::Drained => ("drained", json!({ "way": way })),
            Happening::TakenBack => ("right-taken-back", json!({ "way": way })),
            Happening::Trouble { reason } => ("trouble", json!({ "way": way, "reason": brief(reason) })),
        };
        self.note(event, data);
    }

    /// Notes a command that changes something, and what became of it.
    pub(crate) fn note_command(&self, name: &str, arguments: Option<&str>, refusal: Option<&str>) {
        if !self.is_on() || name.starts_with("query-") {
            return;
        }
        let arguments = arguments.map_or(Value::Null, |text| json!(brief(text)));
        let outcome = refusal.map_or(json!("done"), |reason| json!({ "refused": brief(reason) }));
        self.note("command", json!({ "name": brief(name), "arguments": arguments, "outcome": outcome }));
    }
}
