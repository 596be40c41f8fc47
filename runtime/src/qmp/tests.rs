//! The protocol end to end, over a real socket, with a fake machine behind it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use crossbeam::channel::{Sender, unbounded};
use serde_json::{Value, json};
use switchover_hybrid::monitor::{Limits, Mode};
use switchover_hybrid::settings::{Bandwidth, Tunables};
use switchover_hybrid::status::MigrationStatus;

use super::controller::{Event, TimedEvent};
use super::endpoint::Endpoint;
use super::fake::Fake;
use super::parameters::Parameters;
use super::server::{Bound, Server};
use crate::run_state::RunState;

struct Setup {
    server: Server,
    fake: Arc<Fake>,
    events: Sender<TimedEvent>,
    endpoint: Endpoint,
    _directory: tempfile::TempDir,
}

fn serve(run_state: RunState) -> Setup {
    let directory = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::at(directory.path().join("qmp"));
    let fake = Arc::new(Fake::new(run_state));
    let (events, told) = unbounded();
    let server =
        Server::start(Bound::at(&endpoint).unwrap(), Arc::<Fake>::clone(&fake), Parameters::default(), told).unwrap();
    Setup { server, fake, events, endpoint, _directory: directory }
}

struct Client {
    stream: UnixStream,
    lines: std::io::Lines<BufReader<UnixStream>>,
}

impl Client {
    /// Connects and reads the greeting.
    fn connect(setup: &Setup) -> Self {
        let stream = UnixStream::connect(setup.endpoint.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut client = Self { lines: BufReader::new(stream.try_clone().unwrap()).lines(), stream };
        assert!(client.next()["QMP"]["version"]["qemu"]["major"].is_u64());
        client
    }

    fn negotiated(setup: &Setup) -> Self {
        let mut client = Self::connect(setup);
        assert_eq!(client.ask(&json!({"execute": "qmp_capabilities"})), json!({"return": {}}));
        client
    }

    fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    fn next(&mut self) -> Value {
        serde_json::from_str(&self.lines.next().unwrap().unwrap()).unwrap()
    }

    fn ask(&mut self, command: &Value) -> Value {
        self.send(&command.to_string());
        self.next()
    }

    fn execute(&mut self, name: &str, arguments: &Value) -> Value {
        self.ask(&json!({"execute": name, "arguments": arguments}))
    }

    fn error(&mut self, name: &str, arguments: &Value) -> String {
        let reply = self.execute(name, arguments);
        reply["error"]["desc"].as_str().unwrap_or_else(|| panic!("{name} was not refused: {reply}")).to_owned()
    }

    fn postcopy(&mut self) {
        let on = json!({"capabilities": [{"capability": "postcopy-ram", "state": true}]});
        assert_eq!(self.execute("migrate-set-capabilities", &on), json!({"return": {}}));
    }
}

#[test]
fn negotiation_comes_first_and_only_once() {
    let setup = serve(RunState::Running);
    let mut client = Client::connect(&setup);
    for (input, class, desc) in [
        (json!({"execute": "query-status", "id": 1}), "CommandNotFound", "Expecting capabilities negotiation"),
        (json!({"execute": "nonsense"}), "CommandNotFound", "Expecting capabilities negotiation"),
        (json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}), "GenericError", "not offered"),
        (json!({"execute": "qmp_capabilities", "arguments": {"x": 1}}), "GenericError", "'x' is unexpected"),
    ] {
        let reply = client.ask(&input);
        assert_eq!(reply["error"]["class"], class, "{reply}");
        assert!(reply["error"]["desc"].as_str().unwrap().contains(desc), "{reply}");
        assert_eq!(reply.get("id"), input.get("id"));
    }
    assert_eq!(
        client.ask(&json!({"execute": "qmp_capabilities", "id": {"a": [1]}})),
        json!({"return": {}, "id": {"a": [1]}})
    );
    let again = client.ask(&json!({"execute": "qmp_capabilities", "id": "x"}));
    assert_eq!(again["error"]["class"], "CommandNotFound");
    assert_eq!(again["id"], "x");
}

#[test]
fn what_is_no_command_is_refused_in_qemus_words_and_the_next_is_answered() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    for (text, class, desc) in [
        (r#"{"execute":"nonsense"}"#, "CommandNotFound", "The command nonsense has not been found"),
        (r#"{"exec":"stop"}"#, "GenericError", "QMP input member 'exec' is unexpected"),
        (r#"{"exec-oob":"stop"}"#, "GenericError", "QMP input member 'exec-oob' is unexpected"),
        (r#"{"execute":5}"#, "GenericError", "QMP input member 'execute' must be a string"),
        (r#"{"execute":"stop","foo":1}"#, "GenericError", "QMP input member 'foo' is unexpected"),
        (r#"{"execute":"stop","arguments":[]}"#, "GenericError", "QMP input member 'arguments' must be an object"),
        (r#"{"execute":"stop","arguments":{"z":1}}"#, "GenericError", "Parameter 'z' is unexpected"),
        (r#"{"arguments":{}}"#, "GenericError", "QMP input lacks member 'execute'"),
        ("[1,2]", "GenericError", "QMP input must be a JSON object"),
        ("5 ", "GenericError", "QMP input must be a JSON object"),
        ("{\"execute\": stop}", "GenericError", "JSON parse error"),
        ("\u{0}\u{1} ", "GenericError", "JSON parse error"),
    ] {
        client.send(text);
        let reply = client.next();
        assert_eq!(reply["error"]["class"], class, "{text}: {reply}");
        assert!(reply["error"]["desc"].as_str().unwrap().starts_with(desc), "{text}: {reply}");
        assert_eq!(client.execute("query-status", &json!({}))["return"]["status"], "running", "after {text}");
    }
    assert!(setup.fake.told().is_empty());
}

#[test]
fn objects_may_come_in_pieces_and_several_at_once() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    for piece in [
        r#"{"execute":"query-"#,
        r#"name","id":"#,
        r#"1}{"execute":"query-status","id":2}{"execute""#,
        r#":"stop","id":3}"#,
    ] {
        client.send(piece);
        std::thread::yield_now();
    }
    let ids: Vec<_> = (0..3).map(|_| client.next()["id"].clone()).collect();
    assert_eq!(ids, [json!(1), json!(2), json!(3)]);
}

#[test]
fn a_command_of_more_than_a_megabyte_is_refused_and_skipped() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    let reply = client.execute("migrate", &json!({"uri": "x".repeat(2 << 20)}));
    assert!(reply["error"]["desc"].as_str().unwrap().contains("more than 1048576 bytes"), "{reply}");
    assert_eq!(client.execute("query-name", &json!({})), json!({"return": {}}));
}

#[test]
fn a_guest_is_stopped_and_continued() {
    let setup = serve(RunState::Prelaunch);
    let mut client = Client::negotiated(&setup);
    assert_eq!(client.execute("query-status", &json!({}))["return"], json!({"status": "prelaunch", "running": false}));
    client.execute("cont", &json!({}));
    assert_eq!(client.execute("query-status", &json!({}))["return"], json!({"status": "running", "running": true}));
    client.execute("stop", &json!({}));
    assert_eq!(client.execute("query-status", &json!({}))["return"], json!({"status": "paused", "running": false}));
    assert_eq!(setup.fake.told(), ["cont", "stop"]);
}

#[test]
fn a_guest_is_saved_to_a_file_and_restored_from_one() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    let file = json!({"uri": "file:/a/guest.image"});
    assert!(
        client.error("migrate", &json!({"uri": "file:/a", "resume": true})).contains("no link that could be resumed")
    );
    assert!(client.error("migrate", &json!({"uri": "file:/a,offset=0x10"})).contains("leave 'offset' out"));
    assert!(client.error("migrate-recover", &file).contains("never through a file"));
    for (set, unset) in [("postcopy-ram", "cannot be handed over"), ("pause-before-switchover", "waits for nobody")] {
        let switch = |state: bool| json!({"capabilities": [{"capability": set, "state": state}]});
        client.execute("migrate-set-capabilities", &switch(true));
        assert!(client.error("migrate", &file).contains(unset), "{set}");
        client.execute("migrate-set-capabilities", &switch(false));
    }
    client.execute("migrate-set-parameters", &json!({"x-switchover-compress-image": true}));
    client.execute("migrate-set-parameters", &json!({"x-switchover-live-save": true}));
    assert!(client.error("migrate", &file).contains("cannot be compressed"));
    client.execute("migrate-set-parameters", &json!({"x-switchover-live-save": false}));
    assert_eq!(client.execute("migrate", &file), json!({"return": {}}));
    assert!(client.error("migrate-incoming", &file).contains("'-incoming' was not specified"));
    let saved = "save to /a/guest.image, How { compress: true, live: false }";
    client.execute("migrate-set-parameters", &json!({"x-switchover-lazy-restore": true}));
    assert!(client.error("migrate-incoming", &file).contains("'-incoming' was not specified"));
    let lazily = "restore lazily from /a/guest.image, Lazily { working_set: true }";
    assert_eq!(setup.fake.told(), [saved, "restore from /a/guest.image", lazily]);
}

#[test]
fn a_migration_takes_the_settings_of_its_beginning() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    assert_eq!(client.execute("query-migrate", &json!({})), json!({"return": {}}));
    assert!(client.error("migrate-start-postcopy", &json!({})).contains("Enable postcopy"));
    client.postcopy();
    assert_eq!(
        client.error("migrate-start-postcopy", &json!({})),
        "Postcopy must be started after migration has been started"
    );
    assert!(client.error("migrate", &json!({"uri": "tcp:h:1", "resume": true})).contains("no paused migration"));
    assert!(client.error("migrate", &json!({"uri": "tcp:h:1", "zzz": 1})).contains("'zzz' is unexpected"));
    let parameters = json!({"multifd-channels": 3, "max-postcopy-bandwidth": 1000});
    client.execute("migrate-set-parameters", &parameters);
    assert_eq!(client.execute("query-migrate-parameters", &json!({}))["return"]["multifd-channels"], 3);
    assert_eq!(client.execute("migrate", &json!({"uri": "tcp:h:1", "detach": true})), json!({"return": {}}));
    assert_eq!(setup.fake.told(), ["migrate to tcp:h:1 over 1 at 1000"]);
    assert!(client.error("migrate-set-capabilities", &json!({"capabilities": []})).contains("in progress"));
    assert_eq!(client.execute("migrate-start-postcopy", &json!({})), json!({"return": {}}));
    assert_eq!(client.execute("query-migrate", &json!({}))["return"]["status"], "postcopy-active");
    setup.fake.stand(MigrationStatus::Failed);
    let multifd = json!({"capabilities": [{"capability": "multifd", "state": true}]});
    client.execute("migrate-set-capabilities", &multifd);
    client.execute("migrate", &json!({"uri": "unix:/run/m"}));
    assert_eq!(setup.fake.told().last().unwrap(), "migrate to unix:/run/m over 3 at 1000");
    client.execute("migrate_cancel", &json!({}));
    assert_eq!(setup.fake.told().last().unwrap(), "cancel");
}

#[test]
fn the_mode_decides_whether_a_guest_can_be_handed_over() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    client.execute("migrate", &json!({"uri": "tcp:h:1"}));
    let began = setup.fake.began();
    assert_eq!((began.limits.mode, began.postcopy), (Mode::Precopy, false));
    assert!(client.error("migrate-start-postcopy", &json!({})).contains("Enable postcopy"));
    setup.fake.stand(MigrationStatus::Failed);
    client.execute("migrate-set-parameters", &json!({"x-switchover-mode": "hybrid"}));
    client.execute("migrate", &json!({"uri": "tcp:h:1"}));
    let began = setup.fake.began();
    assert_eq!((began.limits.mode, began.postcopy), (Mode::Hybrid, true));
    assert_eq!(client.execute("migrate-start-postcopy", &json!({})), json!({"return": {}}));
}

#[test]
fn limits_and_bandwidths_change_under_way_and_the_mode_does_not() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    client.execute("migrate-set-parameters", &json!({"x-switchover-mode": "hybrid", "max-bandwidth": 1}));
    assert_eq!(setup.fake.tuned(), None);
    client.execute("migrate", &json!({"uri": "tcp:h:1"}));
    let refusal = client.error("migrate-set-parameters", &json!({"x-switchover-mode": "precopy", "max-bandwidth": 2}));
    assert!(refusal.contains("'x-switchover-mode' cannot be changed while a migration is under way"), "{refusal}");
    assert_eq!(setup.fake.tuned(), None, "all of it or nothing");
    let all = json!({
        "max-bandwidth": 3, "max-postcopy-bandwidth": 4, "downtime-limit": 5, "x-switchover-blackout": 6,
        "x-switchover-time-budget": 7, "x-switchover-max-rounds": 8,
        // For the next migration, as QEMU accepts it.
        "multifd-channels": 9,
    });
    assert_eq!(client.execute("migrate-set-parameters", &all), json!({"return": {}}));
    let Tunables { limits, bandwidth } = setup.fake.tuned().unwrap();
    assert_eq!(bandwidth, Bandwidth { precopy: 3, postcopy: 4 });
    assert_eq!(
        limits,
        Limits {
            mode: Mode::Hybrid,
            downtime_limit: Duration::from_millis(5),
            blackout_target: Duration::from_millis(6),
            time_budget: Duration::from_millis(7),
            round_budget: 8,
        }
    );
    // What is changed when it is over is for the next one.
    setup.fake.stand(MigrationStatus::Completed);
    client.execute("migrate-set-parameters", &json!({"x-switchover-mode": "precopy", "max-bandwidth": 99}));
    assert_eq!(setup.fake.tuned().unwrap().bandwidth.precopy, 3);
}

#[test]
fn a_handoff_goes_on_only_from_where_it_waits() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    let pre = json!({"state": "pre-switchover"});
    assert_eq!(client.error("migrate-continue", &pre), "Migration not in expected state: none");
    setup.fake.stand(MigrationStatus::Active);
    assert_eq!(client.error("migrate-continue", &pre), "Migration not in expected state: active");
    assert!(client.error("migrate-continue", &json!({"state": "active"})).contains("must be 'pre-switchover'"));
    assert_eq!(
        client.error("migrate-continue", &json!({"state": "magic"})),
        "Parameter 'state' does not accept value 'magic'"
    );
    assert_eq!(client.error("migrate-continue", &json!({})), "Parameter 'state' is missing");
    assert!(setup.fake.told().is_empty());
    setup.fake.stand(MigrationStatus::PreSwitchover);
    assert_eq!(client.execute("migrate-continue", &pre), json!({"return": {}}));
    assert_eq!(setup.fake.told(), ["continue"]);
}

#[test]
fn a_lost_link_is_joined_again_in_qemus_words() {
    let setup = serve(RunState::Postmigrate);
    let mut client = Client::negotiated(&setup);
    let (to, at) = (json!({"uri": "tcp:h:1", "resume": true}), json!({"uri": "tcp:127.0.0.1:0"}));
    let refusals = |client: &mut Client| {
        [("migrate-pause", json!({})), ("migrate-recover", at.clone()), ("migrate", to.clone())]
            .map(|(name, arguments)| client.error(name, &arguments))
    };
    let [pause, recover, resume] = refusals(&mut client);
    assert_eq!(pause, "migrate-pause is currently only supported during postcopy-active or postcopy-recover state");
    assert_eq!(recover, "Migrate recover can only be run when postcopy is paused.");
    assert_eq!(resume, "Cannot resume if there is no paused migration");
    assert!(client.error("x-switchover-reclaim", &json!({})).contains("no guest to reclaim"));
    setup.fake.stand(MigrationStatus::PostcopyActive);
    assert_eq!(client.execute("migrate-pause", &json!({})), json!({"return": {}}));
    assert_eq!(client.execute("query-migrate", &json!({}))["return"]["status"], "postcopy-paused");
    assert_eq!(client.error("migrate-recover", &json!({})), "Parameter 'uri' is missing");
    let channels = json!({"uri": "tcp:h:1", "channels": []});
    assert_eq!(client.error("migrate-recover", &channels), "Parameter 'channels' is unexpected");
    assert_eq!(client.execute("migrate-recover", &at), json!({"return": {}}));
    client.execute("migrate-set-parameters", &json!({"max-postcopy-bandwidth": 77}));
    assert_eq!(client.execute("migrate", &to), json!({"return": {}}));
    assert_eq!(setup.fake.told(), ["recover at tcp:127.0.0.1:0", "resume to tcp:h:1 over 1 at 77"]);
}

#[test]
fn a_links_patience_is_set_between_links() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    let silence = |ms: u64| json!({"x-switchover-silence": ms});
    client.execute("migrate-set-parameters", &silence(2000));
    client.execute("migrate", &json!({"uri": "tcp:h:1"}));
    assert_eq!(setup.fake.began().silence, Duration::from_secs(2));
    for status in [MigrationStatus::Setup, MigrationStatus::Active, MigrationStatus::PostcopyRecover] {
        setup.fake.stand(status);
        assert!(client.error("migrate-set-parameters", &silence(3000)).contains("while a link is open"), "{status}");
        assert_eq!(client.execute("migrate-set-parameters", &silence(2000)), json!({"return": {}}), "{status}");
    }
    setup.fake.stand(MigrationStatus::PostcopyPaused);
    assert_eq!(client.execute("migrate-set-parameters", &silence(3000)), json!({"return": {}}));
    client.execute("migrate", &json!({"uri": "tcp:h:1", "resume": true}));
    assert_eq!(setup.fake.began().silence, Duration::from_secs(2), "a resume is no new migration");
    let told = setup.fake.told();
    assert_eq!(
        told.iter().filter(|told| told.starts_with("silence")).collect::<Vec<_>>(),
        ["silence of 2s", "silence of 3s"]
    );
}

#[test]
fn what_blocks_a_migration_is_told_before_one_is_tried() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    client.execute("set-vcpu-dirty-limit", &json!({"dirty-rate": 3}));
    let told = client.execute("query-migrate", &json!({}));
    assert_eq!(told, json!({"return": {"blocked-reasons": ["a limit is held"]}}));
}

#[test]
fn the_dirty_rate_is_measured_as_qemu_measures_it() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    assert_eq!(
        client.execute("query-dirty-rate", &json!({}))["return"],
        json!({
            "status": "unstarted", "start-time": 0, "calc-time": 0, "calc-time-unit": "second", "sample-pages": 0,
            "mode": "page-sampling",
        })
    );
    let milliseconds = |time: i64| json!({"calc-time": time, "calc-time-unit": "millisecond"});
    for (arguments, desc) in [
        (json!({}), "Parameter 'calc-time' is missing"),
        (json!({"calc-time": "1"}), "Invalid parameter type for 'calc-time', expected: integer"),
        (json!({"calc-time": 0}), "Calculation time is out of range [50ms, 60000ms]."),
        (json!({"calc-time": i64::MIN}), "Calculation time is out of range [50ms, 60000ms]."),
        (json!({"calc-time": i64::MAX}), "Calculation time is out of range [50ms, 60000ms]."),
        (milliseconds(49), "Calculation time is out of range [50ms, 60000ms]."),
        (milliseconds(60_001), "Calculation time is out of range [50ms, 60000ms]."),
        (json!({"calc-time": 1, "calc-time-unit": "hour"}), "Parameter 'calc-time-unit' does not accept value 'hour'"),
        (json!({"calc-time": 1, "mode": "guess"}), "Parameter 'mode' does not accept value 'guess'"),
        (
            json!({"calc-time": 1, "mode": "dirty-bitmap"}),
            "mode dirty-bitmap is not enabled, use other method instead.",
        ),
        (
            json!({"calc-time": 1, "mode": "dirty-ring", "sample-pages": 512}),
            "sample-pages is used only in page-sampling mode",
        ),
        (json!({"calc-time": 1, "sample-pages": 127}), "sample-pages is out of range[128, 16384]."),
        (json!({"calc-time": 1, "sample-pages": 16385}), "sample-pages is out of range[128, 16384]."),
    ] {
        assert_eq!(client.error("calc-dirty-rate", &arguments), desc);
    }
    let ring = json!({"calc-time": 1500, "calc-time-unit": "millisecond", "mode": "dirty-ring"});
    assert_eq!(client.execute("calc-dirty-rate", &ring), json!({"return": {}}));
    assert_eq!(client.error("calc-dirty-rate", &ring), "the dirty rate is already being measured.");
    let measuring = json!({
        "status": "measuring", "start-time": 1_700_000_000, "calc-time": 1, "calc-time-unit": "second",
        "sample-pages": 0, "mode": "dirty-ring",
    });
    assert_eq!(client.execute("query-dirty-rate", &json!({}))["return"], measuring);
    setup.fake.measured((7 << 20) + 5);
    let told = client.execute("query-dirty-rate", &json!({"calc-time-unit": "millisecond"}))["return"].take();
    assert_eq!((&told["status"], &told["dirty-rate"]), (&json!("measured"), &json!(7)));
    assert_eq!((&told["calc-time"], &told["calc-time-unit"]), (&json!(1500), &json!("millisecond")));
    client.execute("calc-dirty-rate", &json!({"calc-time": 60}));
    let told = client.execute("query-dirty-rate", &json!({}))["return"].take();
    assert_eq!((&told["mode"], &told["sample-pages"]), (&json!("page-sampling"), &json!(512)));
}

#[test]
fn a_dirty_limit_is_set_asked_for_and_lifted() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    let none = json!({"return": []});
    assert_eq!(client.execute("query-vcpu-dirty-limit", &json!({})), none);
    assert_eq!(client.error("set-vcpu-dirty-limit", &json!({})), "Parameter 'dirty-rate' is missing");
    for index in [-1, 2] {
        let arguments = json!({"cpu-index": index, "dirty-rate": 1});
        assert_eq!(client.error("set-vcpu-dirty-limit", &arguments), "incorrect cpu index specified");
    }
    let one = json!({"cpu-index": 1, "dirty-rate": 1});
    assert!(client.error("set-vcpu-dirty-limit", &one).contains("leave 'cpu-index' out"));
    assert_eq!(client.execute("set-vcpu-dirty-limit", &json!({"dirty-rate": 3})), json!({"return": {}}));
    assert_eq!(
        client.execute("query-vcpu-dirty-limit", &json!({}))["return"],
        json!([
            {"cpu-index": 0, "limit-rate": 3, "current-rate": 2},
            {"cpu-index": 1, "limit-rate": 3, "current-rate": 2},
        ])
    );
    client.execute("set-vcpu-dirty-limit", &json!({"dirty-rate": 4}));
    let told = client.execute("query-vcpu-dirty-limit", &json!({}))["return"].take();
    assert_eq!((&told[0]["current-rate"], &told[1]["current-rate"]), (&json!(1), &json!(4)), "{told}");
    client.execute("cancel-vcpu-dirty-limit", &json!({}));
    assert_eq!(client.execute("query-vcpu-dirty-limit", &json!({})), none);
    client.execute("set-vcpu-dirty-limit", &json!({"dirty-rate": 3}));
    client.execute("set-vcpu-dirty-limit", &json!({"dirty-rate": 0}));
    assert_eq!(client.execute("query-vcpu-dirty-limit", &json!({})), none);
}

#[test]
fn only_a_machine_that_waits_can_be_told_to_listen() {
    let booted = serve(RunState::Running);
    let error = Client::negotiated(&booted).error("migrate-incoming", &json!({"uri": "tcp:127.0.0.1:0"}));
    assert!(error.starts_with("'-incoming' was not specified"), "{error}");
    let waiting = serve(RunState::Inmigrate);
    let mut client = Client::negotiated(&waiting);
    assert!(
        client
            .error("migrate-incoming", &json!({"uri": "tcp:h:1", "exit-on-error": false}))
            .contains("cannot be false")
    );
    assert_eq!(client.execute("migrate-incoming", &json!({"uri": "tcp:127.0.0.1:0"})), json!({"return": {}}));
    assert_eq!(waiting.fake.told(), ["listen at tcp:127.0.0.1:0"]);
}

#[test]
fn a_checkpoint_has_a_file_and_perhaps_a_base() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    client.execute("x-switchover-checkpoint", &json!({"to": "/a/1.image"}));
    client.execute("x-switchover-checkpoint", &json!({"to": "/a/2.image", "base": "/a/1.image"}));
    assert!(client.error("x-switchover-checkpoint", &json!({"base": "/a"})).contains("'to' is missing"));
    let told = ["checkpoint to /a/1.image, on None", "checkpoint to /a/2.image, on Some(\"/a/1.image\")"];
    assert_eq!(setup.fake.told(), told);
}

#[test]
fn every_listed_command_exists_and_takes_no_argument_that_it_does_not_know() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    let listed = client.execute("query-commands", &json!({}))["return"].take();
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    for needed in ["migrate", "migrate_cancel", "query-migrate", "quit", "x-switchover-report"] {
        assert!(names.contains(&needed), "{needed} is not listed");
    }
    for name in names.into_iter().filter(|name| *name != "qmp_capabilities") {
        let mut arguments = json!({"no-such-thing": 1});
        match name {
            "migrate" | "migrate-incoming" | "migrate-recover" => arguments["uri"] = json!("tcp:127.0.0.1:1"),
            "migrate-set-capabilities" => arguments["capabilities"] = json!([]),
            "migrate-continue" => arguments["state"] = json!("pre-switchover"),
            "calc-dirty-rate" => arguments["calc-time"] = json!(1),
            "set-vcpu-dirty-limit" => arguments["dirty-rate"] = json!(1),
            "x-switchover-checkpoint" => arguments["to"] = json!("/a/image"),
            _ => {}
        }
        assert_eq!(client.error(name, &arguments), "Parameter 'no-such-thing' is unexpected", "{name}");
    }
    assert!(setup.fake.told().is_empty());
}

#[test]
fn events_reach_every_negotiated_client_and_no_other() {
    let setup = serve(RunState::Running);
    let mut first = Client::negotiated(&setup);
    let mut second = Client::negotiated(&setup);
    let mut silent = Client::connect(&setup);
    let at = UNIX_EPOCH + Duration::from_micros(1_700_000_000_250_000);
    setup.events.send(TimedEvent { event: Event::Migration(MigrationStatus::Setup), at }).unwrap();
    setup.events.send(TimedEvent { event: Event::MigrationPass(1), at }).unwrap();
    setup.events.send(TimedEvent { event: Event::Stop, at }).unwrap();
    for client in [&mut first, &mut second] {
        assert_eq!(
            client.next(),
            json!({"event": "STOP", "timestamp": {"seconds": 1_700_000_000, "microseconds": 250_000}}),
            "MIGRATION is told only with the capability `events`"
        );
    }
    let on = json!({"capabilities": [{"capability": "events", "state": true}]});
    first.execute("migrate-set-capabilities", &on);
    setup.events.send(TimedEvent { event: Event::Migration(MigrationStatus::PostcopyActive), at }).unwrap();
    let told = second.next();
    assert_eq!((&told["event"], &told["data"]), (&json!("MIGRATION"), &json!({"status": "postcopy-active"})));
    setup.events.send(TimedEvent { event: Event::MigrationPass(7), at }).unwrap();
    let told = second.next();
    assert_eq!((&told["event"], &told["data"]), (&json!("MIGRATION_PASS"), &json!({"pass": 7})));
    assert_eq!(silent.ask(&json!({"execute": "qmp_capabilities"})), json!({"return": {}}));
}

#[test]
fn quit_is_answered_before_the_end_and_the_last_events_are_told() {
    let setup = serve(RunState::Running);
    let mut client = Client::negotiated(&setup);
    assert_eq!(client.ask(&json!({"execute": "quit", "id": 9})), json!({"return": {}, "id": 9}));
    let shutdown = Event::Shutdown { guest: false, reason: "host-qmp-quit" };
    setup.events.send(TimedEvent::now(shutdown)).unwrap();
    let path = setup.endpoint.path().to_owned();
    setup.server.close();
    assert_eq!(client.next()["data"], json!({"guest": false, "reason": "host-qmp-quit"}));
    assert!(client.lines.next().is_none(), "the connection is closed");
    assert!(!path.exists(), "the socket's file is gone");
    assert_eq!(setup.fake.told(), ["quit"]);
}

#[test]
fn a_source_whose_memory_is_still_needed_does_not_quit() {
    let setup = serve(RunState::Postmigrate);
    let mut client = Client::negotiated(&setup);
    setup.fake.stand(MigrationStatus::PostcopyActive);
    assert!(client.error("quit", &json!({})).contains("4 KiB of its memory are only here yet"));
    assert!(setup.fake.told().is_empty());
    setup.fake.stand(MigrationStatus::Completed);
    assert_eq!(client.execute("quit", &json!({})), json!({"return": {}}));
}

#[test]
fn a_source_whose_memory_is_still_needed_quits_when_it_is_forced_to() {
    let setup = serve(RunState::Postmigrate);
    let mut client = Client::negotiated(&setup);
    setup.fake.stand(MigrationStatus::PostcopyActive);
    assert!(client.error("quit", &json!({"x-switchover-force": false})).contains("only here yet"));
    assert_eq!(client.execute("quit", &json!({"x-switchover-force": true})), json!({"return": {}}));
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let setup = serve(RunState::Running);
    let _deaf = Client::negotiated(&setup);
    let mut other = Client::negotiated(&setup);
    for _ in 0..5_000 {
        setup.events.send(TimedEvent::now(Event::Resume)).unwrap();
        assert_eq!(other.next()["event"], "RESUME");
    }
    assert_eq!(other.execute("query-status", &json!({}))["return"]["running"], true);
}

#[test]
fn a_dead_servers_socket_is_replaced_and_a_live_ones_is_not() {
    let setup = serve(RunState::Running);
    let error = Bound::at(&setup.endpoint).unwrap_err();
    assert!(error.to_string().contains("another process listens"), "{error}");
    Client::negotiated(&setup);
}
