//! A guest that works on a file of the host moves, and works on.

use std::fs;
use std::path::PathBuf;

use serde_json::json;
use switchover_guest_tests::lab::{Lab, switchover};
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, Way, allow_postcopy, destination, migrate_as};
use switchover_guest_tests::waiting::until;

use crate::lab;

const WHOLE: &str = "written before.\nand after.\n\n";

/// The guest that waits between its two writes, its directory, and a machine like its own with another directory.
struct Scene {
    spec: Spec,
    directory: PathBuf,
}

impl Scene {
    fn of(lab: &Lab) -> Self {
        let directory = lab.path("files");
        fs::create_dir(&directory).unwrap();
        let spec = lab.guest("hostfile", "wait");
        Self { spec: with(spec, &directory), directory }
    }

    fn another_directory(&self, lab: &Lab) -> Spec {
        let directory = lab.path("other");
        fs::create_dir(&directory).unwrap();
        with(Spec { more: Vec::new(), ..self.spec.clone() }, &directory)
    }

    /// A machine whose guest has written the first part.
    fn start(&self, lab: &Lab) -> Machine {
        let machine = Machine::start(lab, &self.spec);
        let log = machine.serial();
        until("the guest has written", || log.text().contains("WRITE").then_some(()));
        assert_eq!(fs::read_to_string(self.directory.join("ay_caramba")).unwrap(), "written before.\n");
        machine
    }

    fn let_go_on(&self) {
        fs::write(self.directory.join("go"), "").unwrap();
    }

    fn is_done(&self) {
        assert_eq!(fs::read_to_string(self.directory.join("ay_caramba")).unwrap(), WHOLE);
    }
}

fn with(spec: Spec, directory: &std::path::Path) -> Spec {
    let directory = directory.to_str().unwrap().to_owned();
    Spec { more: vec!["--host-files".to_owned(), directory, "--log-host-files".to_owned()], ..spec }
}

/// The lines of the log that do not look for the file that lets the guest go on; the words in them that no two runs have alike
/// are left out.
fn said(machine: &Machine) -> Vec<String> {
    let text = machine.serial().to_end();
    let lines = text.lines().filter(|line| !line.starts_with("OPEN ./go"));
    lines
        .map(|line| {
            line.split(' ').enumerate().filter(|(n, _)| *n != 2).map(|(_, word)| word).collect::<Vec<_>>().join(" ")
        })
        .collect()
}

#[test]
fn an_open_file_moves_with_its_guest() {
    for mode in ["postcopy", "hybrid", "precopy"] {
        let lab = lab!("an_open_file_moves_with_its_guest");
        let scene = Scene::of(&lab);
        let mut source = scene.start(&lab);
        let (mut there, to) = destination(&lab, &scene.spec, Transport::Tcp);
        migrate_as(&mut source, &mut there, &to, Way::new(mode, 1));
        source.quit();
        scene.let_go_on();
        assert_eq!(there.wait_end(), 0, "{}", there.stderr().text());
        scene.is_done();
        assert_eq!(said(&source), ["OPEN ./ay_caramba 511 - return 3", "WRITE 3 16 - return 16"]);
        assert_eq!(said(&there), ["RESTORE OPERATION", "WRITE 3 12 - return 12", "CLOSE 3 return 0", "EXIT 0"]);
        lab.close();
    }
}

#[test]
fn a_machine_without_the_files_takes_no_guest_that_has_them_open() {
    let lab = lab!("a_machine_without_the_files_takes_no_guest_that_has_them_open");
    let scene = Scene::of(&lab);
    let mut source = scene.start(&lab);
    let bare = Spec { more: Vec::new(), ..scene.spec.clone() };
    for (other, words, ends) in [(bare, "host-files", false), (scene.another_directory(&lab), "\"./ay_caramba\"", true)]
    {
        let (mut wrong, to) = destination(&lab, &other, Transport::Tcp);
        allow_postcopy(&mut source);
        source.execute("migrate", json!({ "uri": to }));
        // Where it is refused at the handshake, there is no handoff to ask for.
        let error = until("the migration has failed", || {
            let look = source.execute("query-migrate", json!({}));
            if look["status"] == "active" {
                source.execute("migrate-start-postcopy", json!({}));
            }
            (look["status"] == "failed").then(|| look["error-desc"].as_str().unwrap_or_default().to_owned())
        });
        assert!(error.contains(words), "{words} is not in {error}");
        assert_eq!(source.run_state(), "running");
        // One that has been told of a guest has no second one.
        if ends {
            assert_eq!(wrong.wait_end(), 1);
        } else {
            wrong.quit();
        }
    }
    scene.let_go_on();
    assert_eq!(source.wait_end(), 0);
    scene.is_done();
    lab.close();
}

#[test]
fn a_directory_that_is_none_is_refused() {
    let lab = lab!("a_directory_that_is_none_is_refused");
    let scene = Scene::of(&lab);
    let kernel = scene.spec.kernel.as_ref().unwrap().to_str().unwrap();
    for directory in ["/nowhere", kernel] {
        let ended = switchover(&["run", "--kernel", kernel, "--memory", "64M", "--host-files", directory]);
        assert_eq!(ended.status, Some(1));
        assert!(ended.stderr.contains("--host-files") && ended.stderr.contains(directory), "{}", ended.stderr);
    }
    lab.close();
}
