//! A link that is lost after the handoff, as QMP tells it and as the command line does.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::{Ended, Lab, switchover};
use switchover_guest_tests::machine::Machine;
use switchover_guest_tests::moving::{
    Transport, allow_postcopy, begin, begin_rounds, destination, join_and_finish, set, slow_down, switch,
};
use switchover_guest_tests::waiting::until;

use crate::lab;

/// A guest whose memory takes long to follow where it is held back, since it asks for few pages.
const SLOW: &str = "ws=32M period=50 pace=2000000";
/// Bytes a second: the working set takes more than a minute.
const CRAWL: u64 = 400_000;

fn machines(lab: &Lab) -> (Machine, Machine, String, Journey) {
    let spec = lab.guest("random", SLOW);
    let source = Machine::start(lab, &spec);
    let (there, to) = destination(lab, &spec, Transport::Tcp);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    (source, there, to, journey)
}

#[test]
fn the_command_tells_of_a_lost_link_and_joins_it_again() {
    let lab = lab!("the_command_tells_of_a_lost_link_and_joins_it_again");
    let (mut source, mut there, to, mut journey) = machines(&lab);
    slow_down(&mut source, CRAWL);
    let (endpoint, other) = (source.qmp_endpoint(), there.qmp_endpoint());
    let first = std::thread::scope(|scope| {
        let migrate = scope.spawn(|| switchover(&["migrate", "--qmp", &endpoint, "--to", &to, "--mode", "postcopy"]));
        // Before that the source may not have its commit answered.
        there.wait_migration("postcopy-active");
        there.execute("migrate-pause", json!({}));
        migrate.join().unwrap()
    });
    assert_eq!((first.status, &*first.stdout), (Some(1), ""), "{}", first.stderr);
    for part in ["was lost after the handoff", "only here", &format!("--qmp {endpoint} --to {to} --resume")] {
        assert!(first.stderr.contains(part), "no `{part}` in {}", first.stderr);
    }
    assert_eq!((&*source.run_state(), &*there.run_state()), ("postmigrate", "running"));
    let Ended { status, stdout, stderr } = switchover(&["migrate", "--qmp", &other, "--recover", "tcp:127.0.0.1:0"]);
    assert_eq!((status, &*stderr), (Some(0), ""), "{stdout}");
    let elsewhere = stdout.strip_prefix("listens at ").and_then(|rest| rest.split(';').next()).unwrap();
    assert_eq!(elsewhere, there.address());
    assert_ne!(elsewhere, to);
    let resume = ["migrate", "--qmp", &endpoint, "--to", elsewhere, "--resume", "--max-postcopy-bandwidth", "0"];
    let Ended { status, stdout, stderr } = switchover(&resume);
    assert_eq!((status, &*stderr), (Some(0), ""), "{stdout}");
    assert!(stdout.starts_with("moved in "), "{stdout}");
    // A second time there is nothing to join.
    let Ended { status, stderr, .. } = switchover(&resume);
    assert_eq!(status, Some(1));
    assert!(stderr.contains("Cannot resume if there is no paused migration"), "{stderr}");
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

fn error(look: &Value) -> &str {
    look["error-desc"].as_str().unwrap_or_default()
}

#[test]
fn each_side_notices_a_silent_other_within_its_own_patience() {
    let lab = lab!("each_side_notices_a_silent_other_within_its_own_patience");
    let (mut source, mut there, to, mut journey) = machines(&lab);
    slow_down(&mut source, CRAWL);
    set(&mut source, json!({ "x-switchover-silence": 1000 }));
    // It listens already: what it is told holds from its first link on.
    set(&mut there, json!({ "x-switchover-silence": 1500 }));
    begin(&mut source, &to);
    let refusal = source.refuses("migrate-set-parameters", json!({ "x-switchover-silence": 2000 }));
    assert!(refusal.contains("cannot be changed while a link is open"), "{refusal}");
    source.execute("migrate-start-postcopy", json!({}));
    there.wait_migration("postcopy-active");
    there.signal(Signal::SIGSTOP);
    let paused = source.wait_migration("postcopy-paused");
    assert!(error(&paused).starts_with("nothing was heard of the destination for 1s;"), "{paused}");
    there.signal(Signal::SIGCONT);
    there.wait_migration("postcopy-paused");
    // Between two links it can be changed, for the next.
    set(&mut source, json!({ "x-switchover-silence": 60_000 }));
    source.execute("migrate", json!({ "uri": to, "resume": true }));
    // Whoever looks at once does not take the last loss for the outcome of this.
    assert_ne!(source.execute("query-migrate", json!({}))["status"], "postcopy-paused");
    source.wait_migration("postcopy-active");
    there.wait_migration("postcopy-active");
    source.signal(Signal::SIGSTOP);
    let paused = there.wait_migration("postcopy-paused");
    assert!(error(&paused).starts_with("nothing was heard of the source for 1.5s;"), "{paused}");
    let interruptions = paused["x-switchover-interruptions"].as_array().unwrap();
    assert_eq!(interruptions.len(), 2, "{paused}");
    assert!(interruptions[0]["joined-ns"].as_u64() > interruptions[0]["lost-ns"].as_u64(), "{paused}");
    assert!(interruptions[1].get("joined-ns").is_none(), "{paused}");
    source.signal(Signal::SIGCONT);
    source.wait_migration("postcopy-paused");
    join_and_finish(&mut source, &mut there, &to);
    source.quit();
    journey.goes_to(&there);
    journey.works_on(1);
    there.quit();
    lab.close();
}

#[test]
fn each_side_tells_what_it_knows_of_a_migration() {
    let lab = lab!("each_side_tells_what_it_knows_of_a_migration");
    let spec = lab.guest("random", "ws=16M period=50");
    let mut source = Machine::start(&lab, &spec);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    allow_postcopy(&mut source);
    source.execute("migrate", json!({ "uri": to }));
    source.wait_migration("active");
    source.execute("migrate-start-postcopy", json!({}));
    let (sent, came) = (source.wait_migration("completed"), there.wait_migration("completed"));
    for (look, side) in [(&sent, "source"), (&came, "destination")] {
        let bytes = |name: &str| look["ram"][name].as_u64().unwrap();
        assert_eq!(
            bytes("precopy-bytes") + bytes("downtime-bytes") + bytes("postcopy-bytes"),
            bytes("transferred"),
            "{side}: {look}"
        );
        assert!(bytes("downtime-bytes") > 0 && bytes("postcopy-bytes") > 16 << 20, "{side}: {look}");
        let phases = look["x-switchover-phases"].as_array().unwrap();
        let has = |name: &str| phases.iter().any(|phase| phase["name"] == name && phase["end-ns"].is_u64());
        for phase in ["setup", "active", "device", "postcopy-active"] {
            assert!(has(phase) || (side == "destination" && phase == "device"), "{side}: no {phase} in {look}");
        }
        assert!(look.get("x-switchover-interruptions").is_none(), "{look}");
    }
    assert!(sent.get("postcopy-latency").is_none(), "a source times no faults: {sent}");
    let report = there.execute("x-switchover-report", json!({}));
    let count: u64 =
        came["postcopy-latency-dist"].as_array().unwrap().iter().map(|count| count.as_u64().unwrap()).sum();
    let faults = &report["faults"];
    let most = faults["remote"].as_u64().unwrap() + faults["raced"].as_u64().unwrap();
    assert!((faults["remote"].as_u64().unwrap()..=most).contains(&count) && count > 0, "{count} of {faults}");
    let mean = came["postcopy-latency"].as_u64().unwrap();
    let blocked = came["postcopy-blocktime"].as_u64().unwrap();
    assert!(blocked.abs_diff(mean * count / 1_000_000) <= 1 + count / 1_000_000, "{came}");
    assert_eq!(came["postcopy-vcpu-blocktime"], json!([blocked]));
    source.quit();
    journey.goes_to(&there);
    journey.works_on(1);
    there.quit();
    lab.close();
}

#[test]
fn differences_are_told_of_with_xbzrle() {
    let lab = lab!("differences_are_told_of_with_xbzrle");
    let spec = lab.guest("hotset", "ws=16M period=50");
    let mut source = Machine::start(&lab, &spec);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    // Over a link so slow that a difference saves more than it costs, and for enough rounds to have sent what differs.
    set(&mut source, json!({ "xbzrle-cache-size": 64 << 20, "max-bandwidth": 20_000_000, "downtime-limit": 0 }));
    switch(&mut source, "xbzrle", true);
    switch(&mut source, "postcopy-ram", true);
    begin_rounds(&mut source, &to, 4);
    assert!(
        source.execute("query-migrate", json!({})).get("xbzrle-cache").is_none(),
        "not before all of it is counted"
    );
    source.execute("migrate-start-postcopy", json!({}));
    let ended = source.wait_migration("completed");
    let cache = &ended["xbzrle-cache"];
    println!("{cache}");
    assert_eq!(cache["cache-size"], 64 << 20, "{ended}");
    // Whatever is kept was looked for in vain once.
    assert!(cache["cache-miss"].as_u64().unwrap() > 0, "{cache}");
    let rate = cache["cache-miss-rate"].as_f64().unwrap();
    assert!(rate > 0.0 && rate <= 1.0, "{cache}");
    if cache["pages"].as_u64().unwrap() > 0 {
        assert!(cache["encoding-rate"].as_f64().unwrap() > 1.0, "{cache}");
    }
    there.wait_migration("completed");
    source.quit();
    journey.goes_to(&there);
    journey.works_on(1);
    there.quit();
    lab.close();
}

/// What StratoVirt's documents tell a user to type, word for word.
#[test]
fn stratovirts_words_move_a_guest() {
    let lab = lab!("stratovirts_words_move_a_guest");
    for transport in [Transport::Tcp, Transport::Unix] {
        let spec = lab.guest("random", SLOW);
        let mut source = Machine::start(&lab, &spec);
        let (mut left, to) = destination(&lab, &spec, transport);
        let mut journey = Journey::from(&source);
        journey.works_on(1);
        let mut raw = crate::qmp::Raw::connect(&source);
        let mut says = |words: &str| {
            raw.say(words.as_bytes());
            let mut answer = raw.hear();
            while answer.get("event").is_some() {
                answer = raw.hear();
            }
            answer
        };
        let nothing = json!({ "return": {} });
        let query = r#"{"execute":"query-migrate"}"#;
        assert_eq!(says(r#"{"execute":"qmp_capabilities"}"#), nothing);
        // Held back, so that there is something to cancel.
        set(&mut source, json!({ "max-bandwidth": 1 << 20, "x-switchover-compression": "off" }));
        assert_eq!(says(&format!(r#"{{"execute":"migrate", "arguments":{{"uri":"{to}"}}}}"#)), nothing);
        until("the migration is active", || (says(query)["return"]["status"] == "active").then_some(()));
        assert_eq!(says(r#"{"execute":"migrate_cancel"}"#), nothing);
        until("the migration is cancelled", || (says(query)["return"]["status"] == "cancelled").then_some(()));
        assert_eq!(left.wait_end(), 1);
        journey.works_on(1);
        set(&mut source, json!({ "max-bandwidth": 0 }));
        let (mut there, to) = destination(&lab, &spec, transport);
        assert_eq!(says(&format!(r#"{{"execute":"migrate", "arguments":{{"uri":"{to}"}}}}"#)), nothing);
        until("the migration is completed", || (says(query)["return"]["status"] == "completed").then_some(()));
        assert_eq!(says(r#"{"execute":"quit"}"#), nothing);
        assert_eq!(source.wait_end(), 0);
        journey.goes_to(&there);
        journey.works_on(1);
        there.quit();
    }
    lab.close();
}
