use serde_json::Value;
use switchover_hybrid::trace::Trace;

/// RAM of 4 GiB: a trace's bitmaps take memory by what it says that its RAM is.
const MOST_PAGES: u64 = 1 << 20;

/// Recorded migrations, as `switchover simulate` reads them.
pub fn trace(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let claimed = serde_json::from_str::<Value>(text).ok().and_then(|value| value.get("ram_pages")?.as_u64());
    if claimed.is_some_and(|pages| pages > MOST_PAGES) {
        return;
    }
    let Ok(trace) = Trace::from_json(text) else { return };
    for epoch in &trace.epochs {
        assert!(epoch.duration_ns > 0);
        assert_eq!(trace.written(epoch).unwrap().len(), trace.words());
        assert_eq!(trace.read(epoch).unwrap().len(), trace.words());
    }
    assert_eq!(Trace::from_json(&trace.to_json().unwrap()).unwrap(), trace);
}
