//! QEMU's events, and when they happened. Their times are of the host's wall clock.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use switchover_wire::clock::Nanos;

/// Whether `event` is called `name`.
pub fn is(event: &Value, name: &str) -> bool {
    event.get("event").and_then(Value::as_str) == Some(name)
}

/// Whether `event` says that the migration became `status`.
pub fn is_migration(event: &Value, status: &str) -> bool {
    is(event, "MIGRATION") && event.pointer("/data/status").and_then(Value::as_str) == Some(status)
}

/// When the first of `events` happened that `is_wanted`, by the wall clock.
pub fn at(events: &[Value], is_wanted: impl Fn(&Value) -> bool) -> Option<Nanos> {
    let time = events.iter().find(|event| is_wanted(event))?.get("timestamp")?;
    let field = |name: &str| time.get(name).and_then(Value::as_u64);
    let seconds = field("seconds")?.checked_mul(1_000_000_000)?;
    seconds.checked_add(field("microseconds")?.checked_mul(1_000)?).map(Nanos)
}

/// An instant of the wall clock that has just passed, on `CLOCK_MONOTONIC`. Wrong by what the wall clock was set since.
pub fn as_monotonic(wall: Nanos) -> Option<Nanos> {
    let (now, wall_now) = (Nanos::now(), SystemTime::now().duration_since(UNIX_EPOCH).ok()?);
    let ago = u64::try_from(wall_now.as_nanos()).ok()?.checked_sub(wall.0)?;
    now.0.checked_sub(ago).map(Nanos)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_are_found_with_their_time() {
        let events = [
            json!({ "event": "STOP", "timestamp": { "seconds": 2, "microseconds": 500_000 } }),
            json!({ "event": "MIGRATION", "data": { "status": "completed" }, "timestamp": { "seconds": 3, "microseconds": 1 } }),
        ];
        assert_eq!(at(&events, |event| is(event, "STOP")), Some(Nanos(2_500_000_000)));
        assert_eq!(at(&events, |event| is_migration(event, "completed")), Some(Nanos(3_000_001_000)));
        assert_eq!(at(&events, |event| is_migration(event, "failed")), None);
        assert_eq!(at(&[json!({ "event": "STOP" })], |event| is(event, "STOP")), None);
    }

    #[test]
    fn the_wall_clock_is_told_on_the_other_clock() {
        let before = Nanos::now();
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let found = as_monotonic(Nanos(u64::try_from(wall.as_nanos()).unwrap())).unwrap();
        // Both clocks are read one after the other: the answer is early by no more than that takes.
        assert!(found.0 + 1_000_000_000 > before.0 && found <= Nanos::now(), "{found} is not behind {before}");
        assert_eq!(as_monotonic(Nanos(u64::MAX)), None);
    }
}
